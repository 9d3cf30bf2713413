"""Observers: they get the active entries of a routed block's hidden layer."""

from __future__ import annotations

import weakref
from typing import Protocol

from torch import Tensor, nn


class SupportObserver(Protocol):
    """Counts the active entries of a routed block's hidden layer, as a monitor does."""

    @property
    def needs_dense(self) -> bool:
        """Whether the block's own modules must run now."""

    def see_support(self, x: Tensor, active: Tensor, slopes: Tensor) -> None:
        """Take the support of one call.

        Args:
            x: the block's input ``[*, D]``.
            active: a ≠ 0, bool ``[*, F]``.
            slopes: σ′ ≠ 0, bool ``[*, F]``.
        """


_observers: weakref.WeakKeyDictionary[nn.Module, list[SupportObserver]]
_observers = weakref.WeakKeyDictionary()


def observers_of(down: nn.Module) -> list[SupportObserver]:
    """The observers of the block with this last layer; the caller may change the list.

    They hang on the module and not on a route, since a block may be routed while it is watched.
    """
    return _observers.setdefault(down, [])
