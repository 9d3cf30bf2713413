"""The cells of a study's tables: means, and changes against the baseline, with their intervals."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from steppe.study.compare import Group, Number, change_of, quality_name, quality_of
from steppe.study.statistics import Interval, mean_interval, paired_difference

_SHARES = ("density", "training_density", "derivative_density")
_NUMBERS = (
    *("seeds", "held-out quality", "inference density, %", "training density, %"),
    *("derivative density, %", "dead units, %", "seconds"),
)


@dataclass(frozen=True)
class Cell:
    """A number of a group.

    Attributes:
        text: its mean and its interval.
        change: against the baseline; empty for none.
        is_sure: whether the interval of the change leaves no change out.
    """

    text: str
    change: str = ""
    is_sure: bool = False


def headings_of(groups: Sequence[Group]) -> tuple[list[str], list[str]]:
    """The headings of names and of numbers; settings have a column where there are several.

    Args:
        groups: of one table.
    """
    has_settings = any(group.setting for group in groups)
    return ["recipe", "arm", *(["setting"] if has_settings else [])], list(_NUMBERS)


def cells_of(
    group: Group, others: Sequence[Group], baseline: str, has_settings: bool
) -> tuple[list[str], list[Cell]]:
    """The names and the numbers of a group's row.

    Args:
        group: of the row.
        others: of the table, among them the baseline's.
        baseline: name of an arm.
        has_settings: whether the table has a column of settings.
    """
    other = _baseline_of(group, others, baseline)
    names = [group.recipe, group.arm, *([group.setting] if has_settings else [])]
    dead = group.values(_number("dead_units"))
    seconds = group.values(_whole_seconds)
    return names, [
        Cell(str(len(group.rows))),
        _quality_cell(group, other),
        *(_share_cell(group, other, key) for key in _SHARES),
        Cell(f"{100 * mean_interval(dead).mean:.1f}" if dead else "–"),
        Cell(f"{mean_interval(seconds).mean:.0f}" if seconds else "–"),
    ]


def _whole_seconds(row: dict[str, Any]) -> float | None:
    """The seconds of a run; None of one that was resumed, which knows its last part's alone."""
    return None if row.get("resumed_from") else row["seconds"]


def _baseline_of(group: Group, others: Sequence[Group], baseline: str) -> Group | None:
    """The baseline's group of the same recipe and setting.

    In a table with one group an arm it is the only one, whatever its setting; None for itself.
    """
    if group.arm == baseline:
        return None
    found = [one for one in others if (one.recipe, one.arm) == (group.recipe, baseline)]
    same = [one for one in found if one.setting == group.setting]
    if same:
        return same[0]
    is_one_an_arm = len({(one.recipe, one.arm) for one in others}) == len(others)
    return found[0] if found and is_one_an_arm else None


def _number(key: str) -> Number:
    """A number of a row that may lack it."""

    def number(row: dict[str, Any]) -> float | None:
        return row.get(key)

    return number


def _share_cell(group: Group, other: Group | None, key: str) -> Cell:
    """A density in percent, and its change against the baseline."""
    values = group.values(_number(key))
    if not values:
        return Cell("–")
    cell = _spread(mean_interval(values), 100, 2)
    if other is None:
        return Cell(cell)
    found = change_of(group, other, _number(key))
    if found is None:
        return Cell(cell)
    change, low, high = (100 * end for end in found)
    if math.isnan(low):
        return Cell(cell, f"{change:+.0f} %")
    told = f"{change:+.0f} % [{low:+.0f}, {high:+.0f}]"
    return Cell(cell, told, not low <= 0 <= high)


def _quality_cell(group: Group, other: Group | None) -> Cell:
    """The quality, and its difference to the baseline's."""
    row = next(iter(group.rows.values()))
    name = quality_name(row)
    values = group.values(quality_of)
    if not values:
        return Cell("–")
    told = f"{name} {quality_shown(name, mean_interval(values))}"
    if other is None:
        return Cell(told)
    mine, yours = group.pairs(other, quality_of)
    if not mine:
        return Cell(told)
    difference = paired_difference(mine, yours)
    return Cell(told, quality_shown(name, difference, sign="+"), difference.excludes_zero)


def quality_shown(name: str, interval: Interval, sign: str = "") -> str:
    """A quality or a difference of two: accuracy in percent, loss in nats.

    Args:
        name: as of `quality_name`.
        interval: of it.
        sign: ``+`` to have that before a mean above 0.
    """
    factor, digits = (100, 2) if name == "top1" else (1, 4)
    return _spread(interval, factor, digits, sign)


def _spread(interval: Interval, factor: float, digits: int, sign: str = "") -> str:
    """A mean with its interval, or alone where there is none."""
    mean = f"{factor * interval.mean:{sign}.{digits}f}"
    if math.isnan(interval.half):
        return mean
    return f"{mean} ± {factor * interval.half:.{digits}f}"
