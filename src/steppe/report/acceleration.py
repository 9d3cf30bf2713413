"""How the blocks of an accelerated run ran, in few words."""

from __future__ import annotations

from collections import Counter
from typing import Any


def shares_of_calls(acceleration: dict[str, Any]) -> tuple[str, str]:
    """The share of the calls of all blocks by how they ran, and of those not sparse by the reason.

    Args:
        acceleration: as `steppe.runs.Run.acceleration`.

    Returns:
        Two lists in words, the most frequent first; empty without a call. Reasons of one block that
        is not accelerated at all stand at the end.

    Example:
        >>> block = {"name": "h.0", "calls": {"dense": 1, "sparse": 3}, "reasons": {"busy": 1}}
        >>> shares_of_calls({"blocks": [block], "not_accelerated": {}})
        ('75 % sparse, 25 % dense', '25 % busy')
    """
    blocks = acceleration["blocks"]
    calls = sum((Counter(block["calls"]) for block in blocks), Counter())
    reasons = sum((Counter(block.get("reasons", {})) for block in blocks), Counter())
    left_out = [f"{name}: {why}" for name, why in acceleration["not_accelerated"].items()]
    whys = [text for text in (_shares(reasons, calls.total()), *left_out[:1]) if text]
    if len(left_out) > 1:
        whys.append(f"and {len(left_out) - 1} more blocks")
    return _shares(calls, calls.total()), "; ".join(whys)


def _shares(counts: Counter[str], whole: int) -> str:
    """Counts as shares of a whole, the largest first."""
    return ", ".join(
        f"{100 * count / whole:.0f} % {name}" for name, count in counts.most_common() if whole
    )
