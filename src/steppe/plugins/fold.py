"""`fold_`: moves thresholds into biases, so that nothing is left of the plug-in."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from steppe.blocks.find import MLPBlock, find_blocks, unwrap
from steppe.blocks.fused import Half
from steppe.blocks.linear import linear_weight
from steppe.errors import SparsificationError
from steppe.plugins.applied import sparsification_of, take_out_
from steppe.plugins.base import shifted_bias
from steppe.plugins.rising_threshold import Rising, Threshold
from steppe.record import config_of
from steppe.sharding import is_sharded

_BIAS_SETTING = "mlp_bias"  # of the configs of Llama and its kin
_logger = logging.getLogger(__name__)


def fold_(model: nn.Module) -> nn.Module:
    """Move the thresholds of `RisingThreshold` into the biases, and take the plug-in out.

    ``b − τ · s_u`` takes the place of the bias b of `up`, of a gated block's `gate`, in the same
    Parameter; a layer without a bias gets one. The model computes the same, and loads without
    steppe if it has no other plug-in. Other plug-ins stay. All is checked before anything is
    changed.

    If the stock class of a Hugging Face model has no bias there, ``mlp_bias`` of its config is
    switched on. Where the config has no such setting (T5, Qwen 2), a warning says that
    ``from_pretrained`` would leave the bias out.

    Args:
        model: the model, accelerated or not; wrappers are seen through.

    Returns:
        The model.

    Raises:
        SparsificationError: there is no threshold (any more), no batch was seen yet, or the model
            is sharded; the model is as it was.
    """
    root = unwrap(model)
    sparsification = sparsification_of(root)
    folded = [
        (applied, constraint.thresholds)
        for applied in ([] if sparsification is None else sparsification.applied)
        for constraint in applied.constraints
        if isinstance(constraint, Rising)
    ]
    if not folded:
        raise SparsificationError(
            f"fold_: {type(root).__name__} carries no threshold, or its threshold is folded"
            " already. First: steppe.sparsify_(model, [steppe.RisingThreshold()]), and train"
        )
    thresholds = [threshold for _, of_plugin in folded for threshold in of_plugin]
    blocks = [threshold.block for threshold in thresholds]
    for threshold in thresholds:
        _check(threshold)
    bare = [block for block in blocks if _has_no_bias(block.activated)]
    configs = _bias_configs(root, bare)
    with torch.no_grad():
        biases = {
            threshold.block.activated: shifted_bias(threshold.block.activated, [threshold])
            for threshold in thresholds
        }
        # The setting is for every linear layer of every block.
        for block in find_blocks(root) if configs else ():
            if id(_bias_config(root, block)) in configs:
                for layer in block.layers:
                    if _has_no_bias(layer) and layer not in biases:
                        biases[layer] = _no_bias(layer, block.name)
    _write(biases, list(configs.values()))
    for applied, _ in folded:
        take_out_(root, applied)
    _warn_of_lost(root, bare)
    return model


def _check(threshold: Threshold) -> None:
    """Refuse a threshold that is not known yet, or a layer that is sharded."""
    block = threshold.block
    if block.is_routed and not isinstance(linear_weight(block.activated), nn.Parameter):
        raise SparsificationError(
            f"fold_: {block.name} has its weights in a tensor of all experts, which has no bias to"
            " fold a threshold into. Keep the threshold: accelerate_ takes it as it is"
        )
    if not bool(threshold.deviation.any()):
        raise SparsificationError(
            f"fold_: {block.name} has seen no training batch, so its threshold is not known. Train"
            " first, with steppe.constrain_ or SteppeCallback; or steppe.restore_(model)"
        )
    _refuse_sharded(block.activated, block.name)


def _refuse_sharded(layer: nn.Module, name: str) -> None:
    """Refuse a layer that is sharded."""
    if is_sharded(linear_weight(layer)):
        raise SparsificationError(
            f"fold_: {name} is sharded over processes. Save the model, load it in one process"
            " with steppe.load_pretrained, and fold it there"
        )


def _has_no_bias(layer: Any) -> bool:
    return layer.bias is None


def _no_bias(layer: Any, name: str) -> Tensor:
    """The bias of a layer that has none: zeros."""
    _refuse_sharded(layer, name)
    weight = linear_weight(layer)
    return torch.zeros(layer.out_features, dtype=weight.dtype, device=weight.device)


@torch.no_grad()
def _write(biases: Mapping[Any, Tensor | None], configs: Sequence[Any]) -> None:
    """Give layers their biases and configs the setting, or leave all as it was."""
    before = [(layer, layer.bias) for layer in biases]
    values = [None if bias is None else bias.detach().clone() for _, bias in before]
    settings = [(config, getattr(config, _BIAS_SETTING)) for config in configs]
    done = 0
    try:
        for layer, bias in biases.items():
            assert bias is not None
            done += 1
            if layer.bias is None:
                trained = linear_weight(layer).requires_grad
                _set_bias(layer, nn.Parameter(bias, requires_grad=trained))
            else:
                layer.bias.copy_(bias)
        for config in configs:
            setattr(config, _BIAS_SETTING, True)
    except BaseException:  # also Ctrl-C: never half a model
        for config, setting in settings:
            setattr(config, _BIAS_SETTING, setting)
        for (layer, bias), value in list(zip(before, values, strict=True))[:done]:
            _set_bias(layer, bias)
            if value is not None:
                layer.bias.copy_(value)
        raise


def _set_bias(layer: Any, bias: nn.Parameter | None) -> None:
    """Give a layer a bias, or take it away; for a half, in the fused layer."""
    if not isinstance(layer, Half):
        layer.bias = bias
        return
    whole: Any = layer.whole
    if bias is None:
        whole.bias = None
    elif whole.bias is None:
        zeros = bias.new_zeros(whole.out_features)
        whole.bias = nn.Parameter(zeros, requires_grad=bias.requires_grad)
        layer.bias.copy_(bias)  # type: ignore[union-attr]  # there is one now
    # Else the fused bias was made for the other half, and goes or stays with that.


def _bias_configs(root: nn.Module, bare: Sequence[MLPBlock]) -> dict[int, Any]:
    """The configs that decide whether these blocks' layers have biases, by id."""
    found = (_bias_config(root, block) for block in bare)
    return {id(config): config for config in found if config is not None}


def _warn_of_lost(root: nn.Module, bare: Sequence[MLPBlock]) -> None:
    """Warn of a bias that the stock class of a Hugging Face model does not have."""
    lost = [block.name for block in bare if _bias_config(root, block) is None]
    if lost and any(hasattr(module, "save_pretrained") for module in root.modules()):
        _logger.warning(
            "fold_: %s has a bias now that its stock class does not have, so from_pretrained would"
            " leave it out. Save the state_dict, or save the model before fold_: with its threshold"
            " steppe.load_pretrained brings it back, and accelerate_ takes it as it is",
            lost[0],
        )


def _bias_config(root: nn.Module, block: MLPBlock) -> Any:
    """The nearest config around a block that decides whether its layers have biases, or None."""
    around = [
        config
        for module in root.modules()  # outermost first
        if hasattr(config := config_of(module), _BIAS_SETTING)
        and block.activated in set(module.modules())
    ]
    return around[-1] if around else None
