"""Turns the gradients of a batch's loss into those of each sample's own loss."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from steppe.blocks.huggingface import forward_parameters, shifts_labels, stock_model
from steppe.errors import LossError
from steppe.measures.flatness import new_loss_probe, tap_loss
from steppe.surgery.journal import Journal
from steppe.tokens import IGNORED_LABEL, arguments_by_name

Reduction = Literal["mean", "sum"]
_LABELS = ("labels", "label")


class LossContext:
    """Hooks on a model that learn how the loss of its batches is made up of the samples'.

    Attributes:
        scale: float ``[S]`` or one for all, of the current call: turns the gradient of the
            batch's loss into that of each sample's own; None where the reduction alone tells.
        reduction: of the loss over its terms.
        given: `scale` was set from outside and the model's arguments do not change it.
        outside: the scale of a call without labels, where somebody knows it.
    """

    def __init__(self, root: nn.Module, reduction: Reduction) -> None:
        require_reduction("watch", reduction)
        self.speakers = (root,) if stock_model(root) is root else (root, stock_model(root))
        self._parameters = {one: forward_parameters(one) for one in self.speakers}
        self._in_root = False  # in a call of a wrapper
        self._is_tapped = False  # and the loss of the model in it has been seen
        self._shifted = shifts_labels(root)
        self.scale: Tensor | None = None
        self.reduction: Reduction = reduction
        self.given = False
        self.outside: Tensor | None = None
        self.enabled = False
        parameter = next(root.parameters(), torch.empty(0))
        self.probe = new_loss_probe(torch.device("cpu") if parameter.is_meta else parameter.device)

    def attach(self, journal: Journal) -> None:
        """Register the hooks: on the model, and on the one in it if that one gets the labels."""
        for speaker in self.speakers:
            journal.add_forward_pre_hook(speaker, self._see_labels, with_kwargs=True)
            journal.add_forward_hook(speaker, self._see_loss)
        if len(self.speakers) > 1:
            journal.add_forward_hook(self.speakers[0], self._leave, always=True)

    def _leave(self, *arguments: Any) -> None:
        """Forward hook on a wrapper, called also where its forward has raised."""
        self._in_root = self._is_tapped = False

    def _see_labels(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Forward pre-hook on a model."""
        if not self.enabled:
            return
        if module is self.speakers[0] and len(self.speakers) > 1:
            self._in_root = True
        if self.given:
            return
        arguments = arguments_by_name(self._parameters[module], args, kwargs)
        labels = arguments.get("labels")
        if self._in_root and module is self.speakers[-1] and not isinstance(labels, Tensor):
            return  # the wrapper around it may have got them
        self.scale = (
            sample_scale(labels, self._shifted, self.reduction, arguments.get("num_items_in_batch"))
            if isinstance(labels, Tensor)
            else self.outside
        )

    def _see_loss(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Forward hook on a model; the loss that a wrapper hands on is seen once."""
        if not self.enabled or self._is_tapped or not torch.is_grad_enabled():
            return
        loss = getattr(output, "loss", None)
        if isinstance(loss, Tensor) and loss.dim() == 0 and loss.requires_grad:
            output.loss = self.tapped(loss)
            self._is_tapped = self._in_root

    def tapped(self, loss: Tensor) -> Tensor:
        """The same loss; its backward pass measures its factor."""
        if self.probe.device != loss.device:
            self.probe = new_loss_probe(loss.device)
        return tap_loss(loss, self.probe)

    def tapped_outside(self, loss: Tensor) -> Tensor:
        """The same loss from outside, measured too if the model has got no labels."""
        is_outside = self.enabled and self.outside is not None and self.scale is self.outside
        return self.tapped(loss) if is_outside and loss.requires_grad else loss

    def scale_of(self, samples: int, device: torch.device, name: str) -> Tensor:
        """The factor of each sample's gradient.

        Args:
            samples: S, as a block sees it.
            device: where it is wanted.
            name: of the block.

        Returns:
            float ``[S]``.

        Raises:
            LossError: the labels are of another number of samples.
        """
        if self.scale is None:
            uniform = samples if self.reduction == "mean" else 1
            return torch.full((samples,), float(uniform), device=device)
        if self.scale.dim() == 0:
            return self.scale.to(device).expand(samples)
        if len(self.scale) != samples:
            tower = ".".join(itertools.takewhile(lambda part: not part.isdigit(), name.split(".")))
            raise LossError(
                f"{name}: got {samples} samples, the labels are of {len(self.scale)}. Expected one"
                " row of labels a sample, and one sample a row of the block's input. Where a tower"
                " packs the tokens of all samples into one row (vision in Qwen2-VL), nothing tells"
                " them apart: leave it out by where=lambda block: not"
                f" block.name.startswith({tower!r}), or ask for densities alone: measure(...,"
                " labels=None), watch(..., gradients=False)"
            )
        return self.scale.to(device)


def require_reduction(where: str, reduction: str) -> None:
    """Refuse a value that is no reduction.

    Raises:
        ValueError: it is neither ``mean`` nor ``sum``.
    """
    if reduction not in ("mean", "sum"):
        raise ValueError(f"{where}: expected reduction='mean' or 'sum', got {reduction!r}")


def terms_of(labels: Tensor, shifted: bool) -> Tensor:
    """How many terms of a loss each sample has.

    Args:
        labels: ``[S, *]``; of integers, those of -100 are no terms.
        shifted: each label is predicted from the tokens before it, so that the first is no term.

    Returns:
        bool ``[S, n]``, which labels are terms; one a sample where labels are no integers, or where
        there is one a sample.
    """
    if labels.is_floating_point():
        return torch.ones(len(labels), 1, dtype=torch.bool, device=labels.device)
    counted = labels.reshape(len(labels), -1) != IGNORED_LABEL
    return counted[:, 1:] if shifted and labels.dim() > 1 else counted


def sample_scale(
    labels: Tensor, shifted: bool, reduction: Reduction, terms: Tensor | int | None = None
) -> Tensor | None:
    """The factors from ∂L/∂p to ∂ℓ_s/∂p: L is over all terms, ℓ_s over those of sample s.

    For a mean over N terms, n_s of them of the sample, that is N / n_s, and 0 for a sample
    without terms; for a sum it is 1.

    Args:
        labels: as in `terms_of`.
        shifted: as in `terms_of`.
        reduction: of the loss over its terms.
        terms: N where it is not the number of terms in these labels, as with accumulation.

    Returns:
        float64 ``[S]``, or None for labels without a dimension.
    """
    if labels.dim() == 0:
        return None
    own = terms_of(labels, shifted).sum(-1).to(torch.float64)
    if reduction == "sum":
        return torch.ones_like(own)
    whole = own.sum() if terms is None else terms
    return torch.where(own > 0, whole / own.clamp(min=1.0), 0.0)


def labels_of(batch: Any) -> Tensor | None:
    """The labels in a batch as loaders give them, or None.

    Args:
        batch: a mapping with ``labels``, or a tuple or list with the targets second.
    """
    if isinstance(batch, Mapping):
        found = next((batch[key] for key in _LABELS if key in batch), None)
    else:
        found = batch[1] if isinstance(batch, tuple | list) and len(batch) > 1 else None
    return found if isinstance(found, Tensor) and found.dim() > 0 else None


def logits_of(output: Any, root: nn.Module) -> Tensor:
    """The logits in the output of a model, which has no wrappers.

    Raises:
        LossError: there are none, or they are of no classification or language model.
    """
    logits = output if isinstance(output, Tensor) else getattr(output, "logits", None)
    config = getattr(stock_model(root), "config", None)
    problem = getattr(config, "problem_type", None)
    if (
        not isinstance(logits, Tensor)
        or logits.dim() not in (2, 3)
        or logits.shape[-1] < 2
        or problem in ("regression", "multi_label_classification")
    ):
        got = list(logits.shape) if isinstance(logits, Tensor) else type(output).__name__
        raise LossError(
            f"labels='model': expected logits [samples, classes] or [samples, tokens, vocabulary]"
            f" from {type(root).__name__}, got {got}"
            + (f" of a {problem} model" if problem else "")
            + ". Sampling needs a distribution over classes; use labels='data'."
        )
    return logits


def sample_labels(logits: Tensor, terms: Tensor) -> Tensor:
    """Labels from the model's own predictive distribution.

    Args:
        logits: ``[S, C]`` or ``[S, T, C]``.
        terms: bool ``[S]`` or ``[S, T]``, which predictions count.

    Returns:
        int64, the shape of `terms`, -100 where it is False. Random by the global generator.

    Raises:
        LossError: the logits are NaN or infinite.
    """
    wanted = logits.detach()[terms].to(torch.float32)
    probabilities = wanted.softmax(-1)
    if not bool(probabilities.isfinite().all()):
        raise LossError(
            "labels='model': the model's logits are NaN or infinite, so nothing can be sampled from"
            " them. Has the training diverged? Measure an earlier checkpoint."
        )
    labels = torch.full(terms.shape, IGNORED_LABEL, device=logits.device)
    if len(wanted):
        labels[terms] = torch.multinomial(probabilities, 1).squeeze(-1)
    return labels


def sum_of_own_losses(logits: Tensor, labels: Tensor, reduction: Reduction) -> Tensor:
    """Σ_s ℓ_s, the cross-entropy of each sample over its own terms.

    Args:
        logits: ``[S, C]`` or ``[S, T, C]``.
        labels: int64 ``[S]`` or ``[S, T]``, -100 where there is no term.
        reduction: of ℓ_s over the terms of s.

    Returns:
        A scalar.
    """
    losses = F.cross_entropy(
        logits.flatten(0, -2), labels.flatten(), reduction="none", ignore_index=IGNORED_LABEL
    )
    own = losses.reshape(len(labels), -1).sum(-1)
    if reduction == "mean":
        terms = (labels.reshape(len(labels), -1) != IGNORED_LABEL).sum(-1)
        own = own / terms.clamp(min=1)
    return own.sum()


def require_scalar(loss: Any, batch: int) -> Tensor:
    """Refuse a loss that cannot be run backward.

    Raises:
        LossError: it is no scalar, or has no gradient.
    """
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        got = list(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
        raise LossError(
            f"batch {batch}: expected the loss to be a scalar tensor, got {got}. Reduce it: .mean()"
            " with reduction='mean', .sum() with reduction='sum'."
        )
    if not loss.requires_grad:
        raise LossError(
            f"batch {batch}: the loss has no gradient. Is the forward pass or the loss under"
            " torch.no_grad() or detached? For densities alone: measure(..., labels=None)."
        )
    return loss.reshape(())
