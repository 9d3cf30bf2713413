"""Measure a model on held-out data."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch import distributed as dist

from steppe.blocks.block import MLPBlock
from steppe.blocks.find import blocks_for
from steppe.blocks.huggingface import shifts_labels
from steppe.blocks.patterns import BlockPattern
from steppe.blocks.wrappers import unwrap
from steppe.errors import DeviceError, EmptyLoaderError, LossError, NonFiniteLossError
from steppe.measures.curvature import BlockCurvature, hessian_curvature, samples_of
from steppe.measures.losses import (
    Reduction,
    labels_of,
    logits_of,
    require_reduction,
    require_scalar,
    sample_labels,
    sample_scale,
    sum_of_own_losses,
    terms_of,
)
from steppe.measures.monitor import Monitor
from steppe.measures.report import Report
from steppe.routing.route import run_dense
from steppe.surgery.pattern_notes import note_patterns_

Loss = Callable[[Any, Any], Tensor]


def call_model(model: nn.Module, batch: Any) -> Any:
    """Run a model on a batch as loaders give them.

    Args:
        model: the model.
        batch: a mapping (keyword arguments), a tuple, named tuple or list (the first is the input,
            the rest are targets), or a tensor.

    Returns:
        The output of the model.
    """
    batch = to_device(batch, model)
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(batch[0] if isinstance(batch, tuple | list) else batch)


def to_device(batch: Any, model: nn.Module) -> Any:
    """The tensors of a batch where the model's first parameter is."""
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    if isinstance(batch, Mapping):
        return {key: _to(value, device) for key, value in batch.items()}
    if isinstance(batch, tuple | list):
        moved = [_to(value, device) for value in batch]
        return type(batch)(*moved) if hasattr(batch, "_fields") else type(batch)(moved)
    return _to(batch, device)


def measure(
    model: nn.Module,
    loader: Iterable[Any],
    loss: Loss | None = None,
    labels: Literal["data", "model"] | None = "data",
    reduction: Reduction = "mean",
    forward: Callable[[nn.Module, Any], Any] = call_model,
    max_batches: int | None = None,
    where: Callable[[MLPBlock], bool] | None = None,
    patterns: Sequence[BlockPattern] = (),
    group: dist.ProcessGroup | None = None,
    curvature: bool = False,
    strict: bool = False,
    on_batch: Callable[[int, float], None] | None = None,
) -> Report:
    """How sparse a model's MLP blocks are on some data, and why: `BlockReport` has the measures.

    The model runs in evaluation mode. Backward passes reach the blocks only: no parameter's
    gradient is computed or changed, frozen ones do not matter.

    Args:
        model: the model; it is back in its mode afterwards, module by module.
        loader: batches, with labels unless `labels` is None. Each row is a sample.
        loss: of the model's output and the batch, a scalar; the model's own loss by default.
        labels: ``data``: those of the batch. ``model``: sampled from the model's own predictive
            distribution, by the global random generator, where the batch's are not -100; AF is then
            an estimate of the trace of the Fisher matrix. None: densities alone, without a backward
            pass.
        reduction: how the loss is made of its terms, the labels that are not -100; a sample's own
            loss is made of its own terms in the same way.
        forward: runs the model on a batch.
        max_batches: stop after so many; all by default.
        where: which blocks; all by default.
        patterns: patterns of your own for `find_blocks`, which are noted with the model.
        group: processes that measure a share of the data each; the sums go over all of them.
        curvature: measure the trace and the largest eigenvalue of the Hessian of each weight too,
            see `BlockCurvature`; keeps the batches, and takes many passes over them.
        strict: refuse a model with MLPs that are not found, instead of warning once;
            ``Report.coverage`` says it in any case.
        on_batch: called after each batch with the number of batches done and the density so far,
            for a progress bar; it makes each batch wait for the device.

    Returns:
        Means over the samples, with standard errors.

    Raises:
        BlocksNotFoundError: there is no MLP block.
        DeviceError: the model is partly on no device, or partly on an accelerator.
        EmptyLoaderError: the loader gave no batch, no token that counts, or a batch without a label
            that counts.
        LossError: the loss is no scalar, has no gradient, or there are no labels for it.
        NonFiniteLossError: the loss is NaN or infinite.
        WiringError: a block computes something else than its pattern says.
        ValueError: `labels` or `reduction` is none of those above.

    Source: arXiv 2605.25612.

    Example:
        >>> layer = nn.TransformerEncoderLayer(8, 2, 32, batch_first=True)
        >>> batches = [(torch.randn(2, 5, 8), torch.randn(2, 5, 8))]
        >>> report = measure(layer, batches, loss=lambda z, batch: (z - batch[1]).square().mean())
        >>> block = report.blocks[0]
        >>> abs(block.derivative_density_by_identity / block.derivative_density - 1) < 1e-6
        True
    """
    _require_fitting(labels, loss, curvature)
    require_reduction("measure", reduction)
    root = unwrap(model)
    _require_one_device(root, gradients=labels is not None)
    blocks = blocks_for("measure", model, where, patterns, strict)
    note_patterns_(model, patterns)
    task = _Task(model, root, loss, labels, reduction, forward)
    number = 0
    kept: list[Any] = []
    with (
        _gradients(model, wanted=labels is not None),
        Monitor(model, blocks, labels is not None, reduction, verb="measure").attached() as monitor,
        _evaluating(model),
    ):
        for batch in islice(loader, max_batches):
            batch = to_device(batch, model)
            task.run(batch, number, monitor)
            number += 1
            if on_batch is not None:
                on_batch(number, monitor.density)
            if curvature:
                kept.append(batch)
        if int(monitor.counts(group)[:, 3].sum()) == 0:
            raise EmptyLoaderError(
                f"measure: {number} batches without a single token that counts in"
                f" {type(root).__name__}. Is the loader empty (an iterator that was used"
                " up before, drop_last with a large batch), or every token padding?"
            )
        report = monitor.report(group)
    return replace(report, curvature=task.curvature(kept, blocks)) if curvature else report


def _require_fitting(labels: str | None, loss: Loss | None, curvature: bool) -> None:
    """Refuse arguments that contradict each other."""
    if labels not in ("data", "model", None):
        raise ValueError(f"measure: expected labels='data', 'model' or None, got {labels!r}")
    if curvature and labels != "data":
        raise ValueError(
            "measure: curvature=True is of the loss on the data's labels; say labels='data'"
        )
    if labels == "model" and loss is not None:
        raise ValueError(
            "measure: labels='model' samples from the softmax of the model's logits, whose loss is"
            " the cross-entropy; leave `loss` out, or say labels='data'"
        )


@dataclass(frozen=True)
class _Task:
    """How one batch is measured: the arguments of `measure`, and the model without wrappers."""

    model: nn.Module
    root: nn.Module
    loss: Loss | None
    labels: Literal["data", "model"] | None
    reduction: Reduction
    forward: Callable[[nn.Module, Any], Any]

    def run(self, batch: Any, number: int, monitor: Monitor) -> None:
        """Run the model on a batch, forward and, unless `labels` is None, backward."""
        if self.labels is None:
            self.forward(self.model, batch)
            return
        of_labels = self._loss_on_data if self.labels == "data" else self._loss_on_samples
        value = of_labels(batch, number, monitor)
        _require_finite(value, number)
        value.backward(inputs=monitor.probes())

    def curvature(
        self, batches: Sequence[Any], blocks: Sequence[MLPBlock]
    ) -> tuple[BlockCurvature, ...]:
        """The curvature of each block on some batches."""
        with _evaluating(self.model), torch.enable_grad(), run_dense(blocks):
            return hessian_curvature(
                self.model,
                batches,
                _MeanLoss(self.loss, self.forward, self.reduction),
                blocks,
                size=_Terms(shifts_labels(self.root), self.reduction),
            )

    def _loss_on_data(self, batch: Any, number: int, monitor: Monitor) -> Tensor:
        """The loss of a batch with its own labels; the monitor gets the scale of each sample."""
        labels = labels_of(batch)
        shifted = shifts_labels(self.root)
        if labels is not None and not bool(terms_of(labels, shifted).any()):
            raise _no_label(number)
        monitor.use_scale(None if labels is None else sample_scale(labels, shifted, self.reduction))
        output = self.forward(self.model, batch)
        if self.loss is not None:
            return require_scalar(self.loss(output, batch), number)
        value = getattr(output, "loss", None)
        if value is None:
            raise LossError(
                f"batch {number}: {type(self.root).__name__} returned no loss"
                + (" and the batch has no labels" if labels is None else "")
                + ". Add 'labels' to the batches of a Hugging Face model, or say what the loss is:"
                " measure(..., loss=lambda output, batch: F.cross_entropy(output, batch[1]))."
                " Without labels: labels='model'; without gradients: labels=None."
            )
        return require_scalar(value, number)

    def _loss_on_samples(self, batch: Any, number: int, monitor: Monitor) -> Tensor:
        """The sum of the samples' own losses for labels that the model draws itself."""
        monitor.use_scale(torch.ones(()))
        logits = logits_of(self.forward(self.model, batch), self.root)
        shifted = shifts_labels(self.root) and logits.dim() == 3
        if shifted:
            logits = logits[:, :-1]
        terms = _predictions_that_count(batch, logits, shifted)
        if not bool(terms.any()):
            raise _no_label(number)
        sampled = sample_labels(logits, terms)
        return require_scalar(sum_of_own_losses(logits, sampled, self.reduction), number)


def _predictions_that_count(batch: Any, logits: Tensor, shifted: bool) -> Tensor:
    """Bool ``[S]`` or ``[S, T]``: where the batch's labels count, else where its tokens do."""
    labels = labels_of(batch)
    shape = logits.shape[:-1]
    if labels is not None and not labels.is_floating_point():
        terms = terms_of(labels, shifted)
    elif logits.dim() == 3 and isinstance(batch, Mapping) and "attention_mask" in batch:
        counted = batch["attention_mask"] != 0
        terms = counted[:, 1:] if shifted else counted
    else:
        return torch.ones(shape, dtype=torch.bool, device=logits.device)
    if terms.numel() != shape.numel():
        raise LossError(
            f"labels='model': the model gives {list(logits.shape)} logits, the batch's labels or"
            f" mask say {list(terms.shape)} predictions"
        )
    return terms.reshape(shape).to(logits.device)


class _MeanLoss:
    """The mean loss of a batch as a function of the model."""

    def __init__(
        self,
        loss: Loss | None,
        forward: Callable[[nn.Module, Any], Any],
        reduction: Reduction,
    ) -> None:
        self._loss = loss
        self._forward = forward
        self._reduction = reduction

    def __call__(self, model: nn.Module, batch: Any) -> Tensor:
        """A scalar; of a sum, the share of one sample."""
        output = self._forward(model, batch)
        value: Tensor = output.loss if self._loss is None else self._loss(output, batch)
        return value if self._reduction == "mean" else value / samples_of(batch)


class _Terms:
    """How much a batch counts among others."""

    def __init__(self, shifted: bool, reduction: Reduction) -> None:
        self._shifted = shifted
        self._reduction = reduction

    def __call__(self, batch: Any) -> float:
        """The number of terms of its mean, the number of samples of its sum."""
        labels = labels_of(batch)
        if labels is None or self._reduction == "sum":
            return samples_of(batch)
        return float(terms_of(labels, self._shifted).sum())


def _no_label(number: int) -> EmptyLoaderError:
    return EmptyLoaderError(
        f"batch {number}: no label that counts: every one is -100, or every token is padding. Its"
        " loss is a mean over nothing. Leave such batches out."
    )


def _require_finite(loss: Tensor, number: int) -> None:
    if not bool(loss.isfinite()):
        raise NonFiniteLossError(
            f"batch {number}: the loss is {loss.item()}, so no gradient means anything. Has the"
            " training diverged? Measure an earlier checkpoint, or in float32."
        )


def _require_one_device(root: nn.Module, gradients: bool) -> None:
    """Refuse a model on no device, or on several by accident."""
    kinds = {parameter.device.type for parameter in root.parameters()}
    if "meta" in kinds or (len(kinds) > 1 and not _is_dispatched(root)):
        raise DeviceError(
            f"measure: the parameters of {type(root).__name__} are on mixed devices"
            f" ({', '.join(sorted(kinds))}). Move the model first: model.to('cpu'), or"
            " model.to('cuda')."
        )
    if gradients and any(parameter.is_inference() for parameter in root.parameters()):
        raise DeviceError(
            "measure: the parameters were made under torch.inference_mode(), which no gradient can"
            " pass. Load the model outside of it; for densities alone: labels=None."
        )


def _is_dispatched(root: nn.Module) -> bool:
    """Whether Accelerate has spread a model, or one in it, over devices."""
    return any(hasattr(module, "hf_device_map") for module in root.modules())


@contextmanager
def _gradients(model: nn.Module, wanted: bool) -> Iterator[None]:
    """Gradients on or off, whatever they are outside; without DDP's reduction."""
    if not wanted:
        with torch.no_grad():
            yield
        return
    apart: AbstractContextManager[Any] = nullcontext()
    if isinstance(model, nn.parallel.DistributedDataParallel):
        apart = model.no_sync()
    with (
        torch.inference_mode(False),
        torch.enable_grad(),
        apart,
    ):
        yield


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, then every module back in its own."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


def _to(value: Any, device: torch.device) -> Any:
    return value.to(device) if isinstance(value, Tensor) else value
