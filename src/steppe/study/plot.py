"""The picture of a study: quality against density, one point an arm at its best setting."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from steppe.files import write_file
from steppe.study.compare import Group, Row, best_groups, groups_of, quality_name, quality_of
from steppe.study.statistics import mean_interval

_MARKERS = "os^vD*Px<>ph"
_BESIDE = 3  # panels in a row


def plot_study(rows: Sequence[Row], path: Path) -> Path:
    """Draw a panel a recipe, with 95 % intervals of both numbers.

    Args:
        rows: of one study, at least one.
        path: a PNG or an SVG.

    Returns:
        The path.

    Raises:
        OutputError: the file cannot be written.
    """
    from matplotlib.figure import Figure  # part of the extra `demo`

    best = best_groups(groups_of(rows))
    recipes = list(dict.fromkeys(group.recipe for group in best))
    arms = list(dict.fromkeys(_name_of(group) for group in best))
    columns = min(_BESIDE, len(recipes))
    lines = math.ceil(len(recipes) / columns)
    figure = Figure(figsize=(5.0 * columns, 4.0 * lines), dpi=120, layout="constrained")
    panels = figure.subplots(lines, columns, squeeze=False).flatten()
    for panel in panels[len(recipes) :]:
        panel.remove()
    for panel, recipe in zip(panels, recipes, strict=False):
        own = [group for group in best if group.recipe == recipe]
        for group in own:
            _draw(panel, group, arms)
        name = quality_name(next(iter(own[0].rows.values())))
        unit = "share" if name == "top1" else "nats"
        panel.set(title=recipe, xlabel="inference density, %", ylabel=f"held-out {name}, {unit}")
        panel.grid(alpha=0.3)
        handles, labels = panel.get_legend_handles_labels()
        once = dict(zip(labels, handles, strict=True))
        panel.legend(once.values(), once.keys(), fontsize="x-small")
    write_file(path, lambda temporary: figure.savefig(temporary))
    return path


def _name_of(group: Group) -> str:
    """The arm without the values that vary in it."""
    return group.arm.partition(",")[0]


def _draw(panel: object, group: Group, arms: Sequence[str]) -> None:
    """One point with its intervals; an arm has one look in all panels, whatever varies in it."""
    density = group.values(lambda row: row["density"])
    quality = group.values(quality_of)
    if not density or not quality:
        return
    index = arms.index(_name_of(group))
    x, y = mean_interval([100 * value for value in density]), mean_interval(quality)
    panel.errorbar(  # type: ignore[attr-defined]
        x.mean,
        y.mean,
        xerr=0.0 if math.isnan(x.half) else x.half,
        yerr=0.0 if math.isnan(y.half) else y.half,
        marker=_MARKERS[index % len(_MARKERS)],
        color=f"C{index % 10}",
        linestyle="",
        capsize=2,
        label=arms[index],
    )
