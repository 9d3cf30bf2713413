"""The rows of a study put together: one group a recipe, arm and setting, its seeds in order."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from steppe.study.planned import described
from steppe.study.statistics import paired_change

Row = dict[str, Any]
Number = Callable[[Row], float | None]


@dataclass(frozen=True)
class Group:
    """The rows that differ in their seed alone.

    Attributes:
        recipe: of the rows, with the study's factors, whose values are never compared.
        arm: of the rows.
        setting: the values that vary, in words; empty where none does.
        rows: by seed.
    """

    recipe: str
    arm: str
    setting: str
    rows: dict[int, Row]

    def values(self, number: Number) -> list[float]:
        """A number of each row, of those that have it."""
        return [found for row in self.rows.values() if (found := number(row)) is not None]

    def pairs(self, other: Group, number: Number) -> tuple[list[float], list[float]]:
        """A number of this group's rows and of the other's, over the seeds that both have."""
        both = [
            (mine, yours)
            for seed, row in self.rows.items()
            if seed in other.rows
            and (mine := number(row)) is not None
            and (yours := number(other.rows[seed])) is not None
        ]
        return [mine for mine, _ in both], [yours for _, yours in both]


def groups_of(rows: Sequence[Row]) -> list[Group]:
    """The groups, in the order of their first rows' recipes, then settings, then arms.

    Args:
        rows: of one study.
    """
    found: dict[tuple[str, str, str], dict[int, Row]] = {}
    for row in rows:
        factors = row.get("factors", ())
        other_model = {key: value for key, value in row["setting"].items() if key in factors}
        setting = {key: value for key, value in row["setting"].items() if key not in factors}
        recipe = ",".join(filter(None, (row["recipe"], described(other_model))))
        key = (recipe, described(setting), row["arm"])
        found.setdefault(key, {})[row["seed"]] = row
    recipes = list(dict.fromkeys(key[0] for key in found))
    settings = list(dict.fromkeys(key[1] for key in found))
    arms = list(dict.fromkeys(key[2] for key in found))
    keys = sorted(
        found, key=lambda k: (recipes.index(k[0]), settings.index(k[1]), arms.index(k[2]))
    )
    return [
        Group(recipe, arm, setting, dict(sorted(found[recipe, setting, arm].items())))
        for recipe, setting, arm in keys
    ]


def best_groups(groups: Iterable[Group], across_arms: bool = False) -> list[Group]:
    """Of each recipe and arm the group with the best mean quality on held-out data.

    Only groups with the most seeds take part: one lucky seed would win.

    Args:
        groups: of one study.
        across_arms: whether one arm a recipe is chosen.
    """
    best: dict[tuple[str, str], Group] = {}
    for group in groups:
        key = (group.recipe, "" if across_arms else group.arm)
        if key not in best or _rank(group) > _rank(best[key]):
            best[key] = group
    return list(best.values())


def front_of(groups: Sequence[Group]) -> list[Group]:
    """Of each recipe the groups that no other one beats in density and quality at once.

    Means are compared, of the groups with the most seeds of their recipe.

    Args:
        groups: of one study.

    Returns:
        The groups, the densest of each recipe first.
    """
    points = []
    for group in groups:
        density = group.values(lambda row: row["density"])
        seeds, quality = _rank(group)
        if density and seeds:
            points.append((group, seeds, math.fsum(density) / len(density), quality))
    most = {
        one.recipe: max(s for g, s, _, _ in points if g.recipe == one.recipe) for one, *_ in points
    }
    taking_part = [point for point in points if point[1] == most[point[0].recipe]]
    front = [
        (group, density)
        for group, _, density, quality in taking_part
        if not any(
            other.recipe == group.recipe
            and (d <= density and q >= quality and (d, q) != (density, quality))
            for other, _, d, q in taking_part
        )
    ]
    recipes = list(most)
    front.sort(key=lambda one: (recipes.index(one[0].recipe), -one[1]))
    return [group for group, _ in front]


def change_of(group: Group, other: Group, number: Number) -> tuple[float, float, float] | None:
    """The change of a density against another group's, over the seeds that both have.

    Args:
        group: of a study.
        other: what it is compared with.
        number: the density of a row.

    Returns:
        The change and its 95 % interval, NaN for a single seed; None where there is no pair, or a
        density of 0.
    """
    mine, yours = group.pairs(other, number)
    if not mine or min(*mine, *yours) <= 0:
        return None
    return paired_change(mine, yours)


def quality_name(row: Row) -> str:
    """The quality that arms are compared by: ``top1`` of a classifier, else ``loss``.

    Args:
        row: of a study.
    """
    return "top1" if "top1" in row["quality"] else "loss"


def quality_of(row: Row) -> float | None:
    """The value of that quality.

    Args:
        row: of a study.
    """
    return row["quality"][quality_name(row)]


def _rank(group: Group) -> tuple[int, float]:
    """More seeds first, then the better mean."""
    values = group.values(quality_of)
    if not values:
        return 0, 0.0
    mean = sum(values) / len(values)
    is_share = quality_name(next(iter(group.rows.values()))) == "top1"
    return len(values), mean if is_share else -mean
