"""Odd command lines: each works, or ends with exit code 2 and one message that helps."""

from __future__ import annotations

import errno
import io
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import datasets
import pytest
from transformers.utils import logging

import models
from data.data_makers import TEXT, words_tokenizer
from steppe.commands import app as commands
from steppe.commands import guards, terminal
from steppe.errors import OutputError
from steppe.files import prepare_file, write_json
from steppe.runs import Run, write_run
from steppe.training.recipe_arguments import ArmArguments, DataArguments, ModelArguments
from steppe.training.recipe_file import RECIPES
from training.recipe_worker import TINY_GPT, write_text

LONG = "n" * 300  # more than a file's name may have
HUGE = "A" * 100_000
HOSTILE = "\x1b[31m\x1b]0;title\x07\x9b2J"
ODD_FOLDER = "[/red] [bold]:smile: ‖ " + "x" * 150
TRAIN = ("train", "text-gpt", "--data_dir", "data", "--use_cpu", "true")
MEASURE = ("measure", "model", "--data", "pydoc")

ODD: list[tuple[tuple[str, ...], str]] = [
    (("nonsense",), "nonsense"),
    (("demo", "--seeds", "0"), "--seeds"),
    (("demo", "--max-steps", "many"), "--max-steps"),
    (("measure", "out"), "--data"),
    (("measure", "--data", "pydoc"), "CHECKPOINT"),
    ((*MEASURE, "--labels", "mine"), "--labels"),
    (("report",), "RUN"),
    (("bench", "--threads", "0"), "--threads"),
    (("bench", "fast"), "fast"),
    (("calibrate", "--threads", "0"), "--threads"),
    (("calibrate", "--dtype", "float64"), "--dtype"),
    (("calibrate", "now"), "now"),
    (("train", "text-gtp"), "steppe train text-gpt"),
    (("study", "digit"), "steppe study digits"),
    (("study", "digits", "--jobs", "0"), "--jobs"),
    (("study", "digits", "--only", "vanila"), "Did you mean vanilla?"),
    (("study", "digits", "--data", "digits"), "--data RECIPE=FOLDER"),
    (("study", "digits", "--data", "pydoc=data"), "--data digits=FOLDER"),
    (("study", "digits", "--data", "digits=nowhere"), "nowhere: there is no such file or folder"),
    (("study", "digits", "--out", LONG), "--out PATH"),
    (("study", LONG), "File name too long"),
    (("study", HOSTILE), r"\x1b[31m"),
    (("study", "effect", "--only", "text-gpt,vanilla"), "--data text-gpt=FOLDER"),
    (("train", "text-gpt", "--data_dir", "./nowhere"), "there is no such file or folder"),
    (("train", "text-gpt", "--lerning_rate", "1"), "--learning_rate"),
    (("train", "text-gpt"), "--data_dir FOLDER"),
    (("train", "fashion-mnist-vit", "--data_dir", "taken"), "images or IDX files, found none"),
    ((*MEASURE[:1], "none", *MEASURE[2:]), "none: "),
    ((*MEASURE[:1], "data", *MEASURE[2:]), "data: found no config.json"),
    (("measure", "model", "--data", "none.txt"), "none.txt"),
    (("measure", "model", "--data", "digits"), "digits"),
    ((*MEASURE, "--device", "abacus"), "abacus"),
    (("report", "none"), "none"),
    (("report", "notes.json"), "notes.json: expected a run of version"),
    (("report", "data"), "data: expected a folder with steppe.json"),
    ((HUGE,), "No such command"),
    (("-h",), "see: steppe --help"),
    (("demo", "--seeds", HUGE), "--seeds"),
    (("demo", "--out", LONG), "--out PATH"),
    (("demo", "--out", "~nouser/x"), "./~nouser/x"),
    (("demo", "--out", "taken"), "taken/summary.json: it is a folder"),
    (("train", LONG), "File name too long"),
    (("train", HUGE), "File name too long"),
    (("train", HOSTILE), r"\x1b[31m"),
    (("train", "~nouser/r.yaml"), "./~nouser/r.yaml"),
    (("train", "zero.yaml"), "zero.yaml: data_dir: expected text"),
    (("train", "circle.yaml"), "circle.yaml: "),
    (("train", "key.yaml"), "a key is a word"),
    (("train", "infinite.yaml"), "infinite.yaml: argument --max_steps: invalid int value"),
    (("train", "low.yaml"), "low.yaml: length: expected at least 1, got -3"),
    (("train", "text-gpt", "data"), "data: expected a flag"),
    (("train", "text-gpt", "-lr", "1"), "-lr 1: expected a flag"),
    (("train", "text-gpt", "--data_dir", LONG), "File name too long"),
    (("train", "text-gpt", "--data_dir", "~nouser"), "./~nouser"),
    (("train", "text-gpt", "--data_dir", ""), "data_dir: expected a path"),
    ((*TRAIN, "--max_steps", "0"), "error: max_steps: expected at least 1, or -1"),
    ((*TRAIN, "--per_device_train_batch_size", "0"), "error: per_device_train_batch_size: expec"),
    ((*TRAIN, "--per-device-eval-batch-size", "0"), "error: per_device_eval_batch_size: expect"),
    ((*TRAIN, "--seed", "-1"), "error: seed: expected 0 … 4294967295, got -1"),
    ((*TRAIN, "--learning_rate", "nan"), "error: learning_rate: expected at least 0, got nan"),
    ((*TRAIN, "--learning_rate", HUGE), "error: argument --learning_rate: invalid float value"),
    ((*TRAIN, "--arm", "[/red]"), "got '[/red]'"),
    ((*TRAIN, "--task", HOSTILE), r"got '\x1b[31m"),
    ((*TRAIN, "--output_dir", "~nouser/x"), "./~nouser/x"),
    ((*TRAIN, "--output_dir", LONG), "--output_dir PATH"),
    ((*TRAIN, "--output_dir", "file"), "--output_dir PATH"),
    ((*TRAIN, "--output_dir", "page"), "page/report.html: it is a folder"),
    ((*TRAIN, "--model_config", '{"n_embd": -4}'), "model_type, model_config: RuntimeError"),
    ((*TRAIN, "--model_config", '{"n_head": 0}'), "model_type, model_config: ZeroDivisionError"),
    ((*TRAIN, "--accelerator_config", "none.json"), "text-gpt: [Errno 2] No such file"),
    ((*TRAIN, "--report_to", "nowhere"), "text-gpt: nowhere is not supported"),
    ((*TRAIN, "--tokenizer", "~nouser"), "./~nouser"),
    ((*TRAIN, "--vocab_size", "99999999999"), "error: vocab_size: expected 1 … 10000000"),
    ((*TRAIN, "--task", "image-classification"), "model_type: gpt2 has no image_size"),
    (("measure", "", "--data", "pydoc"), "expected a path or an id"),
    (("measure", "~nouser", "--data", "pydoc"), "./~nouser"),
    (("measure", LONG, "--data", "pydoc"), "File name too long"),
    ((*MEASURE, "--json", "taken"), "taken: it is a folder. Name another place: --json PATH"),
    ((*MEASURE, "--json", LONG), "--json PATH"),
    ((*MEASURE, "--json", "~nouser/x"), "./~nouser/x"),
    (("report", LONG), "File name too long"),
    (("report", "~nouser"), "./~nouser"),
    (("report", "[/red]"), "error: [/red]: expected a folder"),
    (("report", "version.json"), "version.json: expected a run of version"),
    (("report", "run.json", "--out", "taken"), "taken: it is a folder"),
    (("report", "run.json", "--out", "run.json"), "would replace a run"),
    (("report", "run.json", "--out", "./taken/../run.json"), "would replace a run"),
    (("bench", "--json", "taken"), "taken: it is a folder. Name another place: --json PATH"),
    (("bench", "--plot", "taken"), "taken: it is a folder. Name another place: --plot PATH"),
    (("report", "/dev/zero"), "/dev/zero: expected a file, got a device"),
    (("bench", "--threads", "99999999999999999999"), "--threads"),
    (("calibrate", "--threads", "99999999999999999999"), "--threads"),
    (("bench", "--json", "one", "--plot", "./one"), "two files"),
    (("blocks", ""), "expected a path or an id"),
    (("blocks", LONG), "File name too long"),
    (("blocks", "~nouser"), "./~nouser"),
    (("calibrate", HUGE), "unexpected extra argument"),
]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with what the command lines name."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    tmp_path = tmp_path / "place"
    tmp_path.mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    recipe = "task: causal-lm\nmodel_type: gpt2\n"
    for name, text in (
        ("data/text.txt", TEXT * 20),
        ("file", "mine"),
        ("notes.json", "{}"),
        ("taken/summary.json/file", ""),
        ("page/report.html/file", ""),
        ("version.json", json.dumps({"version": HOSTILE + HUGE, "training": []})),
        ("zero.yaml", f'{recipe}data_dir: "a\\0b"\n'),
        ("circle.yaml", f"{recipe}model_config: &a {{x: *a}}\n"),
        ("key.yaml", "? [a, b]\n: c\n"),
        ("infinite.yaml", f"{recipe}data_dir: data\nmax_steps: .inf\n"),
        ("low.yaml", f"{recipe}data_dir: data\nlength: -3\n"),
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    write_run(Run(name="a run", model="M", tokens_per_sample=1.0), tmp_path / "run.json")
    models.gpt2().save_pretrained(tmp_path / "model")
    words_tokenizer(tmp_path / "model")
    datasets.disable_progress_bars()  # as the command line does before it imports them
    logging.disable_progress_bar()
    yield tmp_path
    logging.enable_progress_bar()
    datasets.enable_progress_bars()


def files_in(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("words", "told"), ODD, ids=[f"{' '.join(words)[:40]!a}-{told[:20]}" for words, told in ODD]
)
def test_an_odd_command_line_is_one_short_message_and_changes_nothing(
    place: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    words: tuple[str, ...],
    told: str,
) -> None:
    before = files_in(place)
    monkeypatch.setattr(sys, "argv", ["steppe", *words])
    # As the installed script; `python -m pytest` would show its own name.
    monkeypatch.setattr(sys.modules["__main__"], "__package__", None)
    assert commands.run() == commands.USAGE_ERROR
    out, err = capsys.readouterr()
    assert told in err
    assert err.startswith("error: ")
    assert err.count("error:") == 1
    assert len(err) < 2_000
    assert all(character.isprintable() for character in err.replace("\n", ""))
    assert "site-packages" not in err
    assert str(RECIPES) not in err
    assert out == ""
    assert files_in(place) == before


NO_TORCH = """
import sys
from steppe.cli import main
sys.argv = ["steppe", *sys.argv[1:]]
try:
    main()
finally:
    slow = {"torch", "transformers", "datasets", "numpy"} & set(sys.modules)
    print(sorted(slow), file=sys.stderr)
"""


@pytest.mark.parametrize(
    "words",
    [
        ("--help",),
        ("--version",),
        ("nonsense",),
        *((command, "--help") for command in ("demo", "train", "measure", "report")),
        *((command, "--help") for command in ("bench", "blocks", "calibrate", "study")),
    ],
    ids=" ".join,
)
def test_help_and_version_need_no_torch(words: tuple[str, ...]) -> None:
    done = subprocess.run(
        [sys.executable, "-c", NO_TORCH, *words], capture_output=True, text=True, check=False
    )
    assert done.returncode == (2 if words == ("nonsense",) else 0)
    assert done.stderr.splitlines()[-1] == "[]"
    assert ("Usage: steppe" in done.stdout) == (words[-1] == "--help")


def test_the_help_of_a_recipe_has_every_key_with_its_value_and_help(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers import TrainingArguments

    monkeypatch.setattr(sys, "argv", ["steppe", "train", "text-gpt", "--help"])
    assert commands.run() == 0
    lines = capsys.readouterr().out.splitlines()
    shown = {line.split()[0]: (line, after) for line, after in pairwise(lines)}
    for kind in (ModelArguments, DataArguments, ArmArguments, TrainingArguments):
        for name, field in kind.__dataclass_fields__.items():
            line, after = shown[f"--{name}"]
            assert line.startswith("  --")
            assert after.split()[:3] == field.metadata["help"].replace("%%", "%").split()[:3]
    for line in ("--length 128", "--vocab_size 2048", "--max_steps 1000", "--streaming false"):
        assert f"  {line}" in lines  # the recipe's own, and a default
    assert "  --output_dir runs/text-gpt/best" in lines


def test_markup_in_names_is_printed_as_it_is_after_training(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Rich's [/red] closes nothing, which was an error after a whole training run."""
    folder = place / ODD_FOLDER
    folder.mkdir(parents=True)
    data = write_text(place / "topics", topics=3)
    recipe = folder / "[bold].yaml"
    recipe.write_text((RECIPES / "text-gpt.yaml").read_text())
    words = [
        *("train", str(recipe), "--data_dir", str(data), "--model_config", TINY_GPT),
        *("--length", "32", "--vocab_size", "300", "--cache_dir", str(folder / "cache")),
        *("--output_dir", str(folder / "run"), "--max_steps", "1", "--held_out_samples", "8"),
        *("--use_cpu", "true"),
    ]
    monkeypatch.setattr(sys, "argv", ["steppe", *words])
    assert commands.run() == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-4:-2] == [str(folder / "run" / name) for name in ("summary.json", "model")]
    assert lines[-1] == str(folder / "run" / "report.html")
    assert any("[bold], best" in line for line in lines)


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_a_pipe_reads_the_path_as_one_line_in_any_encoding(place: Path, encoding: str) -> None:
    page = place / ODD_FOLDER / "page.html"
    done = subprocess.run(
        [sys.executable, "-m", "steppe.cli", "report", "run.json", "--out", str(page)],
        env={**os.environ, "PYTHONIOENCODING": encoding, "COLUMNS": "40"},
        capture_output=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout == f"{page}\n".encode(encoding, errors="replace")
    assert page.is_file()


def test_a_table_is_printed_to_a_stream_that_knows_ascii_only(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="ascii"))
    words = ["measure", "model", "--data", "data", "--max-length", "16", "--json", "held-out.json"]
    monkeypatch.setattr(sys, "argv", ["steppe", *words])
    assert commands.run() == 0
    sys.stdout.flush()
    text = written.getvalue().decode("ascii")
    assert "?x??" in text  # ‖x‖²
    assert text.splitlines()[-1] == "held-out.json"
    assert "held-out loss:" in text


def test_names_of_files_that_are_no_text_come_out_byte_by_byte(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="utf-8"))
    terminal.prepare_streams()
    terminal.say_path(os.fsdecode(b"a\xff\xc3\xa9"))
    terminal.say("\udcff\ud800")
    assert written.getvalue() == b"a\xff\xc3\xa9\n" + rb"\udcff\ud800" + b"\n"


class FullDisk(io.StringIO):
    def write(self, text: str) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_full_disk_behind_the_output_is_one_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", FullDisk())
    with pytest.raises(OutputError, match="standard output: No space left"):
        terminal.say_path("page.html")


def test_what_is_no_file_is_never_replaced(tmp_path: Path) -> None:
    """`--json /dev/null` would have made /dev/null a file."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    for write in (lambda: prepare_file(pipe, "out"), lambda: write_json(pipe, {})):
        with pytest.raises(OutputError, match="a device or a pipe"):
            write()
    assert pipe.is_fifo()
    assert list(tmp_path.iterdir()) == [pipe]


def test_a_link_stays_a_link_and_a_name_may_have_all_255_bytes(tmp_path: Path) -> None:
    target, link = tmp_path / ("n" * 255), tmp_path / "link"
    link.symlink_to(target)
    prepare_file(link, "out")
    write_json(link, {"a": 1})
    assert link.is_symlink()
    assert json.loads(target.read_text()) == {"a": 1}


def test_ctrl_c_during_imports_is_one_line() -> None:
    """Not an exception, which modules that try an import turn into another."""
    process = subprocess.Popen(
        [sys.executable, "-X", "importtime", "-m", "steppe.cli", *MEASURE],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert process.stderr is not None
    try:
        for line in process.stderr:
            if "torch._" in line:
                break
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == guards.INTERRUPTED
    own = [line for line in err.splitlines() if not line.startswith("import time:")]
    assert own == ["interrupted"]
    assert out == ""
