"""The file in which a calibration is kept, and how it is read: any damage is no calibration."""

from __future__ import annotations

import hashlib
import json
import os
import platform
from pathlib import Path
from typing import Any

import torch

from steppe.errors import OutputError
from steppe.files import prepare_folder, write_json
from steppe.ops.cpu.library import ABI_VERSION, kernels
from steppe.ops.cpu.thresholds import Tables

VERSION = 4
_MOST_BYTES = 2**16  # a file has about one thousand
_MOST_STEPS = 64  # widths, and rows of a table
_MOST_DIGITS = 9  # of a width, or of a number of rows
_NAMES = {False: "inference", True: "training"}


def path_of(dtype: torch.dtype, threads: int) -> Path:
    """The file for this machine, and for all else that times depend on.

    It is in ``$XDG_CACHE_HOME/steppe``, else in ``~/.cache/steppe``.

    Args:
        dtype: of the blocks.
        threads: that torch uses.

    Raises:
        OutputError: there is no home folder.
    """
    try:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except RuntimeError:
        raise OutputError(
            "there is no home folder to keep a calibration in. Set XDG_CACHE_HOME to a folder"
        ) from None
    machine = [VERSION, ABI_VERSION, kernels().isa, torch.__version__, _processor()]
    key = hashlib.sha256(json.dumps(machine).encode()).hexdigest()[:12]
    name = f"thresholds-{key}-{str(dtype).removeprefix('torch.')}-{threads}.json"
    return folder / "steppe" / name


def read(path: Path) -> tuple[dict[int, Tables], Tables] | None:
    """The measured thresholds: of the density by width, and of the share of candidates.

    Args:
        path: of the file.

    Returns:
        Steps by width and rows, any of them; None if there is no such file, or it is damaged.
    """
    try:
        if not path.is_file() or path.stat().st_size > _MOST_BYTES:
            return None
        values = json.loads(path.read_text(encoding="utf-8"))
        densities = {width: _tables(named) for width, named in _numbered(values, "density").items()}
        return densities, _tables(_entry(values, "candidates"))
    except (OSError, ValueError, RecursionError):
        return None


def prepare(path: Path) -> None:
    """Make sure that a file can be written.

    Args:
        path: of the file.

    Raises:
        OutputError: it cannot.
    """
    prepare_folder(path.parent)


def write(path: Path, densities: dict[int, Tables], candidates: Tables) -> None:
    """Write measured thresholds.

    Args:
        path: of the file.
        densities: steps by width and rows.
        candidates: steps by rows.

    Raises:
        OutputError: it cannot be written; an older file is still whole.
    """

    def named(tables: Tables) -> dict[str, Any]:
        return {name: tables[trains] for trains, name in _NAMES.items()}

    prepare(path)
    write_json(
        path,
        {
            "density": {width: named(tables) for width, tables in densities.items()},
            "candidates": named(candidates),
        },
    )


def _tables(named: Any) -> Tables:
    return {
        trains: {rows: _share(most) for rows, most in _numbered(named, name).items()}
        for trains, name in _NAMES.items()
    }


def _numbered(values: Any, name: str) -> dict[int, Any]:
    """An entry with positive numbers for keys."""
    entry = _entry(values, name)
    if not isinstance(entry, dict) or len(entry) > _MOST_STEPS:
        raise ValueError(name)
    numbered: dict[int, Any] = {}
    for key, value in entry.items():
        if not (key.isascii() and key.isdigit() and len(key) <= _MOST_DIGITS and int(key) > 0):
            raise ValueError(key)
        numbered[int(key)] = value
    return numbered


def _entry(values: Any, name: str) -> Any:
    if not isinstance(values, dict) or name not in values:
        raise ValueError(name)
    return values[name]


def _share(value: Any) -> float:
    """A number in [0, 1], which NaN is not, nor an integer too large for a float."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 1:
        raise ValueError(value)
    return float(value)


def _processor() -> str:
    """The name of the processor."""
    information = Path("/proc/cpuinfo")
    if information.is_file():
        lines = information.read_text(encoding="utf-8", errors="replace").splitlines()
        names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
        if names:
            return names[0]
    return platform.processor()
