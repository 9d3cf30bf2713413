"""The model of a recipe: new or from a vanilla checkpoint, with its plug-ins and LoRA."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from peft import LoraConfig
from peft.tuners.lora import LoraModel
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForSeq2SeqLM,
    PreTrainedModel,
)

from steppe.blocks.find import find_blocks
from steppe.checkpoints.load_by_config import load_checkpoint
from steppe.errors import CheckpointError, RecipeError
from steppe.plugins import (
    ActivationPenalty,
    JumpingSquaredReLU,
    Plugin,
    RestrictedNorm,
    RisingThreshold,
    ZerothBias,
)
from steppe.plugins.applied import sparsification_of
from steppe.surgery.pattern_notes import note_patterns_
from steppe.training.recipe import Recipe
from steppe.training.recipe_arguments import CAUSAL, IMAGES, SPANS, model_settings, patterns_of
from steppe.training.recipe_plugins import named_plugins

_MODELS: dict[str, Any] = {
    IMAGES: AutoModelForImageClassification,
    CAUSAL: AutoModelForCausalLM,
    SPANS: AutoModelForSeq2SeqLM,
}


def config_of(recipe: Recipe) -> Any:
    """The model's config, before the data is known.

    Args:
        recipe: its model.

    Raises:
        RecipeError: there is no such architecture.
        CheckpointError: it is no checkpoint, or no vanilla one for the task.
    """
    if recipe.model.checkpoint is not None:
        return _vanilla(recipe.model.checkpoint, recipe.model.task).config
    with _of_settings():
        return AutoConfig.for_model(str(recipe.model.model_type), **model_settings(recipe.model))


def build_model(recipe: Recipe, **known: Any) -> PreTrainedModel:
    """The model: a new one, or the vanilla checkpoint.

    Args:
        recipe: its model.
        **known: settings of a new model's config that follow from the data; the recipe's go first.

    Raises:
        RecipeError: the architecture does not take the settings.
        CheckpointError: it is no checkpoint, or no vanilla one for the task.
        BlocksNotFoundError: the recipe has patterns, and nothing matches.
    """
    if recipe.model.checkpoint is not None:
        model = _vanilla(recipe.model.checkpoint, recipe.model.task)
    else:
        settings = {**known, **model_settings(recipe.model)}
        with _of_settings():
            config = AutoConfig.for_model(str(recipe.model.model_type), **settings)
            model = _MODELS[recipe.model.task].from_config(config)
        if recipe.model.xavier:
            _draw_by_xavier_(model)
    patterns = patterns_of(recipe.model)
    if patterns:
        find_blocks(model, patterns=patterns)
        note_patterns_(model, patterns)
    return model


def _draw_by_xavier_(model: nn.Module) -> None:
    """Draw the weights of linear layers and of patch embeddings by Xavier's uniform rule."""
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            # A patch embedding is a linear layer on flattened patches.
            nn.init.xavier_uniform_(module.weight.data.flatten(1))


@contextmanager
def _of_settings() -> Iterator[None]:
    """Raise any error as one of the model's settings: its code may divide by them, or index."""
    try:
        yield
    except RecipeError:
        raise
    except Exception as error:
        text = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
        raise RecipeError(f"model_type, model_config: {text}") from error


def _vanilla(checkpoint: str, task: str) -> PreTrainedModel:
    """A checkpoint of a model for a task that steppe has not changed."""
    model = load_checkpoint(checkpoint)
    if sparsification_of(model) is not None:
        raise CheckpointError(
            f"{checkpoint}: is no vanilla model, it has plug-ins of steppe. Name the one that they"
            " were put into, or go on with the run that made it",
            {"checkpoint": "FOLDER_OR_HUB_ID"},
            {"resume": True},
        )
    if type(model) not in _MODELS[task]._model_mapping.values():
        raise CheckpointError(
            f"{checkpoint}: expected a model for {task}, got {type(model).__name__}"
        )
    return model.train()


def plugins_of(recipe: Recipe) -> list[Plugin]:
    """The plug-ins of the arm, those that flags add or leave out, and those named with settings.

    Args:
        recipe: its arm.
    """
    arm = recipe.arm
    papers, ours = arm.arm in ("steppe", "best"), arm.arm in ("threshold", "best")
    positions = None if recipe.model.task == IMAGES else recipe.data.length
    threshold = RisingThreshold(arm.threshold_multiple, arm.threshold_ramp)
    wanted: list[tuple[bool | None, bool, Plugin]] = [
        (arm.zeroth_bias, papers, ZerothBias(max_tokens=positions)),
        (arm.restricted_norm, papers, RestrictedNorm(ramp=arm.ramp)),
        (arm.jumping_squared_relu, papers, JumpingSquaredReLU(ramp=arm.ramp)),
        (arm.rising_threshold, ours, threshold),
    ]
    plugins = [plugin for asked, usual, plugin in wanted if (usual if asked is None else asked)]
    if arm.activation_penalty:
        plugins.append(ActivationPenalty(arm.activation_penalty, arm.penalty_ramp))
    named = named_plugins(arm.plugins)
    keys = {plugin.key for plugin in named}
    for asked, _, plugin in wanted:
        if asked is False and plugin.key in keys:
            raise RecipeError(f"{plugin.key}: `plugins` names it, and the key says false")
    return [plugin for plugin in plugins if plugin.key not in keys] + named


def add_lora_(model: PreTrainedModel, recipe: Recipe) -> LoraModel | None:
    """Put LoRA on the attention, in place; all else is trained as it is.

    Args:
        model: with its plug-ins.
        recipe: rank and targets.

    Returns:
        PEFT's handle, to merge LoRA at the end; None where the recipe has none.

    Raises:
        RecipeError: the model has no such layers.
    """
    if not recipe.model.lora_rank:
        return None
    rank = recipe.model.lora_rank
    frozen = {id(p) for p in model.parameters() if not p.requires_grad}
    config = LoraConfig(r=rank, lora_alpha=rank, target_modules=list(recipe.model.lora_targets))
    try:
        tuner = LoraModel(model, config, "default")
    except ValueError as error:
        raise RecipeError(f"lora_targets: {str(error).splitlines()[0]}") from None
    for name, parameter in model.named_parameters():
        if id(parameter) not in frozen and ".base_layer." not in name:
            parameter.requires_grad_(True)
    return tuner


def norm_parameter_names(model: nn.Module) -> set[str]:
    """Names of the parameters of the norms before the MLPs.

    Args:
        model: with MLP blocks.
    """
    own = {id(p) for block in find_blocks(model) if block.norm for p in block.norm.parameters()}
    return {name for name, parameter in model.named_parameters() if id(parameter) in own}
