"""Tables of what `steppe measure` found: the blocks of one model, or checkpoints of a run."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import compress, groupby

from steppe.measures.report import BlockReport, Report, pooled
from steppe.runs import Run
from steppe.tables import FittingTable

_NONE = "–"  # what was not measured
_MANY = 64  # blocks that have a row each
_NAME_WIDTH = 14  # characters of a block's name


def measure_table(report: Report) -> FittingTable:
    """The measures of one model, one row a block and two lines a row: mean, and ± standard error.

    Of a model with many experts those of one layer are one row.

    Args:
        report: of `steppe.measure`.

    Returns:
        A table of 100 columns or less. ``identity`` is by how much AF / (T̄ F · active gain)
        deviates from the derivative density, relatively. A dash is a value that was not measured;
        columns that no block has are left out.
    """
    title = (
        f"density {_percent(report.density)} %, derivative density"
        f" {_percent(report.derivative_density)} %"
    )
    if report.blocks:
        tokens, samples = report.blocks[0].tokens, report.blocks[0].samples
        title += f", {samples:,} samples, {tokens:,} tokens"
    if report.coverage < 1.0:
        title += f"; {report.coverage:.0%} of the MLP parameters"
    table = FittingTable(title, is_tight=True)
    table.add_texts("block")
    blocks, units = _rows_of(report.blocks)
    columns: list[tuple[str, list[str]]] = [
        ("density\n%", [_with_error(b, "density", percent=True) for b in blocks]),
        ("deriv.\n%", [_with_error(b, "derivative_density", percent=True) for b in blocks]),
    ]
    for heading, key in (
        ("AF up", "AF_up"),
        ("AF gate", "AF_gate"),
        ("AF down", "AF_down"),
        ("active\ngain", "active_gain"),
        ("‖x‖²", "squared_input_norm"),
        ("grad.²", "squared_activation_gradient"),
    ):
        if any(not math.isnan(getattr(block, key)) for block in blocks):
            columns.append((heading, [_with_error(block, key) for block in blocks]))
    dead = [f"{b.dead_neurons}\nof {of}" for b, of in zip(blocks, units, strict=True)]
    columns.append(("dead\nunits", dead))
    if any(block.non_finite_passes for block in blocks):
        columns.append(("passes\nnot finite", [str(b.non_finite_passes) for b in blocks]))
    if any(not math.isnan(block.active_gain) for block in blocks):
        columns.append(("iden-\ntity", [_deviation(block) for block in blocks]))
    table.add_numbers(*(heading for heading, _ in columns))
    for index, name in enumerate(_short_names([block.name for block in blocks])):
        table.add_row(name, *(cells[index] for _, cells in columns))
    return table


def _rows_of(blocks: Sequence[BlockReport]) -> tuple[list[BlockReport], list[int]]:
    """The rows of a table with their numbers of hidden units; many experts share one."""
    rows, units = [], []
    for _, group in groupby(blocks, _layer_of if len(blocks) > _MANY else _name_of):
        alike = list(group)
        rows.append(alike[0] if len(alike) == 1 else pooled(alike))
        units.append(sum(block.d_hidden for block in alike))
    return rows, units


def _name_of(block: BlockReport) -> str:
    return block.name


def _layer_of(block: BlockReport) -> str:
    """The name of the module that an expert is in; of another block its own."""
    parent = block.name.rpartition(".")[0]
    return parent if parent.endswith("experts") else block.name


def curve_table(run: Run) -> FittingTable:
    """The held-out measures of several checkpoints, one row a checkpoint, averaged over the blocks.

    Args:
        run: of `steppe.checkpoints.held_out.measure_checkpoints`.

    Returns:
        A table of 100 columns or less; densities are pooled over the entries of all blocks, the
        other measures are plain means over the blocks that have them.
    """
    table = FittingTable(f"{run.name}: held-out measures, means over the blocks")
    measures = (
        ("AF", "AF_activated"),
        ("AF down", "AF_down"),
        ("active\ngain", "active_gain"),
        ("‖x‖²", "squared_input_norm"),
        ("squared act.\ngradient", "squared_activation_gradient"),
    )
    table.add_numbers("step", "density\n%", "derivative\ndensity %")
    table.add_numbers(*(heading for heading, _ in measures))
    for step, report in zip(run.held_out_steps, run.held_out, strict=True):
        table.add_row(
            f"{step:,}",
            _percent(report.density),
            _percent(report.derivative_density),
            *(_number(_mean([getattr(b, key) for b in report.blocks])) for _, key in measures),
        )
    return table


def _with_error(block: BlockReport, key: str, percent: bool = False) -> str:
    """A measure, and below it its standard error where there is one."""
    value, error = getattr(block, key), block.standard_errors.get(key, math.nan)
    if percent:
        below = f"±{100 * error:.2f}"
        return _percent(value) if math.isnan(error) else f"{_percent(value)}\n{below}"
    return _number(value) if math.isnan(error) else f"{_number(value)}\n±{_number(error)}"


def _deviation(block: BlockReport) -> str:
    """By how much the identity is missed, relatively."""
    by_identity, counted = block.derivative_density_by_identity, block.derivative_density
    if math.isnan(by_identity) or not counted:
        return _NONE
    deviation = abs(by_identity / counted - 1.0)
    return f"{deviation:.0e}" if deviation else "0"


def _percent(share: float) -> str:
    return _NONE if math.isnan(share) else f"{100 * share:.2f}"


def _number(value: float) -> str:
    """Three digits, in eight characters at most."""
    if math.isnan(value):
        return _NONE
    return f"{value:.3g}" if value == 0 or 1e-3 <= abs(value) < 1e4 else f"{value:.1e}"


def _mean(values: Sequence[float]) -> float:
    """Mean of the values that there are."""
    known = [value for value in values if not math.isnan(value)]
    return sum(known) / len(known) if known else math.nan


def _short_names(names: Sequence[str]) -> list[str]:
    """The parts in which each name differs from others: ``encoder.0``, ``decoder.0``."""
    parts = [name.split(".") for name in names]
    short = list(names)
    if len({len(part) for part in parts}) == 1 and len(set(names)) > 1:
        differing = [len(set(column)) > 1 for column in zip(*parts, strict=True)]
        short = [".".join(compress(part, differing)) for part in parts]
    return [name if len(name) <= _NAME_WIDTH else f"…{name[1 - _NAME_WIDTH :]}" for name in short]
