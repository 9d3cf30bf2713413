"""When the first product is screened: thresholds by rows, and the habit of few rows."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from steppe.ops.cpu import decode, dispatch, native_ops, screen
from steppe.ops.cpu.copies import kept_screen
from steppe.ops.cpu.dispatch import MARGIN, Habit
from steppe.ops.cpu.library import kernels
from steppe.ops.cpu.thresholds import reached
from steppe.ops.mlp import mlp
from steppe.ops.outcome import noted

native = pytest.mark.skipif(kernels().name != "native", reason=kernels().reason)
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


def test_a_habit_is_kept_up_to_the_margin_and_taken_up_again_below_the_threshold() -> None:
    habit = Habit()
    assert math.isnan(habit.share)
    assert habit.limit(0.25) == 0.25 + MARGIN  # nothing is known yet
    habit.note(0.29, threshold_held=True)
    assert habit.share == 0.29
    assert habit.limit(0.25) == 0.25 + MARGIN
    habit.note(0.31, threshold_held=False)
    waited = calls_until_a_try(habit, 0.25)
    assert waited == dispatch._LEAST_WAIT
    habit.note(0.24, threshold_held=True)
    assert habit.limit(0.25) == 0.25 + MARGIN


def calls_until_a_try(habit: Habit, threshold: float) -> int:
    """How many calls go unscreened; the try that ends them gets the threshold itself."""
    for waited in range(1000):
        limit = habit.limit(threshold)
        if limit:
            assert limit == threshold
            return waited
    raise AssertionError("no try")


def test_each_failed_try_doubles_the_wait_up_to_a_bound_and_a_good_one_resets_it() -> None:
    habit = Habit()
    habit.note(0.9, threshold_held=False)
    waits = []
    for _ in range(7):
        waits.append(calls_until_a_try(habit, 0.25))
        habit.note(0.9, threshold_held=False)
    least, most = dispatch._LEAST_WAIT, dispatch._MOST_WAIT
    assert waits == [min(least * 2**i, most) for i in range(7)]
    assert waits[-1] == waits[-2] == most
    calls_until_a_try(habit, 0.25)
    habit.note(0.1, threshold_held=True)
    habit.note(0.9, threshold_held=False)
    assert calls_until_a_try(habit, 0.25) == least


@native
def test_few_rows_go_by_their_habit(monkeypatch: pytest.MonkeyPatch) -> None:
    """A block is screened as long as few enough are candidates, and not between tries."""
    weight, down = torch.randn(256, 96) / 96**0.5, torch.randn(256, 96)
    quiet, busy = torch.full((256,), -3.0), torch.full((256,), 3.0)
    screened = []
    run = decode.FewBlock.run

    def counting(self: decode.FewBlock, *arguments: object) -> object:
        done = run(self, *arguments)
        outcome = noted()
        screened.append(outcome is not None and not math.isnan(outcome.candidates))
        return done

    monkeypatch.setattr(decode.FewBlock, "run", counting)

    def call(bias: torch.Tensor, most: float = 0.25) -> None:
        mlp(torch.randn(2, 96), weight, bias, None, None, down, None, *rule, False, 1.0, most)

    rule = 1.0, 0.0, None, 0.0
    call(quiet)
    assert screened == [True]
    habit = kept_screen(weight).few
    assert 0.0 <= habit.share < 0.25
    call(busy)  # too many are candidates, which only counting them tells
    assert screened[1:] == [True]
    assert habit.share == 1.0
    assert not habit.held
    del screened[:]
    for _ in range(dispatch._LEAST_WAIT):
        call(quiet)
    assert not any(screened)
    call(quiet)
    assert screened[-1:] == [True]
    assert habit.held
    call(quiet, most=0.0)
    assert screened[-1:] == [False]
    assert native_ops.kept_screen(weight).few is habit


@native
def test_many_rows_in_inference_go_by_a_habit_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    looks: list[tuple[int, bool]] = []

    def finding(x: torch.Tensor, *arguments: object) -> object:
        found = screen.find_candidates(x, *arguments)
        looks.append((len(x), found is not None))
        return found

    monkeypatch.setattr(native_ops, "find_candidates", finding)
    weight, down = torch.randn(256, 96) / 96**0.5, torch.randn(256, 96)
    quiet, busy = torch.full((256,), -3.0), torch.full((256,), 3.0)
    x = torch.randn(320, 96)

    def call(bias: torch.Tensor, most: float = 0.25) -> list[tuple[int, bool]]:
        del looks[:]
        z = mlp(x, weight, bias, None, None, down, None, 1.0, 0.0, None, 0.0, False, 1.0, most)[0]
        dense = torch.relu(x @ weight.T + bias) @ down
        assert (z - dense).norm() <= 1e-5 * dense.norm()
        return list(looks)

    assert call(quiet) == [(10, True), (320, True)]  # of a weight that is met for the first time
    assert call(quiet) == [(320, True)]
    habit = kept_screen(weight).many
    assert 0.0 < habit.share < 0.25
    assert call(busy) == [(320, False)]
    for _ in range(dispatch._LEAST_WAIT):
        assert call(quiet) == []
    assert call(busy) == [(10, False)]  # a try begins with some rows
    for _ in range(2 * dispatch._LEAST_WAIT):
        assert call(quiet) == []
    assert call(quiet) == [(10, True), (320, True)]
    assert call(quiet) == [(320, True)]
    assert math.isnan(kept_screen(weight).few.share)


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
