"""The results of studies as one page of Markdown; nothing in it is typed by hand."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from steppe.study.compare import (
    Group,
    Number,
    Row,
    best_groups,
    groups_of,
    quality_name,
    quality_of,
)
from steppe.study.statistics import Interval, mean_interval, paired_change, paired_difference

_HEAD = """# Results

Rendered from `docs/results/studies/*.jsonl` by `python docs/render.py`: do not edit. Each line of
these files is one run of `steppe study NAME` ([studies.md](studies.md)). Intervals are 95 %:
Student's t over the seeds. A change against the baseline is paired by seed; that of a density is
the ratio of geometric means. **Bold**: the interval leaves no change out. Intervals are not
corrected for the number of comparisons.
"""
_EMPTY = "\nNo study has been run in full yet.\n"
_SHARES = ("density", "training_density", "derivative_density")
_HEADINGS = ("inference density, %", "training density, %", "derivative density, %")


def results_page(studies: Mapping[str, Sequence[Row]], plots: Mapping[str, str]) -> str:
    """The page of all studies.

    Args:
        studies: rows by the study's name.
        plots: paths of pictures by the study's name, those that there are.

    Returns:
        Markdown.
    """
    parts = [_HEAD]
    for name, rows in studies.items():
        if rows:
            parts.append("\n" + study_markdown(name, rows, plots.get(name)))
    return "".join(parts) if len(parts) > 1 else _HEAD + _EMPTY


def study_markdown(name: str, rows: Sequence[Row], plot: str | None = None) -> str:
    """The part of one study.

    Args:
        name: of the study.
        rows: of it, at least one.
        plot: path of its picture.

    Returns:
        Markdown: what was run, a table of each arm's best setting, one of all.
    """
    groups = groups_of(rows)
    best = best_groups(groups)
    baseline = str(rows[-1]["baseline"])
    lines = [f"## {name}", "", _what_was_run(rows), ""]
    if any(row.get("is_quick") for row in rows):
        lines += ["**A quick look of a few steps: these numbers mean nothing.**", ""]
    if plot is not None:
        lines += [f"![Quality against density of the study {name}]({plot})", ""]
    if len(groups) > len(best):
        lines += [
            "Each arm at the setting with its best mean quality on held-out data, which favours"
            " arms with more settings a little:",
            "",
            *_table(best, best, baseline),
            "",
            f"All settings, compared with `{baseline}` at the same one:",
            "",
        ]
    lines += _table(groups, groups, baseline)
    return "\n".join(lines) + "\n"


def _what_was_run(rows: Sequence[Row]) -> str:
    """Runs, seeds, time and versions in a paragraph."""
    seeds = len({row["seed"] for row in rows})
    hours = math.fsum(row["seconds"] or 0.0 for row in rows) / 3600
    versions: dict[str, set[str]] = {}
    for row in rows:
        for package, version in row["versions"].items():
            versions.setdefault(package, set()).add(str(version))
    told = ", ".join(f"{package} {_and(found)}" for package, found in sorted(versions.items()))
    devices = _and({str(row.get("device", "cpu")) for row in rows})
    return (
        f"{len(rows)} runs from {seeds} {'seed' if seeds == 1 else 'seeds'}, {hours:.2f} hours of"
        f" training in all, on {devices}. {told}."
    )


def _and(words: set[str]) -> str:
    return " and ".join(sorted(words))


def _table(groups: Sequence[Group], others: Sequence[Group], baseline: str) -> list[str]:
    """A table of groups, each compared with the baseline's of its recipe and setting."""
    has_setting = any(group.setting for group in groups)
    headings = ["recipe", "arm", *(["setting"] if has_setting else []), "seeds", "held-out quality"]
    headings += [*_HEADINGS, "dead units, %", "seconds"]
    lines = [f"| {' | '.join(headings)} |", "|" + "---|" * len(headings)]
    for group in groups:
        other = _baseline_of(group, others, baseline)
        cells = [f"`{group.recipe}`", _code(group.arm)]
        cells += [_code(group.setting)] if has_setting else []
        cells += [str(len(group.rows)), _quality_cell(group, other)]
        cells += [_share_cell(group, other, key) for key in _SHARES]
        dead, seconds = (group.values(_number(key)) for key in ("dead_units", "seconds"))
        cells.append(f"{100 * mean_interval(dead).mean:.1f}" if dead else "–")
        cells.append(f"{mean_interval(seconds).mean:.0f}" if seconds else "–")
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _code(text: str) -> str:
    """A word as code; its parts may be broken into lines at the commas."""
    return " ".join(f"`{part}`" for part in text.split(",")) if text else ""


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


def _share_cell(group: Group, other: Group | None, key: str) -> str:
    """A density in percent, and its change against the baseline."""
    values = group.values(_number(key))
    if not values:
        return "–"
    cell = _spread(mean_interval(values), 100, 2)
    if other is None:
        return cell
    mine, yours = group.pairs(other, _number(key))
    if not mine or min(*mine, *yours) <= 0:
        return cell
    change, low, high = (100 * end for end in paired_change(mine, yours))
    if math.isnan(low):
        return f"{cell} ({change:+.0f} %)"
    told = f"{change:+.0f} % [{low:+.0f}, {high:+.0f}]"
    return f"{cell} ({_bold(told, not low <= 0 <= high)})"


def _quality_cell(group: Group, other: Group | None) -> str:
    """The quality, and its difference to the baseline's."""
    row = next(iter(group.rows.values()))
    name = quality_name(row)
    factor, digits = (100, 2) if name == "top1" else (1, 4)
    values = group.values(quality_of)
    if not values:
        return "–"
    told = f"{name} {_spread(mean_interval(values), factor, digits)}"
    if other is None:
        return told
    mine, yours = group.pairs(other, quality_of)
    if not mine:
        return told
    difference = paired_difference(mine, yours)
    shown = f"{factor * difference.mean:+.{digits}f}"
    if math.isnan(difference.half):
        return f"{told} ({shown})"
    shown += f" ± {factor * difference.half:.{digits}f}"
    return f"{told} ({_bold(shown, difference.excludes_zero)})"


def _spread(interval: Interval, factor: float, digits: int) -> str:
    """A mean with its interval, or alone where there is none."""
    mean = f"{factor * interval.mean:.{digits}f}"
    if math.isnan(interval.half):
        return mean
    return f"{mean} ± {factor * interval.half:.{digits}f}"


def _bold(text: str, is_sure: bool) -> str:
    return f"**{text}**" if is_sure else text
