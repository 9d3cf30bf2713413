"""The callback that brings steppe into a stock Hugging Face Trainer."""

from __future__ import annotations

import math
import os
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import transformers
from torch import distributed as dist
from torch import nn
from transformers import (
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer_callback import ExportableState
from transformers.training_args import ParallelMode

from steppe.activations import name_of
from steppe.blocks import find_blocks, unwrap
from steppe.errors import NonFiniteLossError, ScheduleError
from steppe.files import prepare_folder
from steppe.measures.report import Report, report_from_dict
from steppe.measures.tally import Tally, sum_over
from steppe.measures.watch import Monitor, watch
from steppe.plugins.penalty import penalties_of
from steppe.plugins.sparsify import (
    advance_,
    project_,
    sparsification_of,
)
from steppe.runs import RUN_FILE, Run, measures_of, versions, write_run
from steppe.surgery import Journal
from steppe.training.penalized import PenalizedLoss

# Means over the blocks that each log gets, beside the densities.
_MEASURES = (
    "AF_up",
    "AF_gate",
    "AF_down",
    "active_gain",
    "squared_input_norm",
    "squared_activation_gradient",
    "squared_gradient_norm_up",
    "squared_gradient_norm_gate",
    "squared_gradient_norm_down",
    "dead_neurons",
)
# What a reader of a run wants to know of how it was trained.
_SETTINGS = (
    "learning_rate",
    "weight_decay",
    "optim",
    "lr_scheduler_type",
    "warmup_steps",
    "max_steps",
    "num_train_epochs",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "world_size",
    "max_grad_norm",
    "label_smoothing_factor",
    "bf16",
    "fp16",
    "gradient_checkpointing",
    "torch_compile",
    "seed",
)


class SteppeCallback(TrainerCallback, ExportableState):
    """Constraints, schedules and metrics of steppe in a stock ``transformers.Trainer``.

    If the model carries plug-ins, their schedules follow ``global_step / max_steps`` and they are
    projected after every optimizer step; an `ActivationPenalty` is added to the model's loss, with
    which it is logged. Every `every` steps the passes of one step are measured:
    what `BlockReport` has, AF and its factors from the step's own backward pass. Each log gets
    ``density`` and ``derivative_density`` of the steps measured since the last one,
    ``training_density`` (the mean over all steps measured so far, the paper's training density),
    the other measures as means over the blocks, and the same per block, in
    ``trainer.state.log_history``, in TensorBoard and in W&B where ``report_to`` names them. The
    Trainer's evaluations during training are counted too. All survive resuming from a checkpoint.
    Sums go over processes, once per log.

    ``steppe.json`` in the output folder has all of it, for ``steppe report``.

    A loss that the Trainer computes outside of the model (label smoothing, ``compute_loss_func``)
    is taken for a mean over the samples of the micro-batch.

    Args:
        every: measure one optimizer step in so many, ≥ 1.
        per_block: log each block too, not only the whole model.
        flatness: measure the backward pass too, not only the densities.

    Raises:
        ValueError: `every` is below 1.

    Example:
        ``Trainer(model=model, args=args, train_dataset=data, callbacks=[SteppeCallback()])``
    """

    def __init__(self, every: int = 50, per_block: bool = True, flatness: bool = True) -> None:
        if every < 1:
            raise ValueError(f"SteppeCallback: expected every ≥ 1, got {every}")
        self.every = every
        self.per_block = per_block
        self.flatness = flatness
        self.history: list[dict[str, Any]] = []
        """One entry per measured step, complete when training ends: ``step`` and
        ``Report.to_dict()`` of it."""
        self.held_out_history: list[dict[str, Any]] = []
        """The same of the Trainer's evaluations during training; densities only."""
        self._logged = 0  # entries of the history that a log has had
        self._pending: list[tuple[int, list[Tally]]] = []
        self._journal = Journal(transient=True)
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
            "args": {
                "every": self.every,
                "per_block": self.per_block,
                "flatness": self.flatness,
            },
            "attributes": {
                "history": self.history,
                "held_out_history": self.held_out_history,
                "_logged": self._logged,
            },
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
        self.held_out_history = list(attributes.get("held_out_history", []))
        self._logged = int(attributes.get("_logged", 0))
        self._pending = []
        self._watching = watch(model, gradients=self.flatness)
        self._monitor = self._watching.__enter__()
        self._monitor.enabled = False
        if penalties_of(model):
            together = args.world_size if args.average_tokens_across_devices else 1
            penalized = PenalizedLoss(model, args.gradient_accumulation_steps * together)
            self._journal.add_forward_hook(model, penalized, with_kwargs=True)
        _advance(model, state, state.global_step)

    def on_step_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        optimizer: Any = None,
        **kwargs: Any,
    ) -> None:
        """Measure this step if it is its turn."""
        assert self._monitor is not None
        self._monitor.enabled = state.global_step % self.every == 0
        scaler = getattr(optimizer, "scaler", None)  # of accelerate's optimizer, with fp16
        if self._monitor.enabled and scaler is not None:
            self._monitor.loss_factor = scaler.get_scale()

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
        """Put the tallies of this step aside; wait for the device only before a log or a save."""
        assert self._monitor is not None
        if self._monitor.enabled:
            self._monitor.enabled = False
            self._pending.append((state.global_step, self._monitor.take()))
        # All processes pass here with the same control; logs and saves may be the first one's only.
        if control.should_log or control.should_save or control.should_training_stop:
            self._settle()
        self._monitor.enabled = control.should_evaluate

    def on_epoch_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Wait for the device before a log or a save."""
        assert self._monitor is not None
        if control.should_log or control.should_save:
            self._settle()
        self._monitor.enabled = control.should_evaluate

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Take down what an evaluation during training counted."""
        if self._monitor is None or not self._monitor.enabled:
            return
        self._monitor.enabled = False
        self.held_out_history += self._entries([(state.global_step, self._monitor.take())])

    def on_save(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        """Write what is known of the run."""
        self._write(args, state, model)

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
                f"the training loss is {loss} at step {state.global_step}. Clip gradients"
                " (max_grad_norm=1.0), warm up longer, or lower the learning rate",
                {"learning_rate": args.learning_rate / 10},
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
        self._write(args, state, model)
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

    def run(
        self, args: TrainingArguments, state: TrainerState, model: nn.Module, name: str = ""
    ) -> Run:
        """What is known of the run.

        Args:
            args: the Trainer's.
            state: the Trainer's.
            model: the model, to name its class, its activations and its plug-ins.
            name: what to call the run; the output folder's name by default.
        """
        settings: dict[str, Any] = {key: getattr(args, key) for key in _SETTINGS}
        settings["lr_scheduler_type"] = str(getattr(args.lr_scheduler_type, "value", ""))
        settings["optim"] = str(getattr(args.optim, "value", args.optim))
        sparsification = sparsification_of(model)
        blocks = find_blocks(model)
        layout: dict[str, Any] = {
            "name_per_block": [block.name for block in blocks],
            "d_model_per_block": [block.d_model for block in blocks],
            "d_hidden_per_block": [block.d_hidden for block in blocks],
            "gated_per_block": [block.gate is not None for block in blocks],
        }
        training = [report_from_dict(layout | entry) for entry in self.history]
        held_out = [report_from_dict(layout | entry) for entry in self.held_out_history]
        return Run(
            name=name or Path(str(args.output_dir)).resolve().name,
            model=type(unwrap(model)).__name__,
            tokens_per_sample=_tokens_per_sample(training),
            activations=[name_of(getattr(b.act_slot.module, b.act_slot.name)) for b in blocks],
            plugins=[] if sparsification is None else sparsification.record()["plugins"],
            settings={**settings, "measured_every": self.every},
            versions={**versions(), "transformers": transformers.__version__},
            steps=[entry["step"] for entry in self.history],
            training=training,
            held_out_steps=[entry["step"] for entry in self.held_out_history],
            held_out=held_out,
            logs=[
                {key: value for key, value in log.items() if "/" not in key}
                for log in state.log_history
            ],
        )

    def _write(self, args: TrainingArguments, state: TrainerState, model: nn.Module | None) -> None:
        if model is not None and state.is_world_process_zero:
            folder = prepare_folder(str(args.output_dir), "output_dir")
            write_run(self.run(args, state, model), folder / RUN_FILE)

    def _settle(self) -> None:
        """Turn pending tallies into history; the only place that waits for device and processes."""
        pending, self._pending = self._pending, []
        self.history += self._entries(pending)

    def _entries(self, taken: list[tuple[int, list[Tally]]]) -> list[dict[str, Any]]:
        """Entries of a history from tallies of some steps, summed over processes."""
        if not taken or self._monitor is None:
            return []
        device = taken[0][1][0].counts.device
        tallies = [tally.cpu() for _, blocks in taken for tally in blocks]
        if dist.is_available() and dist.is_initialized():
            assert dist.group.WORLD is not None
            tallies = sum_over(tallies, device, dist.group.WORLD)
        count = len(self._monitor.names)
        return [
            {"step": step, **measures_of(self._monitor.report_of(tallies[i : i + count]))}
            for i, (step, _) in zip(range(0, len(tallies), count), taken, strict=True)
        ]

    def _metrics(self, new: list[dict[str, Any]]) -> dict[str, float]:
        """The metrics of one log from the steps measured since the last one."""
        if not new or self._monitor is None:
            return {}
        metrics = {
            "density": _mean([entry["density"] for entry in new]),
            "derivative_density": _mean([entry["derivative_density"] for entry in new]),
            "training_density": self.training_density,
        }
        for key in _MEASURES:
            metrics[key] = _mean([_mean(entry[f"{key}_per_block"]) for entry in new])
        for index, name in enumerate(self._monitor.names if self.per_block else ()):
            for key in ("density", "derivative_density", *_MEASURES):
                metrics[f"{key}/{name}"] = _mean([e[f"{key}_per_block"][index] for e in new])
        # What does not exist, as AF of the gate where there is none, is no metric.
        return {key: value for key, value in metrics.items() if not math.isnan(value)}

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
        self._journal.undo()
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


def _tokens_per_sample(reports: list[Report]) -> float:
    """Mean over all samples of all steps of the first block's tokens; NaN if there are none."""
    samples = sum(report.blocks[0].samples for report in reports)
    tokens = sum(report.blocks[0].tokens for report in reports)
    return tokens / samples if samples else float("nan")


def _mean(values: list[float | None]) -> float:
    """The mean of those that exist; NaN if there are none."""
    found = [value for value in values if value is not None]
    return sum(found) / len(found) if found else float("nan")
