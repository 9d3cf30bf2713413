"""The paper's claim about its three plug-ins, held against the rows of a study."""

from __future__ import annotations

from collections.abc import Sequence

from steppe.study.compare import Group
from steppe.study.markdown import table_lines
from steppe.study.verdict import density_change, has_zeros, is_plain, quality_verdict

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
        if other is None or not (is_plain(group, "steppe") and is_plain(other, "vanilla")):
            continue
        if not has_zeros(other):
            continue
        cells = [_verdict(group, other, key, least) for key, _, least in _CLAIMS]
        if all(cells):
            rows.append([f"`{group.recipe}`", *cells, quality_verdict(group, other).shown])
    names = [f"{name} density, claimed {100 * least:.0f} %" for _, name, least in _CLAIMS]
    return [_HEAD, "", *table_lines(["recipe", *names, "quality"], rows)] if rows else []


def _verdict(group: Group, other: Group, key: str, least: float) -> str:
    """The change of a density and the verdict on it; empty where there is no interval."""
    found = density_change(group, other, lambda row: row[key])
    if found is None:
        return ""
    change, low, high = found
    verdict = "holds" if high <= least else "fails" if low > least else "open"
    return f"*{verdict}*: {100 * change:+.0f} % [{100 * low:+.0f}, {100 * high:+.0f}]"
