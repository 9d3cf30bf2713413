"""The range of values that each key of a recipe may have."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

_LARGEST_SEED = 2**32 - 1  # numpy's
_LARGEST_VOCABULARY = 10**7  # the tokenizer reserves its memory at once, and aborts without it


@dataclass(frozen=True)
class Range:
    """The values that a key may have.

    Attributes:
        expected: the same in words.
        holds: tells whether a value is one of them; False for NaN.
    """

    expected: str
    holds: Callable[[Any], bool]


def _at_least(least: int) -> Range:
    return Range(f"at least {least}", lambda value: least <= value < math.inf)


def _between(least: float, most: float, what: str = "") -> Range:
    return Range(f"{what}{least} … {most}", lambda value: least <= value <= most)


_SHARE = _between(0, 1, "a share in ")
_SHARE_OF_RUN = _between(0, 1, "a share of the run in ")
_SHARE_BELOW_ONE = Range("a share in 0 … 1, less than 1", lambda value: 0 <= value < 1)
_POSITIVE = Range("more than 0", lambda value: 0 < value < math.inf)
_SEED = _between(0, _LARGEST_SEED)

RANGES: Mapping[str, Range] = {
    **dict.fromkeys(
        (
            "gradient_accumulation_steps",
            "length",
            "measure_every",
            "per_device_eval_batch_size",
            "per_device_train_batch_size",
            "repeated_augmentation",
        ),
        _at_least(1),
    ),
    **dict.fromkeys(
        (
            "activation_penalty",
            "adam_epsilon",
            "crop_padding",
            "cutmix",
            "dataloader_num_workers",
            "eval_delay",
            "held_out_samples",
            "learning_rate",
            "lora_rank",
            "mixup",
            "threshold_multiple",
            "time_blocks",
            "warmup_steps",
            "weight_decay",
        ),
        _at_least(0),
    ),
    **dict.fromkeys(("eval_steps", "logging_steps", "save_steps"), _POSITIVE),
    **dict.fromkeys(("adam_beta1", "adam_beta2", "label_smoothing"), _SHARE_BELOW_ONE),
    **dict.fromkeys(("penalty_ramp", "ramp"), _SHARE_OF_RUN),
    **dict.fromkeys(("data_seed", "seed"), _SEED),
    "max_grad_norm": Range("at least 0", lambda value: value >= 0),
    "max_steps": Range(
        "at least 1, or -1 for num_train_epochs", lambda value: value == -1 or value >= 1
    ),
    "num_train_epochs": _POSITIVE,
    "rand_augment": _between(0, 30),
    "random_erasing": _SHARE,
    "save_total_limit": _at_least(1),
    "vocab_size": _between(1, _LARGEST_VOCABULARY),
    "threshold_ramp": Range(
        "a share of the run, more than 0 and at most 1", lambda value: 0 < value <= 1
    ),
}
"""By key. A value of None was not given, and is not checked."""


def wrong_values(values: Mapping[str, Any]) -> dict[str, str]:
    """The keys whose values are out of their range.

    Args:
        values: of a recipe, by key.

    Returns:
        The expected values and the value found, in words, by key.

    Example:
        >>> wrong_values({"max_steps": 0, "length": 128, "data_seed": None})
        {'max_steps': 'expected at least 1, or -1 for num_train_epochs, got 0'}
    """
    return {
        key: f"expected {RANGES[key].expected}, got {value}"
        for key, value in values.items()
        if key in RANGES and value is not None and not RANGES[key].holds(value)
    }
