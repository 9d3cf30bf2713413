"""Sparsified models to save, their loaders, and ways to edit the files."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForSeq2SeqLM,
)

import models
from steppe import (
    JumpingSquaredReLU,
    RestrictedNorm,
    ZerothBias,
    added_parameters,
    advance_,
    project_,
    sparsify_,
)
from steppe.record import METHOD_MARK, WEIGHTS_MARK

PROGRESS = 0.2
MIX = 0.4  # of a ramp over half the run
LAST_SHARD = "model-*.safetensors"
LOADERS: dict[str, Callable[..., nn.Module]] = {
    "t5": AutoModelForSeq2SeqLM.from_pretrained,
    "opt": AutoModelForCausalLM.from_pretrained,
    "gpt2": AutoModelForCausalLM.from_pretrained,
    "llama": AutoModelForCausalLM.from_pretrained,
    "vit": AutoModelForImageClassification.from_pretrained,
    "ijepa": AutoModelForImageClassification.from_pretrained,
}
load_causal = LOADERS["gpt2"]
Edit = Callable[[dict[str, Any]], Any]


def sparsified(name: str = "gpt2", seed: int = 0) -> nn.Module:
    """A model in the middle of a finetuning run, with biases that are not zero."""
    torch.manual_seed(seed)
    model = {**models.LANGUAGE_MODELS, **models.VISION_MODELS}[name]().eval()
    sparsify_(
        model, [ZerothBias(max_tokens=8), RestrictedNorm(ramp=0.3), JumpingSquaredReLU(ramp=0.5)]
    )
    for parameter in added_parameters(model).values():
        nn.init.uniform_(parameter.detach(), -0.05, 0.05)
    return project_(advance_(model, PROGRESS))


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return model(**models.inputs_for(model)).logits


def edit_config(folder: Path, edit: Edit) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    edit(config)
    path.write_text(json.dumps(config))


def edit_weights(folder: Path, edit: Callable[[dict[str, Tensor]], None]) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    edit(tensors)
    path.unlink()  # the tensors may be mapped from it
    save_file(tensors, path, metadata={"format": "pt"})


def never(folder: str) -> nn.Module:
    raise AssertionError("a bad record must be refused before the weights are read")


def take_marks_off(folder: Path) -> None:
    """Make a folder as steppe wrote it before there were marks."""
    edit_config(folder, lambda config: [config.pop(key) for key in (WEIGHTS_MARK, METHOD_MARK)])
