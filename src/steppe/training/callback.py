"""The callback that brings steppe into a stock Hugging Face Trainer."""

from __future__ import annotations

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
from steppe.errors import ScheduleError
from steppe.measures.tally import Tally
from steppe.plugins.penalty import penalties_of
from steppe.runs import Run
from steppe.surgery.journal import Journal
from steppe.tokens import arguments_by_name
from steppe.training.history import History
from steppe.training.interception import AroundCallback, attend, resumed_from
from steppe.training.outside_loss import seen_from_outside
from steppe.training.penalized import PenalizedLoss
from steppe.training.record import record_of, trainer_settings, write_record
from steppe.training.reporters import (
    means_of,
    off_console,
    require_finite,
    training_metrics,
    with_prefix,
)
from steppe.training.resuming import complete_weights_
from steppe.training.schedules import advance_to_, finish_step_


class SteppeCallback(History, AroundCallback, ExportableState):
    """Constraints, schedules and metrics of steppe in a stock ``transformers.Trainer``.

    If the model carries plug-ins, their schedules follow ``global_step / max_steps`` and they are
    projected after every optimizer step. An `ActivationPenalty` is added to the model's loss, also
    to the loss that is logged. One step in `every` is measured: all numbers of a `BlockReport`, AF
    and its factors from the step's own backward pass. Each log gets ``density`` and
    ``derivative_density`` of the steps measured since the last log, ``training_density`` (the mean
    over all steps measured so far, the paper's training density), the other measures as means over
    the blocks, and the same per block.

    Every evaluation of the Trainer is measured too: ``eval_density`` and the rest are among its
    metrics (``metric_for_best_model="eval_density"``), also per block in its log. Generated text
    (``predict_with_generate``) does not count.

    Logs are complete before the Trainer sends them, so all metrics are in
    ``trainer.state.log_history`` and reach every reporter that ``report_to`` names. The console
    shows the densities of the whole model only. Sums go over processes, once per log.

    A resumed run goes on with the same history, also with another `every`. Where the stock Trainer
    resumes without some of the weights (ViT), they are loaded, with a warning. Each trial of a
    hyper-parameter search has its own record, in the folder of its checkpoints.

    Nothing stays on the model: it has hooks only while the Trainer runs a step or an evaluation
    that is measured, also if that ends by an error.

    ``steppe.json`` in the output folder has all of it, for ``steppe report``.

    With `accelerate`, `accelerate_` runs the blocks on the sparse kernels from the beginning of the
    training, after a checkpoint was loaded, to its end, whatever ends it. A model that is
    accelerated already stays so. Blocks that are not of ReLU type stay dense, with a warning. A
    measured step runs dense unless `flatness` is False, since AF is measured on a block's own
    modules. ``steppe.json`` says how each block has run.

    A loss that is computed outside of the model (label smoothing, ``compute_loss_func``, a
    ``compute_loss`` of your own) counts as a mean over labels: over those of the whole step where
    the Trainer passes their number to the function, else over those of the micro-batch.

    Args:
        every: measure one optimizer step in so many, ≥ 1.
        per_block: log each block too, not only the whole model.
        flatness: measure the backward pass too, not only the densities.
        where: which blocks to measure; all by default.
        patterns: patterns of your own for `find_blocks`; those that `sparsify_`, `accelerate_`,
            `watch` or `measure` was given are known.
        accelerate: run the blocks on the sparse kernels while the model trains.

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
        accelerate: bool = False,
    ) -> None:
        super().__init__(every, per_block, flatness, where, patterns, accelerate)
        self._is_in_train = False  # whether the end of the run will be seen, however it ends
        self._is_training = False
        self._is_turn = False  # whether the step that runs is measured
        self._folder = ""  # where the record of the run is written
        self._penalized: PenalizedLoss | None = None
        self._evaluated_last: tuple[str, list[Tally], dict[str, Any]] | None = None

    def state(self) -> dict[str, Any]:
        """The part of ``trainer_state.json`` for this callback; only the first process asks."""
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
        """Attend the Trainer from the start: it may evaluate before it trains."""
        attend(self)

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        """Get ready to measure, from the state of a checkpoint if the run resumes from one.

        Raises:
            ScheduleError: one process has several GPUs, which ``nn.DataParallel`` would use; or the
                callback accelerates, and was added to the Trainer later.
            AccelerationError: a block does not fit the kernels.
        """
        assert model is not None
        if args.parallel_mode == ParallelMode.NOT_DISTRIBUTED and args.n_gpu > 1:
            raise ScheduleError(
                f"SteppeCallback: one process for {args.n_gpu} GPUs runs the hooks in threads that"
                f" race (nn.DataParallel). Start with: torchrun --nproc_per_node {args.n_gpu} ..."
            )
        if self.accelerate and not self._is_in_train:
            raise ScheduleError(
                "SteppeCallback: expected to accelerate from the Trainer's first event on, so that"
                " it sees the run's end. Give it to the Trainer: Trainer(...,"
                " callbacks=[SteppeCallback(accelerate=True)])"
            )
        trainer = attend(self)
        complete_weights_(trainer, resumed_from(trainer))
        self._folder = str(args.output_dir)
        if state.is_hyper_param_search:  # not a recipe's, which writes its checkpoints elsewhere
            self._folder = str(Trainer._get_output_dir(trainer, trainer._trial))
        # In a new run, the state still holds this object's attributes of the last one.
        self._begin(model, self._kept_by(state) if state.global_step > 0 else {})
        self._penalized = None
        if penalties_of(model):
            together = args.world_size if args.average_tokens_across_devices else 1
            self._penalized = PenalizedLoss(model, args.gradient_accumulation_steps * together)
        self._is_training, self._is_turn = True, False
        advance_to_(model, state.global_step, state.max_steps)
        self.acceleration.begin(model)

    def on_step_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        optimizer: Any = None,
        **kwargs: Any,
    ) -> None:
        """Decide whether this step is measured, and note the factor of its loss."""
        assert self._monitor is not None
        self._is_turn = state.global_step % self.every == 0
        scaler = getattr(optimizer, "scaler", None)  # of accelerate's optimizer, with fp16
        if self._is_turn and scaler is not None:
            # The factor as a tensor on the device: get_scale would wait.
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
        # The Trainer counts this step only later.
        finish_step_(model, state.global_step + 1, state.max_steps)

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
        """Put an evaluation during training into the history."""
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
        """Drop the entry of a prediction; its metrics have the numbers."""
        self._evaluated_last = None

    def on_save(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        """Write the record of the run so far."""
        self.acceleration.take_record()
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
        if loss is not None:
            instead = {"learning_rate": args.learning_rate / 10}
            require_finite(loss, state.global_step, "max_grad_norm=1.0", instead)

    def on_train_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        """Set the schedules to the step of the weights that the model has, and write the record."""
        if model is not None and args.load_best_model_at_end and state.best_global_step:
            advance_to_(model, state.best_global_step, state.max_steps)
        self._settle()
        self.acceleration.end()
        self._write(args, state, model)
        self._is_training, self._monitor, self._penalized = False, None, None

    def around_train(
        self, trainer: Trainer, train: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> Any:
        """Around a whole run: the acceleration is taken back however it ends."""
        self._is_in_train = True
        try:
            return train(*args, **kwargs)
        finally:
            self._is_in_train = False
            self.acceleration.end()

    def around_training_step(
        self, trainer: Trainer, step: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> Any:
        """One micro-batch, forward and backward."""
        with ExitStack() as stack:
            if self._is_turn and self._monitor is not None:
                stack.enter_context(self._monitor.attached())
                if self.flatness:
                    names = ("model", "inputs", "num_items_in_batch")
                    given = arguments_by_name(names, args, kwargs)
                    items = given.get("num_items_in_batch")
                    stack.enter_context(
                        seen_from_outside(trainer, self._monitor, given.get("inputs"), items)
                    )
            if self._penalized is not None and trainer.model is not None:
                journal = Journal(transient=True)
                stack.callback(journal.undo)
                journal.add_forward_hook(trainer.model, self._penalized, with_kwargs=True)
            return step(*args, **kwargs)

    def around_evaluation_loop(
        self, trainer: Trainer, loop: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> Any:
        """One pass over held-out data; its metrics get the densities."""
        assert trainer.model is not None
        with self._monitor_of_evaluation(trainer.model).attached():
            output = loop(*args, **kwargs)
        prefix = kwargs.get("metric_key_prefix", args[4] if len(args) > 4 else "eval") + "_"
        tallies, entry = self._evaluated()
        self._evaluated_last = prefix, tallies, entry
        output.metrics.update(with_prefix(prefix, means_of([entry])))
        return output

    def around_log(
        self,
        trainer: Trainer,
        log: Callable[..., Any],
        logs: dict[str, float],
        *args: Any,
        **kwargs: Any,
    ) -> None:
        """One log: every reporter gets all metrics, the caller's dictionary keeps its own."""
        parts: list[tuple[str, dict[str, float]]] = []
        if "loss" in logs or "train_loss" in logs:
            new = self._not_logged()
            parts.append(("", training_metrics(new, self._names(), self.training_density)))
        if self._evaluated_last is not None:
            prefix, _, entry = self._evaluated_last
            if f"{prefix}density" in logs:
                parts.append((prefix, means_of([entry], self._names_of_evaluation())))
        metrics = {key: value for part in parts for key, value in with_prefix(*part).items()}
        whole = {**logs, **metrics}
        self.unprinted = frozenset().union(*(off_console(*part) for part in parts))
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
        """The record of the run so far.

        Args:
            args: the Trainer's.
            state: the Trainer's.
            model: the model, to name its class, its activations and its plug-ins.
            name: of the run; the output folder's name by default.
        """
        return record_of(
            name or Path(self._folder or str(args.output_dir)).resolve().name,
            model,
            self._blocks(model),
            self.history,
            self.held_out_history,
            state.log_history,
            {**trainer_settings(args), "measured_every": self.every},
            {"transformers": transformers.__version__},
            self.acceleration.record,
        )

    def _write(self, args: TrainingArguments, state: TrainerState, model: nn.Module | None) -> None:
        """Write the record of the run, in the first process."""
        if model is not None and state.is_world_process_zero:
            write_record(self.run(args, state, model), self._folder, "output_dir")
