"""The results of studies as one page of Markdown; nothing in it is typed by hand."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from steppe.study.aim import aim_table
from steppe.study.cells import Cell, cells_of, headings_of
from steppe.study.claim import claim_table
from steppe.study.compare import Group, Row, best_groups, front_of, groups_of
from steppe.study.markdown import code, table_lines
from steppe.study.why import course_table, why_table

_HEAD = """# Results

Rendered from `docs/results/studies/*.jsonl` by `python docs/render.py`: do not edit. Each line of
these files is one run of `steppe study NAME` ([studies.md](studies.md)), whose arms stand in
[src/steppe/studies/NAME.yaml](../src/steppe/studies). Intervals are 95 %:
Student's t over the seeds. A change against the baseline is paired by seed; that of a density is
the ratio of geometric means. **Bold**: the interval leaves no change out. Intervals are not
corrected for the number of comparisons.
"""
_WHY = """What moves the density on training batches: its change against the baseline is the product
of the changes of AF, 1 / ‖x‖² and 1 / gradient². The sixth tenth of the run → the last one,
geometric means over blocks:"""
_FRONT = """The front: of those with all seeds, no other arm or setting is at least as good in mean
density and in mean quality, and better in one of them."""
_COURSE = "Derivative density on training batches in the course of training, %:"
_FEW = 10  # arms and settings, among which the front is seen at a glance
_EMPTY = "\nNo study has been run in full yet.\n"


def results_page(
    studies: Mapping[str, Sequence[Row]], plots: Mapping[str, str], about: Mapping[str, str]
) -> str:
    """The page of all studies.

    Args:
        studies: rows by the study's name.
        plots: paths of pictures by the study's name, those that there are.
        about: a line on each by the study's name, those that there are.

    Returns:
        Markdown.
    """
    parts = [_HEAD]
    for name, rows in studies.items():
        if rows:
            parts.append("\n" + study_markdown(name, rows, plots.get(name), about.get(name)))
    return "".join(parts) if len(parts) > 1 else _HEAD + _EMPTY


def study_markdown(
    name: str, rows: Sequence[Row], plot: str | None = None, about: str | None = None
) -> str:
    """The part of one study.

    Args:
        name: of the study.
        rows: of it, at least one.
        plot: path of its picture.
        about: what it asks.

    Returns:
        Markdown: what was run, a table of each arm's best setting, one of all.
    """
    groups = groups_of(rows)
    best = best_groups(groups)
    baseline = str(rows[-1]["baseline"])
    lines = [f"## {name}", ""]
    if about is not None:
        lines += [about if about.endswith("?") else f"{about}.", ""]
    lines += [_what_was_run(rows), ""]
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
    front = front_of(groups)
    if len(groups) > _FEW:
        lines += ["", _FRONT, "", *_table(front, groups, baseline)]
    claim = claim_table(best, baseline)
    if claim:
        lines += ["", *claim]
    aim = aim_table(groups)
    if aim:
        lines += ["", *aim]
    why = why_table(best, baseline)
    if why:
        lines += ["", _WHY, "", *why]
    course = course_table(best)
    if course:
        lines += ["", _COURSE, "", *course]
    return "\n".join(lines) + "\n"


def _what_was_run(rows: Sequence[Row]) -> str:
    """Runs, seeds, time and versions in a paragraph."""
    seeds = sorted({row["seed"] for row in rows})
    hours = math.fsum(row["seconds"] or 0.0 for row in rows) / 3600
    versions: dict[str, set[str]] = {}
    for row in rows:
        for package, version in row["versions"].items():
            versions.setdefault(package, set()).add(str(version))
    told = ", ".join(f"{package} {_and(found)}" for package, found in sorted(versions.items()))
    devices = _and({str(row.get("device", "cpu")) for row in rows})
    return (
        f"{len(rows)} runs from {_seeds(seeds)}, {hours:.2f} hours of training in all, on"
        f" {devices}. {told}."
    )


def _seeds(seeds: Sequence[int]) -> str:
    """How many, and which."""
    if len(seeds) == 1:
        return f"one seed, {seeds[0]}"
    return f"{len(seeds)} seeds, {seeds[0]} to {seeds[-1]}"


def _and(words: set[str]) -> str:
    return " and ".join(sorted(words))


def _table(groups: Sequence[Group], others: Sequence[Group], baseline: str) -> list[str]:
    """A table of groups, each compared with the baseline's of its recipe and setting."""
    texts, numbers = headings_of(groups)
    rows = []
    for group in groups:
        names, cells = cells_of(group, others, baseline, len(texts) > 2)
        rows.append([*(code(name) for name in names), *(markdown_of(cell) for cell in cells)])
    return table_lines([*texts, *numbers], rows)


def markdown_of(cell: Cell) -> str:
    """A cell with its change in brackets, bold where it is sure.

    Args:
        cell: of a table.
    """
    if not cell.change:
        return cell.text
    return f"{cell.text} ({f'**{cell.change}**' if cell.is_sure else cell.change})"
