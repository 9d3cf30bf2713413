"""The loss that the Trainer computes outside of the model, from labels the model does not get."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from transformers import Trainer

from steppe.blocks.find import shifts_labels
from steppe.measures.losses import sample_scale
from steppe.measures.watch import Monitor


@contextmanager
def seen_from_outside(
    trainer: Trainer, monitor: Monitor, inputs: Any, items: Tensor | int | None
) -> Iterator[None]:
    """Let a monitor see the loss outside of the model, and its scale to the samples' losses.

    The loss is a mean over labels. Where the Trainer passes their number to the function that
    computes it (``compute_loss_func``, label smoothing), these are the labels of the whole step, of
    all micro-batches and processes. Otherwise, and for a ``compute_loss`` of the user's own, they
    are the labels of this micro-batch.

    Args:
        trainer: its training step runs within the context.
        monitor: of the training steps, with gradients.
        inputs: of the training step.
        items: labels of the whole step, where the Trainer counts them.
    """
    name = _maker(trainer)
    labels = inputs.get("labels") if isinstance(inputs, Mapping) else None
    if name is None or not isinstance(labels, Tensor) or labels.dim() == 0:
        yield
        return
    make = getattr(trainer, name)
    takes_items = "num_items_in_batch" in inspect.signature(make).parameters
    assert trainer.model is not None
    scale = sample_scale(
        labels.to(trainer.args.device),
        shifts_labels(trainer.model),
        "mean",
        items if takes_items and name != "compute_loss" else None,
    )
    assert scale is not None
    with monitor.outside_loss(scale) as tapped:

        @functools.wraps(make)
        def make_and_tap(*args: Any, **kwargs: Any) -> Any:
            made = make(*args, **kwargs)
            return tapped(made) if isinstance(made, Tensor) else made

        before = trainer.__dict__.get(name)
        setattr(trainer, name, make_and_tap)
        try:
            yield
        finally:
            if before is None:
                delattr(trainer, name)
            else:
                setattr(trainer, name, before)


def _maker(trainer: Trainer) -> str | None:
    """The name of the function that computes the loss, or None where the model does."""
    if type(trainer).compute_loss is not Trainer.compute_loss:
        return "compute_loss"
    names = ("compute_loss_func", "label_smoother")  # the first that there is
    return next((name for name in names if getattr(trainer, name, None) is not None), None)
