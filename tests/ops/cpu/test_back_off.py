"""Hysteresis and back-off: when the screen, or the sparse path, is given up and tried again."""

from __future__ import annotations

import math

import pytest
import torch

from steppe.ops.cpu import back_off as back_off_module
from steppe.ops.cpu import decode, native_ops, screen
from steppe.ops.cpu.back_off import MARGIN, BackOff
from steppe.ops.cpu.copies import kept_screen
from steppe.ops.cpu.library import kernels
from steppe.ops.mlp import mlp
from steppe.ops.outcome import noted

native = pytest.mark.skipif(kernels().name != "native", reason=kernels().reason)
LEAST, MOST = back_off_module._LEAST_WAIT, back_off_module._MOST_WAIT


def test_what_held_goes_on_up_to_the_margin_and_starts_again_below_the_threshold() -> None:
    back_off = BackOff()
    assert math.isnan(back_off.share)
    assert back_off.limit_and_count(0.25) == 0.25 + MARGIN  # nothing is known yet
    back_off.record(0.29, threshold_held=True)
    assert back_off.share == 0.29
    assert back_off.limit_and_count(0.25) == 0.25 + MARGIN
    back_off.record(0.31, threshold_held=False)
    waited = calls_until_a_try(back_off, 0.25)
    assert waited == LEAST
    back_off.record(0.24, threshold_held=True)
    assert back_off.limit_and_count(0.25) == 0.25 + MARGIN


def calls_until_a_try(back_off: BackOff, threshold: float) -> int:
    """How many calls go unscreened; the try that ends them gets the threshold itself."""
    for waited in range(1000):
        limit = back_off.limit_and_count(threshold)
        if limit:
            assert limit == threshold
            return waited
    raise AssertionError("no try")


def test_each_failed_try_doubles_the_wait_up_to_a_bound_and_a_good_one_resets_it() -> None:
    back_off = BackOff()
    back_off.record(0.9, threshold_held=False)
    waits = []
    for _ in range(7):
        waits.append(calls_until_a_try(back_off, 0.25))
        back_off.record(0.9, threshold_held=False)
    assert waits == [min(LEAST * 2**i, MOST) for i in range(7)]
    assert waits[-1] == waits[-2] == MOST
    calls_until_a_try(back_off, 0.25)
    back_off.record(0.1, threshold_held=True)
    back_off.record(0.9, threshold_held=False)
    assert calls_until_a_try(back_off, 0.25) == LEAST


@native
def test_decoding_goes_by_the_back_off_of_its_screen(monkeypatch: pytest.MonkeyPatch) -> None:
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
    back_off = kept_screen(weight).few
    assert 0.0 <= back_off.share < 0.25
    call(busy)  # too many are candidates, which only counting them tells
    assert screened[1:] == [True]
    assert back_off.share == 1.0
    assert not back_off.held
    del screened[:]
    for _ in range(LEAST):
        call(quiet)
    assert not any(screened)
    call(quiet)
    assert screened[-1:] == [True]
    assert back_off.held
    call(quiet, most=0.0)
    assert screened[-1:] == [False]
    assert native_ops.kept_screen(weight).few is back_off


@native
def test_many_rows_in_inference_have_a_back_off_of_their_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
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
    back_off = kept_screen(weight).many
    assert 0.0 < back_off.share < 0.25
    assert call(busy) == [(320, False)]
    for _ in range(LEAST):
        assert call(quiet) == []
    assert call(busy) == [(10, False)]  # a try begins with some rows
    for _ in range(2 * LEAST):
        assert call(quiet) == []
    assert call(quiet) == [(10, True), (320, True)]
    assert call(quiet) == [(320, True)]
    assert math.isnan(kept_screen(weight).few.share)
