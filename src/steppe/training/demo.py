"""Three recipes with real data that comes with dependencies: two in four arms, one accelerated.

The arms of a seed start from the same initial weights and see the same order of batches:

- ``vanilla``: weight decay on all parameters, norms included, as in the paper's ImageNet recipe;
- ``control``: vanilla, but the norms are not decayed (the effect of RestrictedNorm alone);
- ``steppe``: vanilla's optimizer with the paper's three plug-ins;
- ``best``: control with these three and the rising threshold, which is ours and not the paper's.

The blocks of these two are too small for the sparse kernels to gain. The third model is wide. It is
trained twice with the rising threshold alone, the arm ``threshold``, from the same seed: dense and
accelerated.
"""

from __future__ import annotations

import json
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from steppe.files import prepare_file, write_json, writing_to
from steppe.runs import RUN_FILE, Run, read_run, write_run
from steppe.training.recipe import Recipe, read_recipe
from steppe.training.recipe_arguments import model_settings
from steppe.training.recipe_data import bytes_model
from steppe.training.run_recipe import run_recipe

SUMMARY_VERSION = 2  # since 2 with `accelerated`, and with `speed` where blocks gain
SUMMARY = "summary.json"
_WARMUP = 0.1  # share of the run


@dataclass(frozen=True)
class Task:
    """A recipe of the demo.

    Attributes:
        recipe: a recipe by name or path; the name is the key in the summary.
        quality: ``accuracy`` (held-out, in [0, 1]) or ``loss`` (held-out, nats per token).
        measured: the name of it in the summary of a recipe's run.
    """

    recipe: str | Path
    quality: str
    measured: str

    @property
    def name(self) -> str:
        """The recipe's name."""
        return Path(self.recipe).stem


TASKS = (Task("digits", "accuracy", "top1"), Task("pydoc", "loss", "loss"))
ARMS = ("vanilla", "control", "steppe", "best")
WIDE = Task("pydoc-wide", "loss", "loss")
_WIDE_ARM = "threshold"
_WAYS = ("dense", "accelerated")  # that the wide model is trained in


@dataclass(frozen=True)
class ArmRun:
    """The results of one arm from one seed.

    Attributes:
        seed: of the initial weights and the order of batches.
        quality: held-out accuracy or loss, see `Task.quality`.
        density: inference density, on the held-out data at the end.
        derivative_density: the same for the derivative.
        training_density: mean of the density over the measured training steps.
        density_per_block: inference density per block, in forward order.
        derivative_density_per_block: the same for the derivative.
        training_density_per_block: training density per block.
        seconds: training time.
        processor_seconds: the processor's part of it.
        history: ``[step, density]`` of the measured training steps.
        speed: rows of `steppe.bench.time_model`: a training step of the trained blocks on
            a batch of held-out data, and inference; none where blocks are too small to gain.
    """

    seed: int
    quality: float
    density: float
    derivative_density: float
    training_density: float
    density_per_block: list[float]
    derivative_density_per_block: list[float]
    training_density_per_block: list[float]
    seconds: float
    processor_seconds: float
    history: list[tuple[int, float]]
    speed: list[dict[str, Any]]


OnStep = Callable[[str, int, int], None]
"""Called with a run's label, the steps done and the steps in all."""


def run_demo(
    out: str | Path,
    seeds: int = 1,
    max_steps: int | None = None,
    on_step: OnStep | None = None,
) -> dict[str, Any]:
    """Train all arms of two recipes, and one model dense and accelerated; write ``summary.json``.

    Args:
        out: folder for the summary, the TensorBoard logs and the trained models.
        seeds: number of repetitions of the arms, ≥ 1.
        max_steps: train for at most so many steps; the densities then say little.
        on_step: called with the progress of each run.

    Returns:
        The summary, as it was written.

    Raises:
        OutputError: the folder cannot be written (then nothing was trained), or it is full.
        NonFiniteLossError: a loss became NaN or infinite; no summary was written.
        ValueError: `seeds` or `max_steps` is below 1.

    Source: arXiv 2605.25612, scaled down.
    """
    if seeds < 1 or (max_steps is not None and max_steps < 1):
        raise ValueError(
            f"run_demo: expected at least one seed and step, got {seeds=} {max_steps=}"
        )
    out = prepare_file(Path(out) / SUMMARY, "out").parent
    start = time.perf_counter()
    with _one_thread(), writing_to(out, "out"):
        data_sets = {task.name: _run_task(task, out, seeds, max_steps, on_step) for task in TASKS}
        accelerated = _run_both_ways(out, max_steps, on_step)
    summary = {
        "version": SUMMARY_VERSION,
        "seeds": seeds,
        "seconds": time.perf_counter() - start,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "data_sets": data_sets,
        "accelerated": accelerated,
    }
    write_json(out / SUMMARY, summary)
    return summary


def labels_of_runs(seeds: int) -> list[str]:
    """The labels that `run_demo` gives its runs, in order.

    Args:
        seeds: number of repetitions.
    """
    arms = [_label(task, arm, f"seed-{s}") for task in TASKS for arm in ARMS for s in range(seeds)]
    return arms + [_label(WIDE, _WIDE_ARM, way) for way in _WAYS]


def language_model(width: int = 64) -> nn.Module:
    """The demo's GPT-2 of bytes, two layers, without dropout.

    Args:
        width: d_model; the hidden layers are four times as wide.
    """
    recipe = read_recipe("pydoc")
    settings = {**model_settings(recipe.model), "n_embd": width}
    model = replace(recipe.model, model_config=json.dumps(settings))
    return bytes_model(replace(recipe, model=model))


@contextmanager
def _one_thread() -> Iterator[None]:
    """Compute on one core.

    Models this small are as quick on one as on two, many times quicker where the second one is busy
    (a barrier after every small operation), and the numbers do not depend on the machine's cores.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _label(task: Task, arm: str, which: str) -> str:
    """The label of a run, which is also its folder within the demo's."""
    return f"{task.name}/{arm}/{which}"


def _run_task(
    task: Task, out: Path, seeds: int, max_steps: int | None, on_step: OnStep | None
) -> dict[str, Any]:
    """Run all arms of a recipe from all seeds; the recipe's part of the summary."""
    steps = _steps_of(task, max_steps)
    arms = {}
    for arm in ARMS:
        runs = [
            _run_arm(task, _recipe_of(task, arm, seed, steps, out), on_step)
            for seed in range(seeds)
        ]
        arms[arm] = _summarise(task, runs)
    training = _recipe_of(task, ARMS[0], 0, steps, out).training
    return {
        "quality": task.quality,
        "steps": steps,
        "batch": training.per_device_train_batch_size,
        "lr": training.learning_rate,
        "weight_decay": training.weight_decay,
        "arms": arms,
    }


def _run_both_ways(out: Path, max_steps: int | None, on_step: OnStep | None) -> dict[str, Any]:
    """Train the wide model dense and accelerated, from one seed; its part of the summary."""
    steps = _steps_of(WIDE, max_steps)
    runs = {}
    for way in _WAYS:
        is_accelerated = way == "accelerated"
        flags: dict[str, object] = {"accelerate": str(is_accelerated).lower()}
        if not is_accelerated:
            flags["time_blocks"] = 0  # the trained blocks are the same
        runs[way] = _run_arm(WIDE, _recipe_of(WIDE, _WIDE_ARM, 0, steps, out, way, flags), on_step)
    dense, accelerated = (runs[way] for way in _WAYS)
    return {
        "recipe": WIDE.name,
        "arm": _WIDE_ARM,
        "quality": WIDE.quality,
        "steps": steps,
        "speed_up": dense.processor_seconds / accelerated.processor_seconds,
        "runs": {way: asdict(run) for way, run in runs.items()},
    }


def _steps_of(task: Task, max_steps: int | None) -> int:
    """The number of steps of a run."""
    whole = read_recipe(task.recipe).training.max_steps
    return whole if max_steps is None else min(whole, max_steps)


def _recipe_of(
    task: Task,
    arm: str,
    seed: int,
    steps: int,
    out: Path,
    which: str = "",
    more: Mapping[str, object] | None = None,
) -> Recipe:
    """The recipe of one run."""
    label = _label(task, arm, which or f"seed-{seed}")
    flags = {
        "arm": arm,
        "seed": seed,
        "max_steps": steps,
        "warmup_steps": round(_WARMUP * steps),
        "output_dir": out / label,
        "run_name": label,
        "use_cpu": str(not torch.cuda.is_available()).lower(),
        **(more or {}),
    }
    return read_recipe(task.recipe, [f"--{key}={value}" for key, value in flags.items()])


def _run_arm(task: Task, recipe: Recipe, on_step: OnStep | None) -> ArmRun:
    """Run a recipe; its record keeps the one quality that the demo compares."""
    label = str(recipe.training.run_name)
    passed_on = None if on_step is None else partial(on_step, label)
    summary = run_recipe(recipe, passed_on)
    folder = Path(str(recipe.training.output_dir))
    run = read_run(folder)
    quality = summary["quality"][task.measured]
    write_run(replace(run, quality={task.quality: quality}), folder / RUN_FILE)
    return _arm_run(recipe.training.seed, quality, summary, run)


def _arm_run(seed: int, quality: float, summary: dict[str, Any], run: Run) -> ArmRun:
    """The results of a run."""
    (held_out,) = run.held_out
    per_step = zip(*([block.density for block in one.blocks] for one in run.training), strict=True)
    return ArmRun(
        seed=seed,
        quality=quality,
        density=held_out.density,
        derivative_density=held_out.derivative_density,
        training_density=run.training_density,
        density_per_block=[block.density for block in held_out.blocks],
        derivative_density_per_block=[block.derivative_density for block in held_out.blocks],
        training_density_per_block=[sum(column) / len(column) for column in per_step],
        seconds=summary["seconds"],
        processor_seconds=summary["processor_seconds"],
        history=[(step, one.density) for step, one in zip(run.steps, run.training, strict=True)],
        speed=run.speed,
    )


def _summarise(task: Task, runs: Sequence[ArmRun]) -> dict[str, Any]:
    """Means over the seeds, their standard deviations, and the runs."""
    numbers = ("quality", "density", "training_density", "derivative_density", "seconds")
    lists = ("density_per_block", "training_density_per_block", "derivative_density_per_block")
    values = {key: [getattr(run, key) for run in runs] for key in numbers}
    means: dict[str, Any] = {key: statistics.fmean(value) for key, value in values.items()}
    for key in lists:
        columns = zip(*(getattr(run, key) for run in runs), strict=True)
        means[key] = [statistics.fmean(column) for column in columns]
    means[task.quality] = means.pop("quality")
    if len(runs) > 1:
        means["std"] = {
            task.quality if key == "quality" else key: statistics.stdev(value)
            for key, value in values.items()
        }
    means["speed_up"] = {
        row["case"]: statistics.median(run.speed[index]["ratio"] for run in runs)
        for index, row in enumerate(runs[0].speed)
    }
    means["runs"] = [asdict(run) for run in runs]
    return means
