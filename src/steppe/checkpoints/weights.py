"""The tensors of a checkpoint: safetensors only, and no file that lies anywhere else."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from steppe.errors import CheckpointError

WEIGHTS = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_LARGEST_JSON = 64 * 2**20  # bytes; the index of a model with 100,000 tensors takes 10 MB


@dataclass(frozen=True)
class Weights:
    """The file of each tensor of a checkpoint.

    Attributes:
        place: the checkpoint, as errors name it.
        files: path by the name of the tensor.
    """

    place: str
    files: Mapping[str, Path]

    @classmethod
    def of(cls, folder: str) -> Weights:
        """The weights of a folder or hub repository; each file is opened once to check it.

        Raises:
            CheckpointError: there is none, it is no safetensors file, or it lies elsewhere.
        """
        whole, index = find(folder, WEIGHTS), find(folder, _INDEX)
        if whole is not None:
            return cls.in_files(folder, [whole])
        if index is None:
            raise CheckpointError(
                f"{folder}: found no {WEIGHTS}. steppe reads safetensors only; save the model with"
                " save_pretrained"
            )
        files = _read_index(folder, index)
        held = cls.in_files(folder, sorted(set(files.values())))
        lost = [name for name, path in files.items() if held.files.get(name) != path]
        if lost:
            raise CheckpointError(
                f"{index}: {lost[0]} is not in {files[lost[0]].name}, where it should be. The files"
                " are of different checkpoints."
            )
        return held

    @classmethod
    def in_files(cls, place: str, paths: list[Path]) -> Weights:
        """The weights in some files.

        Raises:
            CheckpointError: a file is no safetensors file.
        """
        files: dict[str, Path] = {}
        for path in paths:
            with _opened(path) as tensors:
                files |= dict.fromkeys(tensors.keys(), path)
        return cls(place, files)

    def shape_of(self, name: str) -> list[int]:
        """The shape of a tensor, from the header of its file."""
        with _opened(self.files[name]) as tensors:
            shape: list[int] = tensors.get_slice(name).get_shape()
        return shape

    def copy_into(self, wanted: Mapping[str, Tensor], names: Mapping[str, str]) -> None:
        """Fill tensors of a model; all are checked before any is filled.

        Args:
            wanted: the tensors by their names in the model.
            names: the name in the files of each.

        Raises:
            CheckpointError: a tensor is missing or of another shape; nothing was filled.
        """
        missing = [name for name in wanted if names.get(name, name) not in self.files]
        if missing:
            raise CheckpointError(
                f"{self.place}: the model has {missing[0]}, and the weights do not"
                f" hold it ({len(missing)} missing). The files are of different checkpoints."
            )
        by_file: dict[Path, list[str]] = {}
        for name in wanted:
            by_file.setdefault(self.files[names.get(name, name)], []).append(name)
        for path, here in by_file.items():
            with _opened(path) as tensors:
                for name in here:
                    shape = tensors.get_slice(names.get(name, name)).get_shape()
                    if shape != list(wanted[name].shape):
                        raise CheckpointError(
                            f"{self.place}: {name} is {shape} in the weights and"
                            f" {list(wanted[name].shape)} by the record"
                        )
        for path, here in by_file.items():
            with _opened(path) as tensors, torch.no_grad():
                for name in here:
                    wanted[name].copy_(tensors.get_tensor(names.get(name, name)))


def has_weights(folder: str) -> bool:
    """Whether a folder or a hub repository holds the weights of a model as safetensors."""
    return find(folder, WEIGHTS) is not None or find(folder, _INDEX) is not None


def find(folder: str, file: str) -> Path | None:
    """A file of a local folder or of a hub repository.

    Args:
        folder: the folder, or a hub id.
        file: the file's name.

    Returns:
        The path, or None where there is no file of that name.

    Raises:
        CheckpointError: it is a device or a pipe, or a link that leads out of the folder.
    """
    if Path(folder).is_dir():
        path = Path(folder) / file
        return _checked(path) if os.path.lexists(path) else None
    # Here, not above: it would double the time of `import steppe`, and a local folder needs no hub.
    from huggingface_hub import errors, hf_hub_download

    try:
        return Path(hf_hub_download(folder, file))
    except (errors.EntryNotFoundError, errors.RepositoryNotFoundError, errors.HFValidationError):
        return None


def read_json(path: Path) -> Any:
    """The content of a JSON file.

    Raises:
        CheckpointError: it is none, or far larger than any config.
    """
    size = path.stat().st_size
    if size > _LARGEST_JSON:
        raise CheckpointError(
            f"{path}: {size / 2**20:,.0f} MB, expected at most {_LARGEST_JSON // 2**20}. It is"
            " damaged, or another file under this name."
        )
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{path}: not valid JSON ({error}). Copy it again from where it was saved."
        ) from None


def _read_index(folder: str, index: Path) -> dict[str, Path]:
    """The file that the index names for each tensor."""
    content = read_json(index)
    named = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(named, dict) or not all(isinstance(file, str) for file in named.values()):
        raise CheckpointError(
            f"{index}: damaged; expected a file's name for each tensor under 'weight_map'"
        )
    paths: dict[str, Path] = {}
    for file in sorted(set(named.values())):
        if Path(file).name != file or not file.endswith(".safetensors"):
            raise CheckpointError(
                f"{index}: names {file[:100]!r}, expected a .safetensors file of the same folder."
                " steppe reads no other."
            )
        path = find(folder, file)
        if path is None:
            raise CheckpointError(f"{folder}: found no {file}, which the index names")
        paths[file] = path
    return {name: paths[file] for name, file in named.items()}


def _checked(path: Path) -> Path:
    """A path in a folder, once it is known to be a regular file of that folder."""
    try:
        real = path.resolve(strict=True)
        is_regular = stat.S_ISREG(real.stat().st_mode)
    except (OSError, RuntimeError) as error:  # RuntimeError: links in a circle, before Python 3.13
        raise CheckpointError(f"{path}: cannot be read ({error})") from None
    if not is_regular:
        raise CheckpointError(f"{path}: expected a file, got a folder, a device or a pipe")
    home = path.parent.resolve()
    # The hub's cache keeps all files in `blobs`, and links to them in `snapshots/REVISION`.
    if not real.is_relative_to(home) and real.parent != home.parent.parent / "blobs":
        raise CheckpointError(
            f"{path}: a link that leads out of its folder, to {real}. Put the file itself there."
        )
    return path


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """A safetensors file; an error of it gets the path."""
    try:
        with safe_open(path, framework="pt") as tensors:
            yield tensors
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: damaged or truncated ({error})") from None
