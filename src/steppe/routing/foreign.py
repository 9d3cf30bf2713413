"""Foreign changes: hooks, forwards, classes and modules that others have put into a block."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import nn
from torch.nn.modules import module as global_hooks

from steppe.blocks.bare import HOOKS
from steppe.blocks.fused import HalvesForward
from steppe.surgery.swapping import is_own_hook

GLOBAL_HOOKS = tuple(getattr(global_hooks, f"_global{name}") for name in HOOKS)


class Part(NamedTuple):
    """A module of a routed block, as it was when the route was laid."""

    module: nn.Module
    name: str  # of the module in its parent
    siblings: dict[str, nn.Module | None]  # of the parent
    kind: type[nn.Module]  # its class, swapped
    forward: Callable[..., Any]  # of that class
    plain: type[nn.Module]  # its class before the swap
    plain_forward: Callable[..., Any]

    def foreign(self) -> str:
        """The first change that others have made to the module since then; empty for none."""
        own = self.module.__dict__
        for kind in HOOKS:
            if own[kind] and not all(map(is_own_hook, own[kind].values())):
                return f"a hook that is not steppe's is on {self.name}"
        if has_foreign_forward(self.module):
            return f"the forward of {self.name} was replaced"
        if type(self.module).forward is not self.forward:
            return f"{self.name} was made a {type(self.module).__name__}"
        if self.plain.forward is not self.plain_forward:
            return f"{self.plain.__name__}.forward was replaced"
        if self.siblings.get(self.name) is not self.module:
            return f"another module stands in the place of {self.name}"
        return ""


def part_at(module: nn.Module, place: tuple[nn.Module, str], plain: type[nn.Module]) -> Part:
    """A module as it is now.

    Args:
        module: the module, its class swapped or not.
        place: its parent, and its name there.
        plain: its class without the swap.
    """
    parent, name = place
    kind = type(module)
    return Part(module, name, parent._modules, kind, kind.forward, plain, plain.forward)


def has_foreign_forward(module: object) -> bool:
    """Whether somebody else has given a module a ``forward`` of its own."""
    own = getattr(module, "__dict__", {}).get("forward")
    return own is not None and not isinstance(own, HalvesForward)
