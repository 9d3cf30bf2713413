"""What is asked of the device and of what is installed: a function a question."""

from __future__ import annotations

import functools
import importlib.util
from typing import Any, NamedTuple

import torch


class Card(NamedTuple):
    """A kind of card.

    Attributes:
        capability: its compute capability.
        processors: number of its multiprocessors.
    """

    capability: tuple[int, int]
    processors: int


def is_capturing() -> bool:
    """Whether the calls of this thread go to a CUDA graph that is being captured."""
    return torch.cuda.is_current_stream_capturing()


def card_of(device: torch.device) -> Card:
    """The card that a device is."""
    properties = torch.cuda.get_device_properties(device)
    return Card((properties.major, properties.minor), properties.multi_processor_count)


def wait_for(device: torch.device) -> None:
    """Wait until all that this thread's stream was given is done."""
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()


@functools.cache
def has_triton() -> bool:
    """Whether Triton is installed."""
    return importlib.util.find_spec("triton") is not None


def kernels() -> Any:
    """`steppe.ops.cuda.decode`."""
    from steppe.ops.cuda import decode  # Triton takes long to load

    return decode
