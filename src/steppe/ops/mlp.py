"""A whole MLP block as a PyTorch custom op: schema, fake kernel, autograd.

The body is the reference. For backward the op saves the list of the active entries only.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from steppe.ops import reference
from steppe.ops.reference import Rule, Weights

Seven: TypeAlias = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


@torch.library.custom_op("steppe::support", mutates_args=())
def support(
    r: Tensor,
    up: Tensor,
    index: Tensor,
    offsets: Tensor,
    rows: int,
    columns: int,
    alpha: float,
    beta: float,
    mix: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Which hidden entries are active, and where the activation has a slope.

    An op of its own, since how many entries `mlp` has listed is not known while a call is traced.

    Args:
        r: of `mlp`; so the next three.
        up: of a gated block, else empty.
        index: as listed.
        offsets: empty where the block was run dense.
        rows: T.
        columns: F.
        alpha: as of `mlp`; so the next two.
        beta: β.
        mix: what β is multiplied by.

    Returns:
        a ≠ 0 and σ′ ≠ 0, bool ``[T, F]`` each.
    """
    rule = rule_of(alpha, beta, mix, 0.0)
    active = rule.activation(r) != 0
    if up.numel():
        active &= up != 0
    slopes = torch.as_tensor(rule.slope(r) != 0, device=r.device) & (r != 0)
    if offsets.numel():
        active = reference.densify(active, index, offsets, rows, columns)
        slopes = reference.densify(slopes, index, offsets, rows, columns)
    return active.view(rows, columns), slopes.view(rows, columns)


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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """An MLP block.

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
        mix: 0-dim, what β is multiplied by; None for 1.
        dropout: of the hidden entries.
        trains: whether a backward pass follows.
        max_density: use the sparse kernels up to this density; None for what was measured on this
            machine.
        max_candidates: screen the first product up to this share of candidates, see
            `steppe.ops.screening`; None for what was measured on this machine.

    Returns:
        z ``[T, D]``, and what the backward pass needs: the values of r = max(p, 0), of a gated
        block's `up`, what dropout keeps, `index` and `offsets`. The last two are empty where the
        block was run dense, with all T · F values.
    """
    weights = Weights(activated, activated_bias, up, up_bias, down, down_bias)
    z, r, up_values, kept = reference.mlp(x, weights, rule_of(alpha, beta, mix, dropout))
    return z, r, up_values, kept, *no_list(x.device)


@torch.library.custom_op("steppe::mlp_backward", mutates_args=())
def mlp_backward(
    grad_z: Tensor,
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
    r: Tensor,
    up_values: Tensor,
    kept: Tensor,
    index: Tensor,
    offsets: Tensor,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients of `mlp`: of x and of the six weights, empty where none is needed."""
    weights = Weights(activated, activated_bias, up, up_bias, down, down_bias)
    rule = rule_of(alpha, beta, mix, dropout)
    return reference_backward(grad_z, x, weights, rule, r, up_values, kept, index, offsets, needs)


def reference_backward(
    grad_z: Tensor,
    x: Tensor,
    weights: Weights,
    rule: Rule,
    r: Tensor,
    up_values: Tensor,
    kept: Tensor,
    index: Tensor,
    offsets: Tensor,
    needs: Sequence[bool],
) -> Seven:
    """`mlp_backward`, dense, also of what a sparse forward pass has kept."""
    shape = x.shape[0], weights.down.shape[0]
    r, up_values, kept = (_densified(part, index, offsets, *shape) for part in (r, up_values, kept))
    grad_x, grads = reference.mlp_backward(grad_z, x, weights, rule, r, up_values, kept)
    return only_needed((grad_x, *grads), (x, *weights), needs)


def differentiable_gradients(
    grad_z: Tensor, x: Tensor, weights: Weights, rule: Rule, kept: Tensor
) -> tuple[Tensor, Weights]:
    """`mlp_backward` of a block that is computed again, dense, so that autograd sees all of it.

    Args:
        grad_z: ``[T, D]``.
        x: ``[T, D]``.
        weights: of the block.
        rule: activation and dropout.
        kept: which entries dropout has kept, bool ``[T · F]``; empty without dropout.

    Returns:
        The gradients of x and of the weights; None where there is no weight.
    """
    r = torch.relu(reference.linear(x, weights.activated, weights.activated_bias)).flatten()
    up = r.new_empty(0)
    if weights.up is not None:
        up = reference.linear(x, weights.up, weights.up_bias).flatten()
    return reference.mlp_backward(grad_z, x, weights, rule, r, up, kept)


def _densified(part: Tensor, index: Tensor, offsets: Tensor, rows: int, columns: int) -> Tensor:
    """All T · F values of what was saved for backward as a list, or as they are."""
    if not offsets.numel() or not part.numel():
        return part
    return reference.densify(part, index, offsets, rows, columns).flatten()


def rule_of(alpha: float, beta: float, mix: Tensor | None, dropout: float) -> Rule:
    """The rule that an op's arguments describe."""
    if mix is None:
        return Rule(alpha, beta, dropout)
    return Rule(alpha, beta * mix.item() if mix.is_cpu else beta * mix, dropout)


def no_list(device: torch.device) -> tuple[Tensor, Tensor]:
    """The `index` and `offsets` of a block that was run dense."""
    return (
        torch.empty(0, dtype=torch.int16, device=device),
        torch.empty(0, dtype=torch.int64, device=device),
    )


def only_needed(
    grads: Sequence[Tensor | None], inputs: Sequence[Tensor | None], needs: Sequence[bool]
) -> Seven:
    """Gradients laid out as their inputs are, empty where none is needed.

    An optimizer, or DDP, would copy a gradient of another layout.
    """
    laid_out = []
    nothing = next(tensor for tensor in inputs if tensor is not None).new_empty(0)
    for grad, tensor, needed in zip(grads, inputs, needs, strict=True):
        if grad is None or tensor is None or not needed:
            laid_out.append(nothing.clone())
        elif grad.stride() == tensor.stride():
            laid_out.append(grad)
        else:
            laid_out.append(torch.empty_like(tensor).copy_(grad))
    return _seven(laid_out)


def _seven(tensors: Sequence[Tensor]) -> Seven:
    """As a tuple of known length."""
    x, activated, activated_bias, up, up_bias, down, down_bias = tensors
    return x, activated, activated_bias, up, up_bias, down, down_bias


@support.register_fake
def _(
    r: Tensor,
    up: Tensor,
    index: Tensor,
    offsets: Tensor,
    rows: int,
    columns: int,
    alpha: float,
    beta: float,
    mix: Tensor | None,
) -> tuple[Tensor, Tensor]:
    shape = rows, columns
    return r.new_empty(shape, dtype=torch.bool), r.new_empty(shape, dtype=torch.bool)


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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    values = torch.library.get_ctx().new_dynamic_size()
    return (
        x.new_empty(x.shape[0], down.shape[1]),
        x.new_empty(values),
        x.new_empty(0 if up is None else values),
        x.new_empty(values if dropout else 0, dtype=torch.bool),
        x.new_empty(torch.library.get_ctx().new_dynamic_size(), dtype=torch.int16),
        x.new_empty(torch.library.get_ctx().new_dynamic_size(), dtype=torch.int64),
    )


@mlp_backward.register_fake
def _(
    grad_z: Tensor,
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
    r: Tensor,
    up_values: Tensor,
    kept: Tensor,
    index: Tensor,
    offsets: Tensor,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    inputs = (x, activated, activated_bias, up, up_bias, down, down_bias)
    return _seven(
        [
            torch.empty_like(tensor) if tensor is not None and needed else x.new_empty(0)
            for tensor, needed in zip(inputs, needs, strict=True)
        ]
    )


def _save_mlp(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, *weights, ctx.alpha, ctx.beta, mix, ctx.dropout, _, _, _ = inputs
    ctx.save_for_backward(x, *weights, mix, *output[1:])
    ctx.set_materialize_grads(False)


def _mlp_backward(ctx: Any, grad_z: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    x, *weights, mix, r, up_values, kept, index, offsets = ctx.saved_tensors
    if grad_z is None:
        return (None,) * len(ctx.needs_input_grad)
    if torch.is_grad_enabled():  # create_graph=True: these gradients are differentiated in turn
        rule = rule_of(ctx.alpha, ctx.beta, mix, ctx.dropout)
        kept = _densified(kept, index, offsets, x.shape[0], weights[4].shape[0])
        of_x, of_weights = differentiable_gradients(grad_z, x, Weights(*weights), rule, kept)
        return of_x, *of_weights, *(None,) * 7
    grads = mlp_backward(
        grad_z,
        x,
        *weights,
        ctx.alpha,
        ctx.beta,
        mix,
        ctx.dropout,
        r,
        up_values,
        kept,
        index,
        offsets,
        ctx.needs_input_grad[:7],
    )
    wanted = zip(grads, ctx.needs_input_grad[:7], strict=True)
    return *(grad if needed else None for grad, needed in wanted), *(None,) * 7


mlp.register_autograd(_mlp_backward, setup_context=_save_mlp)
