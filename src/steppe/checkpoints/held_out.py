"""Measure saved checkpoints on held-out data, as ``steppe measure`` does."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import datasets
import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedModel

from steppe.activations import name_of
from steppe.blocks.find import find_blocks
from steppe.blocks.huggingface import shifts_labels
from steppe.blocks.patterns import BlockPattern
from steppe.checkpoints.load_by_config import load_checkpoint, load_config
from steppe.checkpoints.steps import steps_of
from steppe.data.batches import Batch, Batches, load_batches
from steppe.data.read_errors import first_line
from steppe.data.sources import Source
from steppe.errors import CheckpointError, DeviceError
from steppe.measures.losses import terms_of
from steppe.measures.measure import call_model, measure
from steppe.measures.report import Report
from steppe.plugins.applied import sparsification_of
from steppe.runs import Run, versions

Labels = Literal["data", "model"]
OnBatch = Callable[[str, int, int | None, float], None]
"""Called with a checkpoint, the batches of it that are done, their number where it is known, and
the density so far; NaN before the first batch."""
_SAMPLING_SEED = 0  # of labels="model"


def measure_checkpoints(
    checkpoints: Sequence[str | Path],
    source: Source,
    labels: Labels | None = "data",
    max_batches: int | None = None,
    device: str | torch.device | None = None,
    on_batch: OnBatch | None = None,
    patterns: Sequence[BlockPattern] = (),
    on_load: Callable[[str], None] | None = None,
) -> Run:
    """Measure checkpoints of one run on the same held-out data.

    Args:
        checkpoints: folders or hub ids, of models with the same blocks.
        source: the data, prepared once, with the first checkpoint's tokenizer or image processor.
        labels: see `steppe.measure`; None for densities alone.
        max_batches: stop after so many.
        device: where to compute; a CUDA device if there is one, else the CPU.
        on_batch: called with the progress; each batch then waits for the device.
        patterns: patterns of your own for `steppe.find_blocks`; those that a checkpoint's record
            has are known.
        on_load: called with each checkpoint before its weights are loaded or downloaded.

    Returns:
        A run with one held-out report a checkpoint, in the order of their steps: those of
        ``trainer_state.json``, else of their names, or 0, 1, 2, … in the order given if one has
        none. `Run.quality` is that of the last: ``loss``, the mean over all predictions, in nats,
        and ``accuracy`` of classifiers.

    Raises:
        CheckpointError: one cannot be loaded, they have different blocks, or the same step.
        DeviceError: the device is not there.
        DataError: the data is not there, cannot be read, or does not fit the models.
        MissingExtraError: a package that the data needs is not installed.
        SteppeError: as `steppe.measure`.
        ValueError: there is no checkpoint, or `max_batches` is below 1.
    """
    names = [str(checkpoint) for checkpoint in checkpoints]
    if not names or (max_batches is not None and max_batches < 1):
        raise ValueError(
            f"measure_checkpoints: expected at least one checkpoint and batch, got {len(names)}"
            f" checkpoints, {max_batches=}"
        )
    steps = steps_of(names)
    names.sort(key=steps.__getitem__)
    for name in names:
        load_config(name)  # before any is measured
    where = _device(device)
    measured: list[_Measured] = []
    batches: Batches | None = None
    for name in names:
        if on_load is not None:
            on_load(name)
        model = load_checkpoint(name, patterns)
        if batches is None:
            batches = load_batches(source, model, name, with_classes=labels == "data")
        else:
            _require_same_blocks(measured[0], name, model)
        measured.append(_measure(name, model, where, batches, labels, max_batches, on_batch))
        del model  # before the next is loaded
    assert batches is not None
    settings = {
        **asdict(source),
        "split": batches.split,
        "checkpoints": names,
        "labels": labels,
        "max_batches": max_batches,
        "device": where.type,
        "notes": list(batches.notes),
    }
    return _run_of(measured, steps, settings)


@dataclass(frozen=True)
class _Measured:
    """The results of a checkpoint, kept when its model is gone."""

    name: str
    model: str
    layout: list[tuple[str, int, int]]
    activations: list[str]
    plugins: list[dict[str, Any]]
    report: Report
    quality: dict[str, float]


def _run_of(
    measured: Sequence[_Measured], steps: Mapping[str, int], settings: dict[str, Any]
) -> Run:
    """The checkpoints as one run; model, plug-ins and quality are those of the last."""
    names = [one.name for one in measured]
    last = measured[-1]
    blocks = [block for one in measured for block in one.report.blocks[:1]]
    return Run(
        name=_name_of(names),
        model=last.model,
        tokens_per_sample=sum(b.tokens for b in blocks) / sum(b.samples for b in blocks),
        activations=last.activations,
        plugins=last.plugins,
        settings=settings,
        versions={
            **versions(),
            "transformers": transformers.__version__,
            "datasets": datasets.__version__,
        },
        held_out_steps=[steps[name] for name in names],
        held_out=[one.report for one in measured],
        logs=[
            {"step": steps[one.name], **{f"eval_{key}": v for key, v in one.quality.items()}}
            for one in measured
            if one.quality
        ],
        quality=last.quality,
    )


def _measure(
    name: str,
    model: PreTrainedModel,
    device: torch.device,
    batches: Batches,
    labels: Labels | None,
    max_batches: int | None,
    on_batch: OnBatch | None,
) -> _Measured:
    """Measure one checkpoint."""
    nn.Module.to(model, device)
    recorder = _Recorder(classifies="Classification" in type(model).__name__)
    known = [number for number in (batches.total, max_batches) if number is not None]
    show = None if on_batch is None else _Progress(on_batch, name, min(known, default=None))
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(_SAMPLING_SEED)
        report = measure(
            model,
            batches,
            labels=labels,
            forward=recorder,
            max_batches=max_batches,
            on_batch=show,
        )
    sparsification = sparsification_of(model)
    return _Measured(
        name=name,
        model=type(model).__name__,
        layout=_layout(model),
        activations=[name_of(block.current_act) for block in find_blocks(model)],
        plugins=[] if sparsification is None else sparsification.record()["plugins"],
        report=report,
        quality=recorder.quality(),
    )


class _Progress:
    """Tells how far the measuring of one checkpoint has come, at once and after each batch."""

    def __init__(self, on_batch: OnBatch, name: str, total: int | None) -> None:
        self._on_batch = on_batch
        self._name = name
        self._total = total
        self(0, math.nan)

    def __call__(self, done: int, density: float) -> None:
        """Some batches are done."""
        self._on_batch(self._name, done, self._total, density)


class _Recorder:
    """Runs a model on a batch, and keeps how well it did."""

    def __init__(self, classifies: bool) -> None:
        self._classifies = classifies
        self._loss = 0.0
        self._correct = 0
        self._terms = 0

    def __call__(self, model: nn.Module, batch: Batch) -> Any:
        """Output of the model."""
        output = call_model(model, batch)
        labels, loss = batch.get("labels"), getattr(output, "loss", None)
        if labels is not None and isinstance(loss, Tensor):
            terms = int(terms_of(labels, shifts_labels(model)).sum())
            self._loss += loss.item() * terms if terms else 0.0
            self._terms += terms
            if self._classifies:
                self._correct += int((output.logits.argmax(-1).cpu() == labels.cpu()).sum())
        return output

    def quality(self) -> dict[str, float]:
        """Mean loss, and accuracy of a classifier; nothing where there were no labels."""
        if not self._terms:
            return {}
        quality = {"loss": self._loss / self._terms}
        if self._classifies:
            quality["accuracy"] = self._correct / self._terms
        return quality


def _layout(model: nn.Module) -> list[tuple[str, int, int]]:
    """Name and widths of each block."""
    return [(block.name, block.d_model, block.d_hidden) for block in find_blocks(model)]


def _require_same_blocks(first: _Measured, name: str, model: nn.Module) -> None:
    """Refuse a model that is no later state of the first."""
    layout = _layout(model)
    if layout == first.layout:
        return
    described = [
        f"{len(blocks)} blocks from {blocks[0][0]} of width {blocks[0][1]} and {blocks[0][2]}"
        for blocks in (first.layout, layout)
    ]
    raise CheckpointError(
        f"{name}: has {described[1]}; {first.name} has {described[0]}. Expected checkpoints of one"
        " run; measure models of different shape by themselves."
    )


def _device(wanted: str | torch.device | None) -> torch.device:
    """The device to compute on, which is there; by default a CUDA device if there is one."""
    if wanted is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=wanted).device
    except (RuntimeError, AssertionError) as error:  # AssertionError: torch built without CUDA
        raise DeviceError(
            f"device {wanted}: cannot be used here ({first_line(error)}). Name one that is there,"
            " e.g. cpu, or none for the default."
        ) from None


def _name_of(names: Sequence[str]) -> str:
    """A checkpoint's name, of several their folder's."""
    if len(names) == 1:
        return Path(names[0]).name
    return Path(names[-1]).resolve().parent.name or Path(names[-1]).name
