"""Arrival: a number that comes from a device to the CPU some time, while nothing waits for it.

It is 4 bytes in pinned memory, which the device writes whole: the number that is read there is the
one that was sent last, or one before it.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor


class Arrival:
    """The last number that has arrived."""

    def __init__(self) -> None:
        self._place: Tensor | None = None

    def send(self, number: Tensor) -> None:
        """Have a number come, when the device has computed it.

        Args:
            number: 0-dim; arrives as float32.
        """
        if self._place is None:
            self._place = _pinned() if number.is_cuda else torch.full((), float("nan"))
        self._place.copy_(number, non_blocking=True)

    def read(self) -> float:
        """The last number that has arrived; NaN for none."""
        return float("nan") if self._place is None else self._place.item()


def _pinned() -> Tensor:
    """A float32 in pinned memory that is NaN, and is never another's.

    A CUDA graph that was captured with it writes there as long as the graph lives, which may be
    longer than the model does.
    """
    place = next(_places)
    if place % _PAGE == 0:
        _pages.append(torch.full((_PAGE,), float("nan"), pin_memory=True))
    return _pages[-1][place % _PAGE]


_PAGE = 1024
_pages: list[Tensor] = []
_places = itertools.count()
