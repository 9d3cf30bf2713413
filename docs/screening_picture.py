"""Draws docs/screening.svg: what the int8 screen knows of the units of one token.

python docs/screening_picture.py
"""

from __future__ import annotations

from pathlib import Path

import torch
from matplotlib import rc_context
from matplotlib.figure import Figure

from steppe.ops.screening import candidates, estimate, quantise, slack

WIDTH, UNITS, THRESHOLD = 768, 72, 1.3
COLOURS = {"told to be zero": "#BBBBBB", "candidate": "#E69F00", "active": "#0072B2"}


def main() -> None:
    """Write the picture: Gaussian inputs and weights, the bias a constant."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(1, WIDTH, generator=generator)
    weight = torch.randn(UNITS, WIDTH, generator=generator) / WIDTH**0.5
    bias = torch.full((UNITS,), -THRESHOLD)
    one, other = quantise(x), quantise(weight)
    low = (estimate(one, other) - slack(one, other) - THRESHOLD)[0]
    high = (estimate(one, other) + slack(one, other, bias) - THRESHOLD)[0]
    exact = (x.double() @ weight.double().T - THRESHOLD)[0]
    found = candidates(one, other, bias)[0]
    order = exact.argsort().tolist()
    figure = Figure(figsize=(9.2, 3.4), layout="constrained")
    panel = figure.subplots()
    panel.axhline(0.0, color="black", linewidth=1.0)
    labelled: set[str] = set()
    for place, unit in enumerate(order):
        kind = (
            "active" if exact[unit] > 0 else "candidate" if bool(found[unit]) else "told to be zero"
        )
        label = None if kind in labelled else kind
        labelled.add(kind)
        bounds = [float(low[unit]), float(high[unit])]
        panel.plot([place, place], bounds, color=COLOURS[kind], linewidth=4, label=label)
        panel.plot(place, float(exact[unit]), "o", color="black", markersize=2.5)
    skipped = int((~found).sum())
    panel.set_title(
        f"one token, {UNITS} units, d {WIDTH}: {skipped} are told to be zero by int8,"
        f" {UNITS - skipped} are computed, {int((exact > 0).sum())} are active",
        fontsize=10,
    )
    panel.set_xlabel("units, by their pre-activation")
    panel.set_ylabel("p: what int8 allows (bars), exact (dots)")
    panel.legend(frameon=False, fontsize=9)
    panel.grid(axis="y", alpha=0.3)
    path = Path(__file__).with_name("screening.svg")
    with rc_context({"svg.hashsalt": "steppe", "svg.fonttype": "path"}):
        figure.savefig(path, metadata={"Date": None})


if __name__ == "__main__":
    main()
