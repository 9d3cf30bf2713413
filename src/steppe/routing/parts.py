"""Parts: the behaviour of each module of a routed block, in a routed call and outside of one.

`laying` swaps these behaviours into the classes of the modules. Each calls ``super().forward`` in
all calls that are not routed.

Why the compiler sees another way. While torch.compile traces there is no stack of calls: dynamo
would have to guard on a thread's list, and every call would compile again. So in compiled code a
part has only its input to decide by. The first layer asks the route, and dynamo takes the answer
for a constant; the later parts recognise a routed call by the width of their input, the model's and
not the hidden one. Dynamo's guards on the modules keep the answers of one graph the same.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from steppe.routing.calls import Call, call_with, thread
from steppe.routing.route import ROUTES, routes_of


class Owning(nn.Module):
    """The owner, the innermost module that holds a block's parts: its calls begin the block's."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As before."""
        return run_owner(self, super().forward, *args, **kwargs)


def run_owner(owner: nn.Module, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """The forward of a module that holds a block's parts, as a call of the block."""
    routes = owner.__dict__.get(ROUTES)
    if not routes or torch.compiler.is_compiling():
        return forward(*args, **kwargs)
    calls = thread.calls
    depth = len(calls)
    for route in routes:
        calls.append(Call(route))
    try:
        output = forward(*args, **kwargs)
        for call in calls[depth:]:
            if call.is_routed:
                raise call.route.misuse("its last layer is not called")
        return output
    finally:
        del calls[depth:]


class Entering(nn.Module):
    """`up`, or `gate`: hands its input on."""

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """``[*, D]`` if routed, else ``[*, F]``."""
        call = call_with(self)
        x = _only(args, kwargs) if call is not None or torch.compiler.is_compiling() else None
        if x is not None and _begins(self, x, call):
            return x
        p: Tensor = super().forward(*args, **kwargs)
        if call is not None and call.witness is not None:
            call.witness.see_activated(p)
        return p


class One(Tensor):
    """One, ``[]``: a product with it is the other factor, the tensor itself.

    Nothing is computed, and `Arriving` sees without a look at numbers that it gets the block's
    input. To read them would wait for a GPU, and end a capture.
    """

    x: Tensor  # whose dtype and device it has

    @classmethod
    def __torch_function__(
        cls,
        function: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """The other factor of a product; what a tensor with a one does, in all else."""
        if function in _PRODUCTS and len(args) == 2 and not kwargs:
            others = [factor for factor in args if not isinstance(factor, One)]
            if len(others) == 1 and isinstance(others[0], Tensor):
                return others[0]
        arguments = args, kwargs or {}
        args, kwargs = tree_map_only(One, lambda one: one.x.new_ones(()), arguments)
        return function(*args, **kwargs)


_PRODUCTS = {torch.mul, torch.multiply, Tensor.mul, Tensor.multiply}


def _one_for(x: Tensor) -> Tensor:
    """One beside a block's input."""
    is_plain = type(x) is Tensor and not torch.compiler.is_compiling()
    is_traced = torch.jit.is_tracing()  # type: ignore[attr-defined]  # it is documented
    if torch.is_grad_enabled() or is_traced or not is_plain:
        return x.new_ones(())
    one = torch.empty((), device="cpu").as_subclass(One)
    one.x = x
    return one


class Multiplying(nn.Module):
    """A gated `up`: returns one, by which the owner multiplies; see `One`."""

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """``[]`` if routed, else ``[*, F]``."""
        call = call_with(self)
        x = _only(args, kwargs) if call is not None or torch.compiler.is_compiling() else None
        if x is not None and _begins(self, x, call):
            return _one_for(x)
        up: Tensor = super().forward(*args, **kwargs)
        if call is not None and call.witness is not None:
            call.witness.see_up(up)
        return up


class Passing(nn.Module):
    """The activation, or the dropout: hands its input on."""

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """``[*, D]`` if routed, else ``[*, F]``."""
        call = call_with(self)
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
    """`down`: gets the block's input in a routed call, and computes the block."""

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """``[*, D]``."""
        call = call_with(self)
        x = _only(args, kwargs) if call is not None or torch.compiler.is_compiling() else None
        if x is not None and _goes_on(self, x, call):
            if call is None:
                route = routes_of(self)[0]
                return route.computation(route, x, None)
            route = call.route
            if x is not call.x:  # of a gated block with gradients always, multiplied by one
                call.require_input(x, "its last layer")
            if not call.passed:
                raise route.misuse("its activation is not called")
            z = route.computation.run_again(x) if call.is_again else None
            plan = call.plan
            call.end()
            call.arrived = True
            if z is not None:
                return z
            plan = plan or route.computation.plan_and_count(route, x, False)
            return route.computation(route, x, plan)
        if call is not None:
            if call.arrived and x is not None and call.route.has_input_width(x):
                raise call.route.misuse("its last layer is called a second time")
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


def _begins(module: nn.Module, x: Tensor, call: Call | None) -> bool:
    """Whether a part that gets the block's input hands it on."""
    if call is not None:
        routed = call.is_routed
        if routed is None:
            return call.decide(x)
        if routed and x is not call.x:
            call.require_input(x, f"its {'up' if module is call.route.block.up else 'gate'}")
        return routed
    return any(not route.plan(x, traced=True).reason for route in routes_of(module))


def _goes_on(module: nn.Module, x: Tensor, call: Call | None) -> bool:
    """Whether a later part gets the block's input, in a routed call."""
    if call is not None:
        return call.is_routed is True
    return any(route.has_input_width(x) for route in routes_of(module))
