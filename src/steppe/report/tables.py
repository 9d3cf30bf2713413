"""Tables for the terminal."""

from __future__ import annotations

from typing import Any

from rich.table import Table

BASELINE = "vanilla"


def demo_table(summary: dict[str, Any]) -> Table:
    """The result of `steppe demo`, one row per data set and arm.

    Args:
        summary: what `steppe.training.demo.run_demo` returned or wrote.

    Returns:
        A table with quality, densities in percent, reductions relative to ``vanilla``, seconds.
    """
    seeds = summary["seeds"]
    title = "density in % of the hidden units"
    if seeds > 1:
        title += f", mean ± std over {seeds} seeds"
    table = Table(title=title, title_justify="left")
    table.add_column("data")
    table.add_column("arm")
    for heading in (
        "quality",
        "inference\ndensity",
        "against\nvanilla",
        "training\ndensity",
        "against\nvanilla",
        "derivative\ndensity",
        "seconds",
    ):
        table.add_column(heading, justify="right")
    for name, data_set in summary["data_sets"].items():
        arms = data_set["arms"]
        baseline = arms[BASELINE]
        for arm, result in arms.items():
            table.add_row(
                name if arm == BASELINE else "",
                arm,
                _quality(data_set["quality"], result),
                _percent(result, "density"),
                _reduction(result, baseline, "density") if arm != BASELINE else "",
                _percent(result, "training_density"),
                _reduction(result, baseline, "training_density") if arm != BASELINE else "",
                _percent(result, "derivative_density"),
                f"{result['seconds']:.0f}",
            )
        table.add_section()
    return table


def demo_markdown(summary: dict[str, Any]) -> str:
    """The result of `steppe demo` as a Markdown table, for the README.

    Args:
        summary: what `steppe.training.demo.run_demo` returned or wrote.

    Returns:
        The lines of the table, each ended.
    """
    lines = [
        "| data | arm | quality | inference density | training density | derivative density |",
        "|---|---|---|---|---|---|",
    ]
    for name, data_set in summary["data_sets"].items():
        baseline = data_set["arms"][BASELINE]
        for arm, result in data_set["arms"].items():
            cells = [name, arm, _quality(data_set["quality"], result)]
            for key in ("density", "training_density", "derivative_density"):
                change = "" if arm == BASELINE else f" ({_reduction(result, baseline, key)})"
                cells.append(f"{_percent(result, key)} %{change}")
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _quality(kind: str, result: dict[str, Any]) -> str:
    if kind == "accuracy":
        return f"{_percent(result, 'accuracy')} % right"
    spread = result.get("std", {}).get("loss")
    text = f"{result['loss']:.3f}" + ("" if spread is None else f" ± {spread:.3f}")
    return f"loss {text}"


def _percent(result: dict[str, Any], key: str) -> str:
    spread = result.get("std", {}).get(key)
    return f"{100 * result[key]:.1f}" + ("" if spread is None else f" ± {100 * spread:.1f}")


def _reduction(result: dict[str, Any], baseline: dict[str, Any], key: str) -> str:
    """Relative change, negative for sparser."""
    return f"{100 * (result[key] / baseline[key] - 1):+.0f} %"
