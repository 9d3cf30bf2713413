"""`steppe study` as a user calls it, in this process."""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path

import pytest

from commands.test_cli import interrupt
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
    for name in ("digits", "effect", "frontier", "scale-gpu"):
        assert name in told


def test_a_wrong_file_is_one_error_and_nothing_is_run(
    call, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine.yaml").write_text("recipes: {digits: }\narms: {a: {arm: b}}\n")
    assert call("mine.yaml") == 2
    told = capsys.readouterr().err
    assert told.startswith("error: mine.yaml: digits/a: ")
    assert "expected one of vanilla, control, steppe, threshold, best, got 'b'" in told
    assert not (tmp_path / "runs").exists()
    assert call("mine.yaml", "--data", "digits") == 2
    assert "--data RECIPE=FOLDER" in capsys.readouterr().err


def test_a_dry_run_prints_the_runs(call, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("digits", "--dry-run", "--quick", "--only", "vanilla,three") == 0
    assert capsys.readouterr().out.split() == [
        *("digits/vanilla/seed-0", "digits/three/seed-0"),
        *("digits/vanilla/seed-1", "digits/three/seed-1"),
    ]


def test_quick_trains_writes_rows_tells_what_fails_and_does_nothing_twice(
    call, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine.yaml").write_text(
        "recipes: {digits: }\n"
        "arms: {three: {arm: steppe}, wild: {arm: vanilla, learning_rate: 1.0e+30}}\n"
        "seeds: [3]\n"
    )
    words = ("mine.yaml", "--quick", "--jobs", "1", "--out", "out")
    assert call(*words) == 1
    told, errors = capsys.readouterr()
    assert errors.startswith("failed: digits/wild/seed-3\n")
    assert "learning_rate=" in errors
    assert errors.splitlines()[-1].startswith("error: 1 of 2 runs failed")
    file = tmp_path / "out" / "mine.jsonl"
    (row,) = read_rows(file)
    assert row["id"] == "digits/three/seed-3"
    assert row["is_quick"]
    assert row["steps"] == 4
    assert 0 < row["density"] < 1
    assert 0 < row["training_density"] < 1
    assert 0 < row["derivative_density"] < 1
    assert 0 <= row["dead_units"] < 1
    assert row["seconds"] > 0
    assert 0 <= row["quality"]["top1"] <= 1
    assert row["settings"]["max_steps"] == 4
    assert row["settings"]["seed"] == 3
    assert {"steppe", "torch", "python", "transformers"} <= set(row["versions"])
    assert str(tmp_path) not in json.dumps(row)
    assert "mean nothing" in told
    assert told.splitlines()[-1] == "out/mine.jsonl"
    before = file.read_bytes()
    assert call(*words, "--only", "three") == 0
    assert file.read_bytes() == before


@pytest.mark.slow  # half of it imports; study/test_running.py ends processes early in a moment
def test_ctrl_c_ends_with_one_line_and_ends_the_runs(tmp_path: Path) -> None:
    out = tmp_path / "out"
    code, errors = interrupt(
        *("study", "digits", "--only", "vanilla", "--jobs", "1", "--out", str(out)),
        when=lambda: any(out.glob("digits/vanilla/*/log.txt")),
    )
    assert code == 130
    assert errors.strip() == "interrupted; go on with the same command"
    (log,) = out.glob("digits/vanilla/*/log.txt")
    assert "Traceback" not in log.read_text()
    assert read_rows(out / "digits.jsonl") == []
