"""The callback that brings steppe into a stock Hugging Face Trainer."""

from __future__ import annotations

import math
import os
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist
from transformers import (
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer_callback import ExportableState
from transformers.training_args import ParallelMode

from steppe.errors import NonFiniteLossError, ScheduleError
from steppe.measures.density import report_from_counts
from steppe.measures.watch import Monitor, sum_over, watch
from steppe.plugins.sparsify import (
    advance_,
    project_,
    sparsification_of,
)


class SteppeCallback(TrainerCallback, ExportableState):
    """Constraints, schedules and metrics of steppe in a stock ``transformers.Trainer``.

    If the model carries plug-ins, their schedules follow ``global_step / max_steps`` and they are
    projected after every optimizer step. Every `every` steps the forward passes of one step are
    counted. Each log gets ``density`` and ``derivative_density`` of the steps counted since the
    last one, ``training_density`` (the mean over all steps counted so far, the paper's training
    density) and the same per block, in ``trainer.state.log_history``, in TensorBoard and in W&B
    where ``report_to`` names them. All survive resuming from a checkpoint. Counts are summed over
    processes, once per log.

    Args:
        every: count one optimizer step in so many, ≥ 1.
        per_block: log each block too, not only the whole model.

    Raises:
        ValueError: `every` is below 1.

    Example:
        ``Trainer(model=model, args=args, train_dataset=data, callbacks=[SteppeCallback()])``
    """

    def __init__(self, every: int = 50, per_block: bool = True) -> None:
        if every < 1:
            raise ValueError(f"SteppeCallback: expected every ≥ 1, got {every}")
        self.every = every
        self.per_block = per_block
        self.history: list[dict[str, Any]] = []
        """One entry per counted step, complete when training ends: ``step``, ``density``,
        ``derivative_density``, and lists of both per block."""
        self._logged = 0  # entries of the history that a log has had
        self._pending: list[tuple[int, list[Tensor]]] = []
        self._watching: AbstractContextManager[Monitor] | None = None
        self._monitor: Monitor | None = None
        self._writer: Any = None  # TensorBoard's

    @property
    def training_density(self) -> float:
        """Mean over the counted training steps of the density; NaN before the first log."""
        return _mean([entry["density"] for entry in self.history])

    @property
    def training_density_per_block(self) -> list[float]:
        """The same per block, in forward order."""
        per_step = [entry["density_per_block"] for entry in self.history]
        return [_mean(list(column)) for column in zip(*per_step, strict=True)]

    def state(self) -> dict[str, Any]:
        """What ``trainer_state.json`` keeps of this callback; asked of the first process only."""
        return {
            "args": {"every": self.every, "per_block": self.per_block},
            "attributes": {"history": self.history, "_logged": self._logged},
        }

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        """Hang the counters into the model; take up what a checkpoint kept.

        Raises:
            ScheduleError: several GPUs in one process, which ``nn.DataParallel`` would share out.
        """
        assert model is not None
        if args.parallel_mode == ParallelMode.NOT_DISTRIBUTED and args.n_gpu > 1:
            raise ScheduleError(
                f"SteppeCallback: one process for {args.n_gpu} GPUs runs the hooks in threads that"
                f" race (nn.DataParallel). Start with: torchrun --nproc_per_node {args.n_gpu} ..."
            )
        self._stop_watching()
        # Of a run that starts anew the state holds what this object had from the last one.
        attributes = self._kept_by(state) if state.global_step > 0 else {}
        self.history = list(attributes.get("history", []))
        self._logged = int(attributes.get("_logged", 0))
        self._pending = []
        self._watching = watch(model)
        self._monitor = self._watching.__enter__()
        self._monitor.enabled = False
        _advance(model, state, state.global_step)

    def on_step_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Count this step if it is its turn."""
        assert self._monitor is not None
        self._monitor.enabled = state.global_step % self.every == 0

    def on_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        """Set the schedules and project, also after a step that AMP skipped: it changed nothing."""
        assert model is not None
        if sparsification_of(model) is not None:
            _advance(model, state, state.global_step + 1)  # it counts this step only later
            project_(model)

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Put the counts of this step aside; wait for the device only before a log or a save."""
        assert self._monitor is not None
        if self._monitor.enabled:
            self._monitor.enabled = False
            self._pending.append((state.global_step, self._monitor.take()))
        # All processes pass here with the same control; logs and saves may be the first one's only.
        if control.should_log or control.should_save or control.should_training_stop:
            self._settle()

    def on_epoch_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Wait for the device before a log or a save."""
        if control.should_log or control.should_save:
            self._settle()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Add the metrics to this log.

        Raises:
            NonFiniteLossError: the loss is NaN or infinite.
        """
        logs = {} if logs is None else logs
        loss = logs.get("loss")
        if loss is not None and not math.isfinite(loss):
            self._stop_watching()
            raise NonFiniteLossError(
                f"the training loss is {loss} at step {state.global_step}. Lower the learning rate"
                " (--lr), clip gradients (max_grad_norm=1.0), or warm up longer."
            )
        metrics = self._metrics(self.history[self._logged :])
        self._logged = len(self.history)
        if not metrics:
            return
        logs.update(metrics)  # for callbacks after this one
        if state.log_history and state.log_history[-1].get("step") == state.global_step:
            state.log_history[-1].update(metrics)
        if state.is_world_process_zero:
            self._report(args, state, metrics)

    def on_train_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        """Leave the model without hooks, and at the schedule of the weights that it has."""
        if model is not None and args.load_best_model_at_end and state.best_global_step:
            _advance(model, state, state.best_global_step)
        self._settle()
        self._stop_watching()
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def _kept_by(self, state: TrainerState) -> dict[str, Any]:
        """The attributes that a checkpoint kept of a callback with these arguments."""
        by_class: Any = state.stateful_callbacks  # Transformers: a dict, of lists if there are two
        entries = by_class.get(type(self).__name__, [])
        for entry in entries if isinstance(entries, list) else [entries]:
            if entry["args"] == self.state()["args"]:
                return dict(entry["attributes"])
        return {}

    def _settle(self) -> None:
        """Turn pending counts into history; the only place that waits for device and processes."""
        if not self._pending or self._monitor is None:
            return
        counts = torch.stack(
            [torch.stack([block.cpu() for block in blocks]) for _, blocks in self._pending]
        )
        if dist.is_available() and dist.is_initialized():
            device = self._pending[0][1][0].device
            assert dist.group.WORLD is not None
            counts = sum_over(counts, device, dist.group.WORLD)
        for (step, _), step_counts in zip(self._pending, counts, strict=True):
            report = report_from_counts(self._monitor.names, step_counts)
            self.history.append(
                {
                    "step": step,
                    "density": report.density,
                    "derivative_density": report.derivative_density,
                    "density_per_block": [block.density for block in report.blocks],
                    "derivative_density_per_block": [
                        block.derivative_density for block in report.blocks
                    ],
                }
            )
        self._pending = []

    def _metrics(self, new: list[dict[str, Any]]) -> dict[str, float]:
        """The metrics of one log from the steps counted since the last one."""
        if not new or self._monitor is None:
            return {}
        metrics = {
            "density": _mean([entry["density"] for entry in new]),
            "derivative_density": _mean([entry["derivative_density"] for entry in new]),
            "training_density": self.training_density,
        }
        if self.per_block:
            for index, name in enumerate(self._monitor.names):
                for key in ("density", "derivative_density"):
                    metrics[f"{key}/{name}"] = _mean([e[f"{key}_per_block"][index] for e in new])
        return metrics

    def _report(
        self, args: TrainingArguments, state: TrainerState, metrics: dict[str, float]
    ) -> None:
        """Write to the reporters that ran before this callback and have not seen the metrics."""
        named = {f"train/{key}": value for key, value in metrics.items()}
        reporters = args.report_to or []
        if "tensorboard" in reporters:
            if self._writer is None:
                from torch.utils.tensorboard import SummaryWriter  # an optional reporter, too

                self._writer = SummaryWriter(_tensorboard_folder(args))
            for key, value in named.items():
                self._writer.add_scalar(key, value, state.global_step)
            self._writer.flush()
        if "wandb" in reporters:
            import wandb  # an optional reporter, already loaded by Transformers

            if wandb.run is not None:
                wandb.log({**named, "train/global_step": state.global_step})

    def _stop_watching(self) -> None:
        if self._watching is not None:
            self._watching.__exit__(None, None, None)
        self._watching = self._monitor = None


def _advance(model: nn.Module, state: TrainerState, step: int) -> None:
    """Set the schedules of the model's plug-ins, if it has any, to a step of the run."""
    if sparsification_of(model) is not None:
        advance_(model, min(1.0, step / max(1, state.max_steps)))


def _tensorboard_folder(args: TrainingArguments) -> str:
    """The folder that Transformers' own TensorBoard callback has just opened."""
    asked = os.environ.get("TENSORBOARD_LOGGING_DIR")
    if asked:
        return str(Path(asked).expanduser())
    runs = Path(str(args.output_dir)) / "runs"
    opened = sorted(runs.glob("*/events.out.tfevents.*"), key=lambda file: file.stat().st_mtime)
    return str(opened[-1].parent if opened else runs)


def _mean(values: list[float]) -> float:
    """The mean; NaN if there are none."""
    return sum(values) / len(values) if values else float("nan")
