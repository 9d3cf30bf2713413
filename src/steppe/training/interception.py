"""Run a callback around the methods of its Trainer, not only at the Trainer's events.

A callback of Transformers hears of an event after the reporters have, and never of an exception.
Around a method, hooks are in the model only while the method runs, however it ends, and metrics are
in a log before the Trainer sends it, so every reporter gets them.

Transformers hands no Trainer to its callbacks. But the Trainer calls them, so it is found on the
stack. Its class is then swapped for a subclass of the same name. Methods set on the object instead
would refer to it, and keep it and its model alive until the garbage collector runs.
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
    """A callback that is called in place of methods of its Trainer, and calls them itself.

    Attributes:
        unprinted: names in the log that is being sent, which the console leaves out.
    """

    unprinted: frozenset[str] = frozenset()

    def around_train(
        self, trainer: Trainer, train: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> Any:
        """Around a whole run, where the Trainer was attended before the run."""
        return train(*args, **kwargs)

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
    """Let a callback run around methods of the Trainer that is calling it.

    Callbacks that print get events last from now on, and logs without the unprinted names. A second
    call changes nothing more.

    Args:
        callback: one of the Trainer's callbacks. Once it is removed, the methods run alone.

    Returns:
        The Trainer.

    Raises:
        ScheduleError: no Trainer is on the stack.
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
    # A new list: the handler is iterating over the old one.
    handler.callbacks = [*others, _Shorten(callback), *consoles]
    return trainer


def resumed_from(trainer: Trainer) -> str | None:
    """The folder that a Trainer has resumed from, asked while it trains; None for a new run."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        # Reading f_locals keeps a frame's objects alive, so no other frame is read.
        if frame.f_code.co_name == "train" and frame.f_locals.get("self") is trainer:
            folder = frame.f_locals.get("resume_from_checkpoint")
            return folder if isinstance(folder, str) else None
        frame = frame.f_back
    return None


class _Shorten(TrainerCallback):
    """The callback before those that print: it takes the unprinted names out of a log."""

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
        """Take the unprinted names out."""
        for key in self.of.unprinted:
            (logs or {}).pop(key, None)


def _calling_trainer(callback: AroundCallback) -> Trainer:
    """The Trainer on the stack that has the callback."""
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
    """The methods of a Trainer that its `AroundCallback`s run around."""

    callback_handler: Any

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """A whole run."""
        return self._through_callbacks("train", args, kwargs)

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
        """Pickle as the Trainer's own class; the copy is attended again."""
        reduced: Any = object.__reduce_ex__(self, 2)
        return _blank, (type(self).__mro__[2],), *reduced[2:]

    def _through_callbacks(self, name: str, args: Any, kwargs: Any) -> Any:
        """Call a method of the Trainer with every callback around it."""
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
