"""An object beside a module that nothing of the module shows."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from typing import Generic, TypeVar

from torch import nn

Beside = TypeVar("Beside")


class OneBeside(Generic[Beside]):
    """For each module one object, the same one for as long as anybody has it.

    It may refer to the module: it is not kept here.
    """

    def __init__(self) -> None:
        self._known: weakref.WeakKeyDictionary[nn.Module, weakref.ref[Beside]]
        self._known = weakref.WeakKeyDictionary()
        self._lock = threading.RLock()

    def get(
        self,
        module: nn.Module,
        make: Callable[[], Beside | None],
        fits: Callable[[Beside], bool] = lambda one: True,
    ) -> Beside | None:
        """The object of a module.

        Args:
            module: any.
            make: a new one, or None if there is none for it.
            fits: whether the one that there is may be given again.
        """
        with self._lock:
            reference = self._known.get(module)
            known = None if reference is None else reference()
            if known is not None and fits(known):
                return known
            made = make()
            if made is not None:
                self._known[module] = weakref.ref(made)
            return made
