"""Copies of modules without hooks, to be evaluated in the place of somebody's model."""

from __future__ import annotations

import copy
from collections import OrderedDict

import torch
from torch import nn

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
"""The dicts of a module that hold its hooks."""
_OF_HOOKS = (
    *HOOKS,
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks_with_kwargs",
)


def without_hooks(
    module: nn.Module,
    made: dict[int, nn.Module] | None = None,
    device: torch.device | str | None = None,
) -> nn.Module:
    """A copy of a module and of those below it, without hooks.

    It has the same parameters and buffers of its own, so evaluating it leaves the module as it is.
    Not a deep copy: a hook may hold on to a whole model.

    Args:
        module: any module.
        made: by `id` of a module, the module in its place; copies are added.
        device: of the buffers; where they are by default.
    """
    made = {} if made is None else made
    if id(module) not in made:
        clone = made[id(module)] = copy.copy(module)
        for name in _OF_HOOKS:
            clone.__dict__[name] = OrderedDict()
        clone.__dict__["_buffers"] = {
            name: None if buffer is None else buffer.detach().to(device or buffer.device, copy=True)
            for name, buffer in module._buffers.items()
        }
        clone.__dict__["_modules"] = {
            name: None if child is None else without_hooks(child, made, device)
            for name, child in module._modules.items()
        }
    return made[id(module)]
