"""The chart of the arithmetic that is left."""

from __future__ import annotations

from collections.abc import Sequence

from steppe.report.figures import PERCENT, Chart, Figure, Panel, Trace, View, layout, text
from steppe.report.flops import BlockFlops
from steppe.report.readings import percent, read_flops
from steppe.report.series import inference_flops, number, training_flops
from steppe.runs import Run

_PRODUCT_COLOURS = {
    "gate": "#F0E442",
    "up": "#7a7a7a",
    "down": "#56B4E9",
    "∂a": "#D55E00",
    "∂W_down": "#E69F00",
    "∂x": "#CC79A7",
    "∂x of up": "#CC79A7",
    "∂W_up": "#009E73",
    "∂x of gate": "#efc6dd",
    "∂W_gate": "#7fd6b8",
}

_ROW, _BAR = 46, 16  # pixels; the name stands above its bar, which a phone has room for


def flops_of_products(runs: Sequence[Run]) -> Chart:
    """FLOPs of the products at the measured densities, against dense."""
    panels, names = [], []
    for title, count, forward_only in (
        ("inference, % of the dense forward pass", inference_flops, True),
        ("training step, % of the dense step", training_flops, False),
    ):
        counted = [(run.name, flops) for run in runs if (flops := count(run))]
        if counted:
            panels.append(Panel(title, _bars(counted, forward_only)))
            names += [product.name for _, flops in counted for product in flops.products]
    return Chart(
        key="flops",
        title="How much arithmetic is left",
        reading=read_flops(runs),
        views=(View("", tuple(panels)),) if panels else (),
        notes=(
            "FLOPs of the matrix products of the MLP blocks if each skips every zero. With density"
            " ρ in all sparse products, a block of two matrices gains at most 2 / (1 + ρ) in"
            " inference and 6 / (1 + 5 ρ) in training, a gated one 3 / (1 + 2 ρ) and"
            " 9 / (1 + 8 ρ). Attention, memory and the cost of skipping are not counted.",
        ),
        swatches=tuple((_PRODUCT_COLOURS[name], name) for name in dict.fromkeys(names)),
    )


def _bars(counted: Sequence[tuple[str, BlockFlops]], forward_only: bool) -> Figure:
    """Stacked bars, one a run below one for dense, in shares of dense."""
    names = dict.fromkeys(
        product.name
        for _, flops in counted
        for product in flops.products
        if not (forward_only and product.backward)
    )
    rows = [("dense", counted[0][1], True), *((name, flops, False) for name, flops in counted)]
    traces: list[Trace] = []
    for product_name in names:
        widths = [_width(flops, product_name, dense, forward_only) for _, flops, dense in rows]
        traces.append(
            {
                "type": "bar",
                "orientation": "h",
                "name": product_name,
                "marker": {"color": _PRODUCT_COLOURS[product_name]},
                "x": widths,
                "y": list(range(len(rows))),
                "text": [text(name) for name, _, _ in rows],
                "textposition": "none",
                "hovertemplate": "%{text}<br>" + product_name + " %{x:.1%}<extra></extra>",
            }
        )
    totals = [sum(trace["x"][k] or 0.0 for trace in traces) for k in range(len(rows))]
    plain = layout(
        "",
        height=60 + _ROW * len(rows),
        x={"tickformat": PERCENT, "range": [0, 1.02], "tickvals": [0, 0.25, 0.5, 0.75, 1]},
        y={
            "range": [len(rows) - 0.5, -0.8],
            "showticklabels": False,
            "showgrid": False,
        },
        barmode="stack",
        bargap=1 - _BAR / _ROW,
        annotations=[
            {
                "x": 0,
                "y": k,
                "text": f"{percent(total)} {text(name)}",
                "showarrow": False,
                "xanchor": "left",
                "yanchor": "bottom",
                "yshift": _BAR // 2,
            }
            for k, ((name, _, _), total) in enumerate(zip(rows, totals, strict=True))
        ],
    )
    return {"data": traces, "layout": plain}


def _width(flops: BlockFlops, name: str, dense: bool, forward_only: bool) -> float | None:
    """The FLOPs of one product as a share of the dense pass."""
    whole = flops.dense_forward if forward_only else flops.dense_training
    return number(
        sum(p.dense if dense else p.sparse for p in flops.products if p.name == name) / whole
    )
