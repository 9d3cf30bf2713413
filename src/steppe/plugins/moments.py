"""Moments: number, Σ p and Σ p² of pre-activations, summed over the calls of a step.

They are taken from a sample of the tokens. A routed call has no pre-activations, so here they are
computed, and of all tokens that would cost as much as the block's first product.
"""

from __future__ import annotations

import random
import threading

import torch
from torch import Tensor
from torch import distributed as dist
from torch.nn import functional as F

from steppe.checkpointing import in_backward

LEAST = 64  # tokens of a call, of all processes together, that are in its sample if it has so many
_ADDING = threading.Lock()


@torch.library.custom_op("steppe::add_moments_", mutates_args=("sums",))
def add_moments_(
    sums: Tensor, p: Tensor, counted: Tensor | None, start: Tensor, sample: float
) -> None:
    """Add number, Σ p and Σ p² over a sample of the tokens of one call, unit by unit.

    A forward pass that gradient checkpointing runs again in the backward pass counts once. It is a
    custom op so that this holds in compiled graphs too, where Python does not run.

    Args:
        sums: float64 ``[3, F]``, changed.
        p: ``[*, F]``.
        counted: bool ``[N]``, False where a token is padding; None for all.
        start: of the sample, see `start_of`.
        sample: share of the tokens that are in the sample, in (0, 1].
    """
    if not in_backward():
        p, counted = _sampled(p.reshape(-1, p.shape[-1]), counted, start, sample)
        _add_(sums, p, counted)


@add_moments_.register_fake
def _(sums: Tensor, p: Tensor, counted: Tensor | None, start: Tensor, sample: float) -> None:
    """Nothing is returned."""


@torch.library.custom_op("steppe::add_product_moments_", mutates_args=("sums",))
def add_product_moments_(
    sums: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    counted: Tensor | None,
    start: Tensor,
    sample: float,
) -> None:
    """`add_moments_` for ``p = x Wᵀ + b``, which is computed here and not kept.

    Args:
        sums: float64 ``[3, F]``, changed.
        x: ``[*, D]``.
        weight: ``[F, D]``.
        bias: ``[F]``, or None.
        counted: as in `add_moments_`; so the next two.
        start: of the sample.
        sample: share of the tokens.
    """
    if not in_backward():
        x, counted = _sampled(x.reshape(-1, x.shape[-1]), counted, start, sample)
        _add_(sums, F.linear(x, weight, bias), counted)


@add_product_moments_.register_fake
def _(
    sums: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    counted: Tensor | None,
    start: Tensor,
    sample: float,
) -> None:
    """Nothing is returned."""


def start_of(seed: int, progress: float) -> int:
    """The token that the samples of a step begin with, before the remainder by their number.

    Args:
        seed: of the choice.
        progress: share of the run that is done, in [0, 1]: the step.

    Returns:
        A number below 2³¹, the same in every process and on every machine.
    """
    return random.Random(f"{seed} {progress!r}").getrandbits(31)


def rows_of_sample(rows: int, start: Tensor, sample: float, processes: int = 1) -> Tensor | None:
    """The tokens of a call that are in its sample: every k-th, and at least `LEAST`.

    They do not depend on how a batch is dealt out: if each process has a multiple of k tokens,
    their samples together are the sample of the whole batch.

    Args:
        rows: tokens of the call in this process.
        start: 0-dim int64, see `start_of`; it is not read, which on a GPU would wait.
        sample: 1 / k, in (0, 1].
        processes: number of processes, which have calls like this one.

    Returns:
        int64 ``[n]`` on the device of `start`; None for all tokens.

    Example:
        >>> rows_of_sample(2048, torch.tensor(5), 1 / 16)[:4].tolist()
        [5, 21, 37, 53]
    """
    every = min(round(1.0 / sample), rows * processes // LEAST)
    if every <= 1:
        return None
    numbers = torch.arange(max(rows // every, 1), device=start.device)
    return (start + every * numbers) % rows


def _add_(sums: Tensor, p: Tensor, counted: Tensor | None) -> None:
    """Add the moments of pre-activations ``[n, F]`` to `sums`."""
    moments = moments_of(p, counted).to(sums.dtype)
    with _ADDING:  # the model may run in several threads at once
        sums += moments


def _sampled(
    tokens: Tensor, counted: Tensor | None, start: Tensor, sample: float
) -> tuple[Tensor, Tensor | None]:
    """The sample of the rows of a matrix, and which of these count."""
    processes = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
    rows = rows_of_sample(len(tokens), start.to(tokens.device), sample, processes)
    if rows is None:
        return tokens, counted
    return tokens[rows], None if counted is None else counted.to(tokens.device)[rows]


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
