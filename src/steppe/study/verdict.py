"""What the seeds of two groups say about a claim: shared by the claims that a page judges."""

from __future__ import annotations

import math
from typing import NamedTuple

from steppe.study.cells import quality_shown
from steppe.study.compare import Group, Number, change_of, quality_name, quality_of
from steppe.study.statistics import paired_difference

_PLUGINS = (
    *("zeroth_bias", "restricted_norm", "jumping_squared_relu", "rising_threshold"),
    *("plugins", "activation_penalty"),
)
_NO_ZEROS = 0.99  # density of GELU's kind; the claims are about models with ReLU


class QualityVerdict(NamedTuple):
    """How a group's quality compares with another's.

    Attributes:
        is_worse: whether the 95 % interval of the difference says so.
        shown: the verdict with the difference; ``–`` where there is no interval.
    """

    is_worse: bool
    shown: str


def is_plain(group: Group, arm: str) -> bool:
    """Whether a group is an arm of the recipes as it stands, without other plug-ins.

    Args:
        group: of a study.
        arm: name of the recipes' arm.
    """
    settings = next(iter(group.rows.values()))["settings"]
    return settings.get("arm") == arm and not any(settings.get(key) for key in _PLUGINS)


def has_zeros(group: Group) -> bool:
    """Whether any run of a group has a density that ReLU gives, and not GELU.

    Args:
        group: of a study.
    """
    return min(group.values(lambda row: row["density"]), default=1.0) <= _NO_ZEROS


def density_change(group: Group, other: Group, number: Number) -> tuple[float, float, float] | None:
    """The change of a density against another group's, over the seeds that both have.

    Args:
        group: of a study.
        other: what it is compared with.
        number: the density of a row.

    Returns:
        The change and its 95 % interval; None for a single seed or a density of 0.
    """
    found = change_of(group, other, number)
    return None if found is None or math.isnan(found[1]) else found


def quality_verdict(group: Group, other: Group) -> QualityVerdict:
    """Whether a group's quality is worse than another's, and by how much.

    Args:
        group: of a study.
        other: what it is compared with.
    """
    mine, yours = group.pairs(other, quality_of)
    difference = paired_difference(mine, yours) if mine else None
    if difference is None or math.isnan(difference.half):
        return QualityVerdict(False, "–")
    name = quality_name(next(iter(group.rows.values())))
    is_worse = (difference.mean > 0) == (name == "loss") and difference.excludes_zero
    told = "worse" if is_worse else "better"
    told = told if difference.excludes_zero else "no difference shown"
    shown = quality_shown(name, difference, sign="+")
    return QualityVerdict(is_worse, f"*{told}*: {name} {shown}")
