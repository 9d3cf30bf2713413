"""Which factor of the ratio moves an arm's density: each one's change against the baseline."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import geometric_mean

from steppe.study.compare import Group, Number, Row
from steppe.study.markdown import table_lines
from steppe.study.statistics import paired_change
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
        mine, yours = group.pairs(baseline, _term(term, part))
        if not mine:
            return []
        divides = term not in TERMS[:2]
        factors.append(_factor(*((yours, mine) if divides else (mine, yours))))
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
    rows = []
    for group in groups:
        if group.arm == baseline or group.recipe not in others:
            continue
        middle = factors_of(group, others[group.recipe], PARTS // 2)
        end = factors_of(group, others[group.recipe], PARTS - 1)
        if middle and end:
            cells = [
                f"×{one.mean:.2f} → {_told(two)}" for one, two in zip(middle, end, strict=True)
            ]
            rows.append([f"`{group.recipe}`", f"`{group.arm}`", *cells])
    return table_lines(["recipe", "arm", *HEADINGS], rows) if rows else []


def course_table(groups: Sequence[Group]) -> list[str]:
    """A table in Markdown of the derivative density in the course of training.

    Args:
        groups: one an arm and recipe.

    Returns:
        Its lines; none where no row has terms.
    """
    rows = []
    for group in groups:
        first, *_, last = terms = [_term(TERMS[0], part) for part in COURSE]
        shares = [group.values(term) for term in terms]
        if not all(shares):
            continue
        cells = [f"{100 * geometric_mean(values):.1f}" for values in shares]
        both = [
            (end, start)
            for row in group.rows.values()
            if (start := first(row)) is not None and (end := last(row)) is not None
        ]
        told = _told(_factor(*zip(*both, strict=True)))
        rows.append([f"`{group.recipe}`", f"`{group.arm}`", *cells, told])
    tenths = [f"tenth {part + 1}" for part in COURSE]
    return table_lines(["recipe", "arm", *tenths, "last over first"], rows) if rows else []


def _factor(values: Sequence[float], others: Sequence[float]) -> Factor:
    """The ratio of two terms over pairs with one seed."""
    return Factor(*(1.0 + change for change in paired_change(values, others)))


def _told(factor: Factor) -> str:
    """A factor with its interval, bold if that leaves 1 out."""
    told = f"×{factor.mean:.2f}"
    if math.isnan(factor.low):
        return told
    told += f" [{factor.low:.2f}, {factor.high:.2f}]"
    return told if factor.low <= 1.0 <= factor.high else f"**{told}**"


def _term(term: str, part: int) -> Number:
    """A term in one tenth of the run."""

    def number(row: Row) -> float | None:
        return row["terms"][term][part] if row.get("terms") else None

    return number
