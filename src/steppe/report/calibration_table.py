"""The table of what `steppe calibrate` measured."""

from __future__ import annotations

from itertools import groupby

from steppe.ops.cpu.calibration import CANDIDATES, Calibration, Threshold
from steppe.tables import FittingTable
from steppe.timing import Point


def calibration_table(calibration: Calibration) -> FittingTable:
    """Built-in and measured thresholds, one line for each number of rows.

    Args:
        calibration: of `steppe.ops.cpu.calibration.calibrate`.

    Returns:
        A table of 80 columns or less. ``evidence`` has the median of dense time / sparse time, and
        its bounds, at the points next to the threshold.
    """
    dtype = str(calibration.dtype).removeprefix("torch.")
    table = FittingTable(f"{dtype}; threads: {calibration.threads}")
    table.add_texts("block")
    table.add_numbers("rows", "built-in", "used", "evidence")
    table.add_texts("source")
    for name, group in groupby(calibration.thresholds, _block_name):
        for index, threshold in enumerate(group):
            table.add_row(
                "" if index else name,
                f"{threshold.rows}+",
                f"{threshold.built_in:.3g}",
                f"{threshold.used:.3g}",
                _evidence(threshold),
                "measured" if threshold.is_measured else "built-in",
            )
        table.add_section()
    return table


def calibration_summary(calibration: Calibration) -> str:
    """The result of a calibration, in one line.

    Args:
        calibration: of `steppe.ops.cpu.calibration.calibrate`.
    """
    counted, left_out = calibration.rounds
    changed = sum(threshold.is_measured for threshold in calibration.thresholds)
    said = "nothing was clear enough to change a built-in threshold"
    if changed:
        said = f"{changed} of {len(calibration.thresholds)} thresholds changed"
    said += f"; {left_out} of {counted + left_out} rounds were disturbed"
    if calibration.missing:
        said += f"; the time was too short for {calibration.missing} thresholds"
    return said


def _block_name(threshold: Threshold) -> str:
    what = "training" if threshold.trains else "inference"
    if threshold.kind == CANDIDATES:
        return f"screen, {what}"
    return f"{what}, d {threshold.width}+"


def _evidence(threshold: Threshold) -> str:
    """The last point at or below the threshold, and the first above it."""
    below = [point for point in threshold.points if point.share <= threshold.used]
    above = [point for point in threshold.points if point.share > threshold.used]
    return "\n".join(_said(point) for point in (*below[-1:], *above[:1])) or "–"


def _said(point: Point) -> str:
    if not point.ratios:
        return f"{point.share:.2g}: –"
    low, high = point.bounds
    spread = f" ({low:.2f}–{high:.2f})" if low > 0.0 else ""
    return f"{point.share:.2g}: {point.median:.2f}{spread}"
