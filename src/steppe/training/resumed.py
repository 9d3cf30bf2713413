"""What the stock Trainer leaves out when it resumes."""

from __future__ import annotations

import logging

from torch import nn
from transformers import Trainer

from steppe.blocks.wrappers import unwrap
from steppe.checkpoints import load_weights_
from steppe.checkpoints.weights import Weights, has_weights

_logger = logging.getLogger(__name__)


def complete_weights_(trainer: Trainer, checkpoint: str | None) -> None:
    """Load the weights that the Trainer passed over when it resumed, and say so.

    Transformers saves some models (ViT) under the names of older versions, and the Trainer loads a
    checkpoint by the names of the model: what it does not find it leaves as it was initialised.
    (github.com/huggingface/transformers/issues/43701)

    Args:
        trainer: has loaded a checkpoint.
        checkpoint: the folder; None where the run starts anew.

    Raises:
        CheckpointError: the checkpoint does not hold the tensors that are missing.
    """
    model = trainer.model
    if checkpoint is None or model is None or not has_weights(checkpoint):
        return  # anew, or an adapter, or saved otherwise
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        return  # these load their own files, by the names that they saved
    passed_over = _passed_over(unwrap(model), Weights.of(checkpoint))
    if passed_over:
        load_weights_(model, checkpoint)
        _logger.warning(
            "%s: the Trainer has resumed without %d tensors, %s for one, which are saved under"
            " other names than the model's. steppe has loaded them.",
            checkpoint,
            len(passed_over),
            passed_over[0],
        )


def _passed_over(root: nn.Module, weights: Weights) -> list[str]:
    """The tensors that are in no file under the model's names; of tied ones, one is saved."""
    state = root.state_dict()
    held = {tensor.data_ptr() for name, tensor in state.items() if name in weights.files}
    return [name for name, tensor in state.items() if tensor.data_ptr() not in held]
