"""Which factor of the ratio moves an arm's density: each one's change against the baseline."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from steppe.study.compare import Group, Number, Row
from steppe.study.statistics import mean_interval, paired_difference
from steppe.study.terms import PARTS, TERMS

HEADINGS = ("derivative density", "AF", "1 / ‖x‖²", "1 / gradient²")
"""Of `TERMS` as factors: the first is the product of the others."""


COURSE = (0, 1, 3, 5, 7, PARTS - 1)
"""The tenths of a run that its course is shown by, from 0."""


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


def course_table(groups: Sequence[Group]) -> list[str]:
    """A table in Markdown of the derivative density in the course of training.

    Args:
        groups: one an arm and recipe.

    Returns:
        Its lines; none where no row has terms.
    """
    lines = []
    for group in groups:
        shares = [group.values(_logarithm(TERMS[0], part)) for part in COURSE]
        if not all(shares):
            continue
        cells = [f"{100 * math.exp(math.fsum(logs) / len(logs)):.1f}" for logs in shares]
        first, last = (_logarithm(TERMS[0], part) for part in (COURSE[0], COURSE[-1]))
        changes = [
            end - start
            for row in group.rows.values()
            if (start := first(row)) is not None and (end := last(row)) is not None
        ]
        change = mean_interval(changes)
        ends = (change.mean, change.mean - change.half, change.mean + change.half)
        told = _factor(Factor(*(math.exp(end) for end in ends)))
        lines.append(f"| `{group.recipe}` | `{group.arm}` | {' | '.join([*cells, told])} |")
    if not lines:
        return []
    tenths = " | ".join(f"tenth {part + 1}" for part in COURSE)
    return [
        f"| recipe | arm | {tenths} | last over first |",
        "|" + "---|" * (3 + len(COURSE)),
        *lines,
    ]


def _cell(middle: Factor, end: Factor) -> str:
    """A factor in the middle, and at the end with its interval."""
    return f"×{middle.mean:.2f} → {_factor(end)}"


def _factor(factor: Factor) -> str:
    """A factor with its interval, bold if that leaves 1 out."""
    told = f"×{factor.mean:.2f}"
    if math.isnan(factor.low):
        return told
    told += f" [{factor.low:.2f}, {factor.high:.2f}]"
    return told if factor.low <= 1.0 <= factor.high else f"**{told}**"


def _logarithm(term: str, part: int) -> Number:
    """Log of a term, negative for those that the density is divided by."""
    sign = 1.0 if term in TERMS[:2] else -1.0

    def number(row: Row) -> float | None:
        value = row["terms"][term][part] if row.get("terms") else None
        return None if value is None else sign * math.log(value)

    return number
