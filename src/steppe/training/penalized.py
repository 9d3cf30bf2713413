"""The activation penalty in the loss of a Hugging Face model under the Trainer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from steppe.errors import LossError
from steppe.plugins.penalty import penalties_of


class PenalizedLoss:
    """A forward hook on a model that adds its penalties to the loss that it returns.

    Where the Trainer passes the number of labels of the whole step (all micro-batches and
    processes) to the model, the loss is this micro-batch's part of the step's loss. The penalty is
    then an equal part for each micro-batch, because versions of Transformers count the labels
    differently. Otherwise both are means over the micro-batch, and the Trainer averages them.

    Args:
        model: the model, with at least one penalty.
        pieces: micro-batches of a step, in all processes that share a loss.
    """

    def __init__(self, model: nn.Module, pieces: int) -> None:
        self._penalties = penalties_of(model)
        self._pieces = pieces

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        """Add the penalties to the loss of a training pass.

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
        share = 1.0 if kwargs.get("num_items_in_batch") is None else 1.0 / self._pieces
        for penalty in self._penalties:
            loss = penalty.add_to(loss, share)
        output.loss = loss
