"""The ratio taken apart over a run: derivative density = AF / (‖x‖² · gradient²)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import geometric_mean

from steppe.measures.report import BlockReport, Report
from steppe.runs import Run

PARTS = 10
"""Parts of equal length that a run is cut into."""
TERMS = ("derivative_density", "AF", "squared_input_norm", "squared_activation_gradient")
"""The density first, then the factors that it is the product of: AF, and one over the others."""
Terms = dict[str, list[float | None]]


def terms_of(run: Run) -> Terms:
    """The terms of a run's training batches, by tenths of the run.

    Each is a geometric mean over the tenth's measured steps and over the blocks, so that the
    identity holds between them: ``derivative_density = AF / (squared_input_norm ·
    squared_activation_gradient)``, where AF is a hidden entry's, and the gradient is weighted by
    ‖x‖² (`steppe.measures.BlockReport`).

    Args:
        run: its record.

    Returns:
        `PARTS` numbers of each of `TERMS`; None where nothing positive was measured.

    Source: arXiv 2605.25612, the ratio of augmented flatness.
    """
    first, last = min(run.steps, default=0), max(run.steps, default=0)
    parts: list[list[Report]] = [[] for _ in range(PARTS)]
    for step, report in zip(run.steps, run.training, strict=True):
        parts[PARTS * (step - first) // (last - first + 1)].append(report)
    means = [_means(part) for part in parts]
    return {term: [mean[index] for mean in means] for index, term in enumerate(TERMS)}


def _means(reports: Sequence[Report]) -> list[float | None]:
    """The geometric mean of each term over all blocks of all reports that have every one."""
    rows = [_values(block) for report in reports for block in report.blocks]
    usable = [row for row in rows if all(0.0 < value < math.inf for value in row)]
    if not usable:
        return [None] * len(TERMS)
    return [geometric_mean(column) for column in zip(*usable, strict=True)]


def _values(block: BlockReport) -> tuple[float, float, float, float]:
    return (
        block.derivative_density,
        block.AF_per_entry,
        block.squared_input_norm,
        block.weighted_activation_gradient,
    )
