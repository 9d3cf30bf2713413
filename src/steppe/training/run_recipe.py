"""Run a recipe: what stands behind ``steppe train``."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
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
    TrainerControl,
    TrainerState,
    TrainingArguments,
    default_data_collator,
    set_seed,
)
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from steppe.data.augmentation import Augmentation, BatchAugmenter, normalise
from steppe.data.draws import DrawSampler
from steppe.data.image_data import load_image_data
from steppe.data.read_errors import first_line, reading
from steppe.data.text_data import TextSettings, load_text_data, require_shards
from steppe.errors import (
    CheckpointError,
    DataError,
    NonFiniteLossError,
    OutOfMemoryError,
    RecipeError,
    SteppeError,
)
from steppe.files import prepare_file, write_json
from steppe.measures import measure
from steppe.measures.measure import call_model
from steppe.plugins import sparsify_
from steppe.runs import RUN_FILE, versions, write_run
from steppe.training.callback import SteppeCallback
from steppe.training.quality import (
    image_quality,
    keep_correct,
    keep_correct_next,
    keep_ranks,
    perplexity,
    token_quality,
)
from steppe.training.recipe import (
    IMAGES,
    NORMS_NOT_DECAYED,
    SPANS,
    DataArguments,
    Recipe,
    settings_of,
)
from steppe.training.recipe_model import (
    add_lora_,
    build_model,
    config_of,
    norm_parameter_names,
    plugins_of,
)
from steppe.training.saved import has_checkpoints, last_whole_checkpoint
from steppe.training.trainer import Prepare, RecipeTrainer, SoftCrossEntropy

SUMMARY_VERSION = 1
SUMMARY = "summary.json"
"""File of what came of a run, within its folder."""
RESULT = "model"
"""Folder of the trained model, within the run's."""
_PIXEL_MEAN = _PIXEL_STD = 0.5  # of each channel, as ViT was trained
_NOT_A_SETTING = ("resume", "cache_dir")  # what may differ when a run is resumed
_QUALITY = ("loss", "top1", "top5", "accuracy")
_FULL_MEMORY = ("out of memory", "can't allocate memory", "not enough memory")

OnStep = Callable[[int, int], None]
"""Called with the optimizer steps done and the steps in all."""
OnLog = Callable[[str], None]
"""Called with a line about the run."""


class _Job:
    """A recipe's data and model, and what the Trainer needs to know of its task."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self.prepare: Prepare | None = None
        self.notes: tuple[str, ...] = ()
        (self._load_images if recipe.model.task == IMAGES else self._load_text)()

    def _load_images(self) -> None:
        """Images, and a model of them."""
        recipe, asked = self.recipe, self.recipe.data
        # The sizes are the model's, its number of classes is the data's.
        config = config_of(recipe)
        if not isinstance(getattr(config, "image_size", None), int):
            raise RecipeError(
                f"model_type: {config.model_type} has no image_size, so it is no model of square"
                f" images, which the task {IMAGES} needs"
            )
        size, channels = config.image_size, int(getattr(config, "num_channels", 3))
        data = load_image_data(
            _place_of(asked),
            size,
            channels,
            crop=asked.random_resized_crop,
            held_out_split=asked.held_out_split,
            held_out_samples=asked.held_out_samples,
        )
        names = dict(enumerate(data.classes))
        self.model = build_model(recipe, id2label=names, label2id={n: i for i, n in names.items()})
        if self.model.config.num_labels != len(names):
            raise CheckpointError(
                f"{recipe.model.checkpoint}: has {self.model.config.num_labels} classes, the data"
                f" {len(names)}. Name a checkpoint that was trained on this data."
            )
        self.model.loss_function = SoftCrossEntropy(asked.label_smoothing)
        augmenter = BatchAugmenter(
            Augmentation(
                rand_augment=asked.rand_augment,
                crop_padding=asked.crop_padding,
                flip=asked.flip and not asked.random_resized_crop,
                random_erasing=asked.random_erasing,
                mixup=asked.mixup,
                cutmix=asked.cutmix,
            ),
            size,
            channels,
            len(names),
        )
        self.prepare = partial(_prepare_images, augmenter=augmenter, channels=channels)
        self.processor: Any = ViTImageProcessorPil(
            size={"height": size, "width": size},
            image_mean=[_PIXEL_MEAN] * channels,
            image_std=[_PIXEL_STD] * channels,
        )
        self.train: Any = data.train
        self.held_out: Any = data.held_out
        self.notes = data.notes
        self.keep, self.quality = keep_ranks, image_quality

    def _load_text(self) -> None:
        """Text, and a model of it."""
        recipe, asked = self.recipe, self.recipe.data
        settings = TextSettings(
            length=asked.length,
            corrupted=recipe.model.task == SPANS,
            streaming=asked.streaming,
            tokenizer=asked.tokenizer,
            vocab_size=asked.vocab_size,
            cache=Path(asked.cache_dir),
            text_column=asked.text_column,
            held_out_split=asked.held_out_split,
            held_out_samples=asked.held_out_samples,
        )
        data = load_text_data(_place_of(asked), settings)
        self.processor = data.tokenizer
        known: dict[str, Any] = {
            "vocab_size": len(data.tokenizer),
            "bos_token_id": data.tokenizer.bos_token_id,
            "eos_token_id": data.tokenizer.eos_token_id,
            "pad_token_id": data.tokenizer.pad_token_id,
        }
        if recipe.model.task == SPANS:
            known["decoder_start_token_id"] = data.tokenizer.pad_token_id
        self.model = build_model(recipe, **known)
        vocabulary = int(self.model.get_input_embeddings().weight.shape[0])  # type: ignore[index]
        if vocabulary < len(data.tokenizer):
            raise RecipeError(
                f"the model's vocabulary has {vocabulary} tokens, the tokenizer's"
                f" {len(data.tokenizer)}. Name the model's own",
                {"tokenizer": "FOLDER_OR_HUB_ID"},
            )
        self.train, self.held_out, self.notes = data.train, data.held_out, data.notes
        require_shards(self.train, recipe.training.world_size)
        self.keep = keep_correct if recipe.model.task == SPANS else keep_correct_next
        self.quality = token_quality


def run_recipe(
    recipe: Recipe, on_step: OnStep | None = None, on_log: OnLog | None = None
) -> dict[str, Any]:
    """Train as a recipe says, and write ``summary.json``, ``steppe.json`` and the model.

    Under ``torchrun`` or ``accelerate launch`` every process calls this; the first one writes.

    Args:
        recipe: as `read_recipe` gives it.
        on_step: told of the progress.
        on_log: told of each log in one line.

    Returns:
        The summary, as it was written.

    Raises:
        DataError: the data is not there, damaged, or does not fit.
        CheckpointError: the vanilla checkpoint is none, or no checkpoint of the run is whole.
        RecipeError: the run's folder has checkpoints already, and the recipe does not resume.
        OutOfMemoryError: a step does not fit; says what to change.
        OutputError: the folder cannot be written, or is full.
        NonFiniteLossError: the loss became NaN or infinite.

    Source: arXiv 2605.25612.
    """
    folder = Path(str(recipe.training.output_dir))
    settings = _run_settings(recipe)
    resumed = None
    if recipe.arm.resume:
        resumed = last_whole_checkpoint(folder, settings)
    elif has_checkpoints(folder):
        raise RecipeError(
            f"{folder}: has checkpoints of an earlier run. Go on with it, or begin anew in another"
            " folder",
            {"resume": True},
            {"output_dir": "FOLDER"},
        )
    set_seed(recipe.training.seed)
    with reading(_place_of(recipe.data)):
        job = _Job(recipe)
    for name in (SUMMARY, RUN_FILE):  # nothing is left behind where there is no data
        prepare_file(folder / name, "output_dir")
    plugins = plugins_of(recipe)
    if plugins:
        sparsify_(job.model, plugins)
    tuner = add_lora_(job.model, recipe)
    callback = SteppeCallback(every=recipe.arm.measure_every)
    try:
        trainer = _trainer(job, settings, [callback, _Teller(on_step, on_log)])
    except SteppeError:
        raise
    except (ValueError, TypeError, ImportError) as error:  # of the Trainer's own checks
        raise RecipeError(f"{recipe.name}: {error}") from error
    except Exception as error:  # of whatever stands between here and the hub
        if not recipe.training.push_to_hub:
            raise
        raise RecipeError(
            f"{recipe.name}: the hub does not take the model ({first_line(error)}). Log in with `hf"
            " auth login`, or keep it here",
            {"push_to_hub": False},
        ) from error
    if on_log is not None and trainer.is_world_process_zero():
        for note in job.notes:
            on_log(note)
        if resumed is not None:
            on_log(f"going on from {resumed}")
    start = time.perf_counter()
    try:
        with reading(_place_of(recipe.data)):
            trainer.train(resume_from_checkpoint=None if resumed is None else str(resumed))
    except (torch.OutOfMemoryError, RuntimeError) as error:
        if not any(word in str(error).lower() for word in _FULL_MEMORY):
            raise
        raise _out_of_memory(recipe) from None
    except KeyError as error:
        if "metric_for_best_model" not in str(error):
            raise
        raise RecipeError(f"{recipe.name}: {error.args[0]}") from None
    seconds = time.perf_counter() - start
    if tuner is not None:
        tuner.merge_and_unload()
    metrics = {k.removeprefix("eval_"): v for k, v in trainer.evaluate().items()}
    loss = float(metrics["loss"])
    if not math.isfinite(loss):
        raise NonFiniteLossError(
            f"{folder}: the held-out loss is {loss}. Lower the learning rate",
            {"learning_rate": recipe.training.learning_rate / 10},
        )
    quality = {key: float(metrics[key]) for key in _QUALITY if key in metrics}
    if recipe.model.task != IMAGES:
        quality["perplexity"] = perplexity(loss)
    held_out = measure(
        job.model,
        trainer.get_eval_dataloader(),
        labels=None,
        forward=partial(_forward, prepare=trainer._prepare_inputs),
    )
    steps = trainer.state.global_step
    run = callback.run(
        trainer.args, trainer.state, job.model, name=f"{recipe.name}/{recipe.arm.arm}"
    )
    model_folder = trainer.save_result(RESULT, job.processor)
    summary: dict[str, Any] = {
        "version": SUMMARY_VERSION,
        **settings_of(recipe),
        "plugins": [plugin.settings() for plugin in plugins],
        "steps": steps,
        "world_size": recipe.training.world_size,
        "quality": quality,
        "density": held_out.density,
        "derivative_density": held_out.derivative_density,
        "training_density": callback.training_density,
        "density_per_block": [block.density for block in held_out.blocks],
        "seconds": seconds,
        "resumed_from": None if resumed is None else resumed.name,
        "parameters": sum(p.numel() for p in job.model.parameters()),
        "model": str(model_folder),
        "versions": versions(),
    }
    if trainer.is_world_process_zero():
        past = list(zip(run.held_out_steps, run.held_out, strict=True))
        kept = [(step, report) for step, report in past if step != steps] + [(steps, held_out)]
        write_run(
            replace(
                run,
                held_out_steps=[step for step, _ in kept],
                held_out=[report for _, report in kept],
                quality=quality,
            ),
            folder / RUN_FILE,
        )
        write_json(folder / SUMMARY, summary)
    return summary


def _trainer(
    job: _Job, settings: dict[str, object], callbacks: Iterable[TrainerCallback]
) -> RecipeTrainer:
    """The Trainer of a job, without bars and prints of its own."""
    recipe = job.recipe
    arguments = recipe.training
    arguments.logging_nan_inf_filter = False  # it would hide a loss that diverges
    is_stream = isinstance(job.train, torch.utils.data.IterableDataset)
    if is_stream:
        arguments.accelerator_config.dispatch_batches = False  # type: ignore[union-attr]
    seed = arguments.seed if arguments.data_seed is None else arguments.data_seed
    repeats = recipe.data.repeated_augmentation
    spares_norms = recipe.arm.arm in NORMS_NOT_DECAYED
    draws = None if is_stream else DrawSampler(len(job.train), seed, repeats)
    trainer = RecipeTrainer(
        not_decayed=norm_parameter_names(job.model) if spares_norms else set(),
        prepare=job.prepare,
        draws=draws,
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


def _place_of(asked: DataArguments) -> str:
    """Where the data is: a folder that must be there, or a hub id."""
    if asked.data_dir is None:
        return str(asked.dataset)
    if not Path(asked.data_dir).expanduser().exists():
        raise DataError(
            f"{asked.data_dir}: there is no such file or folder. Put the data there, or name"
            " another"
            + (f" (without one {asked.dataset} is fetched from the hub)" if asked.dataset else ""),
            {"data_dir": "FOLDER"},
        )
    return asked.data_dir


def _run_settings(recipe: Recipe) -> dict[str, object]:
    """What must be the same when a run is resumed."""
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


def _prepare_images(
    batch: dict[str, Any], training: bool, augmenter: BatchAugmenter, channels: int
) -> dict[str, Any]:
    """A batch of images as the model takes it."""
    images, labels = batch["pixel_values"], batch["labels"]
    if training:
        images, labels = augmenter(images, labels)
    mean, std = [_PIXEL_MEAN] * channels, [_PIXEL_STD] * channels
    return {**batch, "pixel_values": normalise(images, mean, std), "labels": labels}


def _forward(model: nn.Module, batch: Any, prepare: Callable[[Any], Any]) -> Any:
    """What a model returns for a batch as the Trainer would give it."""
    return call_model(model, prepare(batch))


def _out_of_memory(recipe: Recipe) -> OutOfMemoryError:
    """What to type where a step does not fit."""
    batch = recipe.training.per_device_train_batch_size
    more = recipe.training.gradient_accumulation_steps * 2
    half = max(1, batch // 2)
    return OutOfMemoryError(
        f"{recipe.name}: a step of {batch} samples a device does not fit into its memory. The same"
        " training with less",
        {"per_device_train_batch_size": half, "gradient_accumulation_steps": more},
        {"gradient_checkpointing": True},
    )


class _Teller(TrainerCallback):
    """Passes steps and logs on, from the first process of the run."""

    def __init__(self, on_step: OnStep | None, on_log: OnLog | None) -> None:
        self._on_step = on_step
        self._on_log = on_log
        self._last = ""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Where the run begins."""
        if self._on_step is not None and state.is_world_process_zero:
            self._on_step(state.global_step, state.max_steps)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """One more step."""
        if self._on_step is not None and state.is_world_process_zero:
            self._on_step(state.global_step, state.max_steps)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """The line of a log."""
        if self._on_log is not None and state.is_world_process_zero and logs:
            line = _line(state.global_step, logs)
            if line and line != self._last:  # the last evaluation may be done twice
                self._on_log(line)
                self._last = line


def _line(step: int, logs: dict[str, float]) -> str:
    """A log in few words; empty for one that says nothing of loss or density."""
    shown = [f"step {step}"]
    for key, name in (("loss", "loss"), ("eval_loss", "held-out loss")):
        if key in logs:
            shown.append(f"{name} {logs[key]:.4f}")
    for key, name in (
        ("eval_top1", "top-1"),
        ("eval_top5", "top-5"),
        ("eval_accuracy", "accuracy"),
        ("density", "density"),
        ("derivative_density", "derivative"),
        ("training_density", "training mean"),
    ):
        if key in logs:
            shown.append(f"{name} {100 * logs[key]:.1f} %")
    return "  ".join(shown) if len(shown) > 1 else ""
