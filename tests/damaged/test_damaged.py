"""Damaged and hostile files end in one clear error, or do no harm; nothing crashes or runs full.

A case is named ``target/kind/seed``. To see one: ``python tests/damaged/runner.py FOLDER CASE``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pytest

from damaged.faults import FAULTS, TOLD
from damaged.hostile import HOSTILE
from damaged.mutations import FILE_WAYS
from damaged.runner import run_cases
from damaged.targets import BYTES, FILE, TARGETS, TREE, WHOLE

CHECKED = list(TARGETS)
_SLOW = ("step", "tokenizer", "tokenizer-config", "processor")
"""Targets that load a model for each file."""


def cases_of(names: Sequence[str], each: int) -> list[str]:
    """So many damaged files of each target and kind, and everything else that may be in place."""
    numbers = {BYTES: each, TREE: 2 * each, FILE: len(FILE_WAYS)}
    return [
        f"{name}/{kind}/{seed}"
        for name in names
        for kind in TARGETS[name].kinds
        for seed in range(numbers[kind])
    ]


# One test, since what the child process imports takes as long as what it does.
def test_whole_files_are_read_damaged_ones_do_no_harm_and_hostile_ones_are_refused(
    tmp_path: Path,
) -> None:
    faults = [f"{name}/{WHOLE}/0" for name in FAULTS]
    whole = [f"{name}/{WHOLE}/0" for name in TARGETS]
    hostile = [f"{name}/{WHOLE}/0" for name in HOSTILE]
    damaged = cases_of([name for name in CHECKED if name not in _SLOW], each=3)
    assert len(damaged) > 200
    cases = [*faults, *whole, *hostile, *damaged]
    outcomes = {one.case: one for one in run_cases(cases, tmp_path)}
    assert list(outcomes) == cases
    for name, case in zip(FAULTS, faults, strict=True):
        assert outcomes[case].verdict == "wrong"
        assert TOLD[name] in outcomes[case].told
    assert [outcomes[case] for case in whole if outcomes[case].verdict != "harmless"] == []
    assert [outcomes[case] for case in hostile if outcomes[case].verdict != "clear"] == []
    assert [outcomes[case] for case in damaged if outcomes[case].verdict == "wrong"] == []
    verdicts = Counter(outcomes[case].verdict for case in damaged)
    assert min(verdicts["clear"], verdicts["harmless"]) > 20  # else nothing was damaged, or read


@pytest.mark.slow
def test_two_thousand_damaged_files_and_more(tmp_path: Path) -> None:
    cases = cases_of(CHECKED, each=60)
    assert len(cases) > 2000
    outcomes = run_cases(cases, tmp_path)
    assert [outcome.case for outcome in outcomes] == cases
    assert [outcome for outcome in outcomes if outcome.verdict == "wrong"] == []
