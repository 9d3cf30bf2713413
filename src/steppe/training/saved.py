"""Checkpoints of a run that are whole or not there, and the last whole one to go on from."""

from __future__ import annotations

import json
import logging
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError, safe_open

from steppe.errors import CheckpointError
from steppe.files import write_json

MANIFEST = "steppe-checkpoint.json"
"""Written last: the size of every file of the checkpoint."""
UNFINISHED = ".unfinished"
"""Folder, within a run's, of the checkpoint that is being written."""
_CHECKPOINT = re.compile(r"checkpoint-(\d+)")
_logger = logging.getLogger(__name__)


def seal_checkpoint(folder: Path, settings: dict[str, object]) -> None:
    """Note what a whole checkpoint consists of.

    Args:
        folder: with all files of all processes.
        settings: of the run, which another run must share to go on from here.

    Raises:
        OutputError: it cannot be written.
    """
    sizes = {str(path.relative_to(folder)): path.stat().st_size for path in _files(folder)}
    write_json(folder / MANIFEST, {"settings": settings, "bytes": sizes})


def publish_checkpoint(run: Path, name: str) -> None:
    """Give a sealed checkpoint its name; what was there under it is replaced.

    Args:
        run: the run's folder.
        name: ``checkpoint-STEP``, within `UNFINISHED`.
    """
    target = run / name
    if target.exists():
        shutil.rmtree(target)
    (run / UNFINISHED / name).rename(target)
    discard_unfinished(run)


def discard_unfinished(run: Path) -> None:
    """Remove what an interrupted save left.

    Args:
        run: the run's folder.
    """
    shutil.rmtree(run / UNFINISHED, ignore_errors=True)


def last_whole_checkpoint(run: Path, settings: dict[str, object]) -> Path | None:
    """The newest checkpoint of a run that is whole; damaged ones are passed over with a warning.

    Args:
        run: the run's folder.
        settings: of the run that will go on.

    Returns:
        Its folder, or None if there is no checkpoint.

    Raises:
        CheckpointError: checkpoints are there and none is whole, or the newest whole one is of a
            run with other settings.
    """
    found = sorted(_numbered(run), reverse=True)
    for _, folder in found:
        fault = _fault_of(folder)
        if fault is None:
            _require_same(folder, settings)
            return folder
        _logger.warning("%s: not whole (%s); the one before is used", folder, fault)
    if found:
        raise CheckpointError(
            f"{run}: none of its {len(found)} checkpoints is whole. Begin anew",
            {"resume": False},
        )
    return None


def has_checkpoints(run: Path) -> bool:
    """Whether a run has left checkpoints, whole or not.

    Args:
        run: the run's folder.
    """
    return any(True for _ in _numbered(run))


def _numbered(run: Path) -> Iterator[tuple[int, Path]]:
    """The checkpoints of a run with their steps."""
    for path in run.iterdir() if run.is_dir() else ():
        match = _CHECKPOINT.fullmatch(path.name)
        if match and path.is_dir():
            yield int(match[1]), path


def _files(folder: Path) -> list[Path]:
    return [path for path in sorted(folder.rglob("*")) if path.is_file()]


def _fault_of(folder: Path) -> str | None:
    """What a checkpoint lacks, or None."""
    try:
        sizes = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["bytes"]
    except FileNotFoundError:
        return f"no {MANIFEST}"
    except (KeyError, TypeError, ValueError) as error:
        return f"{MANIFEST} is damaged: {error}"
    for name, size in sizes.items():
        path = folder / name
        if not path.is_file():
            return f"no {name}"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} bytes of {size}"
        if path.suffix == ".safetensors":
            try:
                with safe_open(path, framework="pt"):
                    pass
            except SafetensorError as error:
                return f"{name} is damaged: {error}"
    return None


def _require_same(folder: Path, settings: dict[str, object]) -> None:
    """Refuse to go on with another recipe."""
    kept = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["settings"]
    other = [key for key in settings if kept.get(key) != settings[key]]
    if other:
        told = ", ".join(f"{key}: {kept.get(key)!r}, now {settings[key]!r}" for key in other[:3])
        raise CheckpointError(
            f"{folder}: was made with other settings ({told}). Go on with the same ones, or begin"
            " anew in another folder",
            {"output_dir": "FOLDER"},
        )
