"""Finds and loads the native library, and says which kernels there are.

Absent is fine: the reference runs, and `kernels` says why. A library that is there and does not
load, or does not fit this Python code, raises.
"""

from __future__ import annotations

import ctypes
import importlib.util
import platform
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from itertools import count, takewhile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from steppe.errors import KernelError
from steppe.ops.cpu.structures import STRUCTURES

ABI_VERSION = 8
# On which integers are faster.
_SCREENING = ("avx512+amx", "avx512+bf16", "avx512+vnni", "avx2+vnni", "avx2")
_FILE = "libsteppe_native.so"
_BUILD = "pip install --force-reinstall --no-deps --no-binary steppe steppe"
# The letters of a signature that the library gives, see steppe_function in steppe_native.h.
_TYPES: dict[str, Any] = {
    "v": None,
    "i": ctypes.c_int,
    "n": ctypes.c_int64,
    "f": ctypes.c_float,
    "s": ctypes.c_char_p,
    "p": ctypes.c_void_p,
}


class _Function(ctypes.Structure):
    """``steppe_function`` of steppe_native.h."""

    _fields_ = (
        ("name", ctypes.c_char_p),
        ("signature", ctypes.c_char_p),
        ("address", ctypes.c_void_p),
    )


class _Struct(ctypes.Structure):
    """``steppe_struct`` of steppe_native.h."""

    _fields_ = (("name", ctypes.c_char_p), ("bytes", ctypes.c_int64))


@dataclass(frozen=True)
class Kernels:
    """The kernels that compute the sparse products on the CPU.

    Attributes:
        name: ``native``, or ``reference`` for plain torch, which is dense.
        isa: instruction set of the native kernels, ``avx512+amx``, ``avx512+bf16``,
            ``avx512+vnni``, ``avx512``, ``avx2+vnni``, ``avx2`` or ``portable``; empty for the
            reference.
        reason: why there are no native kernels; empty if there are.
        unscreened: why no first product is screened; empty if first products are.
    """

    name: str
    isa: str
    reason: str
    unscreened: str


@cache
def kernels() -> Kernels:
    """The kernels that compute the sparse products on this machine.

    Returns:
        The native kernels, or the reference with the reason.

    Raises:
        KernelError: the native library is there and cannot be loaded, or is of another version.

    Example:
        >>> kernels().name in ("native", "reference")
        True
    """
    library = load()
    if library is None:
        return Kernels(
            name="reference",
            isa="",
            unscreened="there are no native kernels",
            reason=_why_absent(),
        )
    isa = library.steppe_isa().decode()
    unscreened = "" if isa in _SCREENING else f"{isa}: products of integers are no faster"
    return Kernels(name="native", isa=isa, reason="", unscreened=unscreened)


@cache
def load() -> SimpleNamespace | None:
    """The functions of the native library by name, as ``steppe_count``, or None if there is none.

    Their signatures come from the library, which has names, signatures and addresses from one list,
    ``native/functions.def``: none is written down a second time.

    Raises:
        KernelError: it is there and cannot be loaded, is of another version, or has structs of
            other sizes than their mirrors in `steppe.ops.cpu.structures`.
    """
    path = next((place / _FILE for place in _places() if (place / _FILE).is_file()), None)
    if path is None:
        return None
    cure = f"Build it here: {_BUILD}"
    try:
        opened = ctypes.CDLL(str(path))
        version = opened.steppe_abi_version()
    except (OSError, AttributeError) as error:
        raise KernelError(f"{path}: cannot be loaded ({error}). {cure}") from None
    if version != ABI_VERSION:
        raise KernelError(f"{path}: expected version {ABI_VERSION}, got {version}. {cure}")
    sizes = {entry.name.decode(): entry.bytes for entry in _entries(opened.steppe_structs, _Struct)}
    expected = {name: ctypes.sizeof(mirror) for name, mirror in STRUCTURES.items()}
    if sizes != expected:
        raise KernelError(f"{path}: expected structs of {expected} bytes, got {sizes}. {cure}")
    functions = SimpleNamespace(library=opened)  # which is never unloaded
    for entry in _entries(opened.steppe_functions, _Function):
        result, *parameters = (_TYPES[letter] for letter in entry.signature.decode())
        function = ctypes.CFUNCTYPE(result, *parameters)(entry.address)
        setattr(functions, f"steppe_{entry.name.decode()}", function)
    return functions


def _why_absent() -> str:
    """Why an installation has no library."""
    system = platform.system()
    if system != "Linux":
        return f"the native kernels are for Linux, and this is {system}"
    return (
        f"there is no {_FILE}: this steppe comes from a wheel for other machines, or was built"
        f" without a C++ compiler. Install one (Debian, Ubuntu: apt install g++), then: {_BUILD}"
    )


def _entries(table: Any, of: type[Any]) -> Iterator[Any]:
    """The entries of a table of the library, up to one without a name."""
    table.restype = ctypes.POINTER(of)
    return takewhile(lambda entry: entry.name is not None, (table()[i] for i in count()))


def _places() -> list[Path]:
    """Folders where an installation, plain or editable, puts the library."""
    spec = importlib.util.find_spec("steppe")
    folders = [] if spec is None else spec.submodule_search_locations or []
    return [Path(folder) / "native" for folder in folders]


def library() -> Any:
    """The native library.

    Raises:
        KernelError: it is not built.
    """
    loaded = load()
    if loaded is None:
        raise KernelError("the native kernels are not built; steppe.kernels() says why")
    return loaded
