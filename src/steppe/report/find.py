"""Finds the runs that a person names on the command line."""

from __future__ import annotations

import dataclasses
import os
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from steppe.errors import RunError
from steppe.runs import RUN_FILE, Run, read_run


def find_runs(paths: Sequence[Path]) -> list[Run]:
    """Read every run that the paths lead to.

    Args:
        paths: files that `steppe.runs.write_run` wrote, folders that hold ``steppe.json``, or
            folders with such folders anywhere below. A folder that holds the file itself stands
            for that run alone; hidden folders are passed over.

    Returns:
        The runs, in the order of the paths and below a path in that of their folders, numbers by
        value. A run that two paths lead to comes once. Of runs with the same name each gets where
        it was found added to its name.

    Raises:
        RunError: nothing is there, or a file is no run.
    """
    files: dict[Path, Path] = {}  # one run reached in two ways is one run
    for path in paths:
        for file in _run_files(path):
            files.setdefault(file.resolve(), file)
    runs = [read_run(file) for file in files.values()]
    return _with_distinct_names(runs, list(files))


def _run_files(path: Path) -> list[Path]:
    """The files of runs that one path stands for."""
    if not path.is_dir():
        return [path]  # whatever is wrong with it, `read_run` says it
    if (path / RUN_FILE).is_file():
        return [path / RUN_FILE]
    below = [
        file
        for file in path.rglob(RUN_FILE)
        if file.is_file() and not any(part.startswith(".") for part in file.relative_to(path).parts)
    ]
    if not below:
        raise RunError(
            f"{path}: expected a folder with {RUN_FILE} in it or below it; found none. Name the"
            " folder that a training run wrote, or a file that `steppe measure` wrote."
        )
    return sorted(below, key=_natural)


def _natural(path: Path) -> list[list[tuple[int, str]]]:
    """Sorts ``seed-2`` before ``seed-10``."""
    return [
        [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", folder)]
        for folder in path.parts
    ]


def _with_distinct_names(runs: Sequence[Run], files: Sequence[Path]) -> list[Run]:
    """Runs of one name told apart by where they were found, then by a number."""
    places = [file.parent if file.name == RUN_FILE else file for file in files]
    named = Counter(run.name for run in runs)
    names: list[str] = []
    for run, place in zip(runs, places, strict=True):
        name = run.name
        if named[name] > 1:
            alike = [p for r, p in zip(runs, places, strict=True) if r.name == name]
            name = f"{name} ({place.relative_to(os.path.commonpath(alike)).as_posix()})"
        again = 2
        while name in names:
            name, again = f"{name.removesuffix(f' #{again - 1}')} #{again}", again + 1
        names.append(name)
    return [dataclasses.replace(run, name=name) for run, name in zip(runs, names, strict=True)]
