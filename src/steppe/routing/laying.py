"""Laying: puts a route into a model, by swapping the classes of a block's owner and modules."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from steppe.activations import Activation, is_relu
from steppe.blocks.experts import Expert, SharedActivation
from steppe.blocks.find import Slot
from steppe.blocks.fused import Half
from steppe.blocks.inline import AROUND, WrittenOut
from steppe.routing.calls import call_with
from steppe.routing.foreign import part_at
from steppe.routing.parts import Arriving, Entering, Multiplying, Owning, Passing, run_owner
from steppe.routing.places import Places
from steppe.routing.route import ROUTES, Route
from steppe.surgery.journal import Journal
from steppe.surgery.swapping import plain_class


def lay(route: Route, places: Places, journal: Journal) -> None:
    """Put a route into the model.

    Args:
        route: of a block.
        places: of the model's modules.
        journal: takes it back.
    """
    block = route.block
    parts: list[tuple[nn.Module, type[nn.Module]]] = [(block.activated, Entering)]
    if block.gate is not None:
        parts.append((block.up, Multiplying))
    shared = _shared_activation(block.act_slot)
    parts.append((_activation_module(block.act_slot, journal), Passing))
    if block.dropout is not None:
        parts.append((block.dropout, Passing))
    parts.append((block.down, Arriving))
    if block.dropout_slot is not None:
        slot = block.dropout_slot
        route.dropout = float(getattr(slot.module, slot.name))
        journal.hold_attribute(slot, 0.0)
        journal.add_forward_pre_hook(block.down, partial(_drop, route), first=True)
    for slot, value in block.act_flags:
        journal.set_attribute(slot, value)
    slot = block.act_slot
    for module, behaviour in parts:
        plain = plain_class(type(module))
        _join(route, module, behaviour, journal)
        # An activation that was a function has no place yet.
        place = places.get(id(module), (slot.module, slot.name))
        route.parts.append(part_at(module, place, plain))
    # They are no parts, but a hook on one of them sees hidden tensors.
    seen = [layer.whole for layer in block.layers if isinstance(layer, Half)]
    if shared is not None:  # it is not called in a routed call
        seen.append(shared)
    for module in dict.fromkeys(seen):
        place = places.get(id(module), (slot.module, slot.name))
        route.parts.append(part_at(module, place, plain_class(type(module))))
    _join(route, route.owner, Owning, journal)
    written = route.owner.__dict__.get("forward")
    if isinstance(written, WrittenOut) and AROUND not in written.inline.__dict__:
        journal.add_attribute(Slot(written.inline, AROUND), partial(run_owner, route.owner))


def _join(route: Route, module: nn.Module, behaviour: type[nn.Module], journal: Journal) -> None:
    """Give a module the behaviour of a part of a route; it may be part of others, too."""
    routes = module.__dict__.get(ROUTES)
    if routes is None:
        routes = []
        journal.add_attribute(Slot(module, ROUTES), routes)
    if not issubclass(type(module), behaviour):
        journal.swap_class(module, behaviour)
    journal.append(routes, route)


def _drop(route: Route, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
    """Forward pre-hook on `down`: drops hidden entries as the owner's function would."""
    slot = route.block.dropout_slot
    assert slot is not None
    if not (route.dropout and route.owner.training and args) or getattr(slot.module, slot.name):
        return None  # the last: somebody has set the probability again, and the owner drops
    call = call_with(module)
    a = args[0]
    if call.is_routed if call is not None else route.has_input_width(a):
        return None
    hidden = F.dropout(a, route.dropout, training=True)
    if call is not None and call.witness is not None:
        call.witness.see_dropout_input(a)
        call.witness.see_dropout(hidden)
    return (hidden, *args[1:])


class _Applied(nn.Module):
    """A function as a module."""

    def __init__(self, function: Activation) -> None:
        super().__init__()
        self.function = function

    def forward(self, p: Tensor) -> Tensor:
        """The value of the function."""
        return self.function(p)


def _activation_module(slot: Slot, journal: Journal) -> nn.Module:
    """A block's activation as a module, which takes the place of a function."""
    act: Activation = getattr(slot.module, slot.name)
    module: nn.Module
    if isinstance(slot.module, Expert) and slot.name not in slot.module._modules:
        module = SharedActivation(slot.module.experts).train(slot.module.training)
        journal.set_attribute(slot, module)
        return module
    if isinstance(act, nn.Module):
        return act
    module = (nn.ReLU() if is_relu(act) else _Applied(act)).train(slot.module.training)
    journal.set_attribute(slot, module)
    return module


def _shared_activation(slot: Slot) -> nn.Module | None:
    """A module that is the activation of all experts, if a block's activation is that."""
    act: Activation = getattr(slot.module, slot.name)
    is_shared = isinstance(slot.module, Expert) and slot.name not in slot.module._modules
    return act if is_shared and isinstance(act, nn.Module) else None
