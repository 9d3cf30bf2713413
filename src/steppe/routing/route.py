"""Route: the state of one routed block, and whether a call of it may run on the kernels.

`steppe.acceleration.accelerate` says how a routed block works. Here: `foreign` has the changes that
others have made, `observers` has who watches, `places` finds the modules, `calls` keeps the call
that a thread is in, `parts` has the behaviour of each module, and `laying` swaps it in.
"""

from __future__ import annotations

import itertools
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from enum import Enum, auto
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from steppe.blocks.block import MLPBlock
from steppe.errors import AccelerationError
from steppe.ops.outcome import OWN_MODULES, Outcome
from steppe.ops.plan import Plan
from steppe.routing.foreign import GLOBAL_HOOKS, Part
from steppe.routing.observers import observers_of
from steppe.surgery.swapping import is_own_hook
from steppe.wiring.witness import Witness

ROUTES = "_steppe_routes"  # attribute of each part and each owner: the routes that it belongs to


class RoutedComputation(Protocol):
    """Computes a block from its input in a routed call."""

    def __call__(self, route: Route, x: Tensor, plan: Plan | None) -> Tensor:
        """The block's output ``[*, D]`` from its input ``[*, D]``; informs the route's observers.

        Args:
            route: of the block.
            x: the input.
            plan: of the call; None while torch.compile traces it.
        """

    is_again: Callable[[Tensor], bool]
    run_again: Callable[[Tensor], Tensor | None]

    def take_stock(self, route: Route) -> None:
        """Note on a route the repeated calls since the last time that this was asked."""

    def has_too_little(self, x: Tensor) -> str:
        """Why a call has too little to do; empty if it has enough."""

    def plan_and_count(self, route: Route, x: Tensor, traced: bool) -> Plan:
        """The plan of a call; asked once a call, which it counts."""

    def can_be_tried(self, weight: Tensor) -> bool:
        """Whether `trial` has a plan for an input on the device and in the dtype of a weight."""

    def trial(self, x: Tensor) -> Plan:
        """The plan of a call in a trial."""

    def unfit(self) -> str:
        """Why no call is possible now, whatever its input; empty if calls are."""

    def prepare(self) -> str:
        """Make ready for calls in compiled code; why none is possible, empty if some are."""

    def forget(self) -> None:
        """Free the memory that is kept between calls."""


class Trial(Enum):
    """How a block is run to see whether it may be routed."""

    WITNESSED = auto()  # by its own modules, while a witness looks at them
    ROUTED = auto()


class Route:
    """The way around the modules of one block.

    Args:
        block: the block.
        owner: the innermost module that holds all parts.
        computation: computes the block from its input.

    Attributes:
        observers: get the support of every routed call; those of `observers_of` the block's `down`.
        dense_holds: number of holders that want the block's own modules to run.
        unfit: by mode (training or not), why the block's wiring is not that of its pattern; empty
            if it is; no entry while nobody has looked.
        trial: how the next calls run, whatever it costs; set by `steppe.acceleration.dry_run`
            alone.
        dropout: the probability that the owner would hand to a function, which drops nothing now.
        parts: the modules that are checked for foreign changes in each call.
        modes: the attributes of `down`, ``training`` among them.
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
        self.trial: Trial | None = None
        self.dropout = 0.0
        self.computation = computation
        self.parts: list[Part] = []
        self.modes = block.down.__dict__  # quicker than a look-up by nn.Module
        self._last: Outcome | None = None
        self._calls: Counter[str] = Counter()
        self._reasons: Counter[str] = Counter()
        self._number = next(_numbers)
        _by_number[self._number] = self

    def is_again(self, x: Tensor) -> bool:
        """Whether a call is a decoding step like the last one, so that little is checked."""
        return (
            self.computation.is_again(x)
            and not self.dense_holds
            and not self.observers
            and not self.foreign()
            and self.unfit.get(self.modes["training"]) == ""
        )

    def plan(self, x: Tensor, traced: bool) -> Plan:
        """The plan of a call; counts the call unless torch.compile traces it."""
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
            reason = self.foreign() or self.unfit.get(self.modes["training"], "")
        return Plan(reason) if reason else computation.plan_and_count(self, x, traced)

    def foreign(self) -> str:
        """The first change by others, for which the block's own modules must run; empty for none.

        It runs in every call, also in the cheapest decoding step. So the usual answer, nothing, is
        found by comparisons in this one function, and `Part.foreign` makes the sentence.
        """
        slot = self.block.dropout_slot
        if slot is not None and getattr(slot.module, slot.name):
            return f"{slot.name} was changed"
        for hooks in GLOBAL_HOOKS:
            if hooks and not all(map(is_own_hook, hooks.values())):
                return "a hook for all modules is not steppe's"
        for part in self.parts:
            module, name, siblings, kind, forward, plain, plain_forward = part
            own = module.__dict__
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

    def drops(self) -> float:
        """The probability that a hidden entry is dropped now."""
        layer: Any = self.block.dropout
        if isinstance(layer, nn.Dropout) and layer.training:
            return float(layer.p)
        return self.dropout if self.owner.training else 0.0

    def has_input_width(self, tensor: Tensor) -> bool:
        """Whether a tensor is as wide as the block's input, and so belongs to a routed call.

        Only the width tells it while torch.compile traces: a block as wide inside as outside is
        refused by `accelerate_`.
        """
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

    @property
    def reasons(self) -> Counter[str]:
        """Number of calls so far that were not sparse, by the reason."""
        self.computation.take_stock(self)
        return self._reasons

    def note(self, outcome: Outcome | None, times: int = 1) -> None:
        """Note how a call ran, or several equal calls."""
        if outcome is not None and self.trial is None:
            self.computation.take_stock(self)  # of earlier ones
            self._last = outcome
            self._calls[outcome.how] += times
            if outcome.reason:
                self._reasons[outcome.reason] += times

    def note_own_modules(self, x: Tensor, reason: str) -> None:
        """Note that the block's own modules run, and why."""
        rows = x.numel() // max(x.shape[-1], 1) if x.dim() else 0
        trains = torch.is_grad_enabled()
        self.note(Outcome(OWN_MODULES, rows, trains=trains, reason=reason))

    def note_wiring(self, witness: Witness) -> None:
        """Note the findings of a witness that has seen a whole call."""
        self.unfit[self.block.down.training] = witness.mismatch

    def misuse(self, sentence: str) -> AccelerationError:
        """The error for a routed call in which the owner does something else than before.

        Args:
            sentence: the difference.
        """
        return AccelerationError(
            f"{self.block.name}: {type(self.owner).__name__}.forward does not use the block as it"
            f" did when accelerate_ looked at it: {sentence}. Leave this block out:"
            " accelerate_(model, where=...), or take it all back: restore_(model)"
        )


# A route in compiled code. Dynamo takes no object of ours as the argument of a function that it
# calls while it traces, but it takes a number: so routes are numbered, and the table is weak, since
# compiled code may outlive the model.
_by_number: weakref.WeakValueDictionary[int, Route] = weakref.WeakValueDictionary()
_numbers = itertools.count()


def _reason_when_traced(number: int) -> str:
    """Why a block that torch.compile traces runs its own modules; empty if it runs on the kernels.

    Dynamo runs it as it is, once, while it traces, and takes the answer for a constant. So foreign
    changes are noticed when code is compiled, and not in each call of compiled code; dynamo's own
    guards notice other classes and modules.
    """
    route = _by_number[number]
    unknown = "its wiring was not looked at yet: call the model once before torch.compile"
    unfit = route.unfit.get(route.block.down.training, unknown)
    return route.foreign() or unfit or route.computation.prepare()


# As torch.compiler.assume_constant_result does, which loads torch._dynamo, for seconds.
_reason_when_traced._dynamo_marked_constant = True  # type: ignore[attr-defined]


def routes_of(module: nn.Module) -> list[Route]:
    """The routes that a module is part of."""
    routes: list[Route] = module.__dict__.get(ROUTES, [])
    return routes


def route_of(module: nn.Module) -> Route | None:
    """The route that leads around a linear layer, or None."""
    return next(iter(routes_of(module)), None)


@contextmanager
def run_dense(blocks: Sequence[MLPBlock]) -> Iterator[None]:
    """Let the blocks' own modules run, for computations that differentiate them twice."""
    routes = [route for block in blocks if (route := route_of(block.down)) is not None]
    for route in routes:
        route.dense_holds += 1
    try:
        yield
    finally:
        for route in routes:
            route.dense_holds -= 1
