"""Constraints: advance the plug-ins' schedules and keep their bounds, in any training loop."""

from __future__ import annotations

from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from steppe.blocks.find import unwrap
from steppe.errors import ScheduleError
from steppe.plugins.applied import added_parameters, require_sparsification
from steppe.surgery.journal import Journal

_PATIENCE = 8  # SAM changes the weights twice a step, other wrappers now and then


class Constrained:
    """The link between a model and an optimizer that `constrain_` made.

    Save its `state_dict` beside the optimizer's: it counts the steps that the schedules need.
    Usable as a context manager, which calls `remove` at the end.
    """

    def __init__(self, model: nn.Module, optimizer: Any, total_steps: int | None) -> None:
        self._model = model
        self._total_steps = total_steps
        self._step = 0
        *outer, self._innermost = optimizers_in(optimizer)
        self._handles = [
            one.register_step_post_hook(self._after_step) for one in (self._innermost, *outer)
        ]
        self._watched = next(
            (p for group in optimizer.param_groups for p in group["params"] if p.requires_grad),
            None,
        )
        self._version = _version(self._watched)
        self._changes = 0  # of that parameter since the last step, as far as they were seen
        self._journal = Journal(transient=True)
        self._journal.add_forward_pre_hook(unwrap(model), self._look)

    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if optimizer is self._innermost:  # its wrappers may step, too
            # GradScaler calls a fused optimizer in any case, with a flag on the device that says
            # whether to skip. Reading the flag waits for the device, as for any other optimizer.
            skipped = getattr(optimizer, "found_inf", None)
            if skipped is None or not bool(skipped):
                self._step += 1
            self._advance()
        project_(self._model)
        self._version, self._changes = _version(self._watched), 0

    def _look(self, module: nn.Module, args: Any) -> None:
        """Forward pre-hook in training: notices weights that change without a step."""
        if torch.compiler.is_compiling() or not (module.training and torch.is_grad_enabled()):
            return
        version = _version(self._watched)
        self._changes += version != self._version
        self._version = version
        if self._changes >= _PATIENCE:
            self._changes = 0
            raise ScheduleError(
                f"constrain_: the weights changed before each of {_PATIENCE} forward passes, but"
                f" {type(self._innermost).__name__}, which constrain_ was given, made no step: so"
                " no schedule went on and no bound was kept. Give it the optimizer whose step() the"
                " loop calls, or the one inside it that does the step"
            )

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
        for handle in self._handles:
            handle.remove()
        self._journal.undo()

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
    """Project a model's plug-ins after every optimizer step, and advance their schedules.

    It hangs on ``optimizer.register_step_post_hook``: with gradient accumulation it runs once per
    step, and a step that AMP's GradScaler skips is no step. If an optimizer wraps another one
    (Accelerate's, SAM, Lookahead, ZeRO), the steps of the innermost one count. A training forward
    pass raises once the weights have changed several times without such a step.

    Args:
        model: a sparsified model.
        optimizer: the optimizer that trains it.
        total_steps: optimizer steps of the whole run; needed if a plug-in has a ramp.

    Returns:
        The link, with `state_dict`, `load_state_dict` and `remove`.

    Raises:
        SparsificationError: the model carries no plug-in.
        ScheduleError: a ramp without `total_steps`, trainable new parameters that the optimizer
            does not hold, or something that is no optimizer and has none inside.
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
    if not list(optimizers_in(optimizer)):
        raise ScheduleError(
            f"constrain_: expected a torch.optim.Optimizer or a holder of one, got"
            f" {type(optimizer).__name__}. Without one call, after each step:"
            " steppe.advance_(model, step / total_steps); steppe.project_(model)"
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


def optimizers_in(optimizer: Any) -> list[Optimizer]:
    """An optimizer and the optimizers that it wraps, outermost first.

    Args:
        optimizer: the optimizer, or something that holds one as an attribute.
    """
    found: dict[int, Any] = {}
    layer = [optimizer]
    while layer:
        found.update((id(one), one) for one in layer)
        inside = [value for outer in layer for value in vars(outer).values()]
        layer = [one for one in inside if isinstance(one, Optimizer) and id(one) not in found]
    # Accelerate's wrapper is an optimizer by class alone, and can take no hook.
    return [one for one in found.values() if hasattr(one, "_optimizer_step_post_hooks")]


def _version(parameter: Tensor | None) -> int:
    return 0 if parameter is None or parameter.is_inference() else parameter._version


def advance_(model: nn.Module, progress: float) -> nn.Module:
    """Set the schedules of a model's plug-ins.

    Args:
        model: a sparsified model.
        progress: share of the run that is done, in [0, 1].

    Returns:
        The model.

    Raises:
        SparsificationError: the model carries no plug-in.
        ValueError: `progress` is outside [0, 1].
    """
    if not 0.0 <= progress <= 1.0:
        raise ValueError(f"advance_: expected a share of the run in 0 … 1, got {progress}")
    root = unwrap(model)
    sparsification = require_sparsification(root)
    sparsification.progress = progress
    for constraint in sparsification.constraints:
        constraint.advance(progress)
    sparsification.keep()
    return model


def project_(model: nn.Module) -> nn.Module:
    """Bring the parameters of a model's plug-ins back within their bounds, after a step.

    With `RisingThreshold` it takes up the step's statistics, summed over all processes: every
    process must call it, once a step.

    Args:
        model: a sparsified model, on one device or sharded by FSDP2.

    Returns:
        The model.

    Raises:
        SparsificationError: the model carries no plug-in.
        ScheduleError: there is an `ActivationPenalty`, and no loss got it.
        LossError: the loss that got it gives it no gradient.
    """
    for constraint in require_sparsification(model).constraints:
        constraint.project()
    return model
