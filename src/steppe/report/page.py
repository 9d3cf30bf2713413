"""The HTML page that compares runs: one file that opens offline and loads nothing."""

from __future__ import annotations

import html
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib import metadata, resources
from pathlib import Path
from typing import Any

from steppe.errors import MissingExtraError, RunError
from steppe.files import write_file
from steppe.report.bars import flops_of_products
from steppe.report.charts import (
    density_by_layer,
    density_over_training,
    derivative_against_density,
    neuron_frequency,
    quality_over_training,
    training_against_inference,
)
from steppe.report.figures import Chart
from steppe.report.ratio import ratio_taken_apart
from steppe.report.readings import read_inference
from steppe.report.series import baseline_of
from steppe.report.sheets import (
    acceleration_sheet,
    run_mark,
    settings_sheet,
    speed_sheet,
    summary_table,
)
from steppe.runs import Run

# Nothing may be loaded, whatever a later version of Plotly might want to.
_POLICY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data:"


def write_report(runs: Sequence[Run], path: Path) -> Path:
    """Write a page that compares runs.

    Runs of models with the same blocks are compared with each other, with the first one named
    ``vanilla`` or with the first; those of other models follow below.

    Args:
        runs: at least one.
        path: an HTML file; an older one is replaced.

    Returns:
        The path.

    Raises:
        RunError: no run, or one whose reports are not of the same blocks.
        MissingExtraError: Plotly is not installed.
        OutputError: the file cannot be written.
    """
    _check(runs)
    try:
        from plotly.offline import get_plotlyjs
    except ImportError:
        raise MissingExtraError("the page needs plotly: pip install 'steppe[report]'") from None
    page = _page(runs, get_plotlyjs())
    write_file(path, lambda temporary: temporary.write_text(page, encoding="utf-8"))
    return path


def charts_of(runs: Sequence[Run]) -> list[Chart]:
    """The charts of the page, from top to bottom.

    Args:
        runs: at least one, of models with the same blocks.
    """
    return [
        density_over_training(runs),
        training_against_inference(runs),
        derivative_against_density(runs),
        ratio_taken_apart(runs),
        density_by_layer(runs),
        neuron_frequency(runs),
        quality_over_training(runs),
        flops_of_products(runs),
    ]


def groups_of(runs: Sequence[Run]) -> list[tuple[str, list[Run]]]:
    """Runs that can be compared, and what their names have in common.

    Args:
        runs: in any order, which is kept.

    Returns:
        Groups of runs of one model with blocks of the same number and widths. What the names of all
        of a group begin or end with, between slashes, is taken from them; the beginning is the
        group's title, which may be empty.
    """
    groups: dict[tuple[str, tuple[tuple[int, int], ...]], list[Run]] = {}
    for run in runs:
        alike = [key for key in groups if key[0] == run.model and not (key[1] and _shape(run))]
        key = alike[0] if alike else (run.model, _shape(run))
        groups.setdefault(key, []).append(run)
    return [_with_short_names(group) for group in groups.values()]


def _with_short_names(runs: list[Run]) -> tuple[str, list[Run]]:
    """``digits/vanilla/seed-0`` and ``digits/steppe/seed-0`` become two short names and a title."""
    parts = [run.name.split("/") for run in runs]
    title: list[str] = []
    if len(runs) > 1:
        while all(len(part) > 1 for part in parts) and len({part[0] for part in parts}) == 1:
            title.append(parts[0][0])
            parts = [part[1:] for part in parts]
        while all(len(part) > 1 for part in parts) and len({part[-1] for part in parts}) == 1:
            parts = [part[:-1] for part in parts]
    names = ["/".join(part) for part in parts]
    short = [replace(run, name=name) for run, name in zip(runs, names, strict=True)]
    return "/".join(title), short


def _check(runs: Sequence[Run]) -> None:
    """Refuse what would be drawn block beside block without being the same block."""
    if not runs:
        raise RunError("write_report: expected at least one run, got none")
    for run in runs:
        for steps, reports in ((run.steps, run.training), (run.held_out_steps, run.held_out)):
            blocks = {len(report.blocks) for report in reports}
            if len(steps) != len(reports) or len(blocks) > 1:
                raise RunError(
                    f"{run.name!r}: expected one report a step, all of the same blocks; got"
                    f" {len(steps)} steps and {len(reports)} reports of {sorted(blocks)} blocks"
                )


def _shape(run: Run) -> tuple[tuple[int, int], ...]:
    """Widths of the blocks; empty where nothing was measured."""
    for report in (*run.held_out, *run.training):
        return tuple((block.d_model, block.d_hidden) for block in report.blocks)
    return ()


@dataclass(frozen=True)
class _Part:
    """One group of runs on the page."""

    title: str
    runs: list[Run]
    charts: list[Chart]
    number: int

    @property
    def prefix(self) -> str:
        """The prefix of the ids of its elements."""
        return f"part-{self.number}-" if self.number else ""


def _page(runs: Sequence[Run], plotly: str) -> str:
    parts = [
        _Part(title, group, charts_of(group), number)
        for number, (title, group) in enumerate(groups_of(runs))
    ]
    package = resources.files("steppe.report")
    style = (package / "page.css").read_text(encoding="utf-8")
    script = (package / "page.js").read_text(encoding="utf-8")
    names = [run.name for run in runs]
    title = "steppe: " + ", ".join(names[:3]) + (" …" if len(names) > 3 else "")
    articles = "\n".join(_article(part, alone=len(parts) == 1) for part in parts)
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="{_POLICY}">
<title>{html.escape(title)}</title>
<link rel="icon" href="data:,">
<style>
{style}</style>
</head>
<body>
{_contents(parts)}
<main>
<noscript><p class="note">The charts need JavaScript; the tables beside them do not.</p></noscript>
{articles}
</main>
<footer><p>Made by steppe {metadata.version("steppe")}. This file loads nothing.</p></footer>
<script>
{plotly}
</script>
<script type="application/json" id="charts">{_embedded(parts)}</script>
<script>
{script}</script>
</body>
</html>
"""


def _contents(parts: Sequence[_Part]) -> str:
    """Links to the parts, if there are several."""
    if len(parts) < 2:
        return ""
    links = "".join(
        f'<li><a href="#{part.prefix or "part-0-"}top">{html.escape(_heading(part))}</a></li>'
        for part in parts
    )
    return f'<nav aria-label="Contents"><ul>{links}</ul></nav>'


def _heading(part: _Part) -> str:
    of = f"{_count(len(part.runs), 'run')} of {_models(part.runs)}"
    return f"{part.title}: {of}" if part.title else of


def _article(part: _Part, alone: bool) -> str:
    """One group of runs: the lead, the table, the charts and the settings."""
    sections = "\n".join(_section(part, chart) for chart in part.charts)
    name = "" if alone else f' id="{part.prefix or "part-0-"}top"'
    return f"""<article{name}>
<header>
<h1>{html.escape(_heading(part))}</h1>
<p class="lead">{html.escape(read_inference(part.runs))}</p>
{summary_table(part.runs)}
</header>
<div class="charts">
{sections}
{acceleration_sheet(part.runs, part.prefix)}
{speed_sheet(part.runs, part.prefix)}
{settings_sheet(part.runs, part.prefix)}
</div>
</article>"""


def _section(part: _Part, chart: Chart) -> str:
    """A chart's title, reading, selector, key, places for the figures, and notes."""
    key = part.prefix + chart.key
    title, reading = html.escape(chart.title), html.escape(chart.reading)
    notes = "".join(f'<p class="note">{html.escape(note)}</p>' for note in chart.notes)
    head = f'<h2 id="{key}-title">{title}</h2>\n<p class="reading">{reading}</p>'
    first = html.escape(chart.views[0].reading) if chart.views else ""
    if first:
        notes = f'<p class="note" id="{key}-reading" aria-live="polite">{first}</p>{notes}'
    width = "half" if chart.half else "wide"
    if not chart.views:
        return f'<section class="{width}" id="{key}">\n{head}\n</section>'
    panels = "\n".join(
        f'<div class="panel">{_panel_title(panel.title)}<div class="plot" id="{key}-{index}"'
        f' role="img" aria-label="{html.escape(": ".join((chart.title, panel.title)))}. {reading}"'
        f' style="min-height:{panel.figure["layout"]["height"]}px"></div></div>'
        for index, panel in enumerate(chart.views[0].panels)
    )
    return f"""<section class="{width}" id="{key}">
<figure aria-labelledby="{key}-title">
<figcaption>
{head}
</figcaption>
<div class="controls">{_selector(chart, key)}{_key(part, chart)}</div>
<div class="panels panels-{min(len(chart.views[0].panels), 4)}">
{panels}
</div>
{notes}
</figure>
</section>"""


def _panel_title(title: str) -> str:
    return f'<p class="panel-title">{html.escape(title)}</p>' if title else ""


def _selector(chart: Chart, key: str) -> str:
    """A native list, which every keyboard and screen reader can use."""
    if len(chart.views) < 2:
        return ""
    options = "".join(
        f'<option value="{index}">{html.escape(view.label)}</option>'
        for index, view in enumerate(chart.views)
    )
    name = f"{key}-view"
    return (
        f'<label for="{name}">{html.escape(chart.chooses)} <select id="{name}"'
        f' data-chart="{key}" autocomplete="off">{options}</select></label>'
    )


def _key(part: _Part, chart: Chart) -> str:
    """The legend of the colours; a run's entry is a button that hides it in all charts."""
    base = baseline_of(part.runs)
    entries = [
        f'<li><button type="button" aria-pressed="true" data-run="{part.prefix}{index}"'
        f' title="show or hide in all charts">{run_mark(index, base)}'
        f"{html.escape(part.runs[index].name)}</button></li>"
        for index in chart.runs
    ]
    entries += [
        f'<li><span class="swatch" style="background:{colour}"></span>{html.escape(words)}</li>'
        for colour, words in chart.swatches
    ]
    return f'<ul class="key">{"".join(entries)}</ul>' if entries else ""


def _embedded(parts: Sequence[_Part]) -> str:
    """The figures as JSON that cannot end the script element it stands in."""
    values: list[dict[str, Any]] = [
        {
            "key": part.prefix + chart.key,
            "part": part.prefix,
            "views": [[panel.figure for panel in view.panels] for view in chart.views],
            "readings": [view.reading for view in chart.views],
        }
        for part in parts
        for chart in part.charts
    ]
    text = json.dumps(values, allow_nan=False, separators=(",", ":"), ensure_ascii=False)
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def _models(runs: Sequence[Run]) -> str:
    """The models, with the number of their blocks."""
    models = ", ".join(dict.fromkeys(run.model for run in runs))
    blocks = max(len(run.block_names) for run in runs)
    return f"{models}, {_count(blocks, 'MLP block')}" if blocks else models


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" + ("" if number == 1 else "s")
