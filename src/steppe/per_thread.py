"""State of a call, kept apart by thread: a server runs one model in several at once."""

from __future__ import annotations

import threading
from typing import Any, Generic, TypeVar

import torch

Kept = TypeVar("Kept")


class PerThread(Generic[Kept]):
    """A value for each thread.

    Where torch.compile traces there is one value
    for all, since what a trace has kept belongs to its graph. Copies begin empty.

    Args:
        value: the first value in each thread.
        inherits: a thread that has kept nothing gets what was kept last, whichever thread did:
            autograd has threads of its own, which run a checkpointed forward pass again.
    """

    def __init__(self, value: Kept, inherits: bool = False) -> None:
        self._first = self._last = value
        self._inherits = inherits
        self._own = threading.local()

    def get(self) -> Kept:
        """The value of this thread."""
        if torch.compiler.is_compiling():
            return self._last
        value: Kept = getattr(self._own, "value", self._last if self._inherits else self._first)
        return value

    def set(self, value: Kept) -> None:
        """Keep a value for this thread."""
        self._last = value
        if not torch.compiler.is_compiling():
            self._own.value = value

    def enter(self, value: Kept) -> None:
        """Keep a value for a call, which may be inside another one of this thread."""
        self.set(value)
        if not torch.compiler.is_compiling():
            self._calls().append(value)

    def leave(self) -> None:
        """End a call: the one that it was inside of goes on with its value.

        The outermost one's stays, since its blocks may run again in the backward pass.
        """
        if torch.compiler.is_compiling():
            return
        calls = self._calls()
        if calls:
            calls.pop()
        if calls:
            self.set(calls[-1])

    def _calls(self) -> list[Kept]:
        """The values of the calls that this thread is in, outermost first."""
        calls: list[Kept] = self._own.__dict__.setdefault("calls", [])
        return calls

    def __getstate__(self) -> dict[str, Any]:
        """The state of a copy."""
        return {"value": self._first, "inherits": self._inherits}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Begin empty."""
        self.__init__(**state)  # type: ignore[misc]
