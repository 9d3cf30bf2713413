"""The charts of the page, one function a chart; that of the ratio is in a file of its own."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from steppe.measures.report import FREQUENCY_EDGES, BlockReport, Report
from steppe.report.figures import (
    PERCENT,
    STEP,
    Chart,
    Figure,
    Panel,
    Style,
    Trace,
    View,
    diagonal,
    layout,
    line,
    over_steps,
    shares,
    style_of,
    text,
)
from steppe.report.readings import (
    read_density,
    read_derivative,
    read_frequency,
    read_gap,
    read_layers,
    read_quality,
)
from steppe.report.series import (
    baseline_of,
    curve_of,
    inference_density,
    last_report,
    number,
    pick,
)
from steppe.runs import Run

CURVE_POINTS = 300  # more than a chart has pixels to tell apart
_CLOUD_POINTS = 1500  # a run; a scatter plot of more is slow and a blot
_HEAT_COLUMNS = 160
_QUALITIES = (
    ("loss", "training loss"),
    ("eval_loss", "held-out loss"),
    ("eval_accuracy", "held-out accuracy"),
)


def density_over_training(runs: Sequence[Run]) -> Chart:
    """Density of the training batches, of the whole model and of each block."""
    drawn = tuple(i for i, run in enumerate(runs) if run.training)
    views = []
    if drawn:
        names = runs[drawn[0]].block_names
        views = [View("all blocks", (_density_panel(runs, drawn, None),))]
        views += [
            View(f"{index + 1}: {name}", (_density_panel(runs, drawn, index),))
            for index, name in enumerate(names)
        ]
    return Chart(
        key="density",
        title="How sparse the runs become",
        reading=read_density(runs),
        views=tuple(views),
        notes=(
            "Density is the share of hidden units that are not zero: lower is sparser.",
            *_thinned(runs, CURVE_POINTS),
            *_missing(runs, drawn, "no training step was measured"),
        ),
        runs=drawn,
        chooses="block",
    )


def training_against_inference(runs: Sequence[Run]) -> Chart:
    """Training density against inference density, one point a run."""
    base = baseline_of(runs)
    drawn = tuple(
        i
        for i, run in enumerate(runs)
        if math.isfinite(run.training_density) and math.isfinite(inference_density(run))
    )
    traces = []
    for i in drawn:
        style = style_of(i, base)
        point = line(i, runs[i].name, style, [_x(runs[i])], [runs[i].training_density])
        point["marker"]["size"] = 14
        point["mode"] = "markers"
        point["hovertemplate"] = "%{fullData.name}<br>inference %{x}, training %{y}<extra></extra>"
        traces.append(point)
    most = 1.12 * max((max(_x(runs[i]), runs[i].training_density) for i in drawn), default=1.0)
    figure = _square([diagonal(most), *traces], most, "inference density")
    return Chart(
        key="gap",
        title="In training and at inference",
        reading=read_gap(runs),
        views=(View("", (Panel("training density", figure),)),) if drawn else (),
        notes=(
            "On the dotted line both are equal; above it, inference is sparser.",
            *_missing(runs, drawn, "one of the two densities was not measured"),
        ),
        runs=drawn,
        half=True,
    )


def derivative_against_density(runs: Sequence[Run]) -> Chart:
    """Derivative density against density, one point a block and step."""
    held_out = not any(run.training for run in runs)
    base = baseline_of(runs)
    traces, most = [], 0.0
    drawn = tuple(i for i, run in enumerate(runs) if curve_of(run, held_out)[1])
    for i in drawn:
        blocks = len(runs[i].block_names)
        steps, reports = curve_of(runs[i], held_out)
        chosen = pick(len(reports), max(2, _CLOUD_POINTS // max(1, blocks)))
        points = [(block, steps[k]) for k in chosen for block in reports[k].blocks]
        most = max([most, *(_larger(block) for block, _ in points)])
        traces.append(_cloud(i, runs[i].name, style_of(i, base), points))
    most = min(1.0, 1.08 * most) or 1.0
    figure = _square([diagonal(most), *traces], most, "density")
    return Chart(
        key="derivative",
        title="What the backward pass can skip",
        reading=read_derivative(runs, held_out),
        views=(View("", (Panel("derivative density", figure),)),) if drawn else (),
        notes=(
            "One point for each block and measured step. Below the dotted line, the backward pass"
            " can skip more than the forward pass.",
        ),
        runs=drawn,
        half=True,
    )


def density_by_layer(runs: Sequence[Run]) -> Chart:
    """A heat map of block and step for each run, on one colour scale."""
    held_out = not any(run.training for run in runs)
    drawn = tuple(i for i, run in enumerate(runs) if curve_of(run, held_out)[1])
    chosen = {i: _heat_reports(runs[i], held_out) for i in drawn}
    most = max(
        (number(b.density) or 0.0 for i in drawn for _, r in chosen[i] for b in r.blocks),
        default=0.0,
    )
    panels = tuple(Panel(runs[i].name, _heat_map(runs[i], chosen[i], most or 1.0)) for i in drawn)
    return Chart(
        key="layers",
        title="Where in the model it is sparse",
        reading=read_layers(runs),
        views=(View("", panels),) if drawn else (),
        notes=("Density of each block over training, block 1 at the bottom, one colour scale.",),
    )


def neuron_frequency(runs: Sequence[Run]) -> Chart:
    """How many hidden units are active how often."""
    base = baseline_of(runs)
    traces, drawn = [], []
    for i, run in enumerate(runs):
        report = last_report(run)
        counts = [sum(column) for column in zip(*_histograms(report), strict=True)]
        if sum(counts):
            drawn.append(i)
            traces.append(_steps(i, run.name, style_of(i, base), counts))
    ticks = ["never", *(_round_percent(edge) for edge in FREQUENCY_EDGES)]
    shown = [0, *range(5, len(ticks), 4)]
    axis = {"tickvals": shown, "ticktext": [ticks[k] for k in shown], "tickangle": 0}
    plain = layout("active on at most this share of tokens", x=axis, y=shares())
    return Chart(
        key="frequency",
        title="How often single units are active",
        reading=read_frequency(runs),
        views=(
            (View("", (Panel("share of hidden units", {"data": traces, "layout": plain}),)),)
            if drawn
            else ()
        ),
        notes=("All blocks together; each step to the right allows 1.8 times as many tokens.",),
        runs=tuple(drawn),
    )


def quality_over_training(runs: Sequence[Run]) -> Chart:
    """Loss and accuracy as the Trainer logged them."""
    base = baseline_of(runs)
    panels, drawn = [], set()
    for key, title in _QUALITIES:
        traces = []
        for i, run in enumerate(runs):
            points = [(log.get("step"), log.get(key)) for log in run.logs]
            pairs = [(x, y) for x, y in points if _is_number(x) and _is_number(y)]
            pairs = [pairs[k] for k in pick(len(pairs), CURVE_POINTS)]
            if pairs:
                drawn.add(i)
                x, y = zip(*pairs, strict=True)
                traces.append(line(i, run.name, style_of(i, base), x, y))
        if traces:
            axis: dict[str, Any] = {"hoverformat": ".4g"}
            if key == "eval_accuracy":
                axis = {"tickformat": PERCENT, "hoverformat": ".2%"}
            panels.append(Panel(title, {"data": traces, "layout": over_steps(axis, height=280)}))
    return Chart(
        key="quality",
        title="What it costs in quality",
        reading=read_quality(runs) + ("" if panels else " No loss was logged during training."),
        views=(View("", tuple(panels)),) if panels else (),
        runs=tuple(sorted(drawn)),
    )


def _density_panel(runs: Sequence[Run], drawn: Sequence[int], index: int | None) -> Panel:
    """The curves of one block, or of the whole model."""
    base = baseline_of(runs)
    traces = []
    for i in drawn:
        chosen = pick(len(runs[i].training), CURVE_POINTS)
        reports = [runs[i].training[k] for k in chosen]
        densities = [r.density if index is None else r.blocks[index].density for r in reports]
        steps = [runs[i].steps[k] for k in chosen]
        traces.append(line(i, runs[i].name, style_of(i, base), steps, densities))
    title = "density of the training batches"
    return Panel(title, {"data": traces, "layout": over_steps(shares(), height=360)})


def _square(traces: list[Trace], most: float, x_title: str) -> Figure:
    """Two axes in percent with one range."""
    axis = {"tickformat": PERCENT, "hoverformat": ".2%", "range": [0, most], "nticks": 6}
    return {"data": traces, "layout": layout(x_title, height=360, x=axis, y=axis)}


def _cloud(run: int, name: str, style: Style, points: Sequence[tuple[BlockReport, int]]) -> Trace:
    """Small marks, and what they are of."""
    return {
        "type": "scatter",
        "name": text(name),
        "meta": {"run": run},
        "mode": "markers",
        "marker": {"color": style.colour, "symbol": style.marker, "size": 6, "opacity": 0.55},
        "x": [number(block.density) for block, _ in points],
        "y": [number(block.derivative_density) for block, _ in points],
        "text": [f"{text(block.name)}, step {step:,}" for block, step in points],
        "hovertemplate": (
            "%{fullData.name}<br>%{text}<br>density %{x}<br>derivative density %{y}<extra></extra>"
        ),
    }


def _heat_reports(run: Run, held_out: bool) -> list[tuple[int, Report]]:
    """The steps that a heat map shows."""
    steps, reports = curve_of(run, held_out)
    return [(steps[k], reports[k]) for k in pick(len(reports), _HEAT_COLUMNS)]


def _heat_map(run: Run, chosen: Sequence[tuple[int, Report]], most: float) -> Figure:
    blocks = len(run.block_names)
    trace = {
        "type": "heatmap",
        "x": [str(step) for step, _ in chosen] if len(chosen) == 1 else [s for s, _ in chosen],
        "y": list(range(1, blocks + 1)),
        "z": [[number(report.blocks[k].density) for _, report in chosen] for k in range(blocks)],
        "text": [[text(name)] * len(chosen) for name in run.block_names],
        "colorscale": "Viridis",
        "zmin": 0,
        "zmax": number(most),
        "colorbar": {"tickformat": PERCENT, "thickness": 10, "outlinewidth": 0, "xpad": 6},
        "hovertemplate": "%{text}<br>step %{x}<br>density %{z:.2%}<extra></extra>",
    }
    axis = {"tickformat": "d", "nticks": 10, "showgrid": False}
    if blocks <= 10:
        axis = {"tickvals": list(range(1, blocks + 1)), "showgrid": False}
    plain = layout(
        STEP,
        height=min(360, 150 + 12 * blocks),
        x={"showgrid": False, "nticks": 6},
        y=axis,
        y_title="block",
    )
    return {"data": [trace], "layout": plain}


def _histograms(report: Report | None) -> list[tuple[int, ...]]:
    return [block.neuron_frequency for block in report.blocks] if report else []


def _steps(run: int, name: str, style: Style, counts: Sequence[int]) -> Trace:
    """Shares of the units as flat steps around each bin."""
    units = sum(counts)
    trace = line(run, name, style, range(len(counts)), [count / units for count in counts])
    edges = [f"active on ≤ {_round_percent(edge)} of tokens" for edge in FREQUENCY_EDGES]
    named = zip(["never active", *edges], counts, strict=True)
    trace["line"]["shape"] = "hvh"
    trace["text"] = [f"{tick}: {count:,} units" for tick, count in named]
    trace["hovertemplate"] = "%{fullData.name}<br>%{text} (%{y})<extra></extra>"
    return trace


def _round_percent(edge: float) -> str:
    """Two digits, and 100 without an exponent."""
    return f"{float(f'{100 * edge:.2g}'):g}\u00a0%"


def _thinned(runs: Sequence[Run], most: int) -> tuple[str, ...]:
    """A note where a curve leaves measured steps out."""
    longest = max((len(run.training) for run in runs), default=0)
    if longest <= most:
        return ()
    return (f"Drawn at {most} of up to {longest:,} measured steps; the line above uses all.",)


def _missing(runs: Sequence[Run], drawn: Sequence[int], why: str) -> tuple[str, ...]:
    """A note where runs are not drawn."""
    names = [run.name for i, run in enumerate(runs) if i not in drawn]
    return (f"Not drawn, since {why}: {', '.join(names)}.",) if names and drawn else ()


def _x(run: Run) -> float:
    return inference_density(run)


def _larger(block: BlockReport) -> float:
    return max(number(block.density) or 0.0, number(block.derivative_density) or 0.0)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
