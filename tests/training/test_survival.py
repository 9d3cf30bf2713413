"""A run that is killed, at any moment, goes on to the same weights."""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

from steppe.errors import CheckpointError, OutputError, RecipeError
from steppe.training import resuming
from steppe.training.run_recipe import run_recipe
from training.recipe_worker import run_tiny_text, tiny_text_flags, tiny_text_recipe, write_text

KILLS = 20


@pytest.fixture(scope="module")
def processes() -> multiprocessing.context.BaseContext:
    """Processes that start in a moment: what they import is imported once."""
    context = multiprocessing.get_context("forkserver")
    # Of installed packages: Python 3.11 looks for them without the test's sys.path.
    context.set_forkserver_preload(
        ["steppe.training.run_recipe", "transformers.models.gpt2.modeling_gpt2"]
    )
    return context


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("survival")
    write_text(folder / "data")
    return folder


def start(context, place: Path, out: Path, *flags: str):
    process = context.Process(
        target=run_tiny_text, args=(place / "data", place / "cache", out, *flags)
    )
    process.start()
    return process


@pytest.fixture(scope="module")
def whole(processes, place: Path) -> Path:
    """The run that nothing interrupts."""
    process = start(processes, place, place / "whole")
    process.join()
    assert process.exitcode == 0
    return place / "whole"


def history_of(run: Path) -> list[dict]:
    """What the callback counted, as the last checkpoint kept it."""
    state = json.loads((run / "checkpoint-24" / "trainer_state.json").read_text())
    return state["stateful_callbacks"]["SteppeCallback"]["attributes"]["history"]


# Beside other busy programs it has ended 1e-6 apart, on one processor and as long ago as 88ee55a:
# a kill at some moment spoils the resume. Uninterrupted runs are the same bits there. Until that is
# found it runs with the slow tests.
@pytest.mark.slow
def test_a_run_killed_twenty_times_ends_as_if_it_had_not_been(
    processes, place: Path, whole: Path
) -> None:
    out = place / "killed"
    generator = random.Random(0)
    killed = 0
    steps = set()
    while killed < KILLS:
        process = start(processes, place, out, "--resume", "true")
        told = out / "step"
        told.unlink(missing_ok=True)
        while process.is_alive() and not told.exists():
            time.sleep(0.005)
        # Between a moment and the time that some checkpoints take.
        process.join(timeout=generator.uniform(0.0, 0.25))
        process.kill()
        process.join()
        if process.exitcode == -signal.SIGKILL:
            steps.add(told.read_text())
            killed += 1
            continue
        # It came to its end: once more from a random one of its checkpoints.
        assert process.exitcode == 0
        found = sorted(out.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
        for path in found[generator.randrange(len(found)) :]:
            shutil.rmtree(path)
    process = start(processes, place, out, "--resume", "true")
    process.join()
    assert process.exitcode == 0
    assert len(steps) > 3
    expected = load_file(whole / "model" / "model.safetensors")
    got = load_file(out / "model" / "model.safetensors")
    assert expected.keys() == got.keys()
    for name, tensor in expected.items():
        assert tensor.equal(got[name]), name
    assert history_of(out) == history_of(whole)
    assert [p.name for p in out.iterdir() if p.name.startswith(".")] == []


def test_another_seed_ends_elsewhere(processes, place: Path, whole: Path) -> None:
    process = start(processes, place, place / "other", "--seed", "7")
    process.join()
    other = load_file(place / "other" / "model" / "model.safetensors")
    expected = load_file(whole / "model" / "model.safetensors")
    assert not all(tensor.equal(other[name]) for name, tensor in expected.items())


@pytest.mark.parametrize("file", ["model.safetensors", "optimizer.pt", "steppe-checkpoint.json"])
def test_a_truncated_checkpoint_is_passed_over(
    place: Path, whole: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, file: str
) -> None:
    run = shutil.copytree(whole, tmp_path / "run")
    damaged = run / "checkpoint-24" / file
    damaged.write_bytes(damaged.read_bytes()[:-20])
    with caplog.at_level(logging.WARNING):
        found = resuming.last_whole_checkpoint(run, {})
    assert found is not None
    assert found.name == "checkpoint-21"
    assert "checkpoint-24: not whole" in caplog.text


def test_no_whole_checkpoint_is_an_error(whole: Path, tmp_path: Path) -> None:
    run = shutil.copytree(whole, tmp_path / "run")
    for path in run.glob("checkpoint-*"):
        (path / "scheduler.pt").unlink()
    with pytest.raises(CheckpointError, match="none of its 2 checkpoints is whole"):
        resuming.last_whole_checkpoint(run, {})


def test_a_folder_with_checkpoints_asks_for_resume(place: Path, whole: Path) -> None:
    recipe = tiny_text_recipe(place / "data", place / "cache", whole)
    with pytest.raises(RecipeError, match="resume=True"):
        run_recipe(recipe)


def test_other_settings_do_not_go_on(place: Path, whole: Path) -> None:
    recipe = tiny_text_recipe(
        *(place / "data", place / "cache", whole, "--resume", "true", "--learning_rate", "0.5")
    )
    with pytest.raises(CheckpointError, match=r"learning_rate: 0\.003, now 0\.5"):
        run_recipe(recipe)


def test_a_full_disk_leaves_the_last_whole_checkpoint(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import Trainer

    calls = []
    save = Trainer._save_optimizer_and_scheduler

    def fill_up(self, output_dir):
        calls.append(output_dir)
        if len(calls) == 3:
            raise OSError(28, "No space left on device")
        save(self, output_dir)

    monkeypatch.setattr(Trainer, "_save_optimizer_and_scheduler", fill_up)
    out = tmp_path / "run"
    with pytest.raises(OutputError, match=r"checkpoint-9.*No space left.*resume=True"):
        run_recipe(tiny_text_recipe(place / "data", place / "cache", out))
    found = resuming.last_whole_checkpoint(out, {})
    assert found is not None
    assert found.name == "checkpoint-6"
    assert not (out / resuming.UNFINISHED).exists()


@pytest.mark.slow
def test_two_processes_of_torchrun_survive_a_kill_together(place: Path, tmp_path: Path) -> None:
    settings = tiny_text_flags(place / "data", place / "cache")

    def train(out: Path) -> subprocess.Popen:
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
        command += ["--rdzv_backend", "c10d", "--rdzv_endpoint", "localhost:0"]
        command += ["-m", "steppe.cli", "train", "text-gpt", "--resume", *settings]
        return subprocess.Popen([*command, "--output_dir", str(out)], stderr=subprocess.DEVNULL)

    assert train(tmp_path / "whole").wait() == 0
    launcher = train(tmp_path / "killed")
    while not list((tmp_path / "killed").glob("checkpoint-*")):
        time.sleep(0.05)
        assert launcher.poll() is None
    ranks = children_of(launcher.pid)
    assert len(ranks) == 2
    os.kill(ranks[1], signal.SIGKILL)
    assert launcher.wait(timeout=120) != 0
    assert not any(Path(f"/proc/{rank}").exists() for rank in ranks)  # none is left behind
    assert not (tmp_path / "killed" / "summary.json").exists()
    assert train(tmp_path / "killed").wait() == 0
    expected, got = (
        load_file(tmp_path / name / "model" / "model.safetensors") for name in ("whole", "killed")
    )
    for name, tensor in expected.items():
        assert tensor.equal(got[name]), name


def children_of(process: int) -> list[int]:
    """The processes that one has started and that run."""
    told = Path(f"/proc/{process}/task/{process}/children").read_text()
    return [int(child) for child in told.split()]
