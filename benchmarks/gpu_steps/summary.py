"""The table at the end."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

_ARMS = "training-"


def summary(whole: Mapping[str, Any]) -> str:
    """What was found, as text.

    Args:
        whole: what stands in ``gpu.json``.

    Returns:
        A line a step, and below it the numbers of each.
    """
    lines = ["a dry run on the CPU: these numbers mean nothing"] if whole["dry_run"] else []
    for name, row in whole["steps"].items():
        lines.append(f"{name:20} {row['seconds']:6.0f} s  {row['status']}")
        lines += [f"    {line}" for line in _lines(name, row)]
    return "\n".join(lines)


def _lines(name: str, row: Mapping[str, Any]) -> Iterator[str]:
    """The numbers of a step."""
    if name.startswith(_ARMS):
        yield _arm(row)
        return
    if name == "tests":
        yield ", ".join(f"{row[key]} {key}" for key in ("passed", "skipped") if key in row)
        yield from (f"{test}: {row['outcomes'][test]}" for test in row.get("failed", []))
        yield from row.get("hints", [])
        return
    for key, value in row.items():
        if key not in ("status", "seconds", "error"):
            yield from _flat(key, value)


def _arm(row: Mapping[str, Any]) -> str:
    """A model in training."""
    held_out = row.get("held_out")
    if not isinstance(held_out, Mapping):  # too little time was left for it
        held_out = {}
    compiled = "compiled" if row.get("compiled") is True else f"compiled: {row.get('compiled')}"
    parts = [
        ("{:.0f} tokens/s", row.get("tokens_per_s")),
        ("{} tokens", row.get("tokens")),
        ("{:.2f} GB", _times(row.get("peak_memory_bytes"), 1e-9)),
        ("held-out loss {:.4f}", held_out.get("loss")),
        ("density {:.4f}", held_out.get("density")),
    ]
    return ", ".join([*(text.format(one) for text, one in parts if one is not None), compiled])


def _flat(key: str, value: Any) -> Iterator[str]:
    """A value as lines ``key: value``, nested ones one below the other."""
    if isinstance(value, Mapping) and "us" in value:
        speedup = value.get("speedup")
        beside = "" if speedup is None else f", {speedup:.2f}×"
        peak = _times(value.get("peak_bytes"), 1e-6)
        beside += "" if peak is None else f", {peak:.0f} MB at most"
        rate = next(
            (f", {value[k]:.0f} {k}" for k in ("tflop_per_s", "gb_per_s") if k in value), ""
        )
        yield f"{key}: {value['us']:.1f} us{beside}{rate}"
    elif isinstance(value, Mapping) and "density" in value and "sorted" in value:
        by_tile = ", ".join(
            f"{tile}: {value['independent'][tile]:.2f} / {value['in_sequence'][tile]:.2f} /"
            f" {value['sorted'][tile]:.2f}"
            for tile in value["sorted"]
        )
        yield f"{key}: density {value['density']:.4f}; independent / in sequence / sorted {by_tile}"
    elif isinstance(value, Mapping):
        for inner, one in value.items():
            yield from _flat(f"{key} {inner}", one)
    elif isinstance(value, list) and value and isinstance(value[0], Mapping):
        for one in value:
            yield from _flat(f"{key} {one.get('block', '')}".rstrip(), one)
    elif isinstance(value, float):
        yield f"{key}: {value:.4g}"
    else:
        yield f"{key}: {value}"


def _times(value: float | None, factor: float) -> float | None:
    return None if value is None else value * factor
