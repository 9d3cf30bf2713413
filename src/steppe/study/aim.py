"""The aim of steppe's own arms: a fifth of the best dense arm's density at no worse quality."""

from __future__ import annotations

from collections.abc import Sequence

from steppe.study.compare import Group, best_groups, front_of
from steppe.study.markdown import code, table_lines
from steppe.study.verdict import density_change, has_zeros, is_plain, quality_verdict

_AIM = 0.2
_DENSE = ("vanilla", "control")
_HEAD = """A fifth of the best dense arm's density at no worse quality: the aim, held against the
arms of the front. The best dense arm is `vanilla` or `control`, whichever has the better mean
quality. The aim is *reached* where all of the 95 % interval of the density is below a fifth and
the quality is not shown to be worse, *missed* where none of it is or the quality is worse, and
*open* in between:"""


def aim_table(groups: Sequence[Group]) -> list[str]:
    """Which arms reach the aim, in Markdown.

    Args:
        groups: of one study, one a recipe, arm and setting.

    Returns:
        Its lines; none without a dense arm of ReLU, or from a single seed.
    """
    dense = [group for group in groups if any(is_plain(group, arm) for arm in _DENSE)]
    best = best_groups(filter(has_zeros, dense), across_arms=True)
    rows = [
        row
        for group in front_of(groups)
        for other in best
        if other.recipe == group.recipe and group not in dense and (row := _row(group, other))
    ]
    names = ["recipe", "best dense arm", "arm", "of its density", "quality", "the aim"]
    return [_HEAD, "", *table_lines(names, rows)] if rows else []


def _row(group: Group, dense: Group) -> list[str]:
    """The cells of an arm; none where there is no interval."""
    found = density_change(group, dense, lambda row: row["density"])
    if found is None:
        return []
    share, low, high = (1.0 + end for end in found)
    quality = quality_verdict(group, dense)
    is_missed = low > _AIM or quality.is_worse
    verdict = "missed" if is_missed else "reached" if high <= _AIM else "open"
    return [
        code(group.recipe),
        code(_name(dense)),
        code(_name(group)),
        f"{share:.2f} [{low:.2f}, {high:.2f}]",
        quality.shown,
        f"*{verdict}*",
    ]


def _name(group: Group) -> str:
    return ",".join(filter(None, (group.arm, group.setting)))
