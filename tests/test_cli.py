"""The command line as a user sees it: a real process, its exit code and what it prints."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

COMMAND = [sys.executable, "-m", "steppe.cli"]
PLAIN = {**os.environ, "NO_COLOR": "1", "COLUMNS": "120", "TERM": "dumb", "HF_HUB_OFFLINE": "1"}


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*COMMAND, *arguments], env=PLAIN, capture_output=True, text=True, timeout=300, check=False
    )


def test_version_and_help_say_what_there_is() -> None:
    assert run("--version").stdout == "steppe 0.1.0\n"
    assert "demo" in run("--help").stdout


@pytest.mark.parametrize(
    "arguments", [["nonsense"], ["demo", "--seeds", "0"], ["demo", "--max-steps", "many"]]
)
def test_wrong_arguments_exit_with_2_and_no_traceback(arguments: list[str]) -> None:
    result = run(*arguments)
    assert result.returncode == 2
    assert "Traceback" not in result.stderr


def test_an_output_folder_that_is_a_file_is_one_error_and_nothing_is_trained(
    tmp_path: Path,
) -> None:
    (tmp_path / "file").write_text("mine")
    result = run("demo", "--out", str(tmp_path / "file"))
    assert result.returncode == 2
    assert "error: cannot write to" in result.stderr
    assert "--out" in result.stderr
    assert "Traceback" not in result.stderr
    assert (tmp_path / "file").read_text() == "mine"


def test_demo_writes_summary_plot_logs_and_models_and_prints_the_table(tmp_path: Path) -> None:
    result = run("demo", "--out", str(tmp_path), "--max-steps", "12")
    assert result.returncode == 0, result.stderr
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert (tmp_path / "density.png").read_bytes().startswith(b"\x89PNG")
    for data_set, quality in (("digits", "accuracy"), ("pydoc", "loss")):
        assert data_set in result.stdout
        arms = summary["data_sets"][data_set]["arms"]
        assert list(arms) == ["vanilla", "control", "steppe"]
        for name, arm in arms.items():
            for key in (quality, "density", "training_density", "derivative_density"):
                assert arm[key] > 0
            assert len(arm["density_per_block"]) == 2
            folder = tmp_path / data_set / name / "seed-0"
            assert list(folder.glob("runs/*/events.out.tfevents.*"))
            config = json.loads((folder / "model" / "config.json").read_text())
            assert ("steppe" in config) == (name == "steppe")
    for name in ("vanilla", "control", "steppe"):
        assert name in result.stdout
    assert result.stderr == ""


def test_ctrl_c_ends_with_one_line_and_no_summary(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [*COMMAND, "demo", "--out", str(tmp_path)],
        env=PLAIN,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob("digits/vanilla/seed-0/runs/*/*")):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "interrupted" in errors
    assert "Traceback" not in errors
    assert not (tmp_path / "summary.json").exists()
