"""Checkpoints that are whole or passed over, whatever has become of them."""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from steppe.errors import CheckpointError, OutputError
from steppe.files import why_unwritable
from steppe.training import resuming

SETTINGS: dict[str, object] = {"arm": "steppe", "seed": 0}
FILES = ("model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "sub/part.bin")


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run with two whole checkpoints."""
    for step in (3, 6):
        folder = tmp_path / resuming.UNFINISHED / f"checkpoint-{step}"
        (folder / "sub").mkdir(parents=True)
        for file in FILES:
            (folder / file).write_bytes(os.urandom(10_000))
        resuming.seal_checkpoint(folder, SETTINGS)
        resuming.publish_checkpoint(tmp_path, f"checkpoint-{step}")
    return tmp_path


def zero_a_block(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[4096:8192] = bytes(4096)
    path.write_bytes(content)


def zero_all(path: Path) -> None:
    path.write_bytes(bytes(path.stat().st_size))


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-20])


def extend(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"0")


def remove(path: Path) -> None:
    path.unlink()


def make_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def make_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def link_to_device(path: Path) -> None:
    path.unlink()
    path.symlink_to("/dev/zero")


def link_to_itself(path: Path) -> None:
    path.unlink()
    path.symlink_to(path)


def link_to_a_copy(path: Path) -> None:
    copy = path.parents[1] / "copy"
    shutil.copy(path, copy)
    path.unlink()
    path.symlink_to(copy)


DAMAGES = (
    zero_a_block,
    zero_all,
    flip_a_bit,
    cut,
    extend,
    remove,
    make_folder,
    make_pipe,
    link_to_device,
    link_to_itself,
    link_to_a_copy,
)


def assert_older_is_used(run: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert resuming.last_whole_checkpoint(run, SETTINGS) == run / "checkpoint-3"
    assert "checkpoint-6: not whole" in caplog.text


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda one: one.__name__)
@pytest.mark.parametrize("file", [*FILES, resuming.MANIFEST])
def test_a_damaged_checkpoint_is_passed_over(
    run: Path, caplog: pytest.LogCaptureFixture, file: str, damage: Callable[[Path], None]
) -> None:
    damage(run / "checkpoint-6" / file)
    assert_older_is_used(run, caplog)


@pytest.mark.parametrize(
    "content",
    [
        [],
        None,
        1,
        "yes",
        {},
        {"settings": SETTINGS},
        {"settings": [], "sha256": {"a": "b"}},
        {"settings": SETTINGS, "sha256": {}},
        {"settings": SETTINGS, "sha256": ["model.safetensors"]},
        {"settings": SETTINGS, "sha256": {"model.safetensors": 3}},
        {"settings": SETTINGS, "sha256": {"../checkpoint-3/model.safetensors": "x"}},
        {"settings": SETTINGS, "sha256": {"/dev/zero": "x"}},
        {"settings": SETTINGS, "bytes": {"model.safetensors": 10_000}},
    ],
    ids=str,
)
def test_a_manifest_of_wrong_types_is_passed_over(
    run: Path, caplog: pytest.LogCaptureFixture, content: Any
) -> None:
    (run / "checkpoint-6" / resuming.MANIFEST).write_text(json.dumps(content))
    assert_older_is_used(run, caplog)


@pytest.mark.parametrize("content", [b"[" * 100_000, b"\xff\xfe", b"", bytes(500)])
def test_a_manifest_that_is_no_json_is_passed_over(
    run: Path, caplog: pytest.LogCaptureFixture, content: bytes
) -> None:
    (run / "checkpoint-6" / resuming.MANIFEST).write_bytes(content)
    assert_older_is_used(run, caplog)


def test_a_file_that_nobody_wrote_makes_a_checkpoint_not_whole(
    run: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (run / "checkpoint-6" / "rng_state_1.pth").write_bytes(b"garbage")
    assert_older_is_used(run, caplog)


def test_whole_checkpoints_are_used_newest_first(run: Path) -> None:
    assert resuming.last_whole_checkpoint(run, SETTINGS) == run / "checkpoint-6"
    (run / "checkpoint-99999999999999999999").mkdir()
    assert resuming.last_whole_checkpoint(run, SETTINGS) == run / "checkpoint-6"
    with pytest.raises(CheckpointError, match="other settings"):
        resuming.last_whole_checkpoint(run, {**SETTINGS, "seed": 1})


def test_no_whole_checkpoint_is_one_error(run: Path) -> None:
    for step in (3, 6):
        zero_all(run / f"checkpoint-{step}" / "optimizer.pt")
    with pytest.raises(CheckpointError, match="none of its 2 checkpoints is whole"):
        resuming.last_whole_checkpoint(run, SETTINGS)


def test_a_full_disk_is_known_by_writing_to_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert why_unwritable(tmp_path) is None
    assert why_unwritable(tmp_path / "nowhere") == "No such file or directory"

    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    assert why_unwritable(tmp_path) == "No space left on device"


@pytest.mark.parametrize("is_full", [True, False])
def test_an_error_of_a_writer_is_a_full_disk_only_where_the_disk_is_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_full: bool
) -> None:
    import models
    from steppe.training import trainer as module

    def fail(*args: Any) -> None:
        (tmp_path / resuming.UNFINISHED / "checkpoint-1").mkdir(parents=True)
        raise RuntimeError("[enforce fail at inline_container.cc:668] unexpected pos 64 vs 0")

    reason = "No space left on device" if is_full else None
    monkeypatch.setattr(module, "why_unwritable", lambda folder: reason)
    monkeypatch.setattr(module.Trainer, "_save_checkpoint", fail)
    args = module.Trainer.__init__.__globals__["TrainingArguments"](
        str(tmp_path), report_to=[], use_cpu=True
    )
    trainer = module.RecipeTrainer(
        model=models.gpt2(), args=args, not_decayed=set(), prepare=None, draws=None, settings={}
    )
    trainer.state.global_step = 1
    with pytest.raises(OutputError if is_full else RuntimeError):
        trainer._save_checkpoint(trainer.model, None)
    assert not (tmp_path / resuming.UNFINISHED).exists()
