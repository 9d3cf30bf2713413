"""Stand around methods of the Trainer that calls a callback.

A callback is told what has happened, after the reporters have had it, and is told nothing of an
exception. Hooks that are in the model only while one of the Trainer's own methods runs are gone
whatever ends it, and metrics that are in a log before the Trainer sends it reach everybody.
Transformers hands no Trainer to its callbacks, but it calls them, so it is on the stack. Its class
is then swapped for a subclass of the same name: methods of its own on the object would refer to it,
and keep it and its model alive until the garbage collector comes by.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from types import FrameType
from typing import Any

from transformers import (
    PrinterCallback,
    ProgressCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer import DEFAULT_PROGRESS_CALLBACK

from steppe.errors import ScheduleError

# The default one is a table in notebooks.
_CONSOLES = (PrinterCallback, ProgressCallback, DEFAULT_PROGRESS_CALLBACK)
_SUBCLASSES: dict[type, type] = {}


class AroundCallback(TrainerCallback):
    """A callback that runs around methods of its Trainer, in place of which it is called.

    Attributes:
        unprinted: what those who print are to leave out of the log that is being sent.
    """

    unprinted: frozenset[str] = frozenset()

    def around_training_step(
        self, trainer: Trainer, step: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> Any:
        """Around one micro-batch, forward and backward."""
        return step(*args, **kwargs)

    def around_evaluation_loop(
        self, trainer: Trainer, loop: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> Any:
        """Around one pass over held-out data."""
        return loop(*args, **kwargs)

    def around_log(
        self, trainer: Trainer, log: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> Any:
        """Around one log, before it goes anywhere."""
        return log(*args, **kwargs)


def attend(callback: AroundCallback) -> Trainer:
    """Let a callback run around methods of the Trainer that calls an event of it just now.

    What prints is told of events after all others from now on, and not of all metrics. Nothing more
    changes if this is called again.

    Args:
        callback: one of the Trainer's callbacks. Once it is none any more, the methods run alone.

    Returns:
        The Trainer.

    Raises:
        ScheduleError: no Trainer calls.
    """
    trainer = _calling_trainer(callback)
    if not isinstance(trainer, _Attended):
        trainer.__class__ = _attended(type(trainer))
    handler = trainer.callback_handler
    consoles = [one for one in handler.callbacks if isinstance(one, _CONSOLES)]
    others = [
        one
        for one in handler.callbacks
        if not isinstance(one, _CONSOLES) and not (isinstance(one, _Shorten) and one.of is callback)
    ]
    # Another list: the handler is going through this one.
    handler.callbacks = [*others, _Shorten(callback), *consoles]
    return trainer


def resumed_from(trainer: Trainer) -> str | None:
    """The folder that a Trainer has resumed from, asked while it trains; None if it starts anew."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        # Of no other frame: one whose variables are asked for keeps what they are, long after.
        if frame.f_code.co_name == "train" and frame.f_locals.get("self") is trainer:
            folder = frame.f_locals.get("resume_from_checkpoint")
            return folder if isinstance(folder, str) else None
        frame = frame.f_back
    return None


class _Shorten(TrainerCallback):
    """Stands before those who print."""

    def __init__(self, of: AroundCallback) -> None:
        self.of = of

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Leave out what is not to be printed."""
        for key in self.of.unprinted:
            (logs or {}).pop(key, None)


def _calling_trainer(callback: AroundCallback) -> Trainer:
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        found = frame.f_locals.get("self")
        if isinstance(found, Trainer) and any(
            one is callback for one in found.callback_handler.callbacks
        ):
            return found
        frame = frame.f_back
    raise ScheduleError(
        f"{type(callback).__name__}: expected to be called by the transformers.Trainer that it was"
        " given to. In a loop of your own: steppe.watch and steppe.constrain_"
    )


class _Attended:
    """What a Trainer with an `AroundCallback` does otherwise."""

    callback_handler: Any

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """One micro-batch."""
        return self._through_callbacks("training_step", args, kwargs)

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """One pass over held-out data."""
        return self._through_callbacks("evaluation_loop", args, kwargs)

    def log(self, *args: Any, **kwargs: Any) -> Any:
        """One log."""
        return self._through_callbacks("log", args, kwargs)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """As an object of the Trainer's own class, and attended again."""
        reduced: Any = object.__reduce_ex__(self, 2)
        return _blank, (type(self).__mro__[2],), *reduced[2:]

    def _through_callbacks(self, name: str, args: Any, kwargs: Any) -> Any:
        run = getattr(super(), name)
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, AroundCallback):
                run = partial(getattr(callback, f"around_{name}"), self, run)
        return run(*args, **kwargs)


def _attended(base: type) -> type:
    """The subclass of a Trainer's class, the same one every time."""
    if base not in _SUBCLASSES:
        members = {"__module__": base.__module__, "__qualname__": base.__qualname__}
        _SUBCLASSES[base] = type(base.__name__, (_Attended, base), members)
    return _SUBCLASSES[base]


def _blank(base: type) -> Any:
    """An attended Trainer without a state."""
    return object.__new__(_attended(base))
