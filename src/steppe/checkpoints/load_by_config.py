"""Load a checkpoint as the class that its config names, with the plug-ins of its record.

`load` calls a loader that the user picks; here steppe picks the class itself, for
``steppe measure``, ``steppe blocks`` and recipes.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    PreTrainedConfig,
    PreTrainedModel,
)

from steppe.blocks.patterns import BlockPattern
from steppe.checkpoints import load_pretrained
from steppe.checkpoints.weights import Weights
from steppe.data.read_errors import first_line
from steppe.errors import CheckpointError, MissingExtraError, SteppeError
from steppe.record import RECORD_KEY
from steppe.surgery.pattern_notes import note_patterns_

_LAYERS_OF_ONE = 1000  # that may share their weights
_AUTO_CLASSES = (AutoModelForImageClassification, AutoModelForMaskedLM, AutoModelForCausalLM)


def load_checkpoint(
    checkpoint: str | Path, patterns: Sequence[BlockPattern] = ()
) -> PreTrainedModel:
    """A saved model with its plug-ins, of the class that its config names.

    Reads safetensors only, in the dtype that was saved; code that comes with a checkpoint is never
    run.

    Args:
        checkpoint: a folder that ``save_pretrained`` or the Trainer wrote, or a hub id.
        patterns: patterns of your own, which are noted with the model; those of its record are.

    Returns:
        The model, in evaluation mode, on the CPU.

    Raises:
        CheckpointError: it is not there, is no model of Transformers, needs code of its own, is
            damaged, or lacks weights.
        MissingExtraError: its class needs a package that is not installed.
    """
    checkpoint = str(checkpoint)
    config = load_config(checkpoint)
    weights = Weights.of(checkpoint)  # of safetensors of this folder, and of no other file
    _refuse_absurd(checkpoint, config, len(weights.files))
    load = partial(_load_whole, _class_of(config))
    if hasattr(config, RECORD_KEY):
        model: Any = load_pretrained(load, checkpoint, patterns)
    else:
        model = load(checkpoint)
    note_patterns_(model, patterns)
    return model.eval()


def _refuse_absurd(checkpoint: str, config: PreTrainedConfig, tensors: int) -> None:
    """Refuse layers by the million, which would take minutes to make before one is missed."""
    layers = getattr(config, "num_hidden_layers", 0)
    if isinstance(layers, int) and layers > _LAYERS_OF_ONE + tensors:
        raise CheckpointError(
            f"{checkpoint}: config.json has {layers} layers, the weights {tensors} tensors. They"
            " are of different models."
        )


def empty_model(checkpoint: str | Path) -> PreTrainedModel:
    """A model without weights, of the class that its config names.

    Args:
        checkpoint: as of `load_checkpoint`, or its config.json.

    Returns:
        The model, on the meta device.

    Raises:
        CheckpointError: there is no config, or no model can be made of it.
    """
    path = Path(checkpoint)
    config = load_config(str(path.parent if path.name == "config.json" else checkpoint))
    # A class with a head may have a part of the model only, as CLIP's for images.
    whole: Any = AutoModel if type(config) in AutoModel._model_mapping else _class_of(config)
    kind = _named_class(config) or whole
    make = getattr(kind, "from_config", None) or kind
    try:
        with torch.device("meta"):
            model: PreTrainedModel = make(config)
    except (ValueError, TypeError, KeyError, RuntimeError, ImportError) as error:
        raise CheckpointError(
            f"{checkpoint}: no model can be made of its config ({first_line(error)})"
        ) from None
    return model


def load_config(checkpoint: str) -> PreTrainedConfig:
    """The config of a checkpoint, or an error that says why there is none.

    Args:
        checkpoint: a folder or a hub id.

    Raises:
        CheckpointError: there is none, or the model needs code of its own.
    """
    folder = Path(checkpoint)
    if folder.is_file():
        raise CheckpointError(
            f"{checkpoint}: expected a folder or a hub id, got a file. Name its folder."
        )
    if folder.is_dir() and not (folder / "config.json").is_file():
        adapter = (folder / "adapter_config.json").is_file()
        raise CheckpointError(
            f"{checkpoint}: found no config.json, so this is no checkpoint of Transformers. "
            + (
                "It is an adapter of PEFT: merge it first, with model.merge_and_unload()"
                if adapter
                else "Name a folder that save_pretrained or the Trainer wrote, e.g. checkpoint-1000"
            )
        )
    if not folder.is_dir() and (checkpoint.startswith((".", "/", "~")) or "\\" in checkpoint):
        raise CheckpointError(f"{checkpoint}: there is no such folder")
    try:
        return AutoConfig.from_pretrained(checkpoint, trust_remote_code=False)
    except Exception as error:  # Transformers uses the values unchecked
        if "trust_remote_code" in str(error):
            raise CheckpointError(
                f"{checkpoint}: needs code of its own, which steppe never runs. Load the model"
                " yourself and call steppe.measure(model, loader)."
            ) from None
        raise CheckpointError(
            f"{checkpoint}: expected the folder of a model of Transformers, or the id of one on the"
            f" Hugging Face hub ({first_line(error)})"
        ) from None


def _class_of(config: PreTrainedConfig) -> Any:
    """The class that the config names, else the one that usually has its weights and a loss."""
    named = _named_class(config)
    if named is not None:
        return named
    if getattr(config, "is_encoder_decoder", False):
        return AutoModelForSeq2SeqLM
    known = (kind for kind in _AUTO_CLASSES if type(config) in kind._model_mapping)
    return next(known, AutoModel)


def _named_class(config: PreTrainedConfig) -> type[PreTrainedModel] | None:
    """The class that the config names, if Transformers has it."""
    named = getattr(config, "architectures", None)
    for name in named if isinstance(named, list) else []:
        kind = getattr(transformers, name, None) if isinstance(name, str) else None
        if isinstance(kind, type) and issubclass(kind, PreTrainedModel):
            return kind
    return None


def _load_whole(kind: Any, checkpoint: str) -> PreTrainedModel:
    """A model of a class; every weight of it must be in the checkpoint."""
    try:
        model, info = kind.from_pretrained(
            checkpoint, use_safetensors=True, trust_remote_code=False, output_loading_info=True
        )
    except ImportError as error:
        raise MissingExtraError(f"{checkpoint}: {first_line(error)}") from None
    except SteppeError:
        raise
    except Exception as error:  # Transformers uses a damaged config unchecked
        raise CheckpointError(
            f"{checkpoint}: its weights cannot be loaded ({first_line(error)}). steppe reads"
            " safetensors only; if they are damaged, copy them again, else save the model again"
            " with save_pretrained."
        ) from None
    missing = sorted(info["missing_keys"])
    if missing:
        raise CheckpointError(
            f"{checkpoint}: the weights lack {missing[0]} ({len(missing)} missing), which"
            f" {type(model).__name__} needs. Weights and config are of different models."
        )
    return model
