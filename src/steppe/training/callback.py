"""The callback that brings steppe into a stock Hugging Face Trainer."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import (
    Trainer,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer_callback import ExportableState
from transformers.training_args import ParallelMode

from steppe.blocks.block import MLPBlock
from steppe.blocks.patterns import BlockPattern
from steppe.errors import NonFiniteLossError, ScheduleError
from steppe.files import prepare_folder
from steppe.measures.tally import Tally
from steppe.plugins.applied import sparsification_of
from steppe.plugins.constrain import advance_, project_
from steppe.plugins.penalty import penalties_of
from steppe.runs import RUN_FILE, Run, write_run
from steppe.surgery.journal import Journal
from steppe.tokens import arguments_by_name
from steppe.training.history import HEADLINE, History, means_of
from steppe.training.interception import AroundCallback, attend, resumed_from
from steppe.training.outside_loss import seen_from_outside
from steppe.training.penalized import PenalizedLoss
from steppe.training.resumed import complete_weights_

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


class SteppeCallback(History, AroundCallback, ExportableState):
    """Constraints, schedules and metrics of steppe in a stock ``transformers.Trainer``.

    If the model carries plug-ins, their schedules follow ``global_step / max_steps`` and they are
    projected after every optimizer step; an `ActivationPenalty` is added to the model's loss, with
    which it is logged. Every `every` steps the passes of one step are measured:
    what `BlockReport` has, AF and its factors from the step's own backward pass. Each log gets
    ``density`` and ``derivative_density`` of the steps measured since the last one,
    ``training_density`` (the mean over all steps measured so far, the paper's training density),
    the other measures as means over the blocks, and the same per block.

    Every evaluation of the Trainer is measured too, whoever asks for it: ``eval_density`` and the
    rest are among its metrics (``metric_for_best_model="eval_density"``), also per block in its
    log. What it generates (``predict_with_generate``) is left out.

    Logs are complete before the Trainer sends them, so all of it is in
    ``trainer.state.log_history`` and with every reporter that ``report_to`` names. On the console
    the densities of the whole model stand for it. The run's own survive resuming from a checkpoint.
    Sums go over processes, once per log.

    Resuming goes on with the same history, whatever `every` and the others were before. Where the
    stock Trainer resumes without some of the weights (ViT), they are loaded, with a warning. Each
    trial of a hyper-parameter search has a record of its own, in the folder of its checkpoints.

    Nothing stays on the model: it is watched only while the Trainer is in the very step or
    evaluation that is measured, however that ends.

    ``steppe.json`` in the output folder has all of it, for ``steppe report``.

    A loss that is made outside of the model (label smoothing, ``compute_loss_func``, a
    ``compute_loss`` of your own) is taken for a mean over labels: over those of the whole step
    where the Trainer tells the function their number, else over those of the micro-batch.

    Args:
        every: measure one optimizer step in so many, ≥ 1.
        per_block: log each block too, not only the whole model.
        flatness: measure the backward pass too, not only the densities.
        where: which blocks to measure; all by default.
        patterns: patterns of your own for `find_blocks`; those that `sparsify_`, `accelerate_`,
            `watch` or `measure` was given are known.

    Raises:
        ValueError: `every` is below 1.

    Example:
        ``Trainer(model=model, args=args, train_dataset=data, callbacks=[SteppeCallback()])``
    """

    def __init__(
        self,
        every: int = 50,
        per_block: bool = True,
        flatness: bool = True,
        where: Callable[[MLPBlock], bool] | None = None,
        patterns: Sequence[BlockPattern] = (),
    ) -> None:
        if every < 1:
            raise ValueError(f"SteppeCallback: expected every ≥ 1, got {every}")
        super().__init__(where, patterns)
        self.every = every
        self.per_block = per_block
        self.flatness = flatness
        self._is_training = False
        self._is_turn = False  # of the step that runs, to be measured
        self._folder = ""  # of the run's record
        self._penalized: PenalizedLoss | None = None
        self._evaluated_last: tuple[str, list[Tally], dict[str, Any]] | None = None

    def state(self) -> dict[str, Any]:
        """What ``trainer_state.json`` keeps of this callback; asked of the first process only."""
        return {
            "args": {
                "every": self.every,
                "per_block": self.per_block,
                "flatness": self.flatness,
            },
            "attributes": self._kept(),
        }

    def on_init_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Be there also where the Trainer evaluates before it trains."""
        attend(self)

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        """Get ready to measure; take up what a checkpoint kept.

        Raises:
            ScheduleError: several GPUs in one process, which ``nn.DataParallel`` would share out.
        """
        assert model is not None
        if args.parallel_mode == ParallelMode.NOT_DISTRIBUTED and args.n_gpu > 1:
            raise ScheduleError(
                f"SteppeCallback: one process for {args.n_gpu} GPUs runs the hooks in threads that"
                f" race (nn.DataParallel). Start with: torchrun --nproc_per_node {args.n_gpu} ..."
            )
        trainer = attend(self)
        complete_weights_(trainer, resumed_from(trainer))
        self._folder = str(args.output_dir)
        if state.is_hyper_param_search:  # not a recipe's, which writes its checkpoints elsewhere
            self._folder = str(Trainer._get_output_dir(trainer, trainer._trial))
        # Of a run that starts anew the state holds what this object had from the last one.
        self._begin(model, self.flatness, self._kept_by(state) if state.global_step > 0 else {})
        self._penalized = None
        if penalties_of(model):
            together = args.world_size if args.average_tokens_across_devices else 1
            self._penalized = PenalizedLoss(model, args.gradient_accumulation_steps * together)
        self._is_training, self._is_turn = True, False
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
        self._is_turn = state.global_step % self.every == 0
        scaler = getattr(optimizer, "scaler", None)  # of accelerate's optimizer, with fp16
        if self._is_turn and scaler is not None:
            # What it multiplies by, on the device: get_scale would wait.
            self._monitor.loss_factor = scaler.scale(torch.ones((), device=args.device))

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
        if self._is_turn:
            self._is_turn = False
            self._put_aside(state.global_step)
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

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Take down what an evaluation during training counted."""
        if self._evaluated_last is not None and self._is_training:
            self._note_held_out(state.global_step, self._evaluated_last[1])
        self._evaluated_last = None

    def on_predict(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: Any,
        **kwargs: Any,
    ) -> None:
        """Forget what a prediction counted; its metrics have it."""
        self._evaluated_last = None

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
        """End a run that has diverged.

        Raises:
            NonFiniteLossError: the loss is NaN or infinite.
        """
        loss = (logs or {}).get("loss")
        if loss is not None and not math.isfinite(loss):
            raise NonFiniteLossError(
                f"the training loss is {loss} at step {state.global_step}. Clip gradients"
                " (max_grad_norm=1.0), warm up longer, or lower the learning rate",
                {"learning_rate": args.learning_rate / 10},
            )

    def on_train_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        """Leave the model at the schedule of the weights that it has."""
        if model is not None and args.load_best_model_at_end and state.best_global_step:
            _advance(model, state, state.best_global_step)
        self._settle()
        self._write(args, state, model)
        self._is_training, self._monitor, self._penalized = False, None, None

    def around_training_step(
        self, trainer: Trainer, step: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> Any:
        """One micro-batch, forward and backward."""
        with ExitStack() as stack:
            if self._is_turn and self._monitor is not None:
                stack.enter_context(self._monitor.attached())
                if self.flatness:
                    names = ("model", "inputs", "num_items_in_batch")
                    told = arguments_by_name(names, args, kwargs)
                    items = told.get("num_items_in_batch")
                    stack.enter_context(
                        seen_from_outside(trainer, self._monitor, told.get("inputs"), items)
                    )
            if self._penalized is not None and trainer.model is not None:
                journal = Journal(transient=True)
                stack.callback(journal.undo)
                journal.add_forward_hook(trainer.model, self._penalized, with_kwargs=True)
            return step(*args, **kwargs)

    def around_evaluation_loop(
        self, trainer: Trainer, loop: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> Any:
        """One pass over held-out data, whose metrics get the densities."""
        assert trainer.model is not None
        with self._monitor_of_evaluation(trainer.model).attached():
            output = loop(*args, **kwargs)
        prefix = kwargs.get("metric_key_prefix", args[4] if len(args) > 4 else "eval") + "_"
        tallies, entry = self._evaluated()
        self._evaluated_last = prefix, tallies, entry
        for key, value in means_of([entry]).items():
            output.metrics[prefix + key] = value
        return output

    def around_log(
        self,
        trainer: Trainer,
        log: Callable[..., Any],
        logs: dict[str, float],
        *args: Any,
        **kwargs: Any,
    ) -> None:
        """One log, which everybody gets whole; the caller's has what it had."""
        parts: list[tuple[str, dict[str, float]]] = []
        if "loss" in logs or "train_loss" in logs:
            parts.append(("", self._metrics_since_last_log(self.per_block)))
        if self._evaluated_last is not None:
            prefix, _, entry = self._evaluated_last
            if f"{prefix}density" in logs:
                names = self._names_of_evaluation() if self.per_block else ()
                parts.append((prefix, means_of([entry], names)))
        metrics = {prefix + key: value for prefix, part in parts for key, value in part.items()}
        whole = {**logs, **metrics}
        self.unprinted = frozenset(
            prefix + key for prefix, part in parts for key in part.keys() - HEADLINE
        )
        try:
            log(whole, *args, **kwargs)
        finally:
            self.unprinted = frozenset()
        logs.update({key: value for key, value in whole.items() if key not in metrics})

    def _kept_by(self, state: TrainerState) -> dict[str, Any]:
        """The attributes that a checkpoint kept of this callback, whatever its arguments were."""
        by_class: Any = state.stateful_callbacks  # Transformers: a dict, of lists if there are two
        entries = by_class.get(type(self).__name__, [])
        entries = entries if isinstance(entries, list) else [entries]
        same = [entry for entry in entries if entry["args"] == self.state()["args"]]
        kept = same or (entries if len(entries) == 1 else [])
        return dict(kept[0]["attributes"]) if kept else {}

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
        return self._run(
            model,
            name or Path(self._folder or str(args.output_dir)).resolve().name,
            {**settings, "measured_every": self.every},
            {"transformers": transformers.__version__},
            state.log_history,
        )

    def _write(self, args: TrainingArguments, state: TrainerState, model: nn.Module | None) -> None:
        if model is not None and state.is_world_process_zero:
            folder = prepare_folder(self._folder, "output_dir")
            write_run(self.run(args, state, model), folder / RUN_FILE)


def _advance(model: nn.Module, state: TrainerState, step: int) -> None:
    """Set the schedules of the model's plug-ins, if it has any, to a step of the run."""
    if sparsification_of(model) is not None:
        advance_(model, min(1.0, step / max(1, state.max_steps)))
