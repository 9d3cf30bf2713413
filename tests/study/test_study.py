"""A study from its file to its lines, with work that takes no time."""

from __future__ import annotations

from pathlib import Path

import pytest

from steppe.study.rows import read_rows
from steppe.study.study import StudyOutcome, run_study
from steppe.study.study_file import read_study
from study.fake_work import work

FILE = """
recipes: {digits: }
arms:
  fine: {arm: vanilla}
  raises: {arm: control}
seeds: 2
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "mine.yaml"
    path.write_text(FILE)
    return path


def run(file: Path, heard: list | None = None, **options) -> StudyOutcome:
    tell = [].append if heard is None else heard.append
    return run_study(
        read_study(file),
        file.parent / "out",
        2,
        on_progress=lambda done, total: tell((done, total)),
        on_failure=lambda run, lines: tell((run, lines)),
        work=work,
        **options,
    )


def test_what_fails_is_told_at_the_end_and_tried_again_the_next_time(file: Path) -> None:
    heard: list = []
    outcome = run(file, heard)
    assert outcome.failed == ["digits/raises/seed-0", "digits/raises/seed-1"] or outcome.failed == [
        "digits/raises/seed-1",
        "digits/raises/seed-0",
    ]
    assert sorted(row["id"] for row in outcome.rows) == [
        "digits/fine/seed-0",
        "digits/fine/seed-1",
    ]
    lines = dict(one for one in heard if isinstance(one[0], str))
    assert "no such luck" in lines["digits/raises/seed-0"][-2]
    shares = [one for one in heard if not isinstance(one[0], str)]
    assert shares[-1] == (4, 4)
    assert [done for done, _ in shares] == sorted(done for done, _ in shares)
    file.write_text(FILE.replace("raises", "mended"))
    again = run(file)
    assert again.failed == []
    assert len(again.rows) == 4
    starts = {path.parent.parent.name: path.read_text() for path in file.parent.rglob("starts")}
    assert starts == {"fine": "x", "raises": "x", "mended": "x"}


def test_changed_settings_are_done_again_and_a_quick_look_hides_nothing(file: Path) -> None:
    first = run(file, only=["fine"])
    quick = run(file, only=["fine"], quick=True)
    assert [row["is_quick"] for row in quick.rows] == [True, True]
    assert len(read_rows(quick.file)) == 4
    before = quick.file.read_bytes()
    assert run(file, only=["fine"]).rows == first.rows
    assert quick.file.read_bytes() == before
    file.write_text(FILE + "set: {max_steps: 3}\n")
    assert {row["settings"]["max_steps"] for row in run(file, only=["fine"]).rows} == {3}
    assert len(read_rows(quick.file)) == 6


def test_checkpoints_of_a_run_that_is_done_are_deleted(file: Path) -> None:
    first = run(file, only=["fine"])
    folders = list((file.parent / "out" / "digits" / "fine").iterdir())
    assert len(folders) == 2
    for folder in folders:
        (folder / "checkpoint-4").mkdir()
    first.file.unlink()
    run(file, only=["fine"])
    assert not list(file.parent.rglob("checkpoint-*"))
