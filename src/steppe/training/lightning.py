"""The callback that brings steppe into Lightning; importing this imports Lightning."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from steppe.blocks.block import MLPBlock
from steppe.blocks.find import find_blocks
from steppe.blocks.patterns import BlockPattern
from steppe.errors import MissingExtraError
from steppe.plugins.applied import sparsification_of
from steppe.plugins.constrain import Constrained
from steppe.plugins.penalty import penalties_of
from steppe.record import APPLIED
from steppe.runs import Run
from steppe.training.history import History
from steppe.training.record import record_of, write_record
from steppe.training.reporters import (
    means_of,
    of_the_model,
    require_finite,
    training_metrics,
    with_prefix,
)
from steppe.training.schedules import constrain_only_

try:
    if importlib.util.find_spec("lightning") is None:
        import pytorch_lightning as pl
    else:
        from lightning import pytorch as pl  # type: ignore[no-redef]
except ModuleNotFoundError as error:
    raise MissingExtraError(
        f"steppe.training.lightning needs {error.name}: pip install 'steppe[lightning]'"
    ) from None


class LightningCallback(History, pl.Callback):
    """Constraints, schedules and metrics of steppe in a ``Trainer`` of Lightning.

    The counterpart of `SteppeCallback` for Transformers. If the module contains a model with
    plug-ins, `constrain_` drives their schedules and projects them after each optimizer step. An
    `ActivationPenalty` is added to the loss before the backward pass, and is not in the loss that
    the module logs. One step in `every` is measured: all numbers of a `BlockReport`, AF and its
    factors from the step's own backward pass. At every log ``density``, ``training_density`` and
    the rest go to the loggers and to ``callback_metrics``, at every validation ``val_density`` and
    the rest (``EarlyStopping(monitor="val_density")``), at every test ``test_density``; those of
    the blocks as ``density_per_block/NAME``. A resumed run goes on with the same history. Sums go
    over processes, once per log.

    Nothing stays on the model, also if training ends by an error: it has hooks only while a step or
    an evaluation that is measured runs.

    ``steppe.json`` in the log's folder (``trainer.log_dir``, else ``default_root_dir``) has all of
    it, for ``steppe report``.

    With `accelerate`, `accelerate_` runs the blocks on the sparse kernels while ``fit`` trains, as
    `SteppeCallback` does: from the start of the training, after a checkpoint was loaded, to its
    end, whatever ends it. A measured step runs dense unless `flatness` is False.

    A loss that the module computes from logits counts as a mean over the samples of the
    micro-batch; for a Hugging Face model's own loss the scale of each sample is known.

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
        MissingExtraError: Lightning is not installed; raised by importing this module.

    Example:
        ``pl.Trainer(max_steps=10_000, callbacks=[LightningCallback()]).fit(module, loader)``
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
        self._restored: dict[str, Any] = {}
        self._logs: list[dict[str, Any]] = []
        self._constrained: Constrained | None = None
        self._turn: int | None = None  # the step that is measured, counted from 1
        self._passing = ExitStack()  # takes the hooks off the model

    def state_dict(self) -> dict[str, Any]:
        """The part of a Lightning checkpoint that is this callback's; all processes call this."""
        self._settle()
        return {**self._kept(), "logs": self._logs}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a checkpoint when training starts."""
        self._restored = state_dict

    def on_train_start(self, trainer: Any, pl_module: nn.Module) -> None:
        """Get ready to measure, from the state of a checkpoint if the run resumes from one.

        Raises:
            ScheduleError: not one optimizer, or a schedule and no end of the run.
            AccelerationError: a block does not fit the kernels.
        """
        self._leave()
        restored, self._restored = self._restored, {}
        model = _model_of(pl_module, self.patterns)
        self._begin(model, restored)
        self._logs = list(restored.get("logs", []))
        self._turn = None
        if sparsification_of(model) is not None:
            total = trainer.estimated_stepping_batches
            name = type(self).__name__
            self._constrained = constrain_only_(model, trainer.optimizers, total, name)
            self._constrained.load_state_dict({"step": trainer.global_step})
        self.acceleration.begin(model)

    def on_train_batch_start(
        self, trainer: Any, pl_module: nn.Module, batch: Any, batch_idx: int
    ) -> None:
        """Watch the model if this step is to be measured."""
        assert self._monitor is not None
        self._passing.close()
        step = trainer.global_step + 1
        if trainer.global_step % self.every == 0:
            if self._turn != step:
                self._monitor.reset()  # it has the tallies of a step that did not end
            self._turn = step
            pieces = trainer.accumulate_grad_batches if _is_automatic(pl_module) else 1
            self._monitor.loss_factor = _scale(trainer) / pieces
            self._passing.enter_context(self._monitor.attached())

    def on_before_backward(self, trainer: Any, pl_module: nn.Module, loss: Tensor) -> None:
        """Add the penalties to the loss, in place: Lightning takes no other one."""
        pieces = trainer.accumulate_grad_batches if _is_automatic(pl_module) else 1
        penalized = loss
        for penalty in penalties_of(pl_module):
            penalized = penalty.add_to(penalized, _scale(trainer) / pieces)
        if penalized is not loss:
            loss.copy_(penalized)

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Put the tallies of a finished step aside; log them where Lightning logs.

        Raises:
            NonFiniteLossError: the loss is NaN or infinite; it is checked where Lightning logs.
        """
        self._passing.close()
        step = trainer.global_step
        if self._turn == step:
            self._turn = None
            self._put_aside(step)
        last = self._logs[-1]["step"] if self._logs else 0
        if step == last or not trainer.log_every_n_steps or step % trainer.log_every_n_steps:
            return
        loss = outputs["loss"] if isinstance(outputs, dict) else outputs
        log: dict[str, float] = {}
        if isinstance(loss, Tensor):
            log["loss"] = float(loss)
            require_finite(log["loss"], step, "gradient_clip_val=1.0")
        metrics = self._new_metrics()
        pl_module.log_dict(metrics, on_step=True, on_epoch=False)
        self._keep_log(step, {**log, **metrics})

    def on_validation_start(self, trainer: Any, pl_module: nn.Module) -> None:
        """Watch the model through a validation."""
        self._watch_evaluation(pl_module)

    def on_validation_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Log a validation."""
        tallies = self._log_evaluation(pl_module, "val_")
        if _is_of_training(trainer):
            self._note_held_out(trainer.global_step, tallies)

    def on_validation_end(self, trainer: Any, pl_module: nn.Module) -> None:
        """Keep all metrics of a validation, those of other callbacks too."""
        if _is_of_training(trainer):
            seen = {name: float(value) for name, value in trainer.callback_metrics.items()}
            self._keep_log(trainer.global_step, seen)

    def on_test_start(self, trainer: Any, pl_module: nn.Module) -> None:
        """Watch the model through a test."""
        self._watch_evaluation(pl_module)

    def on_test_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Log a test."""
        self._log_evaluation(pl_module, "test_")

    def on_save_checkpoint(
        self, trainer: Any, pl_module: nn.Module, checkpoint: dict[str, Any]
    ) -> None:
        """Write the record of the run so far."""
        if self._monitor is not None:
            self.acceleration.take_record()
            self._write(trainer, pl_module)

    def on_train_end(self, trainer: Any, pl_module: nn.Module) -> None:
        """Log the steps that no log has had, and write the record of the run."""
        metrics = self._new_metrics()
        if metrics:
            for logger in trainer.loggers:
                logger.log_metrics(metrics, step=trainer.global_step)
            self._keep_log(trainer.global_step, metrics)
        self.acceleration.end()
        self._write(trainer, pl_module)

    def on_exception(self, trainer: Any, pl_module: nn.Module, exception: BaseException) -> None:
        """Leave the model as it was."""
        self._leave()

    def teardown(self, trainer: Any, pl_module: nn.Module, stage: str) -> None:
        """Leave the model as it was."""
        self._leave()

    def run(self, trainer: Any, pl_module: nn.Module, name: str = "") -> Run:
        """The record of the run so far.

        Args:
            trainer: Lightning's.
            pl_module: the module, to name its model's class, its activations and its plug-ins.
            name: of the run; the name of its folder by default.
        """
        (group, *_) = trainer.optimizers[0].param_groups
        settings: dict[str, Any] = {
            "learning_rate": float(group.get("initial_lr", group["lr"])),
            "weight_decay": float(group.get("weight_decay", 0.0)),
            "optim": type(trainer.optimizers[0]).__name__,
            "max_steps": trainer.max_steps,
            "num_train_epochs": trainer.max_epochs,
            "gradient_accumulation_steps": trainer.accumulate_grad_batches,
            "world_size": trainer.world_size,
            "max_grad_norm": trainer.gradient_clip_val,
            "precision": str(trainer.precision),
            "measured_every": self.every,
        }
        model = _model_of(pl_module, self.patterns)
        return record_of(
            name or _folder(trainer).resolve().name,
            model,
            self._blocks(model),
            self.history,
            self.held_out_history,
            self._logs,
            settings,
            {"lightning": getattr(pl, "__version__", "")},
            self.acceleration.record,
        )

    def _new_metrics(self) -> dict[str, float]:
        """The metrics of the steps measured since the last log; waits for all processes."""
        self._settle()
        return training_metrics(self._not_logged(), self._names(), self.training_density)

    def _watch_evaluation(self, pl_module: nn.Module) -> None:
        """Watch the model until `_log_evaluation`."""
        self._passing.close()
        monitor = self._monitor_of_evaluation(_model_of(pl_module, self.patterns))
        self._passing.enter_context(monitor.attached())

    def _log_evaluation(self, pl_module: Any, prefix: str) -> Any:
        """Log the evaluation that began with `_watch_evaluation`, and return its tallies."""
        self._passing.close()
        tallies, entry = self._evaluated()
        metrics = with_prefix(prefix, means_of([entry], self._names_of_evaluation()))
        pl_module.log_dict(metrics, on_step=False, on_epoch=True)
        return tallies

    def _keep_log(self, step: int, metrics: dict[str, float]) -> None:
        """Keep a log for the record of the run."""
        self._logs.append({"step": step, **of_the_model(metrics)})

    def _leave(self) -> None:
        """Take everything off the model and the optimizer."""
        self._passing.close()
        self.acceleration.end()
        if self._constrained is not None:
            self._constrained.remove()
            self._constrained = None

    def _write(self, trainer: Any, pl_module: nn.Module) -> None:
        """Write the record of the run, in the first process."""
        if trainer.is_global_zero:
            write_record(self.run(trainer, pl_module), _folder(trainer), "default_root_dir")


def _model_of(pl_module: nn.Module, patterns: Sequence[BlockPattern]) -> nn.Module:
    """The model in a module: the sparsified one, else the Hugging Face one, else all of it."""
    for module in pl_module.modules():
        if APPLIED in vars(module):
            return module
    downs = {block.down for block in find_blocks(pl_module, patterns=patterns)}
    for module in pl_module.modules():
        if hasattr(module, "config") and downs <= set(module.modules()):
            return module
    return pl_module


def _is_automatic(pl_module: Any) -> bool:
    """Whether Lightning divides the loss by the number of micro-batches."""
    return bool(pl_module.automatic_optimization)


def _is_of_training(trainer: Any) -> bool:
    """Whether a validation is one during training."""
    return trainer.state.fn == "fit" and not trainer.sanity_checking


def _scale(trainer: Any) -> float:
    """The factor of the loss in half precision."""
    scaler: torch.amp.GradScaler | None = getattr(trainer.precision_plugin, "scaler", None)
    return 1.0 if scaler is None else float(scaler.get_scale())


def _folder(trainer: Any) -> Path:
    """Where the record of the run is written."""
    return Path(trainer.log_dir or trainer.default_root_dir)
