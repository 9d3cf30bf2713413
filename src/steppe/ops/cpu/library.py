"""Finds and loads the native library, and says what there is.

Absent is fine: the reference runs, and `kernels` says why. A library that is there and does not
load raises.
"""

from __future__ import annotations

import ctypes
import importlib.util
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from steppe.errors import KernelError

ABI_VERSION = 5
_VNNI = ("avx512+bf16", "avx512+vnni")
_FILE = "libsteppe_native.so"
_POINTER, _SIZE, _INT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
# What each function of steppe_native.h takes and gives; p: pointer, n: int64, i: int, f: float.
_SIGNATURES = {
    "abi_version": ("", _INT),
    "isa": ("", ctypes.c_char_p),
    "prefer_large_pages": ("pni", None),
    "open_writes": ("", _INT),
    "close_writes": ("", None),
    "edges": ("pn", _SIZE),
    "watch_writes": ("pi", _INT),
    "stop_watching": ("p", None),
    "copies_hold": ("pn", _INT),
    "count": ("pinnnpi", None),
    "offsets": ("pnnnp", _SIZE),
    "fill": ("pinnnnpppi", None),
    "pack": ("pinnnnpi", None),
    "spmm": ("pppinnpppnnii", _INT),
    "sampled": ("ppinnppppi", _INT),
    "transpose": ("ppppinnnnppppi", None),
    "row_sums": ("ppinnpi", None),
    "decode_mlp": ("ppppp", _SIZE),
    "screen_weight": ("pinnnnppi", _INT),
    "screen_tokens": ("pinnnppi", _INT),
    "screen": ("ppinnpppnnppi", _SIZE),
    "list_masks": ("pnnnppi", None),
    "count_listed": ("ppinpi", _SIZE),
    "sift": ("ppppinnnnpppi", None),
}
_TYPES = {"p": _POINTER, "n": _SIZE, "i": _INT, "f": ctypes.c_float}


@dataclass(frozen=True)
class Kernels:
    """What computes the sparse products on the CPU.

    Attributes:
        name: ``native``, or ``reference`` for plain torch, which is dense.
        isa: instruction set of the native kernels, ``avx512+bf16``, ``avx512+vnni``, ``avx512``,
            ``avx2`` or ``portable``; empty for the reference.
        reason: why there are no native kernels; empty if there are.
        unscreened: why no first product is screened; empty if first products are.
    """

    name: str
    isa: str
    reason: str
    unscreened: str


@cache
def kernels() -> Kernels:
    """What computes the sparse products on this machine.

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
            reason=f"there is no {_FILE}: steppe was installed without a C++ compiler. Install one"
            " (Debian, Ubuntu: apt install g++), then: pip install --force-reinstall --no-deps"
            " steppe",
        )
    isa = library.steppe_isa().decode()
    unscreened = "" if isa in _VNNI else f"{isa}: int8 products gain nothing without AVX-512 VNNI"
    return Kernels(name="native", isa=isa, reason="", unscreened=unscreened)


@cache
def load() -> ctypes.CDLL | None:
    """The native library, or None if there is none.

    Raises:
        KernelError: it is there and cannot be loaded, or is of another version.
    """
    path = next((place / _FILE for place in _places() if (place / _FILE).is_file()), None)
    if path is None:
        return None
    cure = "Build it anew: pip install --force-reinstall --no-deps steppe"
    try:
        library = ctypes.CDLL(str(path))
        for name, (takes, gives) in _SIGNATURES.items():
            function = getattr(library, f"steppe_{name}")
            function.argtypes = [_TYPES[letter] for letter in takes]
            function.restype = gives
        version = library.steppe_abi_version()
    except (OSError, AttributeError) as error:
        raise KernelError(f"{path}: cannot be loaded ({error}). {cure}") from None
    if version != ABI_VERSION:
        raise KernelError(f"{path}: expected version {ABI_VERSION}, got {version}. {cure}")
    return library


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
