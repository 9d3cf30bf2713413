"""The charts as Plotly figures in JSON values, so that making one needs no Plotly.

Colours of text, grid and background are left to ``page.js``, which knows whether it is dark.
"""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from steppe.report.series import number

Figure = dict[str, Any]
Trace = dict[str, Any]

# Okabe and Ito's palette without black and yellow, which vanish on a dark or a light page; the
# first, grey, is for the run that the others are compared with.
COLOURS = ("#808080", "#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
# Told apart without colour too. Their numbers share no divisor with that of the colours, so that
# forty-two runs look different.
DASHES = (
    "6px,4px",
    "solid",
    "14px,3px",
    "9px,3px,2px,3px",
    "2px,3px",
    "14px,3px,2px,3px,2px,3px",
)
MARKERS = ("circle", "diamond", "square", "triangle-up", "x")
NEUTRAL = "#888888"  # grey enough for both themes
PERCENT = "~%"
STEP = "optimizer step"
_LONGEST = 48  # characters of a name in a chart; the page has it whole
_SYMBOLS = 12  # a curve; enough to tell it by them, and few enough to see it


@dataclass(frozen=True)
class Style:
    """How a run looks in every chart.

    Attributes:
        colour: ``#RRGGBB``.
        dash: lengths of dashes and gaps, as Plotly and SVG have them, or ``solid``.
        marker: a name of Plotly's.
    """

    colour: str
    dash: str
    marker: str


@dataclass(frozen=True)
class Panel:
    """One figure of a chart.

    Attributes:
        title: plain text above it, which says what the vertical axis shows; may be empty.
        figure: ``data`` and ``layout`` for Plotly, JSON values.
    """

    title: str
    figure: Figure


@dataclass(frozen=True)
class View:
    """The view of a chart at one choice of its selector.

    Attributes:
        label: the choice, plain text.
        panels: as many in each view of a chart.
        reading: one line that follows from what this view shows; may be empty.
    """

    label: str
    panels: tuple[Panel, ...]
    reading: str = ""


@dataclass(frozen=True)
class Chart:
    """A chart with what is said about it; everything plain text.

    Attributes:
        key: its place in the page.
        title: in plain words.
        reading: one line that follows from the data; without a view, why there is none.
        views: the choices; none for no data.
        notes: how to read it, and what is missing.
        runs: indices of the runs in its key.
        swatches: other entries of its key, colour and text.
        chooses: the name of the choice.
        half: whether it is as clear at half the width.
    """

    key: str
    title: str
    reading: str
    views: tuple[View, ...] = ()
    notes: tuple[str, ...] = ()
    runs: tuple[int, ...] = ()
    swatches: tuple[tuple[str, str], ...] = ()
    chooses: str = ""
    half: bool = False


def style_of(index: int, baseline: int) -> Style:
    """How a run looks.

    Args:
        index: of the run.
        baseline: index of the run that gets the first style.
    """
    place = 0 if index == baseline else index + 1 if index < baseline else index
    return Style(
        COLOURS[place % len(COLOURS)], DASHES[place % len(DASHES)], MARKERS[place % len(MARKERS)]
    )


def text(words: str) -> str:
    """Text that Plotly, which reads a little HTML and TeX, shows as it is; shortened if long."""
    if len(words) > _LONGEST:
        half = _LONGEST // 2
        words = f"{words[:half]}…{words[-half:]}"
    return html.escape(words, quote=False).replace("$", "&#36;")


def line(run: int, name: str, style: Style, x: Sequence[float], y: Sequence[float]) -> Trace:
    """A curve of a run, with symbols on some of its points.

    Args:
        run: its index.
        name: its name.
        style: its look.
        x: finite numbers.
        y: numbers; one that is not finite is a gap.
    """
    return {
        "type": "scatter",
        "name": text(name),
        "meta": {"run": run},
        "mode": "lines+markers",
        "line": {"color": style.colour, "dash": style.dash, "width": 2},
        "marker": {
            "color": style.colour,
            "symbol": style.marker,
            "size": 7,
            "maxdisplayed": _SYMBOLS if len(x) > 2 * _SYMBOLS else 0,
        },
        "x": list(x),
        "y": [number(value) for value in y],
        "hovertemplate": "%{fullData.name}: %{y}<extra></extra>",
    }


def band(
    run: int, style: Style, x: Sequence[float], y: Sequence[float], errors: Sequence[float]
) -> list[Trace]:
    """The area one standard error around a curve, where the error is known; no trace if nowhere.

    What is below zero, which a logarithmic axis cannot show, is cut at a tenth of the value.
    """
    points = [
        (place, value, error)
        for place, value, error in zip(x, y, errors, strict=True)
        if number(value) is not None and number(error)
    ]
    if len(points) < 2:
        return []
    upper = [number(value + error) for _, value, error in points]
    lower = [number(max(value - error, value / 10)) for _, value, error in points]
    places = [place for place, _, _ in points]
    return [
        {
            "type": "scatter",
            "name": "",
            "meta": {"run": run},
            "mode": "lines",
            "line": {"width": 0},
            "fill": "toself",
            "fillcolor": f"rgba({_rgb(style.colour)},0.22)",
            "hoverinfo": "skip",
            "x": places + places[::-1],
            "y": upper + lower[::-1],
        }
    ]


def diagonal(most: float) -> Trace:
    """The line on which both axes agree."""
    return {
        "type": "scatter",
        "name": "equal",
        "mode": "lines",
        "line": {"color": NEUTRAL, "dash": "dot", "width": 1.5},
        "hoverinfo": "skip",
        "x": [0, most],
        "y": [0, most],
    }


def layout(
    x_title: str,
    *,
    height: int = 320,
    y_title: str = "",
    x: dict[str, Any] | None = None,
    y: dict[str, Any] | None = None,
    **more: Any,
) -> dict[str, Any]:
    """The layout that the charts share.

    Args:
        x_title: of the horizontal axis.
        height: pixels.
        y_title: of the vertical axis, where the title of the panel does not say it.
        x: more of the horizontal axis, in Plotly's words.
        y: more of the vertical axis.
        more: more of the layout.
    """
    return {
        "height": height,
        "margin": {"l": 8, "r": 14, "t": 10, "b": 8},
        "showlegend": False,
        "hovermode": "closest",
        "xaxis": {
            "title": {"text": x_title, "standoff": 10},
            "automargin": True,
            "zeroline": False,
            **(x or {}),
        },
        "yaxis": {
            "title": {"text": y_title, "standoff": 10},
            "automargin": True,
            "zeroline": False,
            **(y or {}),
        },
        **more,
    }


def over_steps(y: dict[str, Any], height: int = 320) -> dict[str, Any]:
    """The layout of curves over training; all runs are told at the step under the pointer."""
    return layout(
        STEP,
        height=height,
        x={
            "unifiedhovertitle": {"text": "step %{x:,}"},
            "hoverformat": ",",
            "rangemode": "tozero",  # around a single step Plotly would put fractions of steps
        },
        y=y,
        hovermode="x unified",
    )


def shares() -> dict[str, Any]:
    """A vertical axis in percent, from zero."""
    return {"tickformat": PERCENT, "hoverformat": ".2%", "rangemode": "tozero"}


def _rgb(colour: str) -> str:
    return ",".join(str(int(colour[i : i + 2], 16)) for i in (1, 3, 5))
