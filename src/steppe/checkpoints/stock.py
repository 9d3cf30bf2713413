"""Teach Transformers to mark the folders of models with plug-ins, and to load them.

Transformers lets a library change a model while it is loaded, through a class that it calls a
quantizer. Here that class adds the plug-ins, once the model's own weights are there.
"""

from __future__ import annotations

import inspect
import logging
import re
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin
from wrapt import wrap_function_wrapper

from steppe.blocks.experts import ExpertLayer
from steppe.blocks.matching import matches
from steppe.checkpoints.card import HERE, update_before_upload, update_card
from steppe.checkpoints.load import apply_record_
from steppe.checkpoints.saved_record import Record, current_own, parse_record
from steppe.checkpoints.weights import Weights
from steppe.errors import CheckpointError
from steppe.record import METHOD, RECORD_KEY, WEIGHTS_MARK, with_marks

_IGNORED = "_keys_to_ignore_on_load_unexpected"
_logger = logging.getLogger(__name__)


class _Method(QuantizationConfigMixin):
    """The mark in the config."""

    def __init__(self, **settings: Any) -> None:
        self.quant_method: Any = METHOD


class _PlugInLoader(HfQuantizer):
    """Gives a model that is being loaded the plug-ins of its record."""

    is_trainable = True

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        """Whether such a model can be saved."""
        return True

    def update_tp_plan(self, config: Any) -> Any:
        """Take the mark off that this loader need not heed (before Transformers 5.21)."""
        return self.update_attn_implementation(config)

    def update_attn_implementation(self, config: Any) -> Any:
        """Take the mark off that this loader need not heed."""
        config.__dict__.pop(WEIGHTS_MARK, None)
        return config

    def _process_model_before_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        """Refuse a bad record before the weights are read, and expect the plug-ins' tensors."""
        config: Any = model.config
        self._place = str(config.name_or_path)
        self._files = [Path(file) for file in kwargs.get("checkpoint_files") or []]
        self._record = self._read(config)
        below = {rf"^(\w+\.)?{re.escape(name)}\." for name in self._record.blocks}
        self._ignored = getattr(model, _IGNORED, None)
        kind = list if self._ignored is None else type(self._ignored)  # set since 5.12
        setattr(model, _IGNORED, kind([*(self._ignored or ()), *below]))
        return model

    def _read(self, config: Any) -> Record:
        """The record of the model."""
        own = current_own()
        if not all(file.suffix == ".safetensors" for file in self._files) or not self._files:
            raise CheckpointError(
                f"{self._place}: steppe reads the tensors of plug-ins from safetensors files only;"
                " save the model with save_pretrained"
            )
        return parse_record(getattr(config, RECORD_KEY, None), self._place, own)

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        """Apply the record."""
        setattr(model, _IGNORED, self._ignored)
        self.remove_quantization_config(model)
        for module in model.modules():
            getattr(module, "config", self).__dict__.pop("_is_quantized", None)
        weights = Weights.in_files(self._place, self._files)
        left = apply_record_(model, self._record, weights, current_own())
        # Transformers writes the tensors of all experts one by one, under names of its own.
        taken_apart = {
            block.name
            for _, _, _, block in (matches(model, ()) if left else ())
            if isinstance(block.down, ExpertLayer)
        }
        whole = [name for name in self._record.blocks if name not in taken_apart]
        of_blocks = [name for name in sorted(left) if any(f"{b}." in name for b in whole)]
        if of_blocks:
            _logger.warning(
                "%s: %s and %d more tensors of the blocks are in the weights and not in the model",
                self._place,
                of_blocks[0],
                len(of_blocks) - 1,
            )
        return model


def register() -> None:
    """Make it known to Transformers, which has been imported."""
    register_quantization_config(METHOD)(_Method)
    register_quantizer(METHOD)(_PlugInLoader)
    wrap_function_wrapper(PreTrainedConfig, "to_diff_dict", _marked)
    wrap_function_wrapper(PreTrainedModel, "save_pretrained", _save_with_card)
    wrap_function_wrapper(PreTrainedModel, "_upload_modified_files", update_before_upload)


def wrap_trainer(trainer: ModuleType) -> None:
    """Make it known to the Trainer, whose module is given."""
    wrap_function_wrapper(trainer, "Trainer.create_model_card", _create_card_with_section)


def _marked(
    to_diff_dict: Callable[..., dict[str, Any]],
    config: PreTrainedConfig,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> dict[str, Any]:
    """The content of a config as ``save_pretrained`` writes it."""
    return with_marks(to_diff_dict(*args, **kwargs))


def _save_with_card(
    save: Callable[..., None],
    model: PreTrainedModel,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> None:
    """Save a model, with what steppe did in the model card."""
    save(*args, **kwargs)
    given = inspect.signature(save).bind(*args, **kwargs)
    given.apply_defaults()
    # In newer Transformers the model decides it, in older ones the caller alone.
    saves_here = getattr(model, "should_save_on_this_rank", bool)
    if saves_here(given.arguments["is_main_process"]) and not given.arguments["push_to_hub"]:
        update_card(Path(given.arguments["save_directory"]), model)


def _create_card_with_section(
    create: Callable[..., None], trainer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    """Let a Trainer replace the card of its output folder, and put the section back."""
    create(*args, **kwargs)
    if trainer.is_world_process_zero():
        folder, place = Path(trainer.args.output_dir), getattr(trainer, "hub_model_id", None)
        update_card(folder, trainer.model, place or HERE)
