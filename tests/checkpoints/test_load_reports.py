"""Transformers' report of a checkpoint's keys says nothing of our tensors, and all else."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import transformers
from torch import Tensor, nn

from checkpoints.saved_models import (
    edit_weights,
    load_causal,
    sparsified,
    take_marks_off,
)
from steppe import load_pretrained


class _Kept(logging.Handler):
    """Keeps messages."""

    def __init__(self) -> None:
        super().__init__()
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())


@pytest.fixture
def reports() -> Iterator[list[str]]:
    """What Transformers logs of a checkpoint, warnings and worse."""
    logger = logging.getLogger("transformers.modeling_utils")
    kept = _Kept()
    logger.addHandler(kept)
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_warning()
    yield kept.messages
    transformers.logging.set_verbosity(verbosity)
    logger.removeHandler(kept)
    assert not logger.filters, "the filter must go after loading"


@pytest.mark.parametrize("shard_size", ["1GB", "10KB"])
@pytest.mark.parametrize("has_marks", [True, False])
def test_our_tensors_are_not_reported_as_unexpected(
    tmp_path: Path, reports: list[str], shard_size: str, has_marks: bool
) -> None:
    sparsified().save_pretrained(tmp_path, max_shard_size=shard_size)
    if not has_marks:
        take_marks_off(tmp_path)
        load_causal(tmp_path)
        assert ["LOAD REPORT" in message for message in reports] == [True], "nothing to hold back"
        reports.clear()
    load_pretrained(load_causal, tmp_path)
    assert reports == []


@pytest.mark.parametrize("has_marks", [True, False])
def test_other_unexpected_tensors_are_still_reported(
    folder: Path, reports: list[str], has_marks: bool
) -> None:
    if not has_marks:
        take_marks_off(folder)
    edit_weights(folder, lambda tensors: tensors.update({"junk.weight": torch.zeros(2)}))
    load_pretrained(load_causal, folder)
    assert len(reports) == 1
    assert "junk.weight" in reports[0]


def test_missing_tensors_are_still_reported(folder: Path, reports: list[str]) -> None:
    edit_weights(folder, lambda tensors: tensors.pop("transformer.ln_f.bias"))
    load_pretrained(load_causal, folder)
    assert len(reports) == 1
    assert "transformer.ln_f.bias" in reports[0]
    assert "MISSING" in reports[0]


def test_other_messages_of_transformers_are_not_held_back(folder: Path, reports: list[str]) -> None:
    def load(name: str) -> nn.Module:
        logging.getLogger("transformers.modeling_utils").warning("something else")
        return load_causal(name)

    load_pretrained(load, folder)
    assert reports == ["something else"]


def test_a_report_before_an_error_of_the_stock_loader_is_shown(
    folder: Path, reports: list[str]
) -> None:
    def shrink(tensors: dict[str, Tensor]) -> None:
        tensors["transformer.ln_f.bias"] = torch.zeros(3)

    edit_weights(folder, shrink)
    with pytest.raises(Exception, match="mismatch"):
        load_pretrained(load_causal, folder)
    assert len(reports) == 1
    assert "transformer.ln_f.bias" in reports[0]


def test_the_filter_is_gone_after_an_error(folder: Path, reports: list[str]) -> None:
    def fail(name: str) -> nn.Module:
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        load_pretrained(fail, folder)
    assert not logging.getLogger("transformers.modeling_utils").filters
    assert reports == []
