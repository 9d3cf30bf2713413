"""A whole MLP block as PyTorch custom ops: schema, fake kernels, autograd.

Who owns what:

- This module owns the schema: the arguments, z, Σ|a| of each token, the gradients, and how autograd
  calls the ops.
- The backend of a device owns `saved`: the five tensors that `mlp` returns behind these, and that
  `mlp_backward`, `support` and `dropout_mask` take. It alone knows their dtypes, their lengths and
  their meaning, and nothing outside of it reads them. Their lengths may depend on the data: the CPU
  keeps the active entries as column-tiled CSR, not one entry more (`steppe.ops.cpu.saved`). Or they
  may be fixed: a GPU would keep a bit mask and a pool of values of fixed capacity
  (`steppe.ops.bitmask`), so that no call waits for a count and a CUDA graph can capture all of it.
- A backend registers a kernel of each op for its device, and with `declare_saved` the shapes of
  `saved`, which the fake kernel gives while a call is traced.
- The bodies below are the reference, and run where no backend is registered. They compute densely
  and save r, `up` and the dropout mask of all T · F entries: lengths that are known beforehand.

`saved` is five tensors and not a list: for an output that is a list, autograd flattens and rebuilds
all arguments and results in Python in each call. A backend that needs fewer leaves others empty.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from steppe.ops import reference
from steppe.ops.reference import Rule, Weights

Five: TypeAlias = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]
Seven: TypeAlias = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]
# Fake tensors like `saved`, from x ``[T, D]``, F, whether the block is gated, and dropout.
FakeSaved: TypeAlias = Callable[[Tensor, int, bool, float], Five]
_fakes: dict[str, FakeSaved] = {}


def declare_saved(device: str, fake: FakeSaved) -> None:
    """Have the fake kernel of `mlp` return a backend's own form of `saved`.

    Args:
        device: type of the device that the backend has registered kernels for.
        fake: makes the tensors.
    """
    _fakes[device] = fake


@torch.library.custom_op("steppe::support", mutates_args=())
def support(
    saved: Sequence[Tensor],
    rows: int,
    columns: int,
    alpha: float,
    beta: float,
    mix: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Where hidden entries are active, and where the activation has a slope.

    An op of its own, since the lengths of `saved` may not be known while a call is traced.

    Args:
        saved: of `mlp`.
        rows: T.
        columns: F.
        alpha: as of `mlp`; so the next two.
        beta: β.
        mix: factor of β.

    Returns:
        a ≠ 0 and σ′ ≠ 0, bool ``[T, F]`` each.
    """
    r, up, *_ = saved
    active, slopes = support_of(r, up, rule_of(alpha, beta, mix, 0.0))
    return active.view(rows, columns), slopes.view(rows, columns)


def support_of(r: Tensor, up: Tensor, rule: Rule) -> tuple[Tensor, Tensor]:
    """`support`, for some entries.

    Args:
        r: max(p, 0), of any shape.
        up: of a gated block, of the same shape; else empty.
        rule: the activation.

    Returns:
        bool, shape of r.
    """
    active = rule.activation(r) != 0
    if up.numel():
        active &= up != 0
    slopes = torch.as_tensor(rule.slope(r) != 0, device=r.device) & (r != 0)
    return active, slopes


@torch.library.custom_op("steppe::dropout_mask", mutates_args=())
def dropout_mask(saved: Sequence[Tensor], rows: int, columns: int) -> Tensor:
    """The hidden entries that dropout has kept, of a call with dropout.

    Args:
        saved: of `mlp`.
        rows: T.
        columns: F.

    Returns:
        bool ``[T · F]``; anything where r = 0.
    """
    return saved[2].clone()


@torch.library.custom_op("steppe::mlp", mutates_args=(), tags=(torch.Tag.nondeterministic_seeded,))
def mlp(
    x: Tensor,
    activated: Tensor,
    activated_bias: Tensor | None,
    up: Tensor | None,
    up_bias: Tensor | None,
    down: Tensor,
    down_bias: Tensor | None,
    alpha: float,
    beta: float,
    mix: Tensor | None,
    dropout: float,
    trains: bool,
    max_density: float | None,
    max_candidates: float | None,
    with_l1: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """An MLP block: ``z = σ(x Wᵀ + b) V + c``, or ``(σ(x Wᵀ + b) ⊙ (x Uᵀ + d)) V + c`` if gated.

    Args:
        x: ``[T, D]``.
        activated: see `Weights`; so the next five, in x's dtype.
        activated_bias: of `activated`.
        up: of a gated block.
        up_bias: of `up`.
        down: ``[F, D]``.
        down_bias: of `down`.
        alpha: α of the rectifier.
        beta: β of it.
        mix: factor of β, 0-dim; None for 1.
        dropout: of the hidden entries.
        trains: whether a backward pass follows.
        max_density: use the sparse kernels up to this density; None for the measured threshold.
        max_candidates: screen the first product up to this share of candidates, see
            `steppe.ops.screening`; None for the measured threshold.
        with_l1: whether Σ|a| is asked for, which a penalty on the activations adds to the loss.

    Returns:
        z ``[T, D]``; Σ|a| of each token, before dropout, ``[T]``, float32 or wider, empty if it was
        not asked for; the five tensors of `saved`.
    """
    weights = Weights(activated, activated_bias, up, up_bias, down, down_bias)
    rule = rule_of(alpha, beta, mix, dropout)
    z, r, up_values, kept = reference.mlp(x, weights, rule)
    l1 = reference.l1(r, up_values, rule, len(x)) if with_l1 else no_l1(x)
    return z, l1, r, up_values, kept, x.new_empty(0), x.new_empty(0)


def no_l1(x: Tensor) -> Tensor:
    """The second result of `mlp` where Σ|a| is not asked for, ``[0]``."""
    return x.new_empty(0, dtype=torch.promote_types(x.dtype, torch.float32))


@torch.library.custom_op("steppe::mlp_backward", mutates_args=())
def mlp_backward(
    grad_z: Tensor,
    grad_l1: Tensor | None,
    x: Tensor,
    activated: Tensor,
    activated_bias: Tensor | None,
    up: Tensor | None,
    up_bias: Tensor | None,
    down: Tensor,
    down_bias: Tensor | None,
    alpha: float,
    beta: float,
    mix: Tensor | None,
    dropout: float,
    saved_0: Tensor,
    saved_1: Tensor,
    saved_2: Tensor,
    saved_3: Tensor,
    saved_4: Tensor,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients of `mlp`: of x and of the six weights, empty where none is needed.

    The gradient of Σ|a|, ``[T]``, lives on the active entries like the rest: it adds
    ``sign(a) · grad_l1`` to that of each hidden entry, before dropout.

    The five of `saved` are arguments one by one: an op with a list of tensors has no batching rule,
    and a Hessian by ``is_grads_batched=True`` needs one.
    """
    weights = Weights(activated, activated_bias, up, up_bias, down, down_bias)
    rule = rule_of(alpha, beta, mix, dropout)
    return dense_backward(grad_z, grad_l1, x, weights, rule, saved_0, saved_1, saved_2, needs)


def dense_backward(
    grad_z: Tensor,
    grad_l1: Tensor | None,
    x: Tensor,
    weights: Weights,
    rule: Rule,
    r: Tensor,
    up: Tensor,
    kept: Tensor,
    needs: Sequence[bool],
) -> Seven:
    """`mlp_backward` by dense products.

    Args:
        grad_z: ``[T, D]``.
        grad_l1: ``[T]``, or None.
        x: ``[T, D]``.
        weights: of the block.
        rule: activation and dropout.
        r: max(p, 0), ``[T · F]``.
        up: of a gated block, ``[T · F]``; else empty.
        kept: the entries that dropout has kept, bool ``[T · F]``; empty without dropout.
        needs: whether each gradient is needed.
    """
    grad_x, grads = reference.mlp_backward(grad_z, grad_l1, x, weights, rule, r, up, kept)
    return only_needed((grad_x, *grads), (x, *weights), needs)


def differentiable_gradients(
    grad_z: Tensor,
    grad_l1: Tensor | None,
    x: Tensor,
    weights: Weights,
    rule: Rule,
    kept: Tensor,
) -> tuple[Tensor, Weights]:
    """`mlp_backward` of a block that is recomputed, dense, so that autograd sees all of it.

    Args:
        grad_z: ``[T, D]``.
        grad_l1: ``[T]``, or None.
        x: ``[T, D]``.
        weights: of the block.
        rule: activation and dropout.
        kept: the entries that dropout has kept, bool ``[T · F]``; empty without dropout.

    Returns:
        The gradients of x and of the weights; None where there is no weight.
    """
    r = torch.relu(reference.linear(x, weights.activated, weights.activated_bias)).flatten()
    up = r.new_empty(0)
    if weights.up is not None:
        up = reference.linear(x, weights.up, weights.up_bias).flatten()
    return reference.mlp_backward(grad_z, grad_l1, x, weights, rule, r, up, kept)


def rule_of(alpha: float, beta: float, mix: Tensor | None, dropout: float) -> Rule:
    """The rule that an op's arguments describe; `mix` is not read, which on a GPU would wait."""
    return Rule(alpha, beta if mix is None else beta * mix, dropout)


def only_needed(
    grads: Sequence[Tensor | None], inputs: Sequence[Tensor | None], needs: Sequence[bool]
) -> Seven:
    """Gradients in the memory layout of their inputs, empty where none is needed."""
    return _seven(laid_out(grads, inputs, needs))


def laid_out(
    grads: Sequence[Tensor | None], inputs: Sequence[Tensor | None], needs: Sequence[bool]
) -> list[Tensor]:
    """`only_needed`, of any number.

    An optimizer, or DDP, would copy a gradient of another layout.
    """
    found = []
    nothing = next(tensor for tensor in inputs if tensor is not None).new_empty(0)
    for grad, tensor, needed in zip(grads, inputs, needs, strict=True):
        if grad is None or tensor is None or not needed:
            found.append(nothing.clone())
        elif grad.stride() == tensor.stride():
            found.append(grad)
        else:
            found.append(torch.empty_like(tensor).copy_(grad))
    return found


def fake_gradients(inputs: Sequence[Tensor | None], needs: Sequence[bool]) -> list[Tensor]:
    """Fake tensors like those of `laid_out`."""
    nothing = next(tensor for tensor in inputs if tensor is not None)
    return [
        torch.empty_like(tensor) if tensor is not None and needed else nothing.new_empty(0)
        for tensor, needed in zip(inputs, needs, strict=True)
    ]


def _seven(tensors: Sequence[Tensor]) -> Seven:
    """As a tuple of known length."""
    x, activated, activated_bias, up, up_bias, down, down_bias = tensors
    return x, activated, activated_bias, up, up_bias, down, down_bias


@support.register_fake
def _(
    saved: Sequence[Tensor],
    rows: int,
    columns: int,
    alpha: float,
    beta: float,
    mix: Tensor | None,
) -> tuple[Tensor, Tensor]:
    one, other = (saved[0].new_empty(rows, columns, dtype=torch.bool) for _ in range(2))
    return one, other


@dropout_mask.register_fake
def _(saved: Sequence[Tensor], rows: int, columns: int) -> Tensor:
    return saved[0].new_empty(rows * columns, dtype=torch.bool)


@mlp.register_fake
def _(
    x: Tensor,
    activated: Tensor,
    activated_bias: Tensor | None,
    up: Tensor | None,
    up_bias: Tensor | None,
    down: Tensor,
    down_bias: Tensor | None,
    alpha: float,
    beta: float,
    mix: Tensor | None,
    dropout: float,
    trains: bool,
    max_density: float | None,
    max_candidates: float | None,
    with_l1: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    fake = _fakes.get(x.device.type, fake_dense)
    saved = fake(x, down.shape[0], up is not None, dropout)
    l1 = no_l1(x)
    if with_l1:
        l1 = l1.new_empty(x.shape[0])
    return x.new_empty(x.shape[0], down.shape[1]), l1, *saved


def fake_dense(x: Tensor, hidden: int, gated: bool, dropout: float) -> Five:
    """Fake tensors like `saved` of the reference; arguments as of `FakeSaved`."""
    entries = x.shape[0] * hidden
    return (
        x.new_empty(entries),
        x.new_empty(entries if gated else 0),
        x.new_empty(entries if dropout else 0, dtype=torch.bool),
        x.new_empty(0),
        x.new_empty(0),
    )


@mlp_backward.register_fake
def _(
    grad_z: Tensor,
    grad_l1: Tensor | None,
    x: Tensor,
    activated: Tensor,
    activated_bias: Tensor | None,
    up: Tensor | None,
    up_bias: Tensor | None,
    down: Tensor,
    down_bias: Tensor | None,
    alpha: float,
    beta: float,
    mix: Tensor | None,
    dropout: float,
    saved_0: Tensor,
    saved_1: Tensor,
    saved_2: Tensor,
    saved_3: Tensor,
    saved_4: Tensor,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    inputs = (x, activated, activated_bias, up, up_bias, down, down_bias)
    return _seven(fake_gradients(inputs, needs))


def _save_mlp(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, *weights, ctx.alpha, ctx.beta, mix, ctx.dropout, _, _, _, ctx.with_l1 = inputs
    ctx.save_for_backward(x, *weights, mix, *output[2:])
    ctx.set_materialize_grads(False)


def _mlp_backward(
    ctx: Any, grad_z: Tensor | None, grad_l1: Tensor | None, *_: Any
) -> tuple[Tensor | None, ...]:
    if not ctx.with_l1:
        grad_l1 = None  # of an empty tensor
    if grad_z is None and grad_l1 is None:
        return (None,) * len(ctx.needs_input_grad)
    x, activated, activated_bias, up, up_bias, down, down_bias, mix, *saved = ctx.saved_tensors
    weights = Weights(activated, activated_bias, up, up_bias, down, down_bias)
    if grad_z is None:
        grad_z = x.new_zeros(x.shape[0], down.shape[1])
    if torch.is_grad_enabled():  # create_graph=True: these gradients are differentiated in turn
        rule = rule_of(ctx.alpha, ctx.beta, mix, ctx.dropout)
        kept = x.new_empty(0, dtype=torch.bool)
        if ctx.dropout:
            kept = dropout_mask([part.detach() for part in saved], len(x), len(down))
        of_x, of_weights = differentiable_gradients(grad_z, grad_l1, x, weights, rule, kept)
        return of_x, *of_weights, *(None,) * 8
    needs = ctx.needs_input_grad[:7]
    rule_arguments = ctx.alpha, ctx.beta, mix, ctx.dropout
    grads = mlp_backward(grad_z, grad_l1, x, *weights, *rule_arguments, *saved, needs)
    wanted = zip(grads, needs, strict=True)
    return *(grad if needed else None for grad, needed in wanted), *(None,) * 8


mlp.register_autograd(_mlp_backward, setup_context=_save_mlp)
