"""Leads a block's input around its own modules, to where the whole block is computed at once.

In a routed call `up` (of a gated block: `gate`) hands its input on as it is, the activation and the
dropout let it pass, a gated `up` multiplies it by one, and `down` gets it and computes the block.
That works wherever the modules hang, also in layers whose MLP is no module of its own. Each module
tells a routed call by the width of what it gets, which is the model's and not the hidden one; in
any other call it does what it always did.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

from torch import Tensor, nn

from steppe.activations import Activation
from steppe.blocks import MLPBlock, Slot
from steppe.surgery import Journal

_ROUTE = "_steppe_route"  # on each linear layer of a routed block


class SupportObserver(Protocol):
    """What wants to know which entries of a routed block's hidden layer are active."""

    @property
    def needs_dense(self) -> bool:
        """Whether the block's own modules must run now."""

    def see_support(self, x: Tensor, active: Tensor, slopes: Tensor) -> None:
        """Be told of a call.

        Args:
            x: the block's input ``[*, D]``.
            active: a ≠ 0, bool ``[*, F]``.
            slopes: σ′ ≠ 0, bool ``[*, F]``.
        """


class Route:
    """The way around the modules of one block.

    Args:
        block: the block.
        compute: computes the block from its input ``[*, D]``, and tells the observers.
        pays: whether that is worth it for an input.

    Attributes:
        observers: told of every routed call.
        dense_holds: how many want the block's own modules to run.
    """

    def __init__(
        self,
        block: MLPBlock,
        compute: Callable[[Route, Tensor], Tensor],
        pays: Callable[[Tensor], bool],
    ) -> None:
        self.block = block
        self.observers: list[SupportObserver] = []
        self.dense_holds = 0
        self._compute = compute
        self._pays = pays

    def leads_around(self, x: Tensor) -> bool:
        """Whether a call with this input is routed."""
        return (
            self.dense_holds == 0
            and not (self.observers and any(observer.needs_dense for observer in self.observers))
            and self._pays(x)
        )

    def is_routed(self, tensor: Tensor) -> bool:
        """Whether what a module after `up` gets belongs to a routed call."""
        return tensor.shape[-1] == self.block.d_model

    def compute(self, x: Tensor) -> Tensor:
        """The block's output ``[*, D]``."""
        return self._compute(self, x)

    def lay(self, journal: Journal) -> None:
        """Put the route into the model."""
        block = self.block
        first = block.activated
        _swap_class(first, _Entering, self, journal)
        if block.gate is not None:
            _swap_class(block.up, _Multiplying, self, journal)
        _swap_class(block.down, _Arriving, self, journal)
        if block.dropout is not None:
            _swap_class(block.dropout, _Passing, self, journal)
        _swap_class(_own_activation(block.act_slot, journal), _Passing, self, journal)
        for slot, value in block.act_flags:
            journal.set_attribute(slot, value)


def route_of(module: nn.Module) -> Route | None:
    """The route that leads around a module, if one does."""
    return module.__dict__.get(_ROUTE)


@contextmanager
def run_dense(blocks: Sequence[MLPBlock]) -> Iterator[None]:
    """Let the blocks' own modules run, for what differentiates them twice."""
    routes = [route for block in blocks if (route := route_of(block.down)) is not None]
    for route in routes:
        route.dense_holds += 1
    try:
        yield
    finally:
        for route in routes:
            route.dense_holds -= 1


class _Entering(nn.Module):
    """`up`, or `gate`: hands its input on."""

    def forward(self, x: Tensor) -> Tensor:
        """``[*, D]`` if routed, else ``[*, F]``."""
        return x if self.__dict__[_ROUTE].leads_around(x) else super().forward(x)


class _Multiplying(nn.Module):
    """A gated `up`: what it gives is multiplied."""

    def forward(self, x: Tensor) -> Tensor:
        """``[]`` if routed, else ``[*, F]``."""
        return x.new_ones(()) if self.__dict__[_ROUTE].leads_around(x) else super().forward(x)


class _Passing(nn.Module):
    """The activation, or the dropout: lets the input pass."""

    def forward(self, x: Tensor) -> Tensor:
        """``[*, D]`` if routed, else ``[*, F]``."""
        return x if self.__dict__[_ROUTE].is_routed(x) else super().forward(x)


class _Arriving(nn.Module):
    """`down`: computes the block."""

    def forward(self, x: Tensor) -> Tensor:
        """``[*, D]``."""
        route = self.__dict__[_ROUTE]
        return route.compute(x) if route.is_routed(x) else super().forward(x)


_SWAPPED: dict[tuple[type, type], type] = {}


def _swap_class(module: nn.Module, behaviour: type, route: Route, journal: Journal) -> None:
    """Give a module another behaviour; its parameters, hooks and name stay."""
    kind = type(module)
    if (behaviour, kind) not in _SWAPPED:
        _SWAPPED[behaviour, kind] = type(
            kind.__name__, (behaviour, kind), {"__module__": kind.__module__}
        )
    journal.add_attribute(Slot(module, _ROUTE), route)
    journal.set_attribute(Slot(module, "__class__"), _SWAPPED[behaviour, kind])


def _own_activation(slot: Slot, journal: Journal) -> nn.Module:
    """A block's activation as a module that nobody else has."""
    act: Activation = getattr(slot.module, slot.name)
    if isinstance(act, nn.Module) and act.state_dict():
        return act  # a copy would be cut off from its schedule
    own = copy.deepcopy(act) if isinstance(act, nn.Module) else nn.ReLU()
    own.train(slot.module.training)
    journal.set_attribute(slot, own)
    return own
