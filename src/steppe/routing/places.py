"""Places: where a model holds its modules, and which module holds all parts of a block."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from torch import nn

from steppe.blocks.find import MLPBlock

Places = dict[int, tuple[nn.Module, str]]
"""By the id of a module: the module that it is a child of, and its name there."""


def places_of(root: nn.Module) -> Places:
    """The place of each module of a model."""
    return {
        id(module): (parent, name)
        for parent in root.modules()
        for name, module in parent._modules.items()
    }


def owners_of(root: nn.Module, blocks: Sequence[MLPBlock]) -> list[nn.Module]:
    """The owner of each block: the innermost module that holds all its parts.

    Args:
        root: the model.
        blocks: its blocks.
    """
    names = {id(module): name for name, module in root.named_modules()}
    owners = []
    for block in blocks:
        parts = [block.up, block.down, block.gate, block.dropout, block.act_slot.module]
        known = [names[id(part)].split(".") for part in parts if part is not None]
        shared = list(
            itertools.takewhile(lambda level: len(set(level)) == 1, zip(*known, strict=False))
        )
        path = ".".join(level[0] for level in shared)
        owner = root.get_submodule(path)
        while owner in parts[:-1]:  # `act_slot.module` may be the owner, the others are its parts
            path = path.rpartition(".")[0]
            owner = root.get_submodule(path)
        owners.append(owner)
    return owners
