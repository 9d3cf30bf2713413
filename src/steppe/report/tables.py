"""Tables for the terminal."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from steppe.report.acceleration import shares_of_calls
from steppe.tables import FittingTable

BASELINE = "vanilla"
_SAME = 0.01  # relative difference of two losses that count as the same


def demo_table(summary: dict[str, Any]) -> FittingTable:
    """The result of `steppe demo`, one row per data set and arm.

    Args:
        summary: as `steppe.training.demo.run_demo` returned or wrote it.

    Returns:
        A table of quality, densities in percent, their change relative to ``vanilla``, and time.
    """
    seeds = summary["seeds"]
    title = "density in % of the hidden units"
    if seeds > 1:
        title += f", mean ± std over {seeds} seeds"
    table = FittingTable(title)
    table.add_texts("data", "arm")
    table.add_numbers(
        *("quality", "inference\ndensity", "training\ndensity", "derivative\ndensity", "time")
    )
    for name, data_set in summary["data_sets"].items():
        arms = data_set["arms"]
        for index, (arm, result) in enumerate(arms.items()):
            table.add_row(
                name if index == 0 else data_set["quality"] if index == 1 else "",
                arm,
                *(
                    _spread_below(cell)
                    for cell in (
                        _quality(data_set["quality"], result),
                        _with_change(arms, arm, "density"),
                        _with_change(arms, arm, "training_density"),
                        _percent(result, "derivative_density"),
                    )
                ),
                f"{result['seconds']:.0f} s",
            )
        table.add_section()
    return table


def recipe_table(summary: dict[str, Any]) -> FittingTable:
    """The result of `steppe train`.

    Args:
        summary: as `steppe.training.run_recipe.run_recipe` returned or wrote it.

    Returns:
        A table of held-out quality, densities in percent, steps and time; of an accelerated run
        the kernels and how the calls of its blocks ran.
    """
    table = FittingTable(f"{summary['recipe']}, {summary['arm']}")
    table.add_texts("held-out")
    table.add_numbers("")
    for name, value in summary["quality"].items():
        is_share = name in ("top1", "top5", "accuracy")
        table.add_row(name, f"{100 * value:.1f} %" if is_share else f"{value:.4g}")
    for key in ("density", "derivative_density", "training_density"):
        table.add_row(key.replace("_", " "), f"{100 * summary[key]:.1f} %")
    table.add_row("steps", str(summary["steps"]))
    table.add_row("time", f"{summary['seconds']:.0f} s")
    acceleration = summary.get("acceleration")
    if acceleration:
        calls, reasons = shares_of_calls(acceleration)
        table.add_row("kernels", acceleration["kernels"] or "none")
        table.add_row("calls of its blocks", calls.replace(", ", "\n") or "none was seen")
        table.add_row("why not sparse", reasons.replace(", ", "\n") or "–")
    return table


def speed_table(summary: dict[str, Any]) -> FittingTable:
    """The gain of the sparse kernels on the blocks that `steppe demo` trained and timed.

    Args:
        summary: as `steppe.training.demo.run_demo` returned or wrote it.

    Returns:
        A table of dense time / sparse time, the median over the seeds, one row per data set and
        arm; the sizes and times of a block are those of the first seed. Blocks that are too small
        to gain were not timed, and have no row.
    """
    title = "speed of the trained blocks on one core, dense time / accelerated time"
    table = FittingTable(title)
    table.add_texts("data", "arm")
    table.add_numbers(
        *("d_model,\nd_hidden", "tokens", "candi-\ndates, %"),
        *("training\nstep", "inference", "dense\nms"),
    )
    for name, data_set in summary["data_sets"].items():
        timed = {arm: one for arm, one in data_set["arms"].items() if one["runs"][0]["speed"]}
        for index, (arm, result) in enumerate(timed.items()):
            first, gains = result["runs"][0]["speed"][0], result["speed_up"].values()
            table.add_row(name if index == 0 else "", arm, *_speed_cells(first, gains))
        table.add_section()
    twice = summary.get("accelerated")
    if twice is not None:
        rows = twice["runs"]["accelerated"]["speed"]
        cells = _speed_cells(rows[0], [row["ratio"] for row in rows])
        table.add_row(twice["recipe"], twice["arm"], *cells)
    return table


def accelerated_sentence(summary: dict[str, Any]) -> str:
    """The losses and the times of the model that `steppe demo` trained dense and accelerated.

    Args:
        summary: as `steppe.training.demo.run_demo` returned or wrote it.

    Returns:
        One sentence; empty for a summary of version 1, which has no such model.
    """
    twice = summary.get("accelerated")
    if twice is None:
        return ""
    dense, ours = (twice["runs"][way] for way in ("dense", "accelerated"))
    losses = f"{dense['quality']:.2f} and {ours['quality']:.2f}"
    is_same = abs(ours["quality"] / dense["quality"] - 1) < _SAME
    return (
        f"{twice['recipe']}, {twice['arm']}, dense and accelerated:"
        f" {'the same loss' if is_same else 'losses'} ({losses}),"
        f" {twice['speed_up']:.1f}× faster ({dense['processor_seconds']:.0f} s and"
        f" {ours['processor_seconds']:.0f} s of the processor)"
    )


def _speed_cells(first: dict[str, Any], gains: Iterable[float]) -> list[str]:
    """The cells of a row of times: sizes, gains, and the dense time."""
    return [
        f"{first['d']}, {first['f']}",
        str(first["tokens"]),
        f"{100 * first['candidates']:.1f}",
        *(f"{gain:.2f}" for gain in gains),
        f"{first['dense_ms']:.1f}",
    ]


def _spread_below(cell: str) -> str:
    """``15.0 ± 1.4 (-38%)`` on two lines, so that the table fits into 80 columns."""
    mean, sign, rest = cell.partition(" ± ")
    spread, space, change = rest.partition(" ")
    return f"{mean}{space}{change}\n± {spread}" if sign else cell


def _quality(kind: str, result: dict[str, Any]) -> str:
    if kind == "accuracy":
        return f"{_percent(result, 'accuracy')} %"
    spread = result.get("std", {}).get("loss")
    return f"{result['loss']:.3f}" + ("" if spread is None else f" ± {spread:.3f}")


def _percent(result: dict[str, Any], key: str) -> str:
    spread = result.get("std", {}).get(key)
    return f"{100 * result[key]:.1f}" + ("" if spread is None else f" ± {100 * spread:.1f}")


def _with_change(arms: dict[str, Any], arm: str, key: str) -> str:
    """A density and, behind it, the relative change against the baseline, negative for sparser."""
    text = _percent(arms[arm], key)
    if arm == BASELINE:
        return text
    return f"{text} ({100 * (arms[arm][key] / arms[BASELINE][key] - 1):+.0f}%)"
