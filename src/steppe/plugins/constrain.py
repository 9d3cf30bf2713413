"""Keep the plug-ins within their bounds in any training loop."""

from __future__ import annotations

from types import TracebackType
from typing import Any

from torch import nn
from torch.optim import Optimizer

from steppe.errors import ScheduleError
from steppe.plugins.sparsify import (
    added_parameters,
    advance_,
    project_,
    require_sparsification,
)


class Constrained:
    """The link between a model and an optimizer that `constrain_` made.

    Save its `state_dict` beside the optimizer's: it counts the steps that the schedules need.
    Usable as a context manager, which calls `remove` at the end.
    """

    def __init__(self, model: nn.Module, optimizer: Optimizer, total_steps: int | None) -> None:
        self._model = model
        self._total_steps = total_steps
        self._step = 0
        # Accelerate's wrapper hands its step on to the optimizer inside it.
        inner = getattr(optimizer, "optimizer", optimizer)
        self._handle = inner.register_step_post_hook(self._after_step)

    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        # GradScaler calls a fused optimizer in any case and tells it on the device whether to skip.
        # Reading it waits for the device, as GradScaler does for every other optimizer.
        skipped = getattr(optimizer, "found_inf", None)
        if skipped is None or not bool(skipped):
            self._step += 1
        self._advance()
        project_(self._model)

    def _advance(self) -> None:
        if self._total_steps is not None:
            advance_(self._model, min(1.0, self._step / self._total_steps))

    def state_dict(self) -> dict[str, int]:
        """The number of optimizer steps taken."""
        return {"step": self._step}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on where `state_dict` was taken."""
        self._step = int(state["step"])
        self._advance()

    def remove(self) -> None:
        """Stop projecting."""
        self._handle.remove()

    def __enter__(self) -> Constrained:
        """Nothing more to do."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Stop projecting."""
        self.remove()


def constrain_(
    model: nn.Module, optimizer: Optimizer, total_steps: int | None = None
) -> Constrained:
    """Project a model's plug-ins after every optimizer step, and drive their schedules.

    It hangs on ``optimizer.register_step_post_hook``: with gradient accumulation it runs once per
    step, and a step that AMP's GradScaler skips is no step.

    Args:
        model: a sparsified model.
        optimizer: the optimizer that trains it.
        total_steps: optimizer steps of the whole run; needed if a plug-in has a ramp.

    Returns:
        The link, with `state_dict`, `load_state_dict` and `remove`.

    Raises:
        SparsificationError: the model carries no plug-in.
        ScheduleError: a ramp without `total_steps`, or trainable new parameters that the optimizer
            does not hold.
    """
    sparsification = require_sparsification(model)
    if total_steps is not None and total_steps < 1:
        raise ScheduleError(f"constrain_: expected total_steps ≥ 1, got {total_steps}")
    if total_steps is None and sparsification.has_schedule:
        ramps = ", ".join(
            repr(applied.plugin)
            for applied in sparsification.applied
            if applied.plugin.has_schedule
        )
        raise ScheduleError(
            f"constrain_: {ramps} needs the length of the run:"
            " constrain_(model, optimizer, total_steps=10_000)"
        )
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    missing = [
        name for name, p in added_parameters(model).items() if p.requires_grad and id(p) not in held
    ]
    if missing:
        raise ScheduleError(
            f"constrain_: the optimizer does not hold {missing[0]} and {len(missing) - 1} more."
            " Add them: optimizer.add_param_group({'params':"
            " list(steppe.added_parameters(model).values())})"
        )
    constrained = Constrained(model, optimizer, total_steps)
    constrained._advance()
    return constrained
