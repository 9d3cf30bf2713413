"""The tables of the page, as HTML."""

from __future__ import annotations

import html
import json
import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

from steppe.report.acceleration import shares_of_calls
from steppe.report.bench_table import curve_name
from steppe.report.figures import style_of
from steppe.report.readings import format_quality, percent
from steppe.report.series import (
    baseline_of,
    derivative_density,
    inference_density,
    relative_change,
)
from steppe.runs import Run

# Plotly's symbols, for the small marks beside names.
_SYMBOLS = {
    "circle": "M13 7a4 4 0 1 0 8 0a4 4 0 1 0 -8 0z",
    "diamond": "M17 2l5 5l-5 5l-5 -5z",
    "square": "M13 3h8v8h-8z",
    "triangle-up": "M17 2l5 9h-10z",
    "x": "M13 5l2 -2l2 2l2 -2l2 2l-2 2l2 2l-2 2l-2 -2l-2 2l-2 -2l2 -2z",
}


def run_mark(index: int, baseline: int) -> str:
    """A piece of a run's line, with its symbol, as inline SVG.

    Args:
        index: of the run.
        baseline: index of the run that the others are compared with.
    """
    style = style_of(index, baseline)
    dashes = "none" if style.dash == "solid" else style.dash.replace("px", "")
    return (
        '<svg class="mark" viewBox="0 0 34 14" width="34" height="14" aria-hidden="true">'
        f'<path d="M0 7H34" stroke="{style.colour}" stroke-width="2.5"'
        f' stroke-dasharray="{dashes}"/>'
        f'<path d="{_SYMBOLS[style.marker]}" fill="{style.colour}"/></svg>'
    )


def summary_table(runs: Sequence[Run]) -> str:
    """One row a run: quality, three densities with their changes, plug-ins.

    Args:
        runs: at least one.
    """
    base = baseline_of(runs)
    columns = (
        ("inference density", inference_density),
        ("training density", _training_density),
        ("derivative density", derivative_density),
    )
    heads = ["run", "quality", *(name for name, _ in columns), "plug-ins"]
    head = "".join(f'<th scope="col" role="columnheader">{name}</th>' for name in heads)
    rows = []
    for index, run in enumerate(runs):
        densities = [(value(run), value(runs[base])) for _, value in columns]
        cells = [
            _quality(run),
            *(_density(*pair, compared=index != base) for pair in densities),
            _plugins(run),
        ]
        name = f"{run_mark(index, base)}{html.escape(run.name)}"
        rows.append(
            f'<tr role="row"><th scope="row" role="rowheader">{name}</th>'
            + "".join(
                f'<td role="cell" data-label="{label}"><span>{cell}</span></td>'
                for label, cell in zip(heads[1:], cells, strict=True)
            )
            + "</tr>"
        )
    caption = (
        "Density is the share of hidden units that are not zero: inference density on the held-out"
        " data measured last, training density the mean over the measured training steps,"
        " derivative density on the same held-out data."
    )
    if len(runs) > 1:
        caption += f" Changes are relative to {html.escape(runs[base].name)}."
    caption += "".join(map(_coverage, runs))
    return (
        f'<table class="summary" role="table"><caption>{caption}</caption><thead role="rowgroup">'
        f'<tr role="row">{head}</tr></thead><tbody role="rowgroup">{"".join(rows)}</tbody></table>'
    )


def speed_sheet(runs: Sequence[Run], prefix: str = "") -> str:
    """How fast the blocks of the runs ran; nothing where no run was timed.

    Args:
        runs: at least one.
        prefix: of the ids of its elements.
    """
    columns = (
        ("dense, ms", lambda row: f"{row['dense_ms']:.3g}"),
        ("density", lambda row: percent(row["density"])),
        ("candidates", lambda row: percent(row["candidates"])),
        ("accelerated", lambda row: f"{row['ratio']:.2f}×"),
        ("without screening", lambda row: f"{row['unscreened_ratio']:.2f}×"),
        ("its bound", lambda row: f"{row['bound']:.2f}×"),
    )
    rows = [(run.name, row) for run in runs for row in run.speed]
    if not rows:
        return ""
    heads = ["run", "pass", *(name for name, _ in columns)]
    head = "".join(f'<th scope="col">{name}</th>' for name in heads)
    body = "".join(
        f'<tr><th scope="row">{html.escape(name)}</th><td>{_curve(row)}</td>'
        + "".join(f"<td>{show(row)}</td>" for _, show in columns)
        + "</tr>"
        for name, row in rows
    )
    return f"""<section class="wide" id="{prefix}speed">
<h2 id="{prefix}speed-title">How fast the blocks ran</h2>
<p class="reading">Dense time over time on the sparse kernels, the median of rounds in which they
took turns. Candidates are the hidden units that the int8 screen cannot tell to be zero: of the
first product, only they are computed. Without screening it is dense, and the ratio has a
bound.</p>
<div class="scroll" tabindex="0" role="region" aria-labelledby="{prefix}speed-title">
<table class="settings"><thead><tr>{head}</tr></thead>
<tbody>{body}</tbody></table>
</div>
</section>"""


def acceleration_sheet(runs: Sequence[Run], prefix: str = "") -> str:
    """How the training ran on the sparse kernels; nothing where no run was accelerated.

    Args:
        runs: at least one; those that were not accelerated are shown for comparison.
        prefix: of the ids of its elements.
    """
    if not any(run.acceleration for run in runs):
        return ""
    heads = ["run", "seconds of training", "kernels", "calls of its blocks", "why not sparse"]
    head = "".join(f'<th scope="col">{name}</th>' for name in heads)
    body = "".join(
        f'<tr><th scope="row">{html.escape(run.name)}</th>'
        + "".join(f"<td>{html.escape(cell)}</td>" for cell in _accelerated(run))
        + "</tr>"
        for run in runs
    )
    return f"""<section class="wide" id="{prefix}acceleration">
<h2 id="{prefix}acceleration-title">How the training ran</h2>
<p class="reading">Accelerated runs compute the same numbers on sparse kernels. A call is one pass
of one block. It runs dense where too many units are active, or while its gradients are
measured.</p>
<div class="scroll" tabindex="0" role="region" aria-labelledby="{prefix}acceleration-title">
<table class="settings"><thead><tr>{head}</tr></thead>
<tbody>{body}</tbody></table>
</div>
</section>"""


def settings_sheet(runs: Sequence[Run], prefix: str = "") -> str:
    """Settings and versions of the runs, folded up; differences stand first and are marked.

    Args:
        runs: at least one.
        prefix: of the ids of its elements.
    """
    rows = [
        (name, [_shown(values.get(name)) for values in map(_facts, runs)]) for name in _names(runs)
    ]
    differing = [row for row in rows if len(set(row[1])) > 1]
    same = [row for row in rows if len(set(row[1])) == 1]
    body = "".join(
        f'<tr{kind}><th scope="row">{html.escape(name)}</th>'
        + "".join(f"<td>{html.escape(cell)}</td>" for cell in cells)
        + "</tr>"
        for kind, group in ((' class="differs"', differing), ("", same))
        for name, cells in group
    )
    head = "".join(f'<th scope="col">{html.escape(run.name)}</th>' for run in runs)
    reading = f"{len(rows)} recorded"
    if len(runs) > 1:
        reading = f"{len(differing)} of {len(rows)} differ"
    return f"""<section class="wide" id="{prefix}settings">
<h2 id="{prefix}settings-title">Settings and versions</h2>
<details>
<summary>{reading}</summary>
<div class="scroll" tabindex="0" role="region" aria-labelledby="{prefix}settings-title">
<table class="settings"><thead><tr><th scope="col">setting</th>{head}</tr></thead>
<tbody>{body}</tbody></table>
</div>
</details>
</section>"""


def _accelerated(run: Run) -> list[str]:
    """The seconds of a run as the Trainer logged them, its kernels, and how its blocks ran."""
    seconds = [log["train_runtime"] for log in run.logs if "train_runtime" in log]
    time = f"{seconds[-1]:.0f}" if seconds else "–"
    if not run.acceleration:
        return [time, "none", "–", "–"]
    calls, reasons = shares_of_calls(run.acceleration)
    kernels = run.acceleration["kernels"] or "none"
    return [time, kernels, calls or "none was seen", reasons or "–"]


def _curve(row: dict[str, Any]) -> str:
    threads = f"{row['threads']} thread{'s' if row['threads'] > 1 else ''}"
    return html.escape(f"{curve_name(row)}, d {row['d']}, {threads}")


def _density(value: float, old: float, compared: bool) -> str:
    """A density and below it the relative change, negative for sparser."""
    change = relative_change(value, old) if compared else math.nan
    if not math.isfinite(change):
        return percent(value)
    sign = "−" if change < 0 else "+"
    return f'{percent(value)} <span class="change">{sign}{abs(100 * change):.0f}\u00a0%</span>'


def _quality(run: Run) -> str:
    values = [
        f"{html.escape(name)} {format_quality(name, value)}" for name, value in run.quality.items()
    ]
    return "<br>".join(values) or "–"


def _plugins(run: Run) -> str:
    names = [str(plugin.get("plugin", "?")).replace("_", " ") for plugin in run.plugins]
    return html.escape(", ".join(names)) or "none"


def _coverage(run: Run) -> str:
    """The measured part of a model's MLPs; empty if it is all of them."""
    report = next(iter((*run.held_out, *run.training)), None)
    if report is None or not report.coverage < 1.0:
        return ""
    left = "; ".join(report.not_covered)
    return html.escape(
        f" Of {run.name} {percent(report.coverage)} of the MLP parameters were measured, without:"
        f" {left}."
    )


def _training_density(run: Run) -> float:
    return run.training_density


def _facts(run: Run) -> dict[str, Any]:
    """The facts of a run besides its measures, by name."""
    activations = Counter(run.activations)
    return {
        "model": run.model,
        "tokens per sample": f"{run.tokens_per_sample:.4g}",
        "activations": ", ".join(f"{count} × {name}" for name, count in activations.items()),
        **{
            f"plug-in {plugin.get('plugin', '?')}": {
                key: value for key, value in plugin.items() if key != "plugin"
            }
            for plugin in run.plugins
        },
        **run.settings,
        **{f"version of {name}": version for name, version in run.versions.items()},
    }


def _names(runs: Sequence[Run]) -> list[str]:
    return list(dict.fromkeys(name for run in runs for name in _facts(run)))


def _shown(value: Any) -> str:
    """A setting on one line; a dash where the run has none."""
    if value is None:
        return "–"
    return (
        value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, sort_keys=True)
    )
