"""Which files a folder of weights may name: safetensors of that folder, and no other."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import models
from steppe.checkpoints.load_by_config import load_checkpoint
from steppe.checkpoints.weights import Weights, find, read_json
from steppe.errors import CheckpointError

INDEX = "model.safetensors.index.json"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A plain checkpoint of GPT-2 in several files."""
    models.gpt2().save_pretrained(tmp_path / "model", max_shard_size="10KB")
    return tmp_path / "model"


def rename_in_index(folder: Path, name: str) -> None:
    """Have the index name another file for one tensor."""
    path = folder / INDEX
    content = json.loads(path.read_text())
    content["weight_map"]["transformer.wte.weight"] = name
    path.write_text(json.dumps(content))


@pytest.mark.parametrize(
    "name",
    [
        "../other.safetensors",
        "/dev/zero",
        "pytorch_model.bin",
        "sub/model.safetensors",
        "..",
        "",
        "/etc/passwd.safetensors",
        "x" * 300 + ".safetensors",
    ],
)
def test_an_index_may_name_files_of_its_folder_alone(folder: Path, name: str) -> None:
    save_file({"transformer.wte.weight": torch.zeros(2)}, folder.parent / "other.safetensors")
    torch.save({"transformer.wte.weight": torch.zeros(2)}, folder / "pytorch_model.bin")
    rename_in_index(folder, name)
    with pytest.raises(CheckpointError, match="index") as caught:
        load_checkpoint(folder)
    assert len(str(caught.value)) < 700


def link_out(folder: Path) -> None:
    outside = folder.parent / "outside.safetensors"
    save_file({"transformer.wte.weight": torch.zeros(2)}, outside)
    (folder / "linked.safetensors").symlink_to(outside)


def link_to_device(folder: Path) -> None:
    (folder / "linked.safetensors").symlink_to("/dev/zero")


def link_in_a_circle(folder: Path) -> None:
    (folder / "linked.safetensors").symlink_to(folder / "linked.safetensors")


def pipe(folder: Path) -> None:
    os.mkfifo(folder / "linked.safetensors")


def subfolder(folder: Path) -> None:
    (folder / "linked.safetensors").mkdir()


@pytest.mark.parametrize("make", [link_out, link_to_device, link_in_a_circle, pipe, subfolder])
def test_what_is_no_file_of_the_folder_is_refused_unread(
    folder: Path, make: Callable[[Path], None]
) -> None:
    make(folder)
    rename_in_index(folder, "linked.safetensors")
    with pytest.raises(CheckpointError, match=r"linked\.safetensors"):
        load_checkpoint(folder)


def test_a_pipe_for_the_weights_or_the_config_is_refused_unread(folder: Path) -> None:
    for file in ("model.safetensors", "config.json"):
        (folder / file).unlink(missing_ok=True)
        os.mkfifo(folder / file)
        with pytest.raises(CheckpointError):
            find(str(folder), file)


def test_a_folder_of_the_hubs_cache_is_read(folder: Path, tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "hub" / "blobs", tmp_path / "hub" / "snapshots" / "abc"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for number, file in enumerate(folder.iterdir()):
        (blobs / str(number)).write_bytes(file.read_bytes())
        (snapshot / file.name).symlink_to(Path("..") / ".." / "blobs" / str(number))
    state: dict[str, Tensor] = load_checkpoint(folder).state_dict()
    for name, tensor in load_checkpoint(snapshot).state_dict().items():
        assert torch.equal(tensor, state[name])


def test_a_tensor_in_another_file_than_the_index_says_is_an_error(folder: Path) -> None:
    other = sorted(folder.glob("*.safetensors"))
    held = next(path for path in other if "transformer.wte.weight" not in keys(path))
    rename_in_index(folder, held.name)
    with pytest.raises(CheckpointError, match=r"transformer\.wte\.weight is not in"):
        load_checkpoint(folder)


def keys(path: Path) -> list[str]:
    return list(Weights.in_files("", [path]).files)


@pytest.mark.parametrize("content", [b"[" * 100_000, b"\xff", b"{", b'{"weight_map": 1}', b"1"])
def test_a_damaged_index_is_one_short_error(folder: Path, content: bytes) -> None:
    (folder / INDEX).write_bytes(content)
    with pytest.raises(CheckpointError, match=INDEX) as caught:
        load_checkpoint(folder)
    assert len(str(caught.value)) < 700


def test_json_of_an_absurd_size_is_refused_unread(tmp_path: Path) -> None:
    with (tmp_path / "config.json").open("wb") as file:
        file.truncate(2**30)
    with pytest.raises(CheckpointError, match="1,024 MB"):
        read_json(tmp_path / "config.json")
