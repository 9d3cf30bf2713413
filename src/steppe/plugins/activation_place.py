"""Putting another activation in the place of a block's own."""

from __future__ import annotations

from torch import nn

from steppe.blocks.block import MLPBlock
from steppe.blocks.linear import linear_weight
from steppe.errors import UnfitBlockError
from steppe.surgery.journal import Journal


def put_activation(block: MLPBlock, activation: nn.Module, journal: Journal) -> None:
    """Put an activation in the place of a block's own.

    Args:
        block: the block.
        activation: elementwise; brought to the block's device and mode.
        journal: takes it back.

    Raises:
        UnfitBlockError: another plug-in of the same call was there first.
    """
    if block.current_act is not block.act:
        raise UnfitBlockError(
            f"{block.name}: two plug-ins change the activation, which is"
            f" {type(block.current_act).__name__} now; give one of them"
        )
    activation.to(linear_weight(block.down).device).train(block.down.training)
    journal.set_attribute(block.act_slot, activation)
    for slot, value in block.act_flags:
        journal.set_attribute(slot, value)
