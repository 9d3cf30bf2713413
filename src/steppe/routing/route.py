"""Leads a block's input around its own modules, to where the whole block is computed at once.

In a routed call `up` (of a gated block: `gate`) hands its input on as it is, the activation and the
dropout let it pass, a gated `up` multiplies it by one, and `down` gets it and computes the block.
That works wherever the modules hang, also in layers whose MLP is no module of its own.

A call begins where the forward pass of the block's owner does, the innermost module that holds all
its parts, and belongs to one thread. Whether it is routed is decided once, by the first part that
runs. A part that is called for itself, as by somebody who reads pre-activations, does what it
always did. While torch.compile traces there are no such calls: parts then tell a routed call by the
width of their input, which is the model's and not the hidden one.
"""

from __future__ import annotations

import itertools
import threading
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from enum import Enum, auto
from functools import partial
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules import module as global_hooks

from steppe.activations import Activation, is_relu
from steppe.blocks.bare import HOOKS
from steppe.blocks.block import MLPBlock, Slot
from steppe.blocks.experts import Expert, SharedActivation
from steppe.blocks.fused import Half, HalvesForward
from steppe.blocks.inline import AROUND, WrittenOut
from steppe.errors import AccelerationError
from steppe.ops.outcome import OWN_MODULES, Outcome
from steppe.ops.plan import Plan
from steppe.surgery.journal import Journal
from steppe.surgery.swapping import is_own_hook, plain_class
from steppe.wiring.witness import Witness

_ROUTES = "_steppe_routes"  # on each part and each owner: the routes that it belongs to
_GLOBAL_HOOKS = tuple(getattr(global_hooks, f"_global{name}") for name in HOOKS)


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


_observers: weakref.WeakKeyDictionary[nn.Module, list[SupportObserver]]
_observers = weakref.WeakKeyDictionary()


def observers_of(down: nn.Module) -> list[SupportObserver]:
    """Who wants to be told of the routed calls of the block with this last layer; to be changed.

    Beside the modules and not on a route, since a block may be routed while it is watched.
    """
    return _observers.setdefault(down, [])


class RoutedComputation(Protocol):
    """What computes a block in a routed call."""

    def __call__(self, route: Route, x: Tensor, plan: Plan | None) -> Tensor:
        """The block's output ``[*, D]`` from its input ``[*, D]``; tells the route's observers.

        Args:
            route: of the block.
            x: the input.
            plan: of the call; None while torch.compile traces it.
        """

    is_again: Callable[[Tensor], bool]
    run_again: Callable[[Tensor], Tensor | None]

    def take_stock(self, route: Route) -> None:
        """Tell a route of the calls like the last one that were made since it was told."""

    def has_too_little(self, x: Tensor) -> str:
        """Why a call has too little to do; empty if it has enough."""

    def plan_and_count(self, x: Tensor, traced: bool) -> Plan:
        """How a call runs; asked once a call, which it counts."""

    def trial(self, x: Tensor) -> Plan:
        """The plan of a call in a trial."""

    def unfit(self) -> str:
        """Why no call is possible now, whatever its input; empty if calls are."""

    def forget(self) -> None:
        """Free what is kept between calls."""


class Trial(Enum):
    """How a block is run to see whether it may be routed."""

    WITNESSED = auto()  # by its own modules, before the eyes of a witness
    ROUTED = auto()


class _Part(NamedTuple):
    """A module of a routed block, and what it has to be for its calls to be led around it."""

    module: nn.Module
    name: str  # of the module in its parent
    siblings: dict[str, nn.Module | None]  # of the parent
    kind: type[nn.Module]  # its class, as accelerate_ has left it
    forward: Callable[..., Any]  # of that class
    plain: type[nn.Module]  # the class that it had before
    plain_forward: Callable[..., Any]

    def foreign(self) -> str:
        """What of others has come to this module; empty for nothing."""
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


Places = dict[int, tuple[nn.Module, str]]
"""By a module's id, one that it is a child of, and its name there."""


def places_of(root: nn.Module) -> Places:
    """Where the modules of a model are."""
    return {
        id(module): (parent, name)
        for parent in root.modules()
        for name, module in parent._modules.items()
    }


def _part(module: nn.Module, place: tuple[nn.Module, str], plain: type[nn.Module]) -> _Part:
    parent, name = place
    kind = type(module)
    return _Part(module, name, parent._modules, kind, kind.forward, plain, plain.forward)


def has_foreign_forward(module: object) -> bool:
    """Whether somebody else has given a module another forward."""
    own = getattr(module, "__dict__", {}).get("forward")
    return own is not None and not isinstance(own, HalvesForward)


class _Call:
    """The call of a block that a thread is in."""

    __slots__ = ("arrived", "is_again", "is_routed", "passed", "plan", "route", "witness", "x")

    def __init__(self, route: Route) -> None:
        self.route = route
        self.is_routed: bool | None = None  # None: no part has run yet
        self.is_again = False  # a decoding step like the last one
        self.witness: Witness | None = None
        self.plan: Plan | None = None  # decided by the first part
        self.x: Tensor | None = None  # of a routed call, the block's input
        self.passed = False  # the activation has let it pass
        self.arrived = False  # a routed run of the block has ended before

    def end(self) -> None:
        """Be ready for the next one: an owner may run its block more than once."""
        self.is_routed = self.plan = self.x = self.witness = None
        self.is_again = self.passed = False

    def refuse_other(self, x: Tensor, part: str) -> None:
        """Refuse what is not the block's input, where a routed call hands that around.

        The owner's forward does something else than when `accelerate_` looked at it, as by a flag,
        and what it has done to the input it would have done to a hidden tensor.
        """
        if x is not self.x and (self.x is None or not _are_equal(x, self.x)):
            raise self.route.is_lost(f"{part} does not get what was handed to it")


class _Calls(threading.local):
    """The calls that a thread is in, innermost last."""

    def __init__(self) -> None:
        self.stack: list[_Call] = []


_calls = _Calls()


class Route:
    """The way around the modules of one block.

    Args:
        block: the block.
        owner: the innermost module that holds all parts.
        computation: computes the block from its input.

    Attributes:
        observers: told of every routed call; those of `observers_of` the block's `down`.
        dense_holds: how many want the block's own modules to run.
        unfit: by mode (training or not), why the block's wiring is not that of its pattern; empty
            if it is; no entry while nobody has looked.
        trial: how the next calls are to run, whatever it costs; for
            `steppe.acceleration.dry_run` alone.
        dropout: the probability that the owner would hand to a function, which drops nothing now.
    """

    def __init__(
        self,
        block: MLPBlock,
        owner: nn.Module,
        computation: RoutedComputation,
    ) -> None:
        self.block = block
        self.owner = owner
        self.observers = observers_of(block.down)
        self.dense_holds = 0
        self.unfit: dict[bool, str] = {}
        self._last: Outcome | None = None
        self._calls: Counter[str] = Counter()
        self.trial: Trial | None = None
        self.dropout = 0.0
        self.computation = computation
        self._parts: list[_Part] = []
        self._modes = block.down.__dict__  # has the mode without a look-up by nn.Module
        self._number = next(_numbers)
        _by_number[self._number] = self

    def leads_around(self, x: Tensor, call: _Call | None) -> bool:
        """Whether a call is routed; the first part that asks decides.

        Args:
            x: the block's input.
            call: that the part belongs to; None while torch.compile traces.
        """
        if call is None:
            return not self._plan(x, traced=True).reason
        if call.is_routed is None:
            call.x = x
            if self.trial is None and self._is_again(x):
                call.is_again = call.is_routed = True
                return True
            if self.trial is None:
                call.plan = self._plan(x, traced=False)
                reason = call.plan.reason
                if not reason and self._modes["training"] not in self.unfit:
                    reason = "its wiring is looked at in this call"
                    call.witness = Witness(self.block)
            elif self.trial is Trial.WITNESSED:
                reason = "a trial"
                call.witness = Witness(self.block)
            else:
                call.plan, reason = self.computation.trial(x), ""
            call.is_routed = not reason
            if reason:
                call.x = None
            if reason and self.trial is None:
                self._note_own(x, reason)
        return call.is_routed

    def _note_own(self, x: Tensor, reason: str) -> None:
        """Take down that the block's own modules run."""
        rows = x.numel() // max(x.shape[-1], 1) if x.dim() else 0
        trains = torch.is_grad_enabled()
        self.note(Outcome(OWN_MODULES, rows, trains=trains, reason=reason))

    def is_lost(self, what: str) -> AccelerationError:
        """The error for a routed call in which the owner does not do what it did.

        Args:
            what: is different, a sentence.
        """
        return AccelerationError(
            f"{self.block.name}: {type(self.owner).__name__}.forward does not use the block as it"
            f" did when accelerate_ looked at it: {what}. Leave this block out: accelerate_(model,"
            " where=...), or take it all back: restore_(model)"
        )

    def is_routed(self, tensor: Tensor) -> bool:
        """Whether what a part after `up` gets, while it is traced, belongs to a routed call."""
        return tensor.dim() > 0 and tensor.shape[-1] == self.block.d_model

    @property
    def last(self) -> Outcome | None:
        """How the block ran last, or None."""
        self.computation.take_stock(self)
        return self._last

    @property
    def calls(self) -> Counter[str]:
        """Number of calls so far, by how they ran."""
        self.computation.take_stock(self)
        return self._calls

    def note(self, outcome: Outcome | None, times: int = 1) -> None:
        """Take down how a call ran, or several calls."""
        if outcome is not None and self.trial is None:
            self.computation.take_stock(self)  # of earlier ones
            self._last = outcome
            self._calls[outcome.how] += times

    def note_wiring(self, witness: Witness) -> None:
        """Take down what a witness of a whole call has seen."""
        self.unfit[self.block.down.training] = witness.mismatch

    def foreign(self) -> str:
        """Why the block's own modules must run: what others have done to it; empty for nothing."""
        slot = self.block.dropout_slot
        if slot is not None and getattr(slot.module, slot.name):
            return f"{slot.name} was set anew"
        for hooks in _GLOBAL_HOOKS:
            if hooks and not all(map(is_own_hook, hooks.values())):
                return "a hook for all modules is not steppe's"
        for part in self._parts:
            module, name, siblings, kind, forward, plain, plain_forward = part
            own = module.__dict__
            # What there is nothing to be said of, written out: it is looked at in each call.
            if (
                own["_forward_hooks"]
                or own["_forward_pre_hooks"]
                or own["_backward_hooks"]
                or own["_backward_pre_hooks"]
                or "forward" in own
                or type(module) is not kind
                or kind.forward is not forward
                or plain.forward is not plain_forward
                or siblings.get(name) is not module
            ):
                reason = part.foreign()
                if reason:
                    return reason
        return ""

    def _is_again(self, x: Tensor) -> bool:
        """Whether a call is a decoding step like the last one: little need be looked at then."""
        return (
            self.computation.is_again(x)
            and not self.dense_holds
            and not self.observers
            and not self.foreign()
            and self.unfit.get(self._modes["training"]) == ""
        )

    def _plan(self, x: Tensor, traced: bool) -> Plan:
        """How this call runs."""
        if self.dense_holds:
            return Plan("the block's own modules were asked for")
        for observer in self.observers:
            if observer.needs_dense:
                return Plan("watch(gradients=True) measures the block's own modules")
        computation = self.computation
        reason = computation.has_too_little(x)
        if not reason and traced:
            reason = _reason_when_traced(self._number)
        elif not reason:
            reason = self.foreign() or self.unfit.get(self._modes["training"], "")
        return Plan(reason) if reason else computation.plan_and_count(x, traced)

    def lay(self, places: Places, journal: Journal) -> None:
        """Put the route into the model.

        Args:
            places: of the model's modules.
            journal: takes it back.
        """
        block = self.block
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
            self.dropout = float(getattr(slot.module, slot.name))
            journal.hold_attribute(slot, 0.0)
            journal.add_forward_pre_hook(block.down, self._drop, first=True)
        for slot, value in block.act_flags:
            journal.set_attribute(slot, value)
        slot = block.act_slot
        for module, behaviour in parts:
            plain = plain_class(type(module))
            self._join(module, behaviour, journal)
            # An activation that was a function has no place yet.
            place = places.get(id(module), (slot.module, slot.name))
            self._parts.append(_part(module, place, plain))
        # They are no parts, but whoever has a hook on one of them sees what flows.
        seen = [layer.whole for layer in block.layers if isinstance(layer, Half)]
        if shared is not None:  # it is not called in a routed call
            seen.append(shared)
        for module in dict.fromkeys(seen):
            place = places.get(id(module), (slot.module, slot.name))
            self._parts.append(_part(module, place, plain_class(type(module))))
        self._join(self.owner, Owning, journal)
        written = self.owner.__dict__.get("forward")
        if isinstance(written, WrittenOut) and AROUND not in written.inline.__dict__:
            journal.add_attribute(Slot(written.inline, AROUND), partial(run_owner, self.owner))

    def drops(self) -> float:
        """The probability that a hidden entry is dropped now."""
        layer: Any = self.block.dropout
        if isinstance(layer, nn.Dropout) and layer.training:
            return float(layer.p)
        return self.dropout if self.owner.training else 0.0

    def _drop(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        """Forward pre-hook on `down`: what the owner's function would do to the hidden tensor."""
        slot = self.block.dropout_slot
        assert slot is not None
        if not (self.dropout and self.owner.training and args) or getattr(slot.module, slot.name):
            return None  # the last: somebody has set the probability anew, and the owner drops
        call = _call_with(module)
        a = args[0]
        if call.is_routed if call is not None else self.is_routed(a):
            return None
        hidden = F.dropout(a, self.dropout, training=True)
        if call is not None and call.witness is not None:
            call.witness.see_dropout_input(a)
            call.witness.see_dropout(hidden)
        return (hidden, *args[1:])

    def _join(self, module: nn.Module, behaviour: type[nn.Module], journal: Journal) -> None:
        """Give a module the behaviour of a part of this route; it may be part of others."""
        routes = module.__dict__.get(_ROUTES)
        if routes is None:
            routes = []
            journal.add_attribute(Slot(module, _ROUTES), routes)
        if not issubclass(type(module), behaviour):
            journal.swap_class(module, behaviour)
        journal.append(routes, self)


_by_number: weakref.WeakValueDictionary[int, Route] = weakref.WeakValueDictionary()
_numbers = itertools.count()


def _reason_when_traced(number: int) -> str:
    """Why a block that torch.compile traces runs its own modules; empty if it need not.

    Runs when it is traced. (An object other than a number cannot be handed to it.)
    """
    route = _by_number[number]
    unknown = "its wiring was not looked at yet: call the model once before torch.compile"
    unfit = route.unfit.get(route.block.down.training, unknown)
    return route.foreign() or unfit or route.computation.unfit()


# As torch.compiler.assume_constant_result does, which loads torch._dynamo, for seconds.
_reason_when_traced._dynamo_marked_constant = True  # type: ignore[attr-defined]


def routes_of(module: nn.Module) -> list[Route]:
    """The routes that a module is part of."""
    routes: list[Route] = module.__dict__.get(_ROUTES, [])
    return routes


def route_of(module: nn.Module) -> Route | None:
    """The route that leads around a linear layer, if one does."""
    return next(iter(routes_of(module)), None)


def owners_of(root: nn.Module, blocks: Sequence[MLPBlock]) -> list[nn.Module]:
    """The innermost module that holds all parts of each block.

    Args:
        root: of the model.
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


class Owning(nn.Module):
    """The innermost module that holds a block's parts: a call of the block begins with its own."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As before."""
        return run_owner(self, super().forward, *args, **kwargs)


def run_owner(owner: nn.Module, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """The forward of a module that holds a block's parts, as a call of the block."""
    routes = owner.__dict__.get(_ROUTES)
    if not routes or torch.compiler.is_compiling():
        return forward(*args, **kwargs)
    stack = _calls.stack
    depth = len(stack)
    for route in routes:
        stack.append(_Call(route))
    try:
        output = forward(*args, **kwargs)
        for call in stack[depth:]:
            if call.is_routed:
                raise call.route.is_lost("its last layer is not called")
        return output
    finally:
        del stack[depth:]


class Entering(nn.Module):
    """`up`, or `gate`: hands its input on."""

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """``[*, D]`` if routed, else ``[*, F]``."""
        call = _call_with(self)
        x = _only(args, kwargs) if call is not None or torch.compiler.is_compiling() else None
        if x is not None and _begins(self, x, call):
            return x
        p: Tensor = super().forward(*args, **kwargs)
        if call is not None and call.witness is not None:
            call.witness.see_activated(p)
        return p


class Multiplying(nn.Module):
    """A gated `up`: what it gives is multiplied."""

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """``[]`` if routed, else ``[*, F]``."""
        call = _call_with(self)
        x = _only(args, kwargs) if call is not None or torch.compiler.is_compiling() else None
        if x is not None and _begins(self, x, call):
            return x.new_ones(())
        up: Tensor = super().forward(*args, **kwargs)
        if call is not None and call.witness is not None:
            call.witness.see_up(up)
        return up


class Passing(nn.Module):
    """The activation, or the dropout: lets the input pass."""

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """``[*, D]`` if routed, else ``[*, F]``."""
        call = _call_with(self)
        x = _only(args, kwargs) if call is not None or torch.compiler.is_compiling() else None
        if x is not None and _goes_on(self, x, call):
            if call is not None and self is not call.route.block.dropout:
                call.passed = True
            return x
        witness = None if call is None or x is None else call.witness
        if witness is None or call is None or x is None:
            output: Tensor = super().forward(*args, **kwargs)
        elif call.route.block.dropout is self:
            witness.see_dropout_input(x)
            output = super().forward(*args, **kwargs)
            witness.see_dropout(output)
        else:
            witness.see_activation_input(x)
            output = super().forward(*args, **kwargs)
            witness.see_activation(output)
        return output


class Arriving(nn.Module):
    """`down`: computes the block."""

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """``[*, D]``."""
        call = _call_with(self)
        x = _only(args, kwargs) if call is not None or torch.compiler.is_compiling() else None
        if x is not None and _goes_on(self, x, call):
            if call is None:
                route = routes_of(self)[0]
                return route.computation(route, x, None)
            route = call.route
            if x is not call.x:  # of a gated block always, multiplied by one
                call.refuse_other(x, "its last layer")
            if not call.passed:
                raise route.is_lost("its activation is not called")
            z = route.computation.run_again(x) if call.is_again else None
            plan = call.plan
            call.end()
            call.arrived = True
            if z is not None:
                return z
            return route.computation(route, x, plan or route.computation.plan_and_count(x, False))
        if call is not None:
            if call.arrived and x is not None and call.route.is_routed(x):
                raise call.route.is_lost("its last layer is called a second time")
            if call.witness is not None and x is not None:
                call.witness.see_down(x)
                call.route.note_wiring(call.witness)
            call.end()
        output: Tensor = super().forward(*args, **kwargs)
        return output


def _only(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """The one tensor that a part is called with, under whatever name; None in any other call."""
    if len(args) == 1 and not kwargs:
        x = args[0]
    elif len(kwargs) == 1 and not args:
        (x,) = kwargs.values()
    else:
        return None
    return x if isinstance(x, Tensor) else None


def _call_with(module: nn.Module) -> _Call | None:
    """The call that a part of a block is in, or None."""
    if torch.compiler.is_compiling():
        return None
    stack = _calls.stack
    routes = module.__dict__.get(_ROUTES) if stack else None
    if not routes:
        return None
    if len(routes) == 1 and stack[-1].route is routes[0]:  # as a rule
        return stack[-1]
    waiting = None
    for call in reversed(stack):
        if call.route in routes:
            if call.is_routed is not None:  # of blocks that share a part, the one that has begun
                return call
            waiting = waiting or call
    return waiting


def _begins(module: nn.Module, x: Tensor, call: _Call | None) -> bool:
    """Whether the part that gets a block's input is led around."""
    if call is not None:
        routed = call.is_routed
        if routed is None:
            return call.route.leads_around(x, call)
        if routed and x is not call.x:
            call.refuse_other(x, f"its {'up' if module is call.route.block.up else 'gate'}")
        return routed
    return any(route.leads_around(x, None) for route in routes_of(module))


def _goes_on(module: nn.Module, x: Tensor, call: _Call | None) -> bool:
    """Whether a later part gets what belongs to a routed call."""
    if call is not None:
        return call.is_routed is True
    return any(route.is_routed(x) for route in routes_of(module))


def _are_equal(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are the same numbers; NaN is NaN."""
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    return torch.equal(one, other) or bool(((one == other) | (one.isnan() & other.isnan())).all())


class _Applied(nn.Module):
    """A function as a module."""

    def __init__(self, function: Activation) -> None:
        super().__init__()
        self.function = function

    def forward(self, p: Tensor) -> Tensor:
        """What the function gives."""
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
