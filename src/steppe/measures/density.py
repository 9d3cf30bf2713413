"""Density and derivative density: what is counted, on the device and while the model runs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from steppe.activations import Activation, derivative, evaluate, is_relu

COUNTERS = ("active", "derivative_active", "entries", "tokens")


@dataclass(frozen=True)
class BlockDensity:
    """Densities of one block, pooled over the counted entries.

    Attributes:
        name: name of the block.
        density: share of entries with a ≠ 0, in [0, 1]; NaN if nothing was counted.
        derivative_density: share of entries with σ′(p) ≠ 0, in [0, 1]; NaN likewise.
        tokens: number of tokens counted.
    """

    name: str
    density: float
    derivative_density: float
    tokens: int


@dataclass(frozen=True)
class DensityReport:
    """Densities of a model.

    Attributes:
        density: share of entries with a ≠ 0, pooled over the blocks, in [0, 1].
        derivative_density: share of entries with σ′(p) ≠ 0, pooled over the blocks, in [0, 1].
        blocks: the same per block, in forward order.
    """

    density: float
    derivative_density: float
    blocks: tuple[BlockDensity, ...]


def report_from_counts(names: tuple[str, ...], counts: Tensor) -> DensityReport:
    """Shares from counts.

    Args:
        names: name of each block.
        counts: int64 ``[blocks, 4]``, the columns of `COUNTERS`.

    Returns:
        The report; NaN where nothing was counted.

    Example:
        >>> report_from_counts(("a",), torch.tensor([[1, 3, 4, 2]])).blocks[0].density
        0.25
    """
    rows = counts.tolist()
    active, slopes, entries, _ = counts.sum(0).tolist()
    return DensityReport(
        density=_share(active, entries),
        derivative_density=_share(slopes, entries),
        blocks=tuple(
            BlockDensity(name, _share(row[0], row[2]), _share(row[1], row[2]), row[3])
            for name, row in zip(names, rows, strict=True)
        ),
    )


def supports(act: Activation, p: Tensor, up: Tensor | None) -> tuple[Tensor, Tensor]:
    """Where a block's activation and its derivative differ from zero.

    Args:
        act: the activation.
        p: pre-activations ``[*, F]``, those of the gate for gated blocks.
        up: for gated blocks, what the activated gate is multiplied by, ``[*, F]``.

    Returns:
        ``a ≠ 0`` and ``σ′(p) ≠ 0``, bool ``[*, F]``.
    """
    p = p.detach()
    with torch.no_grad():
        active = evaluate(act, p) != 0
    slopes = active if is_relu(act) else derivative(act, p) != 0
    return (active if up is None else active & (up.detach() != 0)), slopes


@torch.library.custom_op("steppe::count_", mutates_args=("counts",))
def count_(counts: Tensor, active: Tensor, slopes: Tensor, mask: Tensor | None) -> None:
    """Add the entries of one call to a block's counts, on their device.

    A forward pass that gradient checkpointing runs again in the backward pass counts once. This is
    a custom op so that it does so inside compiled graphs too, where Python does not run.

    Args:
        counts: int64 ``[4]``, changed; the columns of `COUNTERS`.
        active: bool ``[*, F]``.
        slopes: bool ``[*, F]``.
        mask: bool ``[N]`` with N tokens in `active`, False where a token is padding; None for all.
    """
    if torch._C._current_graph_task_id() != -1:
        return
    units = active.shape[-1]
    if mask is None:
        tokens = active.numel() // units
        counts[0] += torch.count_nonzero(active)
        counts[1] += torch.count_nonzero(slopes)
        counts[2] += tokens * units
        counts[3] += tokens
        return
    mask = mask.to(active.device)
    counted = torch.count_nonzero(mask)
    for column, support in enumerate((active, slopes)):
        per_token = torch.count_nonzero(support.reshape(-1, units), dim=-1)
        counts[column] += (per_token * mask).sum()
    counts[2] += counted * units
    counts[3] += counted


@count_.register_fake
def _(counts: Tensor, active: Tensor, slopes: Tensor, mask: Tensor | None) -> None:
    """Nothing is returned."""


def _share(part: int, whole: int) -> float:
    return part / whole if whole else float("nan")
