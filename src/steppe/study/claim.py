"""The paper's claim about its three plug-ins, held against the rows of a study."""

from __future__ import annotations

import math
from collections.abc import Sequence

from steppe.study.compare import Group, Number, Row, quality_name, quality_of
from steppe.study.markdown import table_lines
from steppe.study.statistics import paired_change, paired_difference

_NO_ZEROS = 0.99  # density of GELU's kind; the claim is about models with ReLU
_OTHER_PLUGINS = (
    *("zeroth_bias", "restricted_norm", "jumping_squared_relu", "rising_threshold"),
    *("plugins", "activation_penalty"),
)
_CLAIMS = (("density", "inference", -0.36), ("training_density", "training", -0.50))
_HEAD = """The paper's claim (arXiv 2605.25612, for ViT-B and T5-Base): its three plug-ins lower the
density by at least 36 % at inference and 50 % in training, at no loss of quality. It *holds* here
where all of the 95 % interval is beyond that, *fails* where none of it is, and is *open* in
between:"""


def claim_table(groups: Sequence[Group], baseline: str) -> list[str]:
    """What each recipe says about the claim, in Markdown.

    Args:
        groups: one an arm and recipe.
        baseline: the vanilla arm.

    Returns:
        Its lines; none without an arm of the paper's three plug-ins and nothing else, with
        another baseline than a vanilla one of ReLU, or from a single seed.

    Source: arXiv 2605.25612, abstract.
    """
    vanilla = {group.recipe: group for group in groups if group.arm == baseline}
    rows = []
    for group in groups:
        other = vanilla.get(group.recipe)
        if other is None or not (_is_plain(group, "steppe") and _is_plain(other, "vanilla")):
            continue
        if min(other.values(lambda row: row["density"]), default=1.0) > _NO_ZEROS:
            continue
        cells = [_verdict(group, other, key, least) for key, _, least in _CLAIMS]
        if all(cells):
            rows.append([f"`{group.recipe}`", *cells, _quality(group, other)])
    names = [f"{name} density, claimed {100 * least:.0f} %" for _, name, least in _CLAIMS]
    return [_HEAD, "", *table_lines(["recipe", *names, "quality"], rows)] if rows else []


def _is_plain(group: Group, arm: str) -> bool:
    """Whether a group is an arm of the recipes as it stands, without other plug-ins."""
    settings = next(iter(group.rows.values()))["settings"]
    return settings.get("arm") == arm and not any(settings.get(key) for key in _OTHER_PLUGINS)


def _verdict(group: Group, other: Group, key: str, least: float) -> str:
    """The change of a density and the verdict on it; empty where there is no interval."""
    number: Number = lambda row: row[key]  # noqa: E731
    mine, yours = group.pairs(other, number)
    if len(mine) < 2 or min(*mine, *yours) <= 0:
        return ""
    change, low, high = paired_change(mine, yours)
    verdict = "holds" if high <= least else "fails" if low > least else "open"
    return f"*{verdict}*: {100 * change:+.0f} % [{100 * low:+.0f}, {100 * high:+.0f}]"


def _quality(group: Group, other: Group) -> str:
    """Whether the quality is worse, and by how much."""
    row: Row = next(iter(group.rows.values()))
    mine, yours = group.pairs(other, quality_of)
    difference = paired_difference(mine, yours) if mine else None
    if difference is None or math.isnan(difference.half):
        return "–"
    name = quality_name(row)
    is_worse = (difference.mean > 0) == (name == "loss")
    told = "worse" if is_worse else "better"
    told = told if difference.excludes_zero else "no difference shown"
    factor, digits = (100, 2) if name == "top1" else (1, 4)
    shown = f"{factor * difference.mean:+.{digits}f} ± {factor * difference.half:.{digits}f}"
    return f"*{told}*: {name} {shown}"
