"""Density and derivative density: counts, on the device and while the model runs."""

from __future__ import annotations

import threading

import torch
from torch import Tensor

from steppe.activations import Activation, derivative, evaluate, is_relu
from steppe.checkpointing import in_backward

COUNTERS = ("active", "derivative_active", "entries", "tokens", "samples")
_ADDING = threading.Lock()
SAMPLE_COUNTERS = ("samples", "tokens", "active", "derivative_active")  # rows of the moments


def active_entries(act: Activation, p: Tensor, up: Tensor | None = None) -> Tensor:
    """Where a block's activations differ from zero.

    Args:
        act: the activation.
        p: pre-activations ``[*, F]``, those of the gate for gated blocks.
        up: for gated blocks, the factor of the activated gate, ``[*, F]``.

    Returns:
        ``a ≠ 0``, bool ``[*, F]``.
    """
    with torch.no_grad():
        active = evaluate(act, p.detach()) != 0
    return active if up is None else active & (up.detach() != 0)


def sloped_entries(act: Activation, p: Tensor) -> Tensor:
    """Where the derivative of the activation differs from zero.

    Args:
        act: the activation.
        p: pre-activations ``[*, F]``, those of the gate for gated blocks.

    Returns:
        ``σ′(p) ≠ 0``, bool ``[*, F]``.
    """
    return active_entries(act, p) if is_relu(act) else derivative(act, p) != 0


@torch.library.custom_op("steppe::count_", mutates_args=("counts", "units", "moments"))
def count_(
    counts: Tensor,
    units: Tensor,
    moments: Tensor,
    active: Tensor,
    slopes: Tensor,
    mask: Tensor | None,
    is_again: bool = False,
) -> None:
    """Add the entries of one call to a block's counts, on their device.

    A forward pass that gradient checkpointing runs again in the backward pass counts once. This is
    a custom op so that it does so inside compiled graphs too, where Python does not run.

    Args:
        counts: int64 ``[5]``, changed; the columns of `COUNTERS`.
        units: int64 ``[F]``, changed; on how many tokens each unit is active.
        moments: float64 ``[4, 4]``, changed; Σ_s w_s w_sᵀ of the `SAMPLE_COUNTERS` of a sample.
        active: bool ``[S, T, F]``.
        slopes: bool ``[S, T, F]``.
        mask: bool ``[S, T]``, False where a token is padding; None for all.
        is_again: the block was called in the same pass before, so its samples are counted already.
    """
    if in_backward():
        return
    samples, tokens, width = active.shape
    counted = torch.ones(samples, tokens, dtype=torch.bool, device=active.device)
    if mask is not None:
        counted = mask.to(active.device)
        active = active & counted.unsqueeze(-1)
        slopes = slopes & counted.unsqueeze(-1)
    rows = torch.stack(
        [
            counted.any(-1).to(torch.int64) * (not is_again),
            torch.count_nonzero(counted, dim=-1),
            count_true(active.flatten(1)),
            count_true(slopes.flatten(1)),
        ]
    )  # [4, S]
    sampled, seen, active_entries, derivative_entries = rows.sum(1).unbind()
    found = torch.stack([active_entries, derivative_entries, seen * width, seen, sampled])
    found_units = count_true(active.reshape(-1, width).T)
    precise = rows.to(moments.dtype)
    found_moments = precise @ precise.T
    with _ADDING:  # the model may run in several threads at once
        counts += found
        units += found_units
        moments += found_moments


@count_.register_fake
def _(
    counts: Tensor,
    units: Tensor,
    moments: Tensor,
    active: Tensor,
    slopes: Tensor,
    mask: Tensor | None,
    is_again: bool = False,
) -> None:
    """Nothing is returned."""


def count_true(support: Tensor) -> Tensor:
    """Number of true entries of each row.

    Args:
        support: bool ``[N, M]``.

    Returns:
        int64 ``[N]``.
    """
    return torch.count_nonzero(support, dim=-1)
