"""Draws docs/routing.svg: what flows between a block's modules, in its own and in a routed call.

python docs/routing_picture.py
"""

from __future__ import annotations

from pathlib import Path

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

HIDDEN, INPUT, OUTPUT, GREY = "#E69F00", "#0072B2", "#009E73", "#666666"
WIDTH, HEIGHT, STEP = 1.5, 0.62, 2.75
NAMES = ("up", "activation", "dropout", "down")

# Per row: its title, what each module does, and what each arrow carries (text, colour).
ROWS = (
    (
        "the block's own modules: the owner's forward calls one after the other",
        ("x Kᵀ + b", "σ(p)", "drops entries", "a V + c"),
        (
            ("x  [N, D]", INPUT),
            ("p  [N, F]", HIDDEN),
            ("a  [N, F]", HIDDEN),
            ("a  [N, F]", HIDDEN),
            ("z  [N, D]", OUTPUT),
        ),
        (),
    ),
    (
        "a routed call: the same forward calls the same modules, with their classes swapped",
        ("hands x on", "hands x on", "hands x on", "computes MLP(x)"),
        (
            ("x  [N, D]", INPUT),
            ("x  [N, D]", INPUT),
            ("x  [N, D]", INPUT),
            ("x  [N, D]", INPUT),
            ("z  [N, D]", OUTPUT),
        ),
        (
            (0, "decides: Route.plan"),
            (3, "Computation: one op,\non the device's kernels"),
        ),
    ),
)


def main() -> None:
    """Write the picture."""
    figure = Figure(figsize=(9.6, 4.3), layout="constrained")
    panel = figure.subplots()
    for row, parts in enumerate(ROWS):
        _draw(panel, -2.75 * row, *parts)
    panel.set_xlim(-2.1, 3 * STEP + WIDTH + 1.75)
    panel.set_ylim(-4.65, 1.45)
    panel.set_aspect("equal")
    panel.axis("off")
    panel.text(
        1.5 * STEP + WIDTH / 2,
        -2.75 - 1.05,
        "with a gate: gate hands x on,\nup returns 1, by which the owner multiplies",
        fontsize=8.5,
        ha="center",
        va="top",
        color=GREY,
    )
    path = Path(__file__).with_name("routing.svg")
    with rc_context({"svg.hashsalt": "steppe", "svg.fonttype": "path"}):
        figure.savefig(path, metadata={"Date": None})


def _draw(
    panel: Axes,
    y: float,
    title: str,
    does: tuple[str, ...],
    flows: tuple[tuple[str, str], ...],
    notes: tuple[tuple[int, str], ...],
) -> None:
    """One row: the owner around its modules, the arrows between them, and notes below."""
    right = 3 * STEP + WIDTH
    panel.add_patch(
        FancyBboxPatch(
            (-0.3, y - 0.62), right + 0.6, 1.62, boxstyle="round,pad=0.05", fill=False, ls="--",
            ec=GREY,
        )
    )  # fmt: skip
    panel.text(-0.3, y + 1.13, title, fontsize=10, va="bottom")
    panel.text(right + 0.28, y + 0.82, "owner", fontsize=8.5, color=GREY, ha="right", va="center")
    for place, name in enumerate(NAMES):
        x = place * STEP
        panel.add_patch(
            FancyBboxPatch(
                (x, y - HEIGHT / 2),
                WIDTH,
                HEIGHT,
                boxstyle="round,pad=0.04",
                fc="white",
                ec="black",
            )
        )
        panel.text(x + WIDTH / 2, y + 0.13, name, fontsize=9.5, ha="center", va="center")
        panel.text(
            x + WIDTH / 2, y - 0.15, does[place], fontsize=8, ha="center", va="center", color=GREY
        )
    for place, (text, colour) in enumerate(flows):
        start = place * STEP - STEP + WIDTH
        outside = 0.35 if place in (0, len(flows) - 1) else 0.0
        begin = start - outside if place == 0 else start
        end = start + STEP - WIDTH + (outside if place == len(flows) - 1 else 0.0)
        panel.annotate(
            "",
            (end - 0.06, y),
            (begin + 0.08, y),
            arrowprops={"arrowstyle": "-|>", "color": colour, "lw": 2, "shrinkA": 0, "shrinkB": 0},
        )
        panel.text(
            (begin + end) / 2, y + 0.16, text, fontsize=8.5, ha="center", va="bottom", color=colour
        )
    for place, text in notes:
        x = place * STEP + WIDTH / 2
        panel.annotate(
            text,
            (x, y - HEIGHT / 2 - 0.04),
            (x, y - 1.05),
            fontsize=8.5,
            ha="center",
            va="top",
            color=INPUT,
            arrowprops={"arrowstyle": "-", "color": INPUT, "lw": 1},
        )


if __name__ == "__main__":
    main()
