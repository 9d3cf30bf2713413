"""Run a recipe: train, evaluate, measure and save, for ``steppe train``."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    PrinterCallback,
    ProgressCallback,
    TrainerCallback,
    default_data_collator,
    set_seed,
)

from steppe.bench import PREFILL, TRAINING, time_model
from steppe.data.draws import DrawSampler
from steppe.data.read_errors import first_line, reading
from steppe.errors import (
    AccelerationError,
    NonFiniteLossError,
    OutOfMemoryError,
    RecipeError,
    SteppeError,
)
from steppe.files import prepare_file, write_json
from steppe.measures import measure
from steppe.measures.measure import call_model
from steppe.measures.report import Report
from steppe.plugins import Plugin, sparsify_
from steppe.runs import RUN_FILE, Run, versions, write_run
from steppe.training.callback import SteppeCallback
from steppe.training.console import OnLog, OnStep, PassOn
from steppe.training.quality import perplexity
from steppe.training.recipe import Recipe, settings_of
from steppe.training.recipe_arguments import IMAGES, NORMS_NOT_DECAYED
from steppe.training.recipe_data import Job, load_job, place_of
from steppe.training.recipe_model import add_lora_, norm_parameter_names, plugins_of
from steppe.training.resuming import has_checkpoints, last_whole_checkpoint
from steppe.training.trainer import RecipeTrainer

SUMMARY_VERSION = 1
SUMMARY = "summary.json"
"""File of a run's results, within its folder."""
RESULT = "model"
"""Folder of the trained model, within the run's."""
# Keys that may differ when a run is resumed.
_NOT_A_SETTING = ("resume", "cache_dir", "held_out_flatness", "time_blocks", "accelerate")
_QUALITY = ("loss", "top1", "top5", "accuracy")
_FULL_MEMORY = ("out of memory", "can't allocate memory", "not enough memory")


def run_recipe(
    recipe: Recipe, on_step: OnStep | None = None, on_log: OnLog | None = None
) -> dict[str, Any]:
    """Train by a recipe, and write ``summary.json``, ``steppe.json`` and the model.

    Under ``torchrun`` or ``accelerate launch`` every process calls this; the first one writes.

    Args:
        recipe: as `read_recipe` gives it.
        on_step: called with the steps done and the steps in all.
        on_log: called with each log in one line.

    Returns:
        The summary, as it was written.

    Raises:
        DataError: the data is not there, damaged, or does not fit.
        CheckpointError: the vanilla checkpoint is none, or no checkpoint of the run is whole.
        RecipeError: the run's folder has checkpoints already, and the recipe does not resume.
        OutOfMemoryError: a step does not fit; the message has settings for it.
        AccelerationError: the recipe accelerates, and a block does not fit the kernels.
        OutputError: the folder cannot be written, or is full.
        NonFiniteLossError: the loss became NaN or infinite.

    Source: arXiv 2605.25612.
    """
    folder, settings = Path(str(recipe.training.output_dir)), _run_settings(recipe)
    resumed = _checkpoint_to_resume(recipe, folder, settings)
    set_seed(recipe.training.seed)
    with reading(place_of(recipe.data)):
        job = load_job(recipe)
    for name in (SUMMARY, RUN_FILE):  # after the data: without it, no folder is left behind
        prepare_file(folder / name, "output_dir")
    plugins = plugins_of(recipe)
    if plugins:
        sparsify_(job.model, plugins)
    tuner = add_lora_(job.model, recipe)
    callback = SteppeCallback(every=recipe.arm.measure_every, accelerate=recipe.arm.accelerate)
    passes_on = PassOn(on_step, on_log, callback.acceleration)
    trainer = _trainer(recipe, job, settings, [callback, passes_on])
    if on_log is not None and trainer.is_world_process_zero():
        for note in (*job.notes, *([] if resumed is None else [f"going on from {resumed}"])):
            on_log(note)
    start = time.perf_counter(), time.process_time()
    _train(recipe, trainer, resumed)
    seconds, processor_seconds = time.perf_counter() - start[0], time.process_time() - start[1]
    if tuner is not None:
        tuner.merge_and_unload()
    quality = _quality(recipe, trainer)
    held_out = _held_out(recipe, job, trainer)
    speed = _speed(recipe, job, trainer)
    name = recipe.training.run_name or f"{recipe.name}/{recipe.arm.arm}"
    run = callback.run(trainer.args, trainer.state, job.model, name=name)
    run = replace(
        _with_held_out(run, trainer.state.global_step, held_out), quality=quality, speed=speed
    )
    model_folder = trainer.save_result(RESULT, job.processor, run)
    summary = {
        **_summary(recipe, plugins, quality, held_out),
        "steps": trainer.state.global_step,
        "training_density": callback.training_density,
        "seconds": seconds,
        "processor_seconds": processor_seconds,
        "resumed_from": None if resumed is None else resumed.name,
        "parameters": sum(p.numel() for p in job.model.parameters()),
        "model": str(model_folder),
        **({"acceleration": callback.acceleration.record} if recipe.arm.accelerate else {}),
    }
    if trainer.is_world_process_zero():
        write_run(run, folder / RUN_FILE)
        write_json(folder / SUMMARY, summary)
    return summary


def _run_settings(recipe: Recipe) -> dict[str, object]:
    """The settings that must be the same when a run is resumed."""
    arguments = recipe.training
    numbers = (
        "learning_rate",
        "weight_decay",
        "max_steps",
        "num_train_epochs",
        "per_device_train_batch_size",
        "gradient_accumulation_steps",
        "world_size",
        "seed",
    )
    ours = {k: v for k, v in settings_of(recipe).items() if k not in _NOT_A_SETTING}
    return {**ours, **{key: getattr(arguments, key) for key in numbers}}


def _checkpoint_to_resume(recipe: Recipe, folder: Path, settings: dict[str, object]) -> Path | None:
    """The checkpoint to go on from, or None; one that the recipe does not resume is refused."""
    if recipe.arm.resume:
        return last_whole_checkpoint(folder, settings)
    if has_checkpoints(folder):
        raise RecipeError(
            f"{folder}: has checkpoints of an earlier run. Go on with it, or start again in another"
            " folder",
            {"resume": True},
            {"output_dir": "FOLDER"},
        )
    return None


def _trainer(
    recipe: Recipe, job: Job, settings: dict[str, object], callbacks: Iterable[TrainerCallback]
) -> RecipeTrainer:
    """The Trainer of a job; raises its own checks as errors of the recipe."""
    try:
        return _unchecked_trainer(recipe, job, settings, callbacks)
    except SteppeError:
        raise
    except (ValueError, TypeError, ImportError) as error:  # of the Trainer's own checks
        raise RecipeError(f"{recipe.name}: {error}") from error
    except Exception as error:  # of the hub, or the way to it
        if not recipe.training.push_to_hub:
            raise
        raise RecipeError(
            f"{recipe.name}: the hub does not take the model ({first_line(error)}). Log in with `hf"
            " auth login`, or keep it here",
            {"push_to_hub": False},
        ) from error


def _unchecked_trainer(
    recipe: Recipe, job: Job, settings: dict[str, object], callbacks: Iterable[TrainerCallback]
) -> RecipeTrainer:
    """The Trainer of a job, without bars and prints of its own."""
    arguments = recipe.training
    arguments.logging_nan_inf_filter = False  # it would hide a loss that diverges
    is_stream = isinstance(job.train, torch.utils.data.IterableDataset)
    if is_stream:
        arguments.accelerator_config.dispatch_batches = False  # type: ignore[union-attr]
    seed = arguments.seed if arguments.data_seed is None else arguments.data_seed
    repeats = recipe.data.repeated_augmentation
    spares_norms = recipe.arm.arm in NORMS_NOT_DECAYED
    takes_draws = job.takes_draws and not is_stream
    trainer = RecipeTrainer(
        not_decayed=norm_parameter_names(job.model) if spares_norms else set(),
        prepare=job.prepare,
        draws=DrawSampler(len(job.train), seed, repeats) if takes_draws else None,
        settings=settings,
        model=job.model,
        args=arguments,
        train_dataset=job.train,
        eval_dataset=job.held_out,
        data_collator=default_data_collator,
        processing_class=job.processor,
        compute_metrics=job.quality,
        preprocess_logits_for_metrics=job.keep,
        callbacks=list(callbacks),
    )
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    return trainer


def _train(recipe: Recipe, trainer: RecipeTrainer, resumed: Path | None) -> None:
    """Train; raises the usual mishaps as errors of the recipe."""
    try:
        with reading(place_of(recipe.data)):
            trainer.train(resume_from_checkpoint=None if resumed is None else str(resumed))
    except (torch.OutOfMemoryError, RuntimeError) as error:
        if not any(word in str(error).lower() for word in _FULL_MEMORY):
            raise
        raise _out_of_memory(recipe) from None
    except AccelerationError as error:
        raise AccelerationError(
            f"{error.message}. Or train by the blocks' own modules", {"accelerate": False}
        ) from None
    except KeyError as error:
        if "metric_for_best_model" not in str(error):
            raise
        raise RecipeError(f"{recipe.name}: {error.args[0]}") from None


def _out_of_memory(recipe: Recipe) -> OutOfMemoryError:
    """The error of a step that does not fit, with settings that need less memory."""
    batch = recipe.training.per_device_train_batch_size
    more = recipe.training.gradient_accumulation_steps * 2
    half = max(1, batch // 2)
    return OutOfMemoryError(
        f"{recipe.name}: a step of {batch} samples a device does not fit into its memory. The same"
        " training with less",
        {"per_device_train_batch_size": half, "gradient_accumulation_steps": more},
        {"gradient_checkpointing": True},
    )


def _quality(recipe: Recipe, trainer: RecipeTrainer) -> dict[str, float]:
    """The quality on held-out data at the end, by its name."""
    metrics = {k.removeprefix("eval_"): v for k, v in trainer.evaluate().items()}
    loss = float(metrics["loss"])
    if not math.isfinite(loss):
        raise NonFiniteLossError(
            f"{recipe.training.output_dir}: the held-out loss is {loss}. Lower the learning rate",
            {"learning_rate": recipe.training.learning_rate / 10},
        )
    quality = {key: float(metrics[key]) for key in _QUALITY if key in metrics}
    if recipe.model.task != IMAGES:
        quality["perplexity"] = perplexity(loss)
    return quality


def _held_out(recipe: Recipe, job: Job, trainer: RecipeTrainer) -> Report:
    """The trained model's measures on the held-out data."""
    return measure(
        job.model,
        trainer.get_eval_dataloader(),
        labels="data" if recipe.arm.held_out_flatness else None,
        forward=partial(_forward, prepare=trainer._prepare_inputs),
    )


def _forward(model: nn.Module, batch: Any, prepare: Any) -> Any:
    """The model's output for a batch as the Trainer would give it."""
    return call_model(model, prepare(batch))


def _speed(recipe: Recipe, job: Job, trainer: RecipeTrainer) -> list[dict[str, Any]]:
    """Times of the trained blocks on sparse kernels, on the CPU, for a batch of held-out data."""
    if not recipe.arm.time_blocks:
        return []
    batch = min(recipe.training.per_device_train_batch_size, len(job.held_out))
    samples = trainer.data_collator([job.held_out[index] for index in range(batch)])
    if job.prepare is not None:
        samples = job.prepare(samples, False)
    on_cpu = copy.deepcopy(job.model).cpu()
    seconds = recipe.arm.time_blocks
    return [time_model(on_cpu, samples, case, seconds) for case in (TRAINING, PREFILL)]


def _summary(
    recipe: Recipe, plugins: list[Plugin], quality: dict[str, float], held_out: Report
) -> dict[str, Any]:
    """The part of the summary that does not depend on the way through the run."""
    return {
        "version": SUMMARY_VERSION,
        **settings_of(recipe),
        "plugins": [plugin.settings() for plugin in plugins],
        "world_size": recipe.training.world_size,
        "quality": quality,
        "density": held_out.density,
        "derivative_density": held_out.derivative_density,
        "density_per_block": [block.density for block in held_out.blocks],
        "versions": versions(),
    }


def _with_held_out(run: Run, step: int, held_out: Report) -> Run:
    """A run with the measures of its end in place of an evaluation of the same step."""
    past = list(zip(run.held_out_steps, run.held_out, strict=True))
    kept = [(at, report) for at, report in past if at != step] + [(step, held_out)]
    return replace(
        run,
        held_out_steps=[at for at, _ in kept],
        held_out=[report for _, report in kept],
    )
