"""Schedules and constraints of a model's plug-ins in the loop of a Trainer."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import nn
from torch.optim import Optimizer

from steppe.errors import ScheduleError
from steppe.plugins.applied import require_sparsification, sparsification_of
from steppe.plugins.constrain import Constrained, advance_, constrain_, project_


def advance_to_(model: nn.Module, step: int, total_steps: int) -> None:
    """Set the schedules of a model's plug-ins to a step of the run; a plain model has none.

    Args:
        model: of the run.
        step: optimizer steps done.
        total_steps: of the whole run.
    """
    if sparsification_of(model) is not None:
        advance_(model, _progress(step, total_steps))


def finish_step_(model: nn.Module, step: int, total_steps: int) -> None:
    """Set the schedules after an optimizer step, and project; a plain model is left alone.

    Args:
        model: of the run.
        step: optimizer steps done, this one included.
        total_steps: of the whole run.
    """
    if sparsification_of(model) is not None:
        advance_(model, _progress(step, total_steps))
        project_(model)


def constrain_only_(
    model: nn.Module, optimizers: Sequence[Optimizer], total_steps: float, caller: str
) -> Constrained:
    """Project after each step of the only optimizer, which drives the schedules too.

    Args:
        model: a sparsified model.
        optimizers: of the run.
        total_steps: of the whole run; infinite if unknown.
        caller: the callback's name, for errors.

    Returns:
        The link that `constrain_` made.

    Raises:
        ScheduleError: not one optimizer, or a schedule and no end of the run.
    """
    if len(optimizers) != 1:
        raise ScheduleError(
            f"{caller}: expected one optimizer, got {len(optimizers)}. Take the callback out, and"
            " after each step of the one that trains the plug-ins call steppe.project_(model)"
        )
    if math.isinf(total_steps) and require_sparsification(model).has_schedule:
        raise ScheduleError(
            f"{caller}: the plug-ins' ramps need the length of the run: Trainer(max_steps=10_000)"
        )
    return constrain_(model, optimizers[0], None if math.isinf(total_steps) else int(total_steps))


def _progress(step: int, total_steps: int) -> float:
    """The share of the run that is done after some steps, in [0, 1]."""
    return min(1.0, step / max(1, total_steps))
