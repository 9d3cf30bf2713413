"""When the sparse kernels are faster: thresholds on the density, by machine, dtype and threads."""

from __future__ import annotations

from typing import TypeAlias

import torch

# From so many rows (tokens of a call) on, the kernels are faster up to such a density.
Thresholds: TypeAlias = dict[int, float]

# Measured at d 768, F 3072 on one machine, and less than was measured there: what is used until
# `steppe.ops.calibration` has measured on this one.
DEFAULTS: dict[bool, Thresholds] = {
    False: {1: 0.5, 9: 0.0, 32: 0.3, 128: 0.6},
    True: {1: 0.0, 64: 0.2, 128: 0.5, 256: 0.7},
}
_LEAST_WORK = 2**23  # multiply-adds of the first product, below which calling an op costs more
_LARGE_WEIGHT = 2**20  # elements: reading it takes longer than calling an op
_measured: dict[tuple[torch.dtype, int], dict[bool, Thresholds]] = {}


def pays(rows: int, d_model: int, d_hidden: int) -> bool:
    """Whether a block has so much to do that calling an op costs little beside it.

    Args:
        rows: tokens of the call.
        d_model: width of the model.
        d_hidden: width of the hidden layer.
    """
    weight = d_model * d_hidden
    return rows * weight >= _LEAST_WORK or weight >= _LARGE_WEIGHT


def max_density_for(rows: int, dtype: torch.dtype, trains: bool) -> float:
    """The most of the entries that may be active for the sparse kernels to pay.

    Args:
        rows: tokens of the call.
        dtype: of the block.
        trains: whether a backward pass follows.

    Returns:
        A density; 0 for never.
    """
    thresholds = _measured.get((dtype, torch.get_num_threads()), DEFAULTS)[trains]
    reached = [density for least, density in sorted(thresholds.items()) if rows >= least]
    return reached[-1] if reached else 0.0


def use(dtype: torch.dtype, threads: int, thresholds: dict[bool, Thresholds]) -> None:
    """Dispatch by thresholds from now on.

    Args:
        dtype: of the blocks they hold for.
        threads: the number of threads they hold for.
        thresholds: for inference, under False, and for training, under True.
    """
    _measured[dtype, threads] = thresholds


def is_measured(dtype: torch.dtype, threads: int) -> bool:
    """Whether `use` was called for a dtype and a number of threads."""
    return (dtype, threads) in _measured
