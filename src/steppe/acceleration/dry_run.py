"""The dry run: each routed block once by its own modules and once on the kernels, compared.

A block is run through its owner, on a few tokens of random input, in evaluation and in training,
forward and backward. A witness compares the tensors that its own modules hand on to each other
(`steppe.wiring.witness`): exactly, where results can only be compared within rounding.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from steppe.blocks.bare import HOOKS
from steppe.blocks.linear import PartOfLinear, held_by, linear_weight
from steppe.errors import AccelerationError
from steppe.routing.route import Route, Trial

_TOKENS = 6
# Largest difference of two results, as a share of their norm. The kernels and dense products differ
# by rounding, a hundred times less; a block that computes something else differs by much more.
_TOLERANCE = {
    torch.float64: 1e-6,
    torch.float32: 1e-3,
    torch.float16: 1e-2,
    torch.bfloat16: 5e-2,
}
_NOTHING = 1e-3  # of the largest gradient's norm
_OUTPUT = "the output"
_Results = dict[str, Tensor]


def check_routes(routes: Sequence[Route]) -> None:
    """Compare each block on the kernels with its own modules.

    A block that cannot be run alone is left to the witness of its first call. Gradients are
    compared for the first block of each kind: blocks of the same modules are wired alike.

    Args:
        routes: of the blocks.

    Raises:
        AccelerationError: a block computes something else than its pattern says.
    """
    seen = set()
    with torch.random.fork_rng(devices=[]):
        for route in routes:
            kind = _kind_of(route)
            for training in (False, True):
                _check(route, training, with_gradients=(kind, training) not in seen)
                seen.add((kind, training))
            route.computation.forget()  # a model that trains needs no copies of weights


def _kind_of(route: Route) -> tuple[object, ...]:
    """The properties that blocks share if they are wired alike."""
    parts = (
        (name, type(part), tuple(name for name, _ in part.named_parameters(recurse=False)))
        for name, part in route.owner.named_modules()
    )
    return (type(route.owner), route.block.family, *parts)


def _check(route: Route, training: bool, with_gradients: bool) -> None:
    """Compare one block in one mode."""
    weight = linear_weight(route.block.down)
    is_ordinary = all(
        type(parameter) is nn.Parameter and parameter.device == weight.device
        for layer in route.block.layers
        for parameter in [*layer.parameters(), *_parameters_of(layer).values()]
    )
    if not is_ordinary or not route.computation.can_be_tried(weight):
        return
    if route.foreign() or route.computation.unfit():
        return
    with _alone(route.owner, training), _undropped(route):
        x = 2.0 * torch.randn(1, _TOKENS, route.block.d_model)
        x = x.to(weight)
        with_gradients = with_gradients and not weight.is_inference()
        own = _run_own(route, x, with_gradients)
        if own is None and with_gradients:  # its owner has no gradient
            with_gradients, own = False, _run_own(route, x, False)
        mismatch = route.unfit.get(training)
        if mismatch is None or own is None:
            return  # the witness of the first call will decide
        if not mismatch:
            route.trial = Trial.ROUTED
            try:
                routed = _run(route.owner, x, with_gradients)
                mismatch = _difference(own, routed, _TOLERANCE[weight.dtype])
            except Exception as error:  # a foreign module that cannot take the block's input
                mismatch = f"the kernels' way through it fails: {type(error).__name__}: {error}"
            finally:
                route.trial = None
    if mismatch:
        mode = "in training" if training else "in evaluation"
        raise AccelerationError(
            f"{route.block.name}: is not the block that the pattern {route.block.family!r}"
            f" describes: {mode}, {mismatch}. Leave this block out: accelerate_(model, where=...)"
        )


def _run_own(route: Route, x: Tensor, with_gradients: bool) -> _Results | None:
    """The results of a block's own modules before a witness; None where it cannot run alone."""
    route.trial = Trial.WITNESSED
    try:
        return _run(route.owner, x, with_gradients)
    except Exception:  # of foreign code, which may want more than an input
        return None
    finally:
        route.trial = None


def _run(owner: nn.Module, x: Tensor, with_gradients: bool) -> _Results:
    """The output for an input, and the gradients of a random projection of it, by name."""
    torch.manual_seed(0)  # anything else that is random is the same in each run
    x = x.clone().requires_grad_(with_gradients)
    with torch.set_grad_enabled(with_gradients):
        z = _first_tensor(owner(x))
    results = {_OUTPUT: z.detach()}
    if not with_gradients:
        return results
    parameters = dict(owner.named_parameters())
    for module in owner.modules():
        parameters.update(_parameters_of(module))
    named = {"the input": x, **{n: p for n, p in parameters.items() if p.requires_grad}}
    direction = torch.randn(z.shape, generator=torch.Generator().manual_seed(0)).to(z.dtype)
    grads = torch.autograd.grad(z, list(named.values()), direction, allow_unused=True)
    for (name, tensor), grad in zip(named.items(), grads, strict=True):
        results[f"the gradient of {name}"] = torch.zeros_like(tensor) if grad is None else grad
    return results


def _parameters_of(layer: nn.Module) -> dict[str, nn.Parameter]:
    """The larger parameters that a layer is a part of; empty for most layers."""
    held = held_by(layer) if isinstance(layer, PartOfLinear) else []
    return {name: part for parameters, name in held if (part := parameters.get(name)) is not None}


def _first_tensor(output: Any) -> Tensor:
    """The first tensor in a module's output."""
    if isinstance(output, Tensor):
        return output
    values = output.values() if isinstance(output, dict) else output
    return _first_tensor(next(iter(values)))


def _difference(own: _Results, routed: _Results, tolerance: float) -> str:
    """The first result that differs, and by how much; empty for none."""
    sizes = {name: expected.double().norm().item() for name, expected in own.items()}
    largest = max((size for name, size in sizes.items() if name != _OUTPUT), default=0.0)
    for name, expected in own.items():
        error = (routed[name].double() - expected.double()).norm().item()
        # Some gradients, as of a key's bias, are zero but for rounding.
        floor = 0.0 if name == _OUTPUT else _NOTHING * largest
        if not error <= tolerance * max(sizes[name], floor):  # NaN too
            return f"{name} differs by {error / max(sizes[name], error * 1e-9):.1%}"
    return ""


@contextmanager
def _undropped(route: Route) -> Iterator[None]:
    """A route without the dropout that it applies for its owner."""
    dropout, route.dropout = route.dropout, 0.0
    try:
        yield
    finally:
        route.dropout = dropout


@contextmanager
def _alone(owner: nn.Module, training: bool) -> Iterator[None]:
    """A module without hooks and without dropout, in a mode; all is as it was afterwards."""
    modules = list(owner.modules())
    modes = [module.training for module in modules]
    hooks = [{name: module.__dict__[name] for name in HOOKS} for module in modules]
    dropouts = [
        (module, module.p)
        for module in modules
        if isinstance(module, nn.Dropout) and not isinstance(module.p, Tensor)
    ]
    buffers = [(buffer, buffer.clone()) for buffer in owner.buffers() if not buffer.is_meta]
    try:
        for module in modules:
            module.training = training
            for name in HOOKS:
                module.__dict__[name] = type(module.__dict__[name])()
        for dropout, _ in dropouts:
            dropout.p = 0.0
        yield
    finally:
        for module, mode, of_module in zip(modules, modes, hooks, strict=True):
            module.training = mode
            module.__dict__.update(of_module)
        for dropout, p in dropouts:
            dropout.p = p
        with torch.no_grad():
            for buffer, value in buffers:
                if not torch.equal(buffer, value):
                    buffer.copy_(value)
