"""The main job, small: two real data sets, four arms each, trained by the stock Trainer.

The arms start from the same seed, with the same initial weights and the same order of batches:

- ``vanilla``: weight decay on all parameters, norms included, as in the paper's ImageNet recipe;
- ``control``: vanilla, but the norms are not decayed (what RestrictedNorm alone would bring);
- ``steppe``: vanilla's optimizer with the paper's three plug-ins;
- ``threshold``: control with the rising threshold, which is ours and not the paper's.
"""

from __future__ import annotations

import copy
import math
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    IJepaConfig,
    IJepaForImageClassification,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
    get_cosine_schedule_with_warmup,
    set_seed,
)

from steppe.bench import PREFILL, TRAINING, time_model
from steppe.blocks.find import find_blocks
from steppe.data.embedded import BYTES, Split, load_digits_split, load_pydoc_split
from steppe.errors import NonFiniteLossError
from steppe.files import prepare_file, write_folder, write_json, writing_to
from steppe.measures import measure
from steppe.plugins import (
    JumpingSquaredReLU,
    RestrictedNorm,
    RisingThreshold,
    ZerothBias,
    sparsify_,
)
from steppe.runs import RUN_FILE, write_run
from steppe.training.callback import SteppeCallback

ARMS = ("vanilla", "control", "steppe", "threshold")
_NORMS_SPARED = ("control", "threshold")
SUMMARY_VERSION = 1
SUMMARY = "summary.json"
_WARMUP = 0.1  # share of the run
_COUNT_EVERY = 10  # steps
_EVAL_BATCH = 256
_SPEED_SECONDS = 0.5  # of timing, a trained model and case


@dataclass(frozen=True)
class Task:
    """A data set with the model and the recipe for it.

    Attributes:
        name: key in the summary.
        quality: ``accuracy`` (held-out, in [0, 1]) or ``loss`` (held-out, nats per token).
        build: makes the model, randomly initialised.
        load: loads the data.
        batch: samples per step.
        steps: optimizer steps.
        lr: highest learning rate.
        weight_decay: AdamW's.
    """

    name: str
    quality: str
    build: Callable[[], nn.Module]
    load: Callable[[], Split]
    batch: int
    steps: int
    lr: float
    weight_decay: float


@dataclass(frozen=True)
class ArmRun:
    """What one arm came to from one seed.

    Attributes:
        seed: of the initial weights and the order of batches.
        quality: held-out accuracy or loss, see `Task.quality`.
        density: inference density, on the held-out data at the end.
        derivative_density: the same for the derivative.
        training_density: mean of the density over the counted training steps.
        density_per_block: inference density per block, in forward order.
        derivative_density_per_block: the same for the derivative.
        training_density_per_block: training density per block.
        seconds: training time.
        history: ``[step, density]`` of the counted training steps.
        speed: rows of `steppe.bench.time_model`: a training step of the trained blocks on
            a batch of held-out data, and inference.
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
    """Train all arms on both data sets and write ``summary.json``.

    Args:
        out: folder for the summary, the TensorBoard logs and the trained models.
        seeds: number of repetitions, ≥ 1.
        max_steps: train for at most so many steps; the densities then say little.
        on_step: told of the progress.

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
    data_sets: dict[str, Any] = {}
    for task in TASKS:
        split = task.load()
        steps = task.steps if max_steps is None else min(task.steps, max_steps)
        with _one_thread(), writing_to(out, "out"):
            arms = {
                arm: [
                    _train_arm(task, split, arm, seed, steps, out, on_step) for seed in range(seeds)
                ]
                for arm in ARMS
            }
        data_sets[task.name] = {
            "quality": task.quality,
            "steps": steps,
            "batch": task.batch,
            "lr": task.lr,
            "weight_decay": task.weight_decay,
            "arms": {arm: _summarise(task, runs) for arm, runs in arms.items()},
        }
    summary = {
        "version": SUMMARY_VERSION,
        "seeds": seeds,
        "seconds": time.perf_counter() - start,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "data_sets": data_sets,
    }
    write_json(out / SUMMARY, summary)
    return summary


def labels_of_runs(seeds: int) -> list[str]:
    """The labels that `run_demo` gives its runs, in order."""
    return [_label(task.name, arm, seed) for task in TASKS for arm in ARMS for seed in range(seeds)]


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


def _label(task: str, arm: str, seed: int) -> str:
    return f"{task}/{arm}/seed-{seed}"


def _train_arm(
    task: Task,
    split: Split,
    arm: str,
    seed: int,
    steps: int,
    out: Path,
    on_step: OnStep | None,
) -> ArmRun:
    """Train one arm from one seed and measure it on the held-out data."""
    set_seed(seed)
    model = task.build()
    decayed: list[nn.Parameter] = []
    spared: list[nn.Parameter] = []
    norms = {id(p) for b in find_blocks(model) if b.norm for p in b.norm.parameters()}
    if arm == "steppe":
        sparsify_(model, [ZerothBias(), RestrictedNorm(), JumpingSquaredReLU()])
    elif arm == "threshold":
        sparsify_(model, [RisingThreshold()])
    for parameter in model.parameters():
        is_spared = arm in _NORMS_SPARED and id(parameter) in norms
        (spared if is_spared else decayed).append(parameter)
    groups: list[dict[str, Any]] = [{"params": decayed}, {"params": spared, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=task.lr, weight_decay=task.weight_decay)
    label = _label(task.name, arm, seed)
    folder = out / label
    callback = SteppeCallback(every=_COUNT_EVERY)
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(folder),
            max_steps=steps,
            per_device_train_batch_size=task.batch,
            per_device_eval_batch_size=_EVAL_BATCH,
            max_grad_norm=1.0,
            logging_steps=50,
            logging_nan_inf_filter=False,
            save_strategy="no",
            report_to=["tensorboard"],
            disable_tqdm=True,
            seed=seed,
            use_cpu=not torch.cuda.is_available(),
        ),
        train_dataset=split.train,
        eval_dataset=split.held_out,
        optimizers=(
            optimizer,
            get_cosine_schedule_with_warmup(optimizer, round(_WARMUP * steps), steps),
        ),
        compute_metrics=_accuracy if task.quality == "accuracy" else None,
        callbacks=[callback, _Progress(label, on_step)],
    )
    trainer.remove_callback(PrinterCallback)
    start = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - start
    metrics = trainer.evaluate()
    loss = metrics["eval_loss"]
    if not math.isfinite(loss):
        raise NonFiniteLossError(f"{label}: the held-out loss is {loss} after {steps} steps")
    held_out = measure(model, trainer.get_eval_dataloader())
    run = callback.run(trainer.args, trainer.state, model, name=label)
    quality = metrics["eval_accuracy"] if task.quality == "accuracy" else loss
    speed = _speed(model, trainer, split.held_out, task.batch)
    measured = replace(run, held_out=[held_out], held_out_steps=[steps], speed=speed)
    write_run(replace(measured, quality={task.quality: quality}), folder / RUN_FILE)
    write_folder(folder / "model", lambda temporary: trainer.save_model(str(temporary)))
    return ArmRun(
        seed=seed,
        quality=quality,
        density=held_out.density,
        derivative_density=held_out.derivative_density,
        training_density=callback.training_density,
        density_per_block=[block.density for block in held_out.blocks],
        derivative_density_per_block=[block.derivative_density for block in held_out.blocks],
        training_density_per_block=callback.training_density_per_block,
        seconds=seconds,
        history=[(entry["step"], entry["density"]) for entry in callback.history],
        speed=speed,
    )


def _speed(model: nn.Module, trainer: Trainer, data: Any, batch: int) -> list[dict[str, Any]]:
    """What the sparse kernels gain on the trained blocks, on the CPU."""
    on_cpu = copy.deepcopy(model).cpu()
    samples = trainer.data_collator([data[index] for index in range(batch)])
    return [time_model(on_cpu, samples, case, _SPEED_SECONDS) for case in (TRAINING, PREFILL)]


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


class _Progress(TrainerCallback):
    """Passes the steps on."""

    def __init__(self, label: str, on_step: OnStep | None) -> None:
        self._label = label
        self._on_step = on_step

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """One more step."""
        if self._on_step is not None:
            self._on_step(self._label, state.global_step, state.max_steps)


def _accuracy(prediction: Any) -> dict[str, float]:
    """Top-1 accuracy."""
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


def _vision_model() -> nn.Module:
    """A ViT with mean pooling; with a class token the effect reverses at this size."""
    model = IJepaForImageClassification(
        IJepaConfig(
            hidden_size=48,
            intermediate_size=192,
            num_hidden_layers=2,
            num_attention_heads=4,
            hidden_act="relu",
            image_size=8,
            patch_size=2,
            num_channels=1,
            num_labels=10,  # type: ignore[call-arg]  # handled by PreTrainedConfig
        )
    )
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            # The patch embedding is a linear layer on flattened patches.
            nn.init.xavier_uniform_(module.weight.data.flatten(1))
    return model


def language_model(width: int = 64) -> nn.Module:
    """A GPT-2 of bytes, two layers, without dropout.

    Args:
        width: d_model; the hidden layers are four times as wide.
    """
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=BYTES,
            n_positions=64,
            n_embd=width,
            n_layer=2,
            n_head=4,
            activation_function="relu",
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            bos_token_id=0,
            eos_token_id=0,
            use_cache=False,
        )
    )


TASKS = (
    Task(
        name="digits",
        quality="accuracy",
        build=_vision_model,
        load=load_digits_split,
        batch=64,
        steps=2000,
        lr=1e-2,
        weight_decay=1.0,
    ),
    Task(
        name="pydoc",
        quality="loss",
        build=language_model,
        load=load_pydoc_split,
        batch=16,
        steps=1000,
        lr=4e-3,
        weight_decay=1.0,
    ),
)
