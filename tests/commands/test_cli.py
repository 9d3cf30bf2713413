"""The command line as a user sees it: a real process, its exit code and what it prints."""

from __future__ import annotations

import json
import math
import os
import pty
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

import models
import steppe
from data.data_makers import TEXT, words_tokenizer
from steppe.runs import read_run
from training.recipe_worker import TINY_GPT, write_text

COMMAND = [sys.executable, "-m", "steppe.cli"]
PLAIN = {**os.environ, "NO_COLOR": "1", "COLUMNS": "120", "TERM": "dumb", "HF_HUB_OFFLINE": "1"}


def run(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {**PLAIN, **variables}
    return subprocess.run(
        [*COMMAND, *arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def message_of(result: subprocess.CompletedProcess[str]) -> str:
    """The one error of a command that was refused, on one line."""
    assert result.returncode == 2
    assert "Traceback" not in result.stderr
    return " ".join(result.stderr.split())


def test_version_and_help_say_what_there_is() -> None:
    assert run("--version").stdout == f"steppe {steppe.__version__}\n"
    described = run("--help").stdout
    for command in ("demo", "train", "measure", "report", "bench", "calibrate", "study"):
        assert command in described


def test_an_output_folder_that_is_a_file_is_one_error_and_nothing_is_trained(
    tmp_path: Path,
) -> None:
    (tmp_path / "file").write_text("mine")
    result = run("demo", "--out", str(tmp_path / "file"))
    assert "error: cannot write to" in message_of(result)
    assert "--out" in result.stderr
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.slow  # half a minute; training/test_demo.py trains the same
def test_demo_writes_summary_plot_logs_and_models_and_prints_the_table(tmp_path: Path) -> None:
    result = run("demo", "--out", str(tmp_path), "--max-steps", "12")
    assert result.returncode == 0, result.stderr
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert (tmp_path / "density.png").read_bytes().startswith(b"\x89PNG")
    for data_set, quality in (("digits", "accuracy"), ("pydoc", "loss")):
        assert data_set in result.stdout
        arms = summary["data_sets"][data_set]["arms"]
        assert list(arms) == ["vanilla", "control", "steppe", "best"]
        for name, arm in arms.items():
            for key in (quality, "density", "training_density", "derivative_density"):
                assert arm[key] > 0
            assert len(arm["density_per_block"]) == 2
            folder = tmp_path / data_set / name / "seed-0"
            assert list(folder.glob("runs/*/events.out.tfevents.*"))
            config = json.loads((folder / "model" / "config.json").read_text())
            assert ("steppe" in config) == (name in ("steppe", "best"))
    for name in ("vanilla", "control", "steppe", "best"):
        assert name in result.stdout
    assert "ours and not the paper's" in result.stdout
    assert "dense time / accelerated time" in result.stdout
    assert "pydoc-wide, threshold, dense and accelerated: " in result.stdout
    assert "faster (" in result.stdout
    assert result.stdout.splitlines()[-1] == str(tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    for label in ("digits", "pydoc", "vanilla", "control", "steppe", "best"):
        assert label in page
    assert result.stderr == ""


def listen_to_ctrl_c() -> None:
    """As in a terminal: a process that nohup or a shell's ``&`` has started ignores it."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def interrupt(*args: str, when: Callable[[], bool], **env: str) -> tuple[int, str]:
    """Start steppe, press Ctrl-C as soon as something is true, and give code and messages."""
    process = subprocess.Popen(
        [*COMMAND, *args],
        env={**PLAIN, **env},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=listen_to_ctrl_c,
    )
    try:
        deadline = time.monotonic() + 600
        while not when():
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=120)
    finally:
        process.kill()  # what has ended already stays as it is
        process.wait()
    assert "Traceback" not in errors
    return process.returncode, errors


def test_ctrl_c_ends_with_one_line_and_no_summary(tmp_path: Path) -> None:
    code, errors = interrupt(
        *("demo", "--out", str(tmp_path)),
        when=lambda: bool(list(tmp_path.glob("digits/vanilla/seed-0/runs/*/*"))),
    )
    assert code == 130
    assert "interrupted" in errors
    assert not (tmp_path / "summary.json").exists()


def test_ctrl_c_in_code_made_from_text_ends_with_the_code_too(tmp_path: Path) -> None:
    (tmp_path / "interrupted.py").write_text("""\
import steppe.cli, steppe.commands.app

def run():
    try:
        exec("raise KeyboardInterrupt")
    except KeyboardInterrupt:
        return steppe.cli.INTERRUPTED

steppe.commands.app.run = run
steppe.cli.main()
""")
    command = [sys.executable, "-m", "interrupted"]
    assert subprocess.run(command, cwd=tmp_path, check=False).returncode == 130


@pytest.fixture
def measurable(tmp_path: Path) -> list[str]:
    """Two checkpoints of a run, and the options that name data for them."""
    for step in (10, 20):
        folder = tmp_path / "run" / f"checkpoint-{step}"
        models.gpt2().save_pretrained(folder)
        words_tokenizer(folder)
    (tmp_path / "text.txt").write_text(TEXT * 40)
    checkpoints = [str(tmp_path / "run" / f"checkpoint-{step}") for step in (20, 10)]
    return [*checkpoints, "--data", str(tmp_path / "text.txt"), "--max-length", "16"]


def test_measure_prints_tables_and_what_it_writes_can_be_reported(
    tmp_path: Path, measurable: list[str]
) -> None:
    written, page = tmp_path / "held-out.json", tmp_path / "new" / "page.html"
    result = run("measure", *measurable, "--max-batches", "2", "--json", str(written))
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    measured = read_run(written)
    assert measured.held_out_steps == [10, 20]
    density = measured.held_out[-1].blocks[0].density
    assert 0 < density < 1
    assert f"{100 * density:.2f}" in result.stdout
    assert "step 20" in result.stdout
    assert f"held-out loss: {measured.quality['loss']:.4g}" in result.stdout
    result = run("report", str(written), "--out", str(page))
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == [str(page)]
    assert "<h1" in page.read_text(encoding="utf-8")


def on_a_terminal(*words: str, interrupt_at: str | None = None) -> tuple[int, str, str]:
    """Run a command whose error stream is a terminal: its code, its output, what the screen got.

    Ctrl-C is pressed as soon as the screen has the text of `interrupt_at`.
    """
    screen, terminal = pty.openpty()
    process = subprocess.Popen(
        [*COMMAND, *words],
        env={**PLAIN, "TERM": "xterm"},
        stdout=subprocess.PIPE,
        stderr=terminal,
        text=True,
        preexec_fn=listen_to_ctrl_c,
    )
    os.close(terminal)
    shown, pressed = b"", interrupt_at is None
    try:
        while chunk := read_or_end(screen):
            shown += chunk
            if not pressed and str(interrupt_at).encode() in shown:
                process.send_signal(signal.SIGINT)
                pressed = True
        output, _ = process.communicate(timeout=120)
    finally:
        process.kill()
        process.wait()
        os.close(screen)
    return process.returncode, output, re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown.decode())


def read_or_end(screen: int) -> bytes:
    try:
        return os.read(screen, 4096)
    except OSError:  # Linux: nobody has the terminal open any more
        return b""


def test_measure_shows_its_progress_on_a_terminal_and_prints_the_same(
    tmp_path: Path, measurable: list[str]
) -> None:
    options = ("--max-batches", "2", "--labels", "none", "--json", str(tmp_path / "a.json"))
    piped = run("measure", *measurable, *options)
    written = (tmp_path / "a.json").read_bytes()
    (tmp_path / "a.json").unlink()
    code, output, shown = on_a_terminal("measure", *measurable, *options)
    assert code == 0, shown
    assert output == piped.stdout
    assert (tmp_path / "a.json").read_bytes() == written
    assert piped.stderr == ""
    coloured = run("measure", *measurable, *options, FORCE_COLOR="1")
    assert re.sub(r"\x1b\[[0-9;]*m", "", coloured.stdout) == piped.stdout  # and no bars in a pipe
    assert coloured.stderr == ""
    density = 100 * read_run(tmp_path / "a.json").held_out[-1].density
    for part in ("loading run/checkpoint-10", "loading run/checkpoint-20"):
        assert part in shown
    # Done batches, the density, the time that has passed, the time that is left.
    last = rf"run/checkpoint-20 ━+ 2/2 density {density:.2f} % \d:\d\d:\d\d 0:00:00"
    assert re.search(last, shown)


def test_ctrl_c_while_measuring_is_one_line_and_writes_nothing(
    tmp_path: Path, measurable: list[str]
) -> None:
    (tmp_path / "text.txt").write_text(TEXT * 4000)  # a minute
    written = tmp_path / "a.json"
    words = ("measure", *measurable, "--batch-size", "1", "--json", str(written))
    code, output, shown = on_a_terminal(*words, interrupt_at="density ")
    assert code == 130
    assert output == ""
    assert "Traceback" not in shown
    assert "interrupted; nothing was written" in shown
    assert not written.exists()


@pytest.mark.slow  # measures/ has the numbers
def test_measure_samples_labels_or_does_without(tmp_path: Path, measurable: list[str]) -> None:
    checkpoint, options = measurable[0], measurable[2:]
    results = {}
    for labels in ("model", "none"):
        written = tmp_path / f"{labels}.json"
        result = run("measure", checkpoint, *options, "--labels", labels, "--json", str(written))
        assert result.returncode == 0, result.stderr
        results[labels] = read_run(written).held_out[0].blocks[0]
    assert results["model"].AF_up > 0
    assert math.isnan(results["none"].AF_up)
    assert results["none"].density == results["model"].density


@pytest.mark.slow  # test_bench.py times and tables the same
def test_bench_prints_a_table_and_writes_rows_and_a_plot(tmp_path: Path) -> None:
    written, plot = tmp_path / "new" / "bench.json", tmp_path / "bench.png"
    arguments = ["--quick", "--threads", "1", "--json", str(written), "--plot", str(plot)]
    result = run("bench", *arguments)
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    first, *_, last_but_one, last = result.stdout.splitlines()
    found = steppe.kernels()
    assert first.startswith(f"{found.name} kernels, {found.isa}" if found.isa else "no kernels: ")
    assert [last_but_one, last] == [str(written), str(plot)]
    values = json.loads(written.read_text())
    assert values["kernels"]["name"] == found.name
    assert {row["case"] for row in values["rows"]} == {"training", "prefill", "decode"}
    for row in values["rows"]:
        assert row["case"] in result.stdout
        assert f"{row['ratio']:.2f}" in result.stdout
        assert row["threads"] == 1
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_bench_refuses_a_place_where_it_cannot_write_before_it_times(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    for option in ("--json", "--plot"):
        result = run("bench", "--quick", option, str(tmp_path / "file" / "rows"))
        assert "error: cannot write to" in message_of(result)
        assert result.stdout == ""


def test_calibrate_refuses_a_place_where_it_cannot_write_before_it_measures(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    place = {**PLAIN, "XDG_CACHE_HOME": str(tmp_path / "file")}
    result = subprocess.run(
        [*COMMAND, "calibrate"], env=place, capture_output=True, text=True, timeout=300, check=False
    )
    assert message_of(result).startswith("error: ")
    assert "measured" not in result.stdout
    assert (tmp_path / "file").read_text() == "mine"


def test_an_interrupted_calibrate_ends_with_one_line_and_writes_nothing(tmp_path: Path) -> None:
    if steppe.kernels().name != "native":
        pytest.skip(steppe.kernels().reason)
    code, errors = interrupt(
        *("calibrate", "--dtype", "float32", "--threads", "1"),
        when=(tmp_path / "steppe").exists,  # it is made before anything is measured
        XDG_CACHE_HOME=str(tmp_path),
    )
    assert code == 130
    assert "interrupted; the thresholds for float32 are as they were" in errors
    assert list((tmp_path / "steppe").iterdir()) == []


def test_train_lists_its_recipes() -> None:
    listed = run("train", "--list").stdout
    for name in ("vit-b16-imagenet1k", "t5-base-c4-finetune", "fashion-mnist-vit"):
        assert name in listed


@pytest.mark.slow  # test_readme.py trains and reports, too
def test_train_ends_with_a_table_a_page_and_what_it_wrote(tmp_path: Path) -> None:
    write_text(tmp_path / "data", topics=20)
    command = [
        *("train", "text-gpt", "--data_dir", str(tmp_path / "data"), "--model_config", TINY_GPT),
        *("--length", "32", "--vocab_size", "300", "--cache_dir", str(tmp_path / "cache")),
        *("--output_dir", str(tmp_path / "run"), "--max_steps", "6", "--save_steps", "3"),
        *("--logging_steps", "2", "--measure_every", "1", "--eval_steps", "6"),
        *("--held_out_samples", "8", "--use_cpu", "true"),
    ]
    done = run(*command)
    assert done.returncode == 0, done.stderr
    assert "step 6  loss" in done.stdout
    assert "derivative" in done.stdout
    assert "perplexity" in done.stdout
    for name in ("summary.json", "report.html", "steppe.json", "model/config.json"):
        assert (tmp_path / "run" / name).is_file()
    assert list((tmp_path / "run" / "runs").rglob("events.out.tfevents.*"))
    assert "--resume" in message_of(run(*command))
    assert run(*command, "--resume").returncode == 0
    measured = run("measure", str(tmp_path / "run" / "model"), "--data", str(tmp_path / "data"))
    assert measured.returncode == 0, measured.stderr
