"""When the sparse kernels are faster, and the screen: thresholds by machine, dtype and threads.

Densities go by the width of the block too: the narrower, the more of the time goes into lists.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeAlias, TypeVar

import torch

from steppe.ops.native import kernels

# From so many rows (tokens of a call) on, the kernels are faster up to such a density, or the
# screen up to such a share of candidates.
Thresholds: TypeAlias = dict[int, float]
Tables: TypeAlias = dict[bool, Thresholds]  # for inference, under False, and for training
_Value = TypeVar("_Value")

# Measured at d 768, F 3072 on one machine, and less than was measured there: what is used until
# `steppe.ops.calibration` has measured on this one.
DEFAULTS: dict[int, Tables] = {  # from such a width on; of narrower blocks never
    128: {False: {1: 0.0, 256: 0.1}, True: {1: 0.0, 256: 0.2}},
    256: {
        False: {1: 0.5, 9: 0.0, 32: 0.3, 128: 0.6},
        True: {1: 0.0, 64: 0.2, 128: 0.5, 256: 0.7},
    },
}
SCREENED_DEFAULTS: Tables = {
    False: {1: 0.3, 9: 0.0, 64: 0.3},
    True: {1: 0.0, 256: 0.3},
}
MARGIN = 0.05  # by which a share may be above a threshold, once it was below it
_LEAST_WAIT, _MOST_WAIT = 16, 256  # calls
_LEAST_WORK = 2**23  # multiply-adds of the first product, below which calling an op costs more
_LARGE_WEIGHT = 2**20  # elements: reading it takes longer than calling an op
_measured: dict[tuple[torch.dtype, int], dict[int, Tables]] = {}
_screened: dict[tuple[torch.dtype, int], Tables] = {}


def pays(rows: int, d_model: int, d_hidden: int) -> bool:
    """Whether a block has so much to do that calling an op costs little beside it.

    Args:
        rows: tokens of the call.
        d_model: width of the model.
        d_hidden: width of the hidden layer.
    """
    weight = d_model * d_hidden
    return rows * weight >= _LEAST_WORK or weight >= _LARGE_WEIGHT


def max_density_for(rows: int, width: int, dtype: torch.dtype, trains: bool) -> float:
    """The most of the entries that may be active for the sparse kernels to pay.

    Args:
        rows: tokens of the call.
        width: d_model of the block.
        dtype: of the block.
        trains: whether a backward pass follows.

    Returns:
        A density; 0 for never.
    """
    widths = _measured.get((dtype, torch.get_num_threads()), DEFAULTS)
    tables = _reached(widths, width, None)
    return 0.0 if tables is None else _reached(tables[trains], rows, 0.0)


def max_candidates_for(rows: int, dtype: torch.dtype, trains: bool) -> float:
    """The most of the entries that may be candidates for the screen to pay.

    Args:
        rows: tokens of the call.
        dtype: of the block.
        trains: whether a backward pass follows.

    Returns:
        A share; 0 for never.
    """
    if kernels().unscreened:
        return 0.0
    table = _screened.get((dtype, torch.get_num_threads()), SCREENED_DEFAULTS)
    return _reached(table[trains], rows, 0.0)


def _reached(steps: Mapping[int, _Value], at: int, below: _Value) -> _Value:
    """The value of the last step that is not above `at`."""
    reached, value = 0, below
    for least, its_value in steps.items():
        if reached <= least <= at:
            reached, value = least, its_value
    return value


@dataclass
class Habit:
    """Whether to try what pays below a threshold, in inference, by what came of it before.

    Once the share of candidates, or the density, is above the threshold by more than `MARGIN`, some
    calls go without before the next try, twice as many each time; the try has to get below the
    threshold itself.

    Attributes:
        share: at the last try; NaN if it was not counted.
        held: whether it was low enough, or nothing is known yet.
        wait: calls until the next try.
        next_wait: calls to wait after the next try that fails.
    """

    share: float = float("nan")
    held: bool = True
    wait: int = 0
    next_wait: int = _LEAST_WAIT

    def limit(self, threshold: float) -> float:
        """Up to which share this call tries; 0 for not at all.

        Args:
            threshold: up to which it pays.
        """
        if self.held:
            return threshold + MARGIN
        if self.wait:
            self.wait -= 1
            return 0.0
        return threshold

    def note(self, share: float, threshold_held: bool) -> None:
        """Take down what came of a try.

        Args:
            share: of candidates, or the density; NaN if it was not counted.
            threshold_held: whether it was low enough.
        """
        self.share, self.held = share, threshold_held
        if threshold_held:
            self.next_wait = _LEAST_WAIT
        else:
            self.wait, self.next_wait = self.next_wait, min(2 * self.next_wait, _MOST_WAIT)


def use(
    dtype: torch.dtype,
    threads: int,
    densities: dict[int, Tables],
    candidates: Tables,
) -> None:
    """Dispatch by thresholds from now on.

    Args:
        dtype: of the blocks they hold for.
        threads: the number of threads they hold for.
        densities: the tables from each width on.
        candidates: of shares of candidates.
    """
    _measured[dtype, threads] = densities
    _screened[dtype, threads] = candidates


def is_measured(dtype: torch.dtype, threads: int) -> bool:
    """Whether `use` was called for a dtype and a number of threads."""
    return (dtype, threads) in _measured
