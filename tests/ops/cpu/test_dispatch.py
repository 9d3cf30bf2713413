"""When the first product is screened: thresholds by rows, dtype, threads and width."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from steppe.ops.cpu import dispatch, native_ops, screen
from steppe.ops.cpu.library import kernels
from steppe.ops.cpu.thresholds import reached

TABLE = {False: {1: 0.25, 9: 0.0, 64: 0.5}, True: {64: 0.125}}


@pytest.fixture
def with_vnni(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "kernels", lambda: replace(kernels(), unscreened=""))


@pytest.mark.parametrize(
    ("rows", "inference", "training"),
    [
        *((0, 0.0, 0.0), (1, 0.25, 0.0), (8, 0.25, 0.0), (9, 0.0, 0.0), (63, 0.0, 0.0)),
        *((64, 0.5, 0.125), (5000, 0.5, 0.125)),
    ],
)
def test_the_threshold_is_that_of_the_most_rows_reached(
    rows: int, inference: float, training: float, with_vnni: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dispatch, "_screened", {(torch.float32, 1): TABLE})
    share = dispatch.max_candidates_for
    assert share(rows, torch.float32, trains=False) == inference
    assert share(rows, torch.float32, trains=True) == training
    for dtype, threads in ((torch.bfloat16, 1), (torch.float32, 2)):
        torch.set_num_threads(threads)
        defaults = dispatch.screened_defaults_for(dtype, threads)
        assert share(rows, dtype, trains=False) == reached(defaults[False], rows)


def test_without_vnni_nothing_is_screened_unasked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        dispatch, "_screened", {(torch.float32, 1): {False: {1: 1.0}, True: {1: 1.0}}}
    )
    monkeypatch.setattr(dispatch, "kernels", lambda: replace(kernels(), unscreened="no VNNI"))
    for trains in (False, True):
        assert dispatch.max_candidates_for(1024, torch.float32, trains) == 0.0


@pytest.mark.parametrize("asked", [0.0, 0.3, 1.0])
def test_what_is_asked_for_is_screened_without_vnni_and_however_narrow(
    asked: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dispatch, "kernels", lambda: replace(kernels(), unscreened="no VNNI"))
    for trains in (False, True):
        assert native_ops.screen_limit(100, 16, torch.float32, trains, asked) == asked
        assert native_ops.screen_limit(100, 4096, torch.float32, trains, None) == 0.0
        assert native_ops.screen_limit(0, 16, torch.float32, trains, asked) == 0.0
        assert native_ops.screen_limit(100, screen.MAX_WIDTH, torch.float32, trains, asked) == 0.0


def test_narrow_blocks_are_not_screened_unasked(
    with_vnni: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dispatch, "_screened", {(torch.float32, 1): TABLE})
    least = native_ops._LEAST_WIDTH
    assert native_ops.screen_limit(64, least, torch.float32, False, None) == 0.5
    assert native_ops.screen_limit(64, least - 1, torch.float32, False, None) == 0.0
    assert native_ops.screen_limit(64, least - 1, torch.float32, False, 1.0) == 1.0
