"""The record of a training run, ``steppe.json``, which `steppe report` reads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn
from transformers import TrainingArguments

from steppe.activations import name_of
from steppe.blocks.find import Blocks
from steppe.blocks.wrappers import unwrap
from steppe.files import prepare_folder
from steppe.measures.report import Report, report_from_dict
from steppe.plugins.applied import sparsification_of
from steppe.runs import RUN_FILE, Run, versions, write_run
from steppe.training.reporters import of_the_model

_SETTINGS = (
    "learning_rate",
    "weight_decay",
    "optim",
    "lr_scheduler_type",
    "warmup_steps",
    "max_steps",
    "num_train_epochs",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "world_size",
    "max_grad_norm",
    "label_smoothing_factor",
    "bf16",
    "fp16",
    "gradient_checkpointing",
    "torch_compile",
    "seed",
)


def record_of(
    name: str,
    model: nn.Module,
    blocks: Blocks,
    history: Sequence[dict[str, Any]],
    held_out: Sequence[dict[str, Any]],
    logs: Sequence[Mapping[str, Any]],
    settings: dict[str, Any],
    packages: Mapping[str, str],
    acceleration: dict[str, Any],
) -> Run:
    """The record of a run.

    Args:
        name: of the run in tables and charts.
        model: to name its class, its activations and its plug-ins.
        blocks: of the model, those that were measured.
        history: one entry per measured training step, as `History` keeps them.
        held_out: the same of the evaluations.
        logs: one mapping per log, each with ``step``; metrics of single blocks are left out.
        settings: of the training, JSON values.
        packages: version of the package that trains, by its name.
        acceleration: of `AccelerationOfRun`; empty for a run without one.
    """
    sparsification = sparsification_of(model)
    layout: dict[str, Any] = {
        "name_per_block": [block.name for block in blocks],
        "d_model_per_block": [block.d_model for block in blocks],
        "d_hidden_per_block": [block.d_hidden for block in blocks],
        "gated_per_block": [block.gate is not None for block in blocks],
        "coverage": blocks.coverage.share,
        "not_covered": list(blocks.coverage.not_covered()),
    }
    training = [report_from_dict(layout | entry) for entry in history]
    return Run(
        name=name,
        model=type(unwrap(model)).__name__,
        tokens_per_sample=_tokens_per_sample(training),
        activations=[name_of(b.current_act) for b in blocks],
        plugins=[] if sparsification is None else sparsification.record()["plugins"],
        settings=settings,
        versions={**versions(), **packages},
        steps=[entry["step"] for entry in history],
        training=training,
        held_out_steps=[entry["step"] for entry in held_out],
        held_out=[report_from_dict(layout | entry) for entry in held_out],
        logs=[of_the_model(log) for log in logs],
        acceleration=acceleration,
    )


def write_record(run: Run, folder: str | Path, setting: str) -> None:
    """Write the record of a run into its folder.

    Args:
        run: the record.
        folder: of the run.
        setting: the setting that names the folder, for errors.

    Raises:
        OutputError: it cannot be written.
    """
    write_run(run, prepare_folder(folder, setting) / RUN_FILE)


def trainer_settings(args: TrainingArguments) -> dict[str, Any]:
    """The arguments of a Transformers' Trainer that a reader of the record needs, as JSON values.

    Args:
        args: the Trainer's.
    """
    settings: dict[str, Any] = {key: getattr(args, key) for key in _SETTINGS}
    settings["lr_scheduler_type"] = str(getattr(args.lr_scheduler_type, "value", ""))
    settings["optim"] = str(getattr(args.optim, "value", args.optim))
    return settings


def _tokens_per_sample(reports: Sequence[Report]) -> float:
    """Mean over all samples of all steps of the first block's tokens; NaN if there are none."""
    samples = sum(report.blocks[0].samples for report in reports)
    tokens = sum(report.blocks[0].tokens for report in reports)
    return tokens / samples if samples else float("nan")
