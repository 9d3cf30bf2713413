"""Checkpoints to resume from: whole or not there, found, and loaded in full."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn
from transformers import Trainer

from steppe.blocks.find import unwrap
from steppe.checkpoints import load_weights_
from steppe.checkpoints.weights import Weights, has_weights
from steppe.errors import CheckpointError
from steppe.files import write_json

MANIFEST = "steppe-checkpoint.json"
"""Written last: the digest of every file of the checkpoint."""
UNFINISHED = ".unfinished"
"""Folder, within a run's, of the checkpoint that is being written."""
_CHECKPOINT = re.compile(r"checkpoint-(\d{1,18})")
_LARGEST_MANIFEST = 2**24  # bytes; one of 10,000 files takes 1 MB
_CHUNK = 2**20
_logger = logging.getLogger(__name__)


def seal_checkpoint(folder: Path, settings: dict[str, object]) -> None:
    """Write the manifest of a checkpoint, once the disk has all of its files.

    Without waiting for the disk a power cut leaves files of the right size, full of zeros.

    Args:
        folder: with all files of all processes.
        settings: of the run, which another run must share to go on from here.

    Raises:
        OutputError: it cannot be written.
    """
    digests = {}
    for path in _files(folder):
        digests[str(path.relative_to(folder))] = _digest(path)
        _wait_for_disk(path)
    write_json(folder / MANIFEST, {"settings": settings, "sha256": digests})
    for path in (folder / MANIFEST, *_folders(folder)):
        _wait_for_disk(path)


def publish_checkpoint(run: Path, name: str) -> None:
    """Give a sealed checkpoint its name, and replace an older one of the same name.

    Args:
        run: the run's folder.
        name: ``checkpoint-STEP``, within `UNFINISHED`.
    """
    target = run / name
    if target.exists():
        shutil.rmtree(target)
    (run / UNFINISHED / name).rename(target)
    _wait_for_disk(run)
    discard_unfinished(run)


def discard_unfinished(run: Path) -> None:
    """Remove the rest of an interrupted save.

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
        try:
            manifest = _read_manifest(folder)
            _require_whole(folder, manifest)
        except _NotWholeError as fault:
            _logger.warning("%s: not whole (%s); the one before is used", folder, fault)
            continue
        _require_same(folder, manifest, settings)
        return folder
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


def complete_weights_(trainer: Trainer, checkpoint: str | None) -> None:
    """Load the weights that the Trainer passed over when it resumed, with a warning.

    Transformers saves some models (ViT) under the names of older versions, and the Trainer loads a
    checkpoint by the names of the model: a tensor that it does not find stays as initialised.
    (github.com/huggingface/transformers/issues/43701)

    Args:
        trainer: has loaded a checkpoint.
        checkpoint: the folder; None where the run starts anew.

    Raises:
        CheckpointError: the checkpoint does not hold the tensors that are missing.
    """
    model = trainer.model
    if checkpoint is None or model is None or not has_weights(checkpoint):
        return  # a new run, an adapter, or another format
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        return  # these load their own files, by the names that they saved
    passed_over = _passed_over(unwrap(model), Weights.of(checkpoint))
    if passed_over:
        load_weights_(model, checkpoint)
        _logger.warning(
            "%s: the Trainer has resumed without %d tensors, %s for one, which are saved under"
            " other names than the model's. steppe has loaded them.",
            checkpoint,
            len(passed_over),
            passed_over[0],
        )


def _numbered(run: Path) -> Iterator[tuple[int, Path]]:
    """The checkpoints of a run with their steps."""
    for path in run.iterdir() if run.is_dir() else ():
        match = _CHECKPOINT.fullmatch(path.name)
        if match and path.is_dir():
            yield int(match[1]), path


class _NotWholeError(Exception):
    """A checkpoint is damaged or incomplete; the message says how."""


@dataclass(frozen=True)
class _Manifest:
    """The files of a whole checkpoint.

    Attributes:
        settings: of its run.
        digests: SHA-256 of each file, by its path in the folder.
    """

    settings: Mapping[str, Any]
    digests: Mapping[str, str]


def _read_manifest(folder: Path) -> _Manifest:
    """The manifest of a checkpoint."""
    path = folder / MANIFEST
    try:
        state = path.lstat()
        if not stat.S_ISREG(state.st_mode) or state.st_size > _LARGEST_MANIFEST:
            raise _NotWholeError(f"{MANIFEST} is no file, or far too large")
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise _NotWholeError(f"no {MANIFEST}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise _NotWholeError(f"{MANIFEST} is damaged: {error}") from None
    content = content if isinstance(content, dict) else {}
    settings, digests = content.get("settings"), content.get("sha256")
    if (
        not isinstance(settings, dict)
        or not isinstance(digests, dict)
        or not digests
        or not all(isinstance(one, str) for one in digests.values())
    ):
        raise _NotWholeError(f"{MANIFEST} is damaged: expected settings and a digest for each file")
    return _Manifest(settings, digests)


def _require_whole(folder: Path, manifest: _Manifest) -> None:
    """Refuse a checkpoint with a file that is missing, strange or changed."""
    there = {str(path.relative_to(folder)) for path in _files(folder)} - {MANIFEST}
    if there != set(manifest.digests):
        odd = sorted(there ^ set(manifest.digests))[0]
        raise _NotWholeError(f"{'a strange' if odd in there else 'no'} {odd[:100]!r}")
    for name, digest in manifest.digests.items():
        try:
            is_same = _digest(folder / name) == digest
        except OSError as error:
            raise _NotWholeError(f"{name} cannot be read: {error.strerror}") from None
        if not is_same:
            raise _NotWholeError(f"{name} is damaged")


def _require_same(folder: Path, manifest: _Manifest, settings: dict[str, object]) -> None:
    """Refuse a checkpoint of a run with other settings."""
    kept = manifest.settings
    other = [key for key in settings if kept.get(key) != settings[key]]
    if other:
        shown = ", ".join(f"{key}: {kept.get(key)!r}, now {settings[key]!r}" for key in other[:3])
        raise CheckpointError(
            f"{folder}: was made with other settings ({shown}). Go on with the same ones, or begin"
            " anew in another folder",
            {"output_dir": "FOLDER"},
        )


def _files(folder: Path) -> list[Path]:
    """Everything in a folder that is no folder, by name; a link is not followed."""
    return [path for path in sorted(folder.rglob("*")) if path.is_symlink() or not path.is_dir()]


def _folders(folder: Path) -> list[Path]:
    return [folder, *(path for path in folder.rglob("*") if path.is_dir())]


def _digest(path: Path) -> str:
    """SHA-256 of a regular file; a link, a device or a pipe is an error."""
    if not stat.S_ISREG(path.lstat().st_mode):
        raise OSError(0, "no regular file")
    found = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            found.update(chunk)
    return found.hexdigest()


def _wait_for_disk(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _passed_over(root: nn.Module, weights: Weights) -> list[str]:
    """The tensors that no file has under the model's names; of tied tensors one is saved."""
    state = root.state_dict()
    held = {tensor.data_ptr() for name, tensor in state.items() if name in weights.files}
    return [name for name, tensor in state.items() if tensor.data_ptr() not in held]
