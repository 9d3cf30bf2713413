"""`fold_`: a threshold becomes part of a bias, and nothing is left of the plug-in."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from steppe.blocks import MLPBlock, find_blocks, unwrap
from steppe.errors import SparsificationError
from steppe.fused import Half
from steppe.linear import linear_weight
from steppe.plugins.rising_threshold import Rising, Threshold, activated_bias
from steppe.plugins.sparsify import sparsification_of, take_out_
from steppe.record import config_of
from steppe.sharding import is_sharded

_BIAS_SETTING = "mlp_bias"  # of the configs of Llama and its kin
_logger = logging.getLogger(__name__)


def fold_(model: nn.Module) -> nn.Module:
    """Move the thresholds of `RisingThreshold` into the biases, and take the plug-in out.

    ``b − τ · s_u`` takes the place of the bias b of `up`, of a gated block's `gate`, in the same
    Parameter; where there is none, one is made. What is left computes the same and needs no steppe
    to be loaded, if no other plug-in is in the model. Other plug-ins stay.

    A Hugging Face model whose stock class has no bias there gets it by its config where that has a
    setting for it (``mlp_bias``); where it has none (T5, Qwen 2) a warning says that
    ``from_pretrained`` would leave the bias out.

    Args:
        model: the model, accelerated or not; wrappers are seen through.

    Returns:
        The model.

    Raises:
        SparsificationError: there is no threshold (any more), no batch was seen yet, or the model
            is sharded.
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
    blocks = [threshold.block for _, thresholds in folded for threshold in thresholds]
    for _, thresholds in folded:
        for threshold in thresholds:
            _check(threshold)
    bare = [block for block in blocks if _has_no_bias(block.activated)]
    with torch.no_grad():
        for block in blocks:
            bias = activated_bias(block)
            assert bias is not None
            _bias_of(block.activated).copy_(bias)
    for applied, _ in folded:
        take_out_(root, applied)
    if bare:
        _make_loadable(root, bare)
    return model


def _check(threshold: Threshold) -> None:
    """Refuse a threshold that is not known yet, or a bias that is not whole."""
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
    if is_sharded(linear_weight(block.activated)):
        raise SparsificationError(
            f"fold_: {block.name} is sharded over processes. Save the model, load it in one process"
            " with steppe.load_pretrained, and fold it there"
        )


def _has_no_bias(layer: Any) -> bool:
    return layer.bias is None


def _bias_of(layer: Any) -> Tensor:
    """The bias of a layer, or the part of a larger one; where there is none, a new one of zeros."""
    if layer.bias is None:
        whole: Any = layer.whole if isinstance(layer, Half) else layer
        weight = linear_weight(layer)
        zeros = torch.zeros(whole.out_features, dtype=weight.dtype, device=weight.device)
        whole.bias = nn.Parameter(zeros, requires_grad=weight.requires_grad)
    bias: Tensor = layer.bias
    return bias


def _make_loadable(root: nn.Module, bare: Sequence[MLPBlock]) -> None:
    """Let the stock class of a Hugging Face model know the new biases, or say that it cannot."""
    configs = {id(config): config for block in bare if (config := _bias_config(root, block))}
    for config in configs.values():
        setattr(config, _BIAS_SETTING, True)
    # The setting is for every linear layer of every block.
    for block in find_blocks(root) if configs else ():
        if id(_bias_config(root, block)) in configs:
            for layer in block.layers:
                _bias_of(layer)
    lost = [block.name for block in bare if _bias_config(root, block) is None]
    if lost and any(hasattr(module, "save_pretrained") for module in root.modules()):
        _logger.warning(
            "fold_: %s has a bias now that its stock class does not have, so from_pretrained would"
            " leave it out. Save the state_dict, or save the model before fold_: with its threshold"
            " steppe.load_pretrained brings it back, and accelerate_ takes it as it is",
            lost[0],
        )


def _bias_config(root: nn.Module, block: MLPBlock) -> Any:
    """The nearest config around a block that says whether its layers have biases, or None."""
    around = [
        config
        for module in root.modules()  # outermost first
        if hasattr(config := config_of(module), _BIAS_SETTING)
        and block.activated in set(module.modules())
    ]
    return around[-1] if around else None
