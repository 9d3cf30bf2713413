"""Plots for a file."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

from steppe.bench import break_even
from steppe.errors import MissingExtraError
from steppe.files import write_file
from steppe.report.bench_table import curve_name

# Okabe and Ito's palette: told apart with any colour vision, and in grey by the dashes.
_STYLES = (("#000000", "-"), ("#E69F00", "--"), ("#0072B2", "-"), ("#009E73", "-."))
_SMOOTHING = 5  # counted steps


def plot_training_density(summary: dict[str, Any], path: Path) -> Path:
    """Density over training, one panel per data set, one curve per arm.

    Args:
        summary: as `steppe.training.demo.run_demo` returned or wrote it.
        path: a PNG.

    Returns:
        The path.

    Raises:
        MissingExtraError: matplotlib is not installed.
        OutputError: the file cannot be written.
    """
    data_sets = summary["data_sets"]
    figure = _figure_class()(figsize=(5.2 * len(data_sets), 4.0), dpi=120, layout="constrained")
    panels = figure.subplots(1, len(data_sets), squeeze=False)[0]
    for panel, (name, data_set) in zip(panels, data_sets.items(), strict=True):
        draw_training_density(panel, name, data_set)
    write_file(path, lambda temporary: figure.savefig(temporary, format="png"))
    return path


def draw_training_density(panel: Any, name: str, data_set: dict[str, Any]) -> None:
    """Draw the density over training on one data set, one curve a run.

    Args:
        panel: axes of matplotlib.
        name: of the data set.
        data_set: of the summary of `steppe.training.demo.run_demo`.
    """
    for (arm, result), (colour, dash) in zip(data_set["arms"].items(), _STYLES, strict=False):
        for index, run in enumerate(result["runs"]):
            steps, densities = zip(*run["history"], strict=True)
            label = f"{arm}, {100 * result['density']:.1f} % held-out" if index == 0 else None
            smooth = _running_mean([100 * density for density in densities])
            panel.plot(steps, smooth, dash, color=colour, label=label, linewidth=1.6)
    quality = ", ".join(
        f"{arm} {_quality(data_set['quality'], result)}" for arm, result in data_set["arms"].items()
    )
    panel.set_title(f"{name}\n{quality}", fontsize=9)
    panel.set_xlabel("optimizer step")
    panel.set_ylabel("active hidden units, % of the training batch")
    panel.set_ylim(bottom=0)
    panel.grid(alpha=0.3)
    panel.legend(frameon=False, fontsize=9)


def plot_bench(rows: Sequence[dict[str, Any]], path: Path) -> Path:
    """Dense time / sparse time against the density, screened and not, the bound and the line at 1.

    Where a curve falls to the line is marked, and said in the legend.

    Args:
        rows: of `steppe.bench.time_blocks`.
        path: a PNG.

    Returns:
        The path.

    Raises:
        MissingExtraError: matplotlib is not installed.
        OutputError: the file cannot be written.
    """
    curves: dict[str, list[dict[str, Any]]] = {}
    for row in sorted(rows, key=lambda row: row["density"]):
        curves.setdefault(curve_name(row), []).append(row)
    figure = _figure_class()(figsize=(6.4, 4.4), dpi=120, layout="constrained")
    panel = figure.subplots()
    panel.axhline(1.0, color="0.5", linewidth=1.0)
    for (name, curve), (colour, dash) in zip(curves.items(), cycle(_STYLES), strict=False):
        densities = [100 * row["density"] for row in curve]
        ratios = [row["ratio"] for row in curve]
        lows, highs = zip(*(row["quartiles"] for row in curve), strict=True)
        margins = [
            [max(ratio - low, 0.0) for ratio, low in zip(ratios, lows, strict=True)],
            [max(high - ratio, 0.0) for ratio, high in zip(ratios, highs, strict=True)],
        ]
        crossing = break_even(curve)
        label = name if crossing is None else f"{name}: even at {100 * crossing:.0f} %"
        panel.errorbar(
            densities, ratios, margins, fmt=f"{dash}o", color=colour, label=label, markersize=4
        )
        panel.plot(densities, [row["bound"] for row in curve], ":", color=colour, linewidth=1.0)
        unscreened = [row["unscreened_ratio"] for row in curve]
        panel.plot(densities, unscreened, dash, color=colour, linewidth=0.8, alpha=0.5)
        if crossing is not None:
            panel.plot([100 * crossing], [1.0], "x", color=colour, markersize=9)
    panel.set_xscale("log")
    panel.minorticks_off()
    ticks = sorted({float(f"{100 * row['density']:.2g}") for row in rows if row["density"]})
    panel.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    panel.set_xlabel("active hidden units, %")
    panel.set_ylabel("dense time / sparse time (thin: unscreened, dotted: its bound)")
    panel.set_ylim(bottom=0)
    panel.grid(alpha=0.3)
    panel.legend(frameon=False, fontsize=9)
    write_file(path, lambda temporary: figure.savefig(temporary, format="png"))
    return path


def _figure_class() -> Any:
    """Matplotlib's figure, which needs no screen."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise MissingExtraError("plots need matplotlib: pip install 'steppe[demo]'") from None
    return Figure


def _quality(kind: str, result: dict[str, Any]) -> str:
    return f"{100 * result['accuracy']:.1f} %" if kind == "accuracy" else f"{result['loss']:.3f}"


def _running_mean(values: list[float]) -> list[float]:
    """Mean over the last few values."""
    return [
        sum(values[max(0, i + 1 - _SMOOTHING) : i + 1]) / min(i + 1, _SMOOTHING)
        for i in range(len(values))
    ]
