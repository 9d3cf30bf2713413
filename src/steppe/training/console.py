"""The steps and logs of a run, passed on to the caller as numbers and lines."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from steppe.training.accelerated import AccelerationOfRun

OnStep = Callable[[int, int], None]
"""Called with the optimizer steps done and the steps in all."""
OnLog = Callable[[str], None]
"""Called with a line about the run."""
_LOSSES = (("loss", "loss"), ("eval_loss", "held-out loss"))
_SHARES = (
    ("eval_top1", "top-1"),
    ("eval_top5", "top-5"),
    ("eval_accuracy", "accuracy"),
    ("density", "density"),
    ("derivative_density", "derivative"),
    ("training_density", "training mean"),
)


class PassOn(TrainerCallback):
    """Passes steps and logs on, from the first process of the run.

    Args:
        on_step: called at the start and after each step; None for nobody.
        on_log: called with the line of each log; None for nobody.
        acceleration: of the run; its sentence is the first line.
    """

    def __init__(
        self, on_step: OnStep | None, on_log: OnLog | None, acceleration: AccelerationOfRun
    ) -> None:
        self._on_step = on_step
        self._on_log = on_log
        self._acceleration = acceleration
        self._last = ""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Pass on the step at which the run begins, and how it is accelerated."""
        if not state.is_world_process_zero:
            return
        if self._on_step is not None:
            self._on_step(state.global_step, state.max_steps)
        if self._on_log is not None and self._acceleration.sentence:
            self._on_log(self._acceleration.sentence)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Pass on one more step."""
        if self._on_step is not None and state.is_world_process_zero:
            self._on_step(state.global_step, state.max_steps)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Pass on the line of a log."""
        if self._on_log is not None and state.is_world_process_zero and logs:
            line = _line(state.global_step, logs)
            if line and line != self._last:  # the last evaluation may be done twice
                self._on_log(line)
                self._last = line


def _line(step: int, logs: dict[str, float]) -> str:
    """A log in few words; empty without a loss and a density."""
    losses = [f"{name} {logs[key]:.4f}" for key, name in _LOSSES if key in logs]
    shares = [f"{name} {100 * logs[key]:.1f} %" for key, name in _SHARES if key in logs]
    return "  ".join((f"step {step}", *losses, *shares)) if losses or shares else ""
