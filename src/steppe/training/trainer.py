"""The Trainer of recipes: the stock one with its decay, sampler, batches and saving filled in."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset, Sampler
from transformers import Trainer
from transformers.trainer_utils import rotate_checkpoints

from steppe.checkpoints import load_weights_
from steppe.checkpoints.card import update_card
from steppe.errors import OutputError
from steppe.files import why_unwritable, writing_to
from steppe.runs import Run
from steppe.training.resuming import (
    UNFINISHED,
    discard_unfinished,
    publish_checkpoint,
    seal_checkpoint,
)

Prepare = Callable[[dict[str, Any], bool], dict[str, Any]]
"""Makes of a batch on the device the model's inputs; the flag says whether it is for training."""


class RecipeTrainer(Trainer):
    """A Trainer with a recipe's decay and batches, and checkpoints that are whole or not there.

    Args:
        not_decayed: parameters without weight decay; all others have it, as in the paper.
        prepare: augments and normalises batches on the device.
        draws: the sampler of the training data; None for the Trainer's own, or for a stream.
        settings: of the run, kept in its checkpoints.
        **kwargs: as `transformers.Trainer`.
    """

    def __init__(
        self,
        *,
        not_decayed: set[str],
        prepare: Prepare | None,
        draws: Sampler[Any] | None,
        settings: dict[str, object],
        **kwargs: Any,
    ) -> None:
        self._not_decayed = not_decayed
        self._prepare = prepare
        self._draws = draws
        self._settings = settings
        self._run_folder: Path | None = None
        super().__init__(**kwargs)

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """Names of the parameters with weight decay."""
        return [name for name, _ in model.named_parameters() if name not in self._not_decayed]

    def _get_train_sampler(self, train_dataset: Dataset[Any] | None = None) -> Any:
        """The draws of the training data."""
        return super()._get_train_sampler(train_dataset) if self._draws is None else self._draws

    def _prepare_inputs(self, inputs: Any) -> Any:
        """The batch on the device, augmented where the model trains."""
        inputs = super()._prepare_inputs(inputs)
        if self._prepare is None or self.model is None:
            return inputs
        return self._prepare(inputs, self.model.training)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Load the weights of a checkpoint, all of them: the stock one passes over renamed ones.

        Raises:
            CheckpointError: they are not this model's.
        """
        if self.is_fsdp_enabled:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        else:
            wanted = self.model if model is None else model
            assert wanted is not None
            load_weights_(wanted, resume_from_checkpoint)

    def _get_output_dir(self, trial: Any) -> str:
        """The run's folder; while a checkpoint is written, that of unfinished ones."""
        return str(self._run_folder or super()._get_output_dir(trial=trial))

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Let the stock Trainer write under a temporary name, then rename.

        Raises:
            OutputError: it cannot be written; the checkpoints before are whole.
        """
        run = Path(self._get_output_dir(trial))
        name = f"checkpoint-{self.state.global_step}"
        if self.args.should_save:
            discard_unfinished(run)
        self.accelerator.wait_for_everyone()
        self._run_folder = run / UNFINISHED
        try:
            super()._save_checkpoint(model, trial)
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                seal_checkpoint(self._run_folder / name, self._settings)
                publish_checkpoint(run, name)
        except Exception as error:
            # On a full disk torch.save says no more than that its writer has failed.
            reason = why_unwritable(self._run_folder)
            if isinstance(error, OSError | SafetensorError):
                reason = reason or getattr(error, "strerror", None) or str(error).splitlines()[0]
            shutil.rmtree(self._run_folder, ignore_errors=True)
            if reason is None:
                raise
            raise OutputError(
                f"{run / name}: cannot be written ({reason}); the checkpoints before it are whole."
                " Make room, then go on",
                {"resume": True},
            ) from None
        finally:
            self._run_folder = None
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            rotate_checkpoints(output_dir=str(run), save_total_limit=self.args.save_total_limit)

    def save_result(self, name: str, processor: Any, record: Run) -> Path:
        """Save the model for users, under a temporary name first.

        Args:
            name: of the folder, within the run's.
            processor: tokenizer or image processor, saved beside the weights; None for none.
            record: of the run, for the densities in the model card.

        Returns:
            The folder.

        Raises:
            OutputError: it cannot be written.
        """
        run = Path(str(self.args.output_dir))
        unfinished = run / UNFINISHED / name
        with writing_to(run / name):
            self.save_model(str(unfinished))
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                if processor is not None:
                    processor.save_pretrained(str(unfinished))
                assert self.model is not None
                update_card(unfinished, self.model, run=record)
                publish_checkpoint(run, name)
        return run / name


class SoftCrossEntropy:
    """The cross-entropy of a classifier with labels that may be mixed.

    Args:
        smoothing: label smoothing, in training only.
    """

    def __init__(self, smoothing: float) -> None:
        self._smoothing = smoothing

    def __call__(
        self,
        labels: Tensor,
        logits: Tensor,
        config: Any = None,
        num_items_in_batch: Tensor | int | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """The mean over the samples, of all accumulated batches where their number is given.

        Args:
            labels: int64 ``[B]``, or float ``[B, classes]`` with rows that sum to 1.
            logits: float ``[B, classes]``.
            config: not needed.
            num_items_in_batch: samples of the step.
            **kwargs: not needed.
        """
        smoothing = self._smoothing if torch.is_grad_enabled() else 0.0
        total = F.cross_entropy(logits.float(), labels, reduction="sum", label_smoothing=smoothing)
        return total / (len(labels) if num_items_in_batch is None else num_items_in_batch)
