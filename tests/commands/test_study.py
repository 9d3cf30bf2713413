"""`steppe study` as a user calls it, in this process."""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path

import pytest

from steppe.commands.app import run
from steppe.study.rows import read_rows


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.chdir(tmp_path)
    for name in ("transformers", "datasets"):  # the commands quieten them
        monkeypatch.setattr(logging.getLogger(name), "level", logging.WARNING)

    def called(*arguments: str) -> int:
        monkeypatch.setattr(sys, "argv", ["steppe", "study", *arguments])
        return run()

    return called


def test_the_list_has_the_studies(call, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("--list") == 0
    told = capsys.readouterr().out
    for name in ("digits", "effect", "frontier", "widths"):
        assert name in told


def test_a_wrong_file_is_one_error_and_nothing_is_run(
    call, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine.yaml").write_text("recipes: {digits: }\narms: {a: {arm: b}}\n")
    assert call("mine.yaml") == 2
    told = capsys.readouterr().err
    assert told.startswith("error: mine.yaml: digits/a: ")
    assert "expected one of vanilla, control, steppe, threshold, got 'b'" in told
    assert not (tmp_path / "runs").exists()
    assert call("mine.yaml", "--data", "digits") == 2
    assert "--data RECIPE=FOLDER" in capsys.readouterr().err


def test_a_dry_run_prints_the_runs(call, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("digits", "--dry-run", "--quick", "--only", "vanilla,three") == 0
    assert capsys.readouterr().out.split() == [
        *("digits/vanilla/seed-0", "digits/three/seed-0"),
        *("digits/vanilla/seed-1", "digits/three/seed-1"),
    ]


def test_quick_trains_writes_rows_and_does_nothing_the_second_time(
    call, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("digits", "--quick", "--only", "three", "--jobs", "1", "--out", "out")
    assert call(*words) == 0, capsys.readouterr().err
    file = tmp_path / "out" / "digits.jsonl"
    rows = read_rows(file)
    assert [row["id"] for row in rows] == ["digits/three/seed-0", "digits/three/seed-1"]
    for row in rows:
        assert row["is_quick"]
        assert row["steps"] == 4
        assert 0 < row["density"] < 1
        assert 0 < row["training_density"] < 1
        assert 0 < row["derivative_density"] < 1
        assert 0 <= row["dead_units"] < 1
        assert row["seconds"] > 0
        assert 0 <= row["quality"]["top1"] <= 1
        assert row["settings"]["max_steps"] == 4
        assert {"steppe", "torch", "python", "transformers"} <= set(row["versions"])
        assert str(tmp_path) not in json.dumps(row)
    assert len({row["density"] for row in rows}) == 2
    told = capsys.readouterr().out
    assert "mean nothing" in told
    assert told.splitlines()[-1] == "out/digits.jsonl"
    before = file.read_bytes()
    assert call(*words) == 0
    assert file.read_bytes() == before
