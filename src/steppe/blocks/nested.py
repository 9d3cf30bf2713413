"""Encoders that hand nested tensors to their layers."""

from __future__ import annotations

from torch import nn

from steppe.blocks.wrappers import unwrap


def find_nested_tensor_encoders(model: nn.Module) -> list[nn.Module]:
    """The ``nn.TransformerEncoder`` modules, which may hand nested tensors to their layers.

    In evaluation they drop the padding that way, for a fused kernel that runs no hook; a layer with
    a hook then fails on the nested tensor. Whoever adds hooks sets ``use_nested_tensor`` to False.

    Args:
        model: any module.

    Returns:
        The encoders that have ``use_nested_tensor``, on or off.
    """
    return [
        module
        for module in unwrap(model).modules()
        if isinstance(module, nn.TransformerEncoder) and hasattr(module, "use_nested_tensor")
    ]
