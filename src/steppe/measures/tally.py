"""The sums that the hooks gather of a block, and the report that follows from them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor
from torch import distributed as dist

from steppe.blocks.block import MLPBlock
from steppe.measures.density import COUNTERS, SAMPLE_COUNTERS
from steppe.measures.flatness import COLUMNS, GRADIENT_COLUMNS
from steppe.measures.report import (
    NAN,
    BlockReport,
    Report,
    frequency_histogram,
    ratio_of_sums,
)


@dataclass(frozen=True)
class Tally:
    """Sums over the samples of one block.

    Attributes:
        counts: int64 ``[5]``, the `COUNTERS`.
        units: int64 ``[F]``, on how many tokens each hidden unit was active.
        moments: float64 ``[4, 4]``, second moments of the `SAMPLE_COUNTERS`.
        activated: float64 ``[9, 8]``, second moments of the `COLUMNS` of the layer that the
            activation reads, and a row that begins with the number of backward passes that were not
            finite and are in no other row; zeros where there was no backward pass.
        up: the same of the `up` of a gated block; zeros in others.
        down: the same of `down`.
    """

    counts: Tensor
    units: Tensor
    moments: Tensor
    activated: Tensor
    up: Tensor
    down: Tensor

    def cpu(self) -> Tally:
        """The same on the CPU; waits for the device."""
        return Tally(*(getattr(self, field.name).cpu() for field in fields(Tally)))


def scaled(moments: Tensor, squared_factor: Tensor) -> Tensor:
    """Moments for a loss that was multiplied on its way to ``backward``.

    Args:
        moments: ``[9, 8]`` as in a `Tally`.
        squared_factor: scalar, the square of the factor.

    Returns:
        ``[9, 8]``, those of the loss itself.
    """
    factors = torch.ones_like(moments[0])
    factors[-len(GRADIENT_COLUMNS) :] /= squared_factor.to(factors)
    scales = torch.cat([factors.outer(factors), torch.ones_like(factors).unsqueeze(0)])
    return torch.where(moments == 0, 0.0, moments * scales)  # 0 also for the factor of no pass


def sum_over(
    tallies: Sequence[Tally], device: torch.device, group: dist.ProcessGroup
) -> list[Tally]:
    """The sums of tallies over processes, in two reductions for all; counts are exact.

    Args:
        tallies: on the CPU, as many and of the same shapes in every process.
        device: where the group's backend wants its tensors.
        group: the processes, all of which must call this.

    Returns:
        The sums, on the CPU.
    """
    names = [field.name for field in fields(Tally)]
    parts = [getattr(tally, name) for tally in tallies for name in names]
    summed: dict[int, Tensor] = {}
    for dtype in (torch.int64, torch.float64):
        chosen = [i for i, part in enumerate(parts) if part.dtype == dtype]
        flat = torch.cat([parts[i].flatten() for i in chosen]).to(device)
        dist.all_reduce(flat, group=group)
        sizes = [parts[i].numel() for i in chosen]
        for i, total in zip(chosen, flat.cpu().split(sizes), strict=True):
            summed[i] = total.reshape(parts[i].shape)
    rows = [summed[i] for i in range(len(parts))]
    return [Tally(*rows[i : i + len(names)]) for i in range(0, len(rows), len(names))]


def report_of(blocks: Sequence[MLPBlock], tallies: Sequence[Tally]) -> Report:
    """The report that follows from tallies.

    Args:
        blocks: the blocks.
        tallies: one each, on the CPU.

    Returns:
        The report; NaN where nothing was counted.
    """
    counts = torch.stack([tally.counts for tally in tallies]).sum(0).tolist()
    totals = dict(zip(COUNTERS, counts, strict=True))
    return Report(
        density=_share(totals["active"], totals["entries"]),
        derivative_density=_share(totals["derivative_active"], totals["entries"]),
        blocks=tuple(
            _block_report(block, tally) for block, tally in zip(blocks, tallies, strict=True)
        ),
    )


def _block_report(block: MLPBlock, tally: Tally) -> BlockReport:
    counts = dict(zip(COUNTERS, tally.counts.tolist(), strict=True))
    taps = (tally.activated, tally.up, tally.down)
    (activated, up, down), gated = (moments[:-1] for moments in taps), block.gate is not None
    up = up if gated else activated
    gate = activated if gated else torch.zeros_like(activated)
    estimates: dict[str, tuple[float, float]] = {
        "density": _ratio(tally.moments, SAMPLE_COUNTERS, ["active"], ["tokens"], block.d_hidden),
        "derivative_density": _ratio(
            tally.moments, SAMPLE_COUNTERS, ["derivative_active"], ["tokens"], block.d_hidden
        ),
        "active_gain": _ratio(activated, COLUMNS, ["gain"], ["derivative_active"]),
        "squared_input_norm": _ratio(activated, COLUMNS, ["squared_input"], ["tokens"]),
        "squared_activation_gradient": _ratio(
            activated, COLUMNS, ["squared_gradient"], ["derivative_active"]
        ),
        "AF_per_entry": _ratio(activated, COLUMNS, ["flatness"], ["tokens"], block.d_hidden),
        "weighted_activation_gradient": _ratio(
            activated, COLUMNS, ["gain", "tokens"], ["derivative_active", "squared_input"]
        ),
    }
    for layer, moments in (("up", up), ("gate", gate), ("down", down)):
        estimates[f"AF_{layer}"] = _ratio(moments, COLUMNS, ["flatness"], ["samples"])
        estimates[f"squared_gradient_norm_{layer}"] = _ratio(
            moments, COLUMNS, ["squared_weight_gradient"], ["samples"]
        )
    derived = ("AF_per_entry", "weighted_activation_gradient")  # properties of the report
    means = {name: mean for name, (mean, _) in estimates.items() if name not in derived}
    # Of the exact counts, not of their floating-point moments.
    means["density"] = _share(counts["active"], counts["entries"])
    means["derivative_density"] = _share(counts["derivative_active"], counts["entries"])
    return BlockReport(
        name=block.name,
        d_model=block.d_model,
        d_hidden=block.d_hidden,
        gated=gated,
        samples=counts["samples"],
        tokens=counts["tokens"],
        dead_neurons=int((tally.units == 0).sum()) if counts["tokens"] else 0,
        neuron_frequency=frequency_histogram(tally.units, counts["tokens"]),
        non_finite_passes=int(max(moments[-1, 0] for moments in taps)),
        standard_errors={name: error for name, (_, error) in estimates.items()},
        **means,
    )


def _ratio(
    moments: Tensor,
    columns: tuple[str, ...],
    parts: Sequence[str],
    wholes: Sequence[str],
    units: int = 1,
) -> tuple[float, float]:
    """A ratio of columns' sums and its error, per hidden unit."""
    ratio, error = ratio_of_sums(
        moments, [columns.index(name) for name in parts], [columns.index(name) for name in wholes]
    )
    return ratio / units, error / units


def _share(part: int, whole: int) -> float:
    return part / whole if whole else NAN
