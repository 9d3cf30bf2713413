"""Stand around methods of the Trainer that calls a callback.

A callback is told what has happened, after the reporters have had it, and is told nothing of an
exception. Hooks that are in the model only while one of the Trainer's own methods runs are gone
whatever ends it, and metrics that are in a log before the Trainer sends it reach everybody.
Transformers hands no Trainer to its callbacks, but it calls them, so it is on the stack.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerCallback
from transformers.trainer import DEFAULT_PROGRESS_CALLBACK

from steppe.errors import ScheduleError

Around = Callable[..., Any]
"""Called with the Trainer, the method and the method's arguments, in place of the method."""

# The default one is a table in notebooks.
_CONSOLES = (PrinterCallback, ProgressCallback, DEFAULT_PROGRESS_CALLBACK)


def calling_trainer(callback: TrainerCallback) -> Trainer:
    """The Trainer that calls an event of a callback just now.

    Args:
        callback: one of its callbacks.

    Raises:
        ScheduleError: there is none.
    """
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        found = frame.f_locals.get("self")
        if isinstance(found, Trainer) and has_callback(found, callback):
            return found
        frame = frame.f_back
    raise ScheduleError(
        f"{type(callback).__name__}: expected to be called by the transformers.Trainer that it was"
        " given to. In a loop of your own: steppe.watch and steppe.constrain_"
    )


def has_callback(trainer: Trainer, callback: TrainerCallback) -> bool:
    """Whether a callback is one of a Trainer's."""
    return any(one is callback for one in trainer.callback_handler.callbacks)


def stand_around(trainer: Trainer, callback: TrainerCallback, **arounds: Around) -> None:
    """Call functions in place of methods of one Trainer, once however often this is called.

    Args:
        trainer: its class stays as it is.
        callback: once it is no callback of the Trainer any more, the methods run alone.
        **arounds: by the method's name.
    """
    for name, around in arounds.items():
        method = getattr(trainer, name)
        if not (isinstance(method, _Around) and method.has(callback)):
            setattr(trainer, name, _Around(trainer, callback, method, around))


def put_before_consoles(trainer: Trainer, callback: TrainerCallback) -> None:
    """Let a callback be told after all reporters and before what prints.

    The list of callbacks is another one afterwards: this one may be being gone through.
    """
    handler = trainer.callback_handler
    others = [one for one in handler.callbacks if one is not callback]
    consoles = [one for one in others if isinstance(one, _CONSOLES)]
    reporters = [one for one in others if not isinstance(one, _CONSOLES)]
    handler.callbacks = [*reporters, callback, *consoles]


class _Around:
    """A method of one Trainer with a function around it; a copy of the Trainer has a copy of it."""

    def __init__(
        self, trainer: Trainer, callback: TrainerCallback, method: Any, around: Around
    ) -> None:
        self._trainer = trainer
        self._callback = callback
        self._method = method
        self._around = around

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the function, or the method alone."""
        if has_callback(self._trainer, self._callback):
            return self._around(self._trainer, self._method, *args, **kwargs)
        return self._method(*args, **kwargs)

    def has(self, callback: TrainerCallback) -> bool:
        """Whether it, or one that it stands around, is of a callback."""
        inner = self._method
        return self._callback is callback or (isinstance(inner, _Around) and inner.has(callback))
