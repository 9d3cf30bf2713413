"""The chart that takes the ratio apart, which is what the library explains density with."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from steppe.measures.report import BlockReport
from steppe.report.figures import (
    Chart,
    Panel,
    Trace,
    View,
    band,
    line,
    over_steps,
    shares,
    style_of,
)
from steppe.report.readings import read_identity, read_terms
from steppe.report.series import NAN, baseline_of, curve_of, has_backward, number, pick
from steppe.runs import Run

RATIO_POINTS = 120  # a curve; there are six for each block and run
_SYMBOLS = 30  # a curve; more would hide the line that they are on
_TITLES = (
    "AF per hidden entry (the numerator)",
    "mean squared input norm ‖x‖²",
    "squared activation gradient, weighted by ‖x‖²",
    "quotient (symbols) over the measured derivative density (line)",
)


def ratio_taken_apart(runs: Sequence[Run]) -> Chart:
    """Numerator and denominator over training, and their quotient over the measured density."""
    held_out = not any(has_backward(run.training) for run in runs)
    drawn = tuple(i for i, run in enumerate(runs) if has_backward(curve_of(run, held_out)[1]))
    names = runs[drawn[0]].block_names if drawn else ()
    views = tuple(
        View(
            f"{index + 1}: {name}",
            _panels(runs, drawn, index, held_out),
            read_terms(runs, drawn, index, held_out),
        )
        for index, name in enumerate(names)
    )
    missing = [run.name for i, run in enumerate(runs) if i not in drawn]
    notes = [
        "Derivative density = AF / (‖x‖² · gradient): flatter minima lower the numerator, larger"
        " inputs and gradients raise the denominator; either makes the block sparser.",
        f"Measured on {'held-out data' if held_out else 'training batches'}; bands are one standard"
        " error over samples, where it is known.",
    ]
    if any(len(curve_of(runs[i], held_out)[1]) > RATIO_POINTS for i in drawn):
        notes.append(f"Drawn at {RATIO_POINTS} of the measured steps; the line above uses all.")
    if missing:
        notes.append(f"Not drawn, since no backward pass was measured: {', '.join(missing)}.")
    return Chart(
        key="ratio",
        title="Why it is sparse: the ratio taken apart",
        reading=read_identity(runs, held_out),
        views=views,
        notes=tuple(notes) if views else (),
        runs=drawn,
        chooses="block",
    )


def _panels(
    runs: Sequence[Run], drawn: Sequence[int], index: int, held_out: bool
) -> tuple[Panel, ...]:
    """Three terms on logarithmic axes, and the quotient."""
    base = baseline_of(runs)
    log = {"type": "log", "exponentformat": "power", "nticks": 6, "hoverformat": ".3~g"}
    terms: list[list[Trace]] = [[], [], []]
    quotients: list[Trace] = []
    for i in drawn:
        steps, reports = curve_of(runs[i], held_out)
        chosen = [k for k in pick(len(reports), RATIO_POINTS) if index < len(reports[k].blocks)]
        x = [steps[k] for k in chosen]
        blocks = [reports[k].blocks[index] for k in chosen]
        style = style_of(i, base)
        for traces, (value, error) in zip(terms, _TERMS, strict=True):
            y = [_positive(value(block)) for block in blocks]
            traces += band(i, style, x, y, [error(block) for block in blocks])
            traces.append(line(i, runs[i].name, style, x, y))
        quotients += _over_measured(line(i, runs[i].name, style, x, []), blocks)
    figures = [{"data": traces, "layout": over_steps(log, height=260)} for traces in terms]
    figures.append({"data": quotients, "layout": over_steps(shares(), height=260)})
    return tuple(Panel(title, figure) for title, figure in zip(_TITLES, figures, strict=True))


def _over_measured(plain: Trace, blocks: Sequence[BlockReport]) -> list[Trace]:
    """The measured density as a pale line, the quotient as symbols on it."""
    measured = {
        **plain,
        "name": f"{plain['name']}, measured",
        "mode": "lines",
        "line": {**plain["line"], "dash": "solid", "width": 5},
        "opacity": 0.35,
        "y": [number(block.derivative_density) for block in blocks],
    }
    quotient = {
        **plain,
        "name": f"{plain['name']}, quotient",
        "mode": "markers",
        "marker": {**plain["marker"], "size": 6, "maxdisplayed": _SYMBOLS},
        "y": [number(block.derivative_density_by_identity) for block in blocks],
    }
    return [measured, quotient]


def _af(block: BlockReport) -> float:
    return block.AF_per_entry


def _af_error(block: BlockReport) -> float:
    return block.standard_errors.get("AF_per_entry", NAN)


def _norm(block: BlockReport) -> float:
    return block.squared_input_norm


def _norm_error(block: BlockReport) -> float:
    return block.standard_errors.get("squared_input_norm", NAN)


def _gradient(block: BlockReport) -> float:
    return block.weighted_activation_gradient


def _gradient_error(block: BlockReport) -> float:
    return block.standard_errors.get("weighted_activation_gradient", NAN)


def _positive(value: float) -> float:
    return value if value > 0 else NAN


_Value = Callable[[BlockReport], float]
_TERMS: tuple[tuple[_Value, _Value], ...] = (
    (_af, _af_error),
    (_norm, _norm_error),
    (_gradient, _gradient_error),
)
