"""Moments: number, Σ p and Σ p² of pre-activations, summed over the calls of a step."""

from __future__ import annotations

import threading

import torch
from torch import Tensor
from torch.nn import functional as F

_ADDING = threading.Lock()


@torch.library.custom_op("steppe::add_moments_", mutates_args=("sums",))
def add_moments_(sums: Tensor, p: Tensor, counted: Tensor | None) -> None:
    """Add number, Σ p and Σ p² over the tokens of one call, unit by unit, on their device.

    A forward pass that gradient checkpointing runs again in the backward pass counts once. It is a
    custom op so that this holds in compiled graphs too, where Python does not run.

    Args:
        sums: float64 ``[3, F]``, changed.
        p: ``[*, F]``.
        counted: bool ``[N]``, False where a token is padding; None for all.
    """
    if torch._C._current_graph_task_id() == -1:
        moments = moments_of(p.reshape(-1, p.shape[-1]), counted).to(sums.dtype)
        with _ADDING:  # the model may run in several threads at once
            sums += moments


@add_moments_.register_fake
def _(sums: Tensor, p: Tensor, counted: Tensor | None) -> None:
    """Nothing is returned."""


@torch.library.custom_op("steppe::add_product_moments_", mutates_args=("sums",))
def add_product_moments_(
    sums: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, counted: Tensor | None
) -> None:
    """`add_moments_` for ``p = x Wᵀ + b``, which is computed here and not kept.

    Args:
        sums: float64 ``[3, F]``, changed.
        x: ``[*, D]``.
        weight: ``[F, D]``.
        bias: ``[F]``, or None.
        counted: as in `add_moments_`.
    """
    if torch._C._current_graph_task_id() == -1:
        p = F.linear(x.reshape(-1, x.shape[-1]), weight, bias)
        moments = moments_of(p, counted).to(sums.dtype)
        with _ADDING:
            sums += moments


@add_product_moments_.register_fake
def _(sums: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, counted: Tensor | None) -> None:
    """Nothing is returned."""


def moments_of(p: Tensor, counted: Tensor | None) -> Tensor:
    """Number, Σ p and Σ p² over tokens.

    The squares are summed about the mean, in float32 or wider: if the mean of a unit is many
    deviations away from zero, sums of plain squares lose the deviation to rounding. In half
    precision p itself is read, twice, instead of a copy in float32.

    Args:
        p: ``[N, F]``.
        counted: bool ``[N]``, False for tokens that do not count; None for all.

    Returns:
        float64 ``[3, F]``; float32 on devices without float64.

    Example:
        >>> moments_of(torch.tensor([[1.0], [3.0], [9.0]]), torch.tensor([True, True, False]))
        tensor([[ 2.],
                [ 4.],
                [10.]], dtype=torch.float64)
    """
    wide = torch.promote_types(p.dtype, torch.float32)
    precise = torch.float32 if p.device.type == "mps" else torch.float64
    with torch.autocast(p.device.type, enabled=False):
        padding = None if counted is None else ~counted.to(p.device).unsqueeze(-1)
        if padding is None:
            tokens = torch.full((), len(p), dtype=precise, device=p.device)
        else:
            p = p.masked_fill(padding, 0.0)  # padding may be infinite
            tokens = len(p) - padding.sum(dtype=precise)
        total = p.sum(0, dtype=wide).to(precise)
        centre = (total / tokens.clamp(min=1.0)).to(wide)
        centred = p - centre
        if padding is not None:
            centred.masked_fill_(padding, 0.0)
        # The norm over rows takes twice as long on the CPU, and half as long elsewhere.
        squares = (
            centred.square_().sum(0)
            if p.is_cpu
            else torch.linalg.vector_norm(centred, dim=0).square()
        ).to(precise)
    centre = centre.to(precise)
    rest = total - tokens * centre
    return torch.stack(
        [
            tokens.expand_as(total),
            total,
            squares + 2.0 * centre * rest + tokens * centre.square(),
        ]
    )
