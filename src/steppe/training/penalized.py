"""The activation penalty in the loss of a Hugging Face model that the Trainer runs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from steppe.blocks import shifts_labels
from steppe.errors import LossError
from steppe.measures.losses import terms_of
from steppe.plugins.penalty import penalties_of


class PenalizedLoss:
    """A forward hook on a model that adds its penalties to the loss that it returns.

    Where the Trainer tells the model how many labels the step's batch has in all its micro-batches
    and processes, the loss is this micro-batch's part of the step's, and the penalty is too, by its
    share of the labels. Else both are means, of which the Trainer takes the mean.

    Args:
        model: the model, with at least one penalty.
    """

    def __init__(self, model: nn.Module) -> None:
        self._penalties = penalties_of(model)
        self._shifted = shifts_labels(model)

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        """Add them.

        Raises:
            LossError: the model returned no loss to add them to.
        """
        if not module.training or not torch.is_grad_enabled():
            return
        loss = getattr(output, "loss", None)
        if not isinstance(loss, Tensor):
            raise LossError(
                f"ActivationPenalty: {type(module).__name__} returned no loss, so the Trainer makes"
                " one outside of the model. Leave out label_smoothing_factor and"
                " compute_loss_func, or add it there: loss = steppe.penalize(loss, model)"
            )
        share = self._share(kwargs.get("labels"), kwargs.get("num_items_in_batch"))
        for penalty in self._penalties:
            loss = penalty.add_to(loss, share)
        output.loss = loss

    def _share(self, labels: Tensor | None, whole: Tensor | int | None) -> Tensor | float:
        """Of a step's labels, those of this micro-batch; 1 where the loss is a mean of its own."""
        if labels is None or whole is None:
            return 1.0
        own = terms_of(labels, self._shifted).sum()
        return own / (whole.to(own.device) if isinstance(whole, Tensor) else whole)
