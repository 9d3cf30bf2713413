"""The data of the page: which steps of runs it draws, and the numbers that sum a run up."""

from __future__ import annotations

import math
from collections.abc import Sequence

from steppe.measures.report import BlockReport, Report
from steppe.report.flops import BlockFlops, count_flops, sum_flops
from steppe.runs import Run

NAN = float("nan")
BASELINE = "vanilla"
_SIGNIFICANT = 6  # digits in the page; more cannot be seen and make it larger


def baseline_of(runs: Sequence[Run]) -> int:
    """Index of the run that the others are compared with.

    Args:
        runs: at least one.

    Returns:
        Of the first run named ``vanilla``, else of the first with ``vanilla`` between the slashes
        of its name, else 0.
    """
    for index, run in enumerate(runs):
        if run.name == BASELINE:
            return index
    for index, run in enumerate(runs):
        if BASELINE in run.name.split("/"):
            return index
    return 0


def inference_density(run: Run) -> float:
    """Density on the held-out data that was measured last; NaN if there was none."""
    return run.held_out[-1].density if run.held_out else NAN


def derivative_density(run: Run) -> float:
    """Derivative density on the held-out data that was measured last; NaN if there was none."""
    return run.held_out[-1].derivative_density if run.held_out else NAN


def relative_change(new: float, old: float) -> float:
    """``new / old − 1``; NaN where it is not defined."""
    return new / old - 1.0 if old and math.isfinite(old) and math.isfinite(new) else NAN


def density_at_end(run: Run) -> float:
    """Mean density over the last tenth of the measured training steps; NaN if there are none."""
    return mean_of([report.density for report in last_tenth(run.training)])


def last_tenth(reports: Sequence[Report]) -> Sequence[Report]:
    """The last tenth of the reports, at least one if there are any."""
    return reports[len(reports) - math.ceil(len(reports) / 10) :]


def curve_of(run: Run, held_out: bool) -> tuple[list[int], list[Report]]:
    """Steps and reports, of the held-out data or of the training batches."""
    return (run.held_out_steps, run.held_out) if held_out else (run.steps, run.training)


def has_backward(reports: Sequence[Report]) -> bool:
    """Whether the ratio was measured of any block."""
    return any(math.isfinite(block.AF_per_entry) for report in reports for block in report.blocks)


def last_report(run: Run) -> Report | None:
    """The last report on held-out data, else the last on training batches."""
    for reports in (run.held_out, run.training):
        if reports:
            return reports[-1]
    return None


def inference_flops(run: Run) -> BlockFlops | None:
    """The products of all blocks at the densities of the last report on held-out data.

    Args:
        run: the run.

    Returns:
        None where no density was measured.
    """
    return _flops(run.held_out[-1:])


def training_flops(run: Run) -> BlockFlops | None:
    """The products of all blocks at the means of their densities over the training steps.

    Args:
        run: the run.

    Returns:
        None where no density was measured.
    """
    return _flops(run.training)


def _flops(reports: Sequence[Report]) -> BlockFlops | None:
    columns: list[Sequence[BlockReport]] = list(zip(*(r.blocks for r in reports), strict=True))
    blocks = [
        count_flops(
            column[0].d_model,
            column[0].d_hidden,
            mean_of([block.density for block in column]),
            mean_of([block.derivative_density for block in column]),
            column[0].gated,
        )
        for column in columns
    ]
    flops = sum_flops(blocks)
    return flops if blocks and math.isfinite(flops.training) else None


def pick(count: int, most: int) -> list[int]:
    """Evenly spaced indices, the first and the last among them.

    Args:
        count: how many there are.
        most: how many are wanted at most, ≥ 2.

    Example:
        >>> pick(3, 5), pick(9, 3)
        ([0, 1, 2], [0, 4, 8])
    """
    if count <= most:
        return list(range(count))
    return [round(k * (count - 1) / (most - 1)) for k in range(most)]


def number(value: float | None) -> float | None:
    """A number for JSON, which has no word for what is not finite.

    Example:
        >>> number(1 / 3), number(float("nan"))
        (0.333333, None)
    """
    if value is None or not math.isfinite(value):
        return None
    return float(f"{value:.{_SIGNIFICANT}g}")


def mean_of(values: Sequence[float]) -> float:
    """Mean; NaN of nothing."""
    return math.fsum(values) / len(values) if values else NAN
