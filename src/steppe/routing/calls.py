"""Calls: the calls of routed blocks that a thread is in, and the decision of each.

Why a call is an object of its own, and not state of the route. One model may serve several threads
at once, so nothing of a call may stand on the model: the stack here belongs to the thread. A block
may run inside another one's owner; an owner may hold many blocks (the experts of a mixture, which
share their activation), run one of them twice, or raise in the middle. So the owner's forward
pushes one call for each of its routes, and takes them off in ``finally``; a part finds its call by
its route, the innermost first. The first part decides whether the call is routed, once, and the
others read that. They could not decide for themselves: a mode, a hook or the count of calls until
the next try may change between two parts, and then one half of the block would hand the input on,
while the other half expects a hidden tensor.
"""

from __future__ import annotations

import threading

import torch
from torch import Tensor, nn

from steppe.ops.plan import Plan
from steppe.routing.route import ROUTES, Route, Trial
from steppe.wiring.witness import Witness


class Call:
    """The call of a block that a thread is in.

    Attributes:
        route: of the block.
        is_routed: whether it is routed; None while no part has run.
        is_again: whether it is a decoding step like the last one.
        witness: compares the tensors that the block's own modules hand on, or None.
        plan: of a routed call, decided by the first part.
        x: the block's input, of a routed call.
        passed: whether the activation has handed it on.
        arrived: whether a routed run of the block has ended before, within the same owner's call.
    """

    __slots__ = ("arrived", "is_again", "is_routed", "passed", "plan", "route", "witness", "x")

    def __init__(self, route: Route) -> None:
        self.route = route
        self.is_routed: bool | None = None
        self.is_again = False
        self.witness: Witness | None = None
        self.plan: Plan | None = None
        self.x: Tensor | None = None
        self.passed = False
        self.arrived = False

    def decide(self, x: Tensor) -> bool:
        """Decide whether the call is routed; called by its first part, once.

        Args:
            x: the block's input.
        """
        self.x = x
        route = self.route
        if route.trial is None and route.is_again(x):
            self.is_again = self.is_routed = True
            return True
        if route.trial is None:
            self.plan = route.plan(x, traced=False)
            reason = self.plan.reason
            if not reason and route.modes["training"] not in route.unfit:
                reason = "its wiring is looked at in this call"
                self.witness = Witness(route.block)
        elif route.trial is Trial.WITNESSED:
            reason = "a trial"
            self.witness = Witness(route.block)
        else:
            self.plan, reason = route.computation.trial(x), ""
        self.is_routed = not reason
        if reason:
            self.x = None
        if reason and route.trial is None:
            route.note_own_modules(x, reason)
        return self.is_routed

    def end(self) -> None:
        """Be ready for the next run of the block: an owner may run it more than once."""
        self.is_routed = self.plan = self.x = self.witness = None
        self.is_again = self.passed = False

    def require_input(self, x: Tensor, part: str) -> None:
        """Refuse a tensor that is not the block's input, where a routed call hands that on.

        The owner's forward then does something else than when `accelerate_` looked at it, as by a
        flag: it changed the input, where it would have changed a hidden tensor.
        """
        if x is not self.x and (self.x is None or not _are_equal(x, self.x)):
            raise self.route.misuse(f"{part} does not get the tensor that was handed on")


class _Stack(threading.local):
    """The calls that a thread is in, innermost last."""

    def __init__(self) -> None:
        self.calls: list[Call] = []


thread = _Stack()


def call_with(module: nn.Module) -> Call | None:
    """The call that a part of a block is in; None outside of one, and while torch.compile traces.

    A part that is called for itself, as by a user who reads pre-activations, is in no call and runs
    its own forward.
    """
    if torch.compiler.is_compiling():
        return None
    calls = thread.calls
    routes = module.__dict__.get(ROUTES) if calls else None
    if not routes:
        return None
    if len(routes) == 1 and calls[-1].route is routes[0]:  # as a rule
        return calls[-1]
    waiting = None
    for call in reversed(calls):
        if call.route in routes:
            if call.is_routed is not None:  # of blocks that share a part, the one that has begun
                return call
            waiting = waiting or call
    return waiting


def _are_equal(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are the same numbers; NaN is NaN."""
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    if type(one) is type(other) is Tensor and one.is_set_to(other):
        return True  # a view of all of it; to read it would wait for a GPU, and end a capture
    return torch.equal(one, other) or bool(((one == other) | (one.isnan() & other.isnan())).all())
