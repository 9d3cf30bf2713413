"""The quality of a model on held-out data, from the few numbers that evaluation keeps of logits."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from steppe.tokens import IGNORED_LABEL

_TOP = 5


def keep_ranks(logits: Any, labels: Tensor) -> Tensor:
    """The rank of each image's class among its logits: the number of classes before it.

    Args:
        logits: float ``[B, classes]``, or a tuple with it first.
        labels: int64 ``[B]``.

    Returns:
        int64 ``[B]``, 0 where the prediction is right.
    """
    logits = logits[0] if isinstance(logits, tuple) else logits
    return (logits > logits.gather(-1, labels[:, None])).sum(-1)


def keep_correct_next(logits: Any, labels: Tensor) -> Tensor:
    """The number of next tokens that a language model predicts rightly; see `keep_correct`.

    Args:
        logits: float ``[B, T, vocabulary]``, or a tuple with it first.
        labels: int64 ``[B, T]``.
    """
    logits = logits[0] if isinstance(logits, tuple) else logits
    return keep_correct(logits[:, :-1], labels[:, 1:])


def keep_correct(logits: Any, labels: Tensor) -> Tensor:
    """The number of labels that a model predicts rightly, and of all labels, per sample.

    Args:
        logits: float ``[B, T, vocabulary]``, or a tuple with it first.
        labels: int64 ``[B, T]``; those of -100 are not counted.

    Returns:
        int64 ``[B, 2]``: right labels, and all labels.
    """
    logits = logits[0] if isinstance(logits, tuple) else logits
    counted = labels != IGNORED_LABEL
    right = (logits.argmax(-1) == labels) & counted
    return torch.stack([right.sum(-1), counted.sum(-1)], -1)


def image_quality(prediction: Any) -> dict[str, float]:
    """Top-1 and top-5 accuracy of images.

    Args:
        prediction: of the Trainer, with the ranks of `keep_ranks`.

    Returns:
        ``top1`` and ``top5``, in [0, 1].
    """
    ranks = prediction.predictions
    return {"top1": float((ranks == 0).mean()), "top5": float((ranks < _TOP).mean())}


def token_quality(prediction: Any) -> dict[str, float]:
    """Share of the tokens that are predicted rightly.

    Args:
        prediction: of the Trainer, with the numbers of `keep_correct` or `keep_correct_next`.

    Returns:
        ``accuracy``, in [0, 1].
    """
    right, counted = prediction.predictions.sum(0)
    return {"accuracy": float(right / max(counted, 1))}


Keep = Callable[[Any, Tensor], Tensor]
"""Makes of logits and labels the few numbers that evaluation gathers."""


def perplexity(loss: float) -> float:
    """The perplexity exp(loss), infinite where it does not fit a float.

    Args:
        loss: in nats per token.
    """
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf
