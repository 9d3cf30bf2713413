"""Which factor of the ratio moves an arm's density: each one's change against the baseline."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from steppe.study.compare import Group, Number, Row
from steppe.study.statistics import paired_difference
from steppe.study.terms import PARTS, TERMS

HEADINGS = ("derivative density", "AF", "1 / ‖x‖²", "1 / gradient²")
"""Of `TERMS` as factors: the first is the product of the others."""


@dataclass(frozen=True)
class Factor:
    """A term of an arm over the baseline's, in one tenth of the run.

    Attributes:
        mean: the ratio of the geometric means; of terms that the density is divided by, one over
            it, so that the density's is the product of the others'.
        low: the lower end of its 95 % interval; NaN of one seed.
        high: the upper end.
    """

    mean: float
    low: float
    high: float


def factors_of(group: Group, baseline: Group, part: int) -> list[Factor]:
    """The density's change against the baseline, and the factors that it is the product of.

    Args:
        group: an arm's.
        baseline: of the same recipe.
        part: the tenth of the run, from 0.

    Returns:
        One for each of `TERMS`; none where no seed of both has them.
    """
    factors = []
    for term in TERMS:
        mine, yours = group.pairs(baseline, _logarithm(term, part))
        if not mine:
            return []
        change = paired_difference(mine, yours)
        ends = (change.mean, change.mean - change.half, change.mean + change.half)
        factors.append(Factor(*(math.exp(end) for end in ends)))
    return factors


def why_table(groups: Sequence[Group], baseline: str) -> list[str]:
    """A table in Markdown of the factors of each arm, in the middle of the run and at its end.

    Args:
        groups: one an arm and recipe.
        baseline: name of the arm that they are compared with.

    Returns:
        Its lines; none where no row has terms.
    """
    others = {group.recipe: group for group in groups if group.arm == baseline}
    lines = []
    for group in groups:
        if group.arm == baseline or group.recipe not in others:
            continue
        middle = factors_of(group, others[group.recipe], PARTS // 2)
        end = factors_of(group, others[group.recipe], PARTS - 1)
        if middle and end:
            cells = [_cell(*both) for both in zip(middle, end, strict=True)]
            lines.append(f"| `{group.recipe}` | `{group.arm}` | {' | '.join(cells)} |")
    if not lines:
        return []
    return [f"| recipe | arm | {' | '.join(HEADINGS)} |", "|" + "---|" * (2 + len(TERMS)), *lines]


def _cell(middle: Factor, end: Factor) -> str:
    """A factor in the middle, and at the end with its interval; bold if that leaves 1 out."""
    told = f"×{end.mean:.2f}"
    if not math.isnan(end.low):
        told += f" [{end.low:.2f}, {end.high:.2f}]"
        told = told if end.low <= 1.0 <= end.high else f"**{told}**"
    return f"×{middle.mean:.2f} → {told}"


def _logarithm(term: str, part: int) -> Number:
    """Log of a term, negative for those that the density is divided by."""
    sign = 1.0 if term in TERMS[:2] else -1.0

    def number(row: Row) -> float | None:
        value = row["terms"][term][part] if row.get("terms") else None
        return None if value is None else sign * math.log(value)

    return number
