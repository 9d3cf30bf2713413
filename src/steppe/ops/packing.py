"""A block's training step that keeps its activations packed: two ops, dense products.

Forward: the first product, `act_pack`, the second product. Of the hidden entries it saves one bit
each, and the values of the active ones: about a tenth of a hidden tensor. Backward: `unpack_grad`
gives ∂ℓ/∂p and a, which the dense products of the gradients take. The time is that of a dense
block and a little more; what is saved is memory.

All shapes are known beforehand, and nothing waits for the device: `steppe.ops.room` has the
capacity for the values, and rows that do not fit are computed again. The functions that pack are
those of x's device (`steppe.ops.backend.packer_of`).

`steppe.ops.mlp` has the sparse kernels' op, and what both share: how autograd calls an op, and
gradients that are differentiated in turn, for which the block is computed again, dense.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from steppe.ops import reference
from steppe.ops.backend import packer_of
from steppe.ops.bitmask import WORD, Packed
from steppe.ops.mlp import differentiable_gradients, fake_gradients, laid_out, no_l1, rule_of
from steppe.ops.reference import Weights, ceil_div, transposed_product
from steppe.ops.room import room_of

Five: TypeAlias = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


@torch.library.custom_op("steppe::packed_mlp", mutates_args=())
def packed_mlp(
    x: Tensor,
    activated: Tensor,
    activated_bias: Tensor | None,
    down: Tensor,
    down_bias: Tensor | None,
    alpha: float,
    beta: float,
    mix: Tensor | None,
    capacity: int,
    room: int,
    with_l1: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """An MLP block ``z = σ(x Wᵀ + b) V + c`` that keeps a pack of its pre-activations.

    Args:
        x: ``[T, D]``.
        activated: W, ``[F, D]``, in x's dtype like the next three; of any strides.
        activated_bias: b, ``[F]``.
        down: V, ``[F, D]``, of any strides.
        down_bias: c, ``[D]``.
        alpha: α of the rectifier.
        beta: β of it.
        mix: factor of β, 0-dim; None for 1.
        capacity: how many active entries there is room for. Whatever it is, results are exact.
        room: number of the `steppe.ops.room.Room` that the number of active entries is noted in;
            `NO_ROOM` for none.
        with_l1: whether Σ|a| is asked for, which a penalty on the activations adds to the loss.

    Returns:
        z ``[T, D]``; Σ|a| of each token, ``[T]``, float32 or wider, empty if it was not asked for;
        words, starts and values of the `Packed`.

    Raises:
        KernelError: x's dtype is none that is packed on its device.
    """
    p = reference.linear(x, activated, activated_bias)
    a, packed = packer_of(x).act_pack(p, _coefficients(alpha, beta, mix, p), capacity)
    noted = room_of(room)
    if noted is not None:
        noted.note(packed.starts, p.numel())
    del p
    l1 = no_l1(x)
    if with_l1:  # no entry is negative
        l1 = a.sum(1, dtype=l1.dtype)
    return reference.linear(a, down.T, down_bias), l1, *packed


@torch.library.custom_op("steppe::packed_mlp_backward", mutates_args=())
def packed_mlp_backward(
    grad_z: Tensor,
    grad_l1: Tensor | None,
    x: Tensor,
    activated: Tensor,
    activated_bias: Tensor | None,
    down: Tensor,
    down_bias: Tensor | None,
    alpha: float,
    beta: float,
    mix: Tensor | None,
    words: Tensor,
    starts: Tensor,
    values: Tensor,
    room: int,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients of `packed_mlp`: of x and the four weights, empty where none is needed.

    Products that only such gradients need are left out. The gradient of Σ|a|, ``[T]``, is added to
    that of each active entry.
    """
    needs_x, needs_activated, needs_activated_bias, needs_down, needs_down_bias = needs
    grads: list[Tensor | None] = [None] * 5
    needs_p = needs_x or needs_activated or needs_activated_bias
    if needs_p or needs_down:
        grad_a = grad_z @ down.T if needs_p else grad_z.new_empty(len(x), len(down))
        if grad_l1 is not None and needs_p:
            grad_a += grad_l1.to(grad_a.dtype)[:, None]
        packer, packed = packer_of(x), Packed(words, starts, values)
        coefficients = _coefficients(alpha, beta, mix, grad_a)
        grad_p, a = packer.unpack_grad(grad_a, packed, coefficients)
        packer.recompute_lost_(
            grad_p, a, grad_a, packed, coefficients, x, activated, activated_bias
        )
        del grad_a
        if needs_down:
            grads[3] = transposed_product(a, grad_z, down)
        del a
        if needs_x:
            grads[0] = grad_p @ activated
        if needs_activated:
            grads[1] = transposed_product(grad_p, x, activated)
        if needs_activated_bias:
            grads[2] = grad_p.sum(0)
    if needs_down_bias:
        grads[4] = grad_z.sum(0)
    noted = room_of(room)
    if noted is not None:
        noted.refresh()
    return _five(laid_out(grads, (x, activated, activated_bias, down, down_bias), needs))


def _coefficients(alpha: float, beta: float, mix: Tensor | None, like: Tensor) -> Tensor:
    """α and β as packing takes them; `mix` is not read, which on a GPU would wait."""
    wide = torch.promote_types(like.dtype, torch.float32)
    coefficients = torch.full((2,), alpha, dtype=wide, device=like.device)
    coefficients[1:].fill_(beta)
    if mix is not None:
        coefficients[1:].mul_(mix)
    return coefficients


def _five(tensors: Sequence[Tensor]) -> Five:
    """As a tuple of known length."""
    x, activated, activated_bias, down, down_bias = tensors
    return x, activated, activated_bias, down, down_bias


@packed_mlp.register_fake
def _(
    x: Tensor,
    activated: Tensor,
    activated_bias: Tensor | None,
    down: Tensor,
    down_bias: Tensor | None,
    alpha: float,
    beta: float,
    mix: Tensor | None,
    capacity: int,
    room: int,
    with_l1: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    rows, columns = x.shape[0], down.shape[0]
    l1 = no_l1(x)
    if with_l1:
        l1 = l1.new_empty(rows)
    return (
        x.new_empty(rows, down.shape[1]),
        l1,
        x.new_empty(rows, ceil_div(columns, WORD), dtype=torch.int32),
        x.new_empty(rows + 1, dtype=torch.int64),
        x.new_empty(capacity),
    )


@packed_mlp_backward.register_fake
def _(
    grad_z: Tensor,
    grad_l1: Tensor | None,
    x: Tensor,
    activated: Tensor,
    activated_bias: Tensor | None,
    down: Tensor,
    down_bias: Tensor | None,
    alpha: float,
    beta: float,
    mix: Tensor | None,
    words: Tensor,
    starts: Tensor,
    values: Tensor,
    room: int,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    inputs = (x, activated, activated_bias, down, down_bias)
    return _five(fake_gradients(inputs, needs))


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, *weights, ctx.alpha, ctx.beta, mix, _, ctx.room, ctx.with_l1 = inputs
    ctx.save_for_backward(x, *weights, mix, *output[2:])
    ctx.set_materialize_grads(False)
    room = room_of(ctx.room)
    # What a compiler traces with are tensors of its own, whose graph it may keep for ever.
    ctx.claim = room.claim() if room is not None and type(x) is Tensor else None


def _backward(
    ctx: Any, grad_z: Tensor | None, grad_l1: Tensor | None, *_: Any
) -> tuple[Tensor | None, ...]:
    room = room_of(ctx.room)
    if room is not None and ctx.claim is not None:
        room.end(ctx.claim)
    if not ctx.with_l1:
        grad_l1 = None  # of an empty tensor
    if grad_z is None and grad_l1 is None:
        return (None,) * len(ctx.needs_input_grad)
    x, activated, activated_bias, down, down_bias, mix, *packed = ctx.saved_tensors
    if grad_z is None:
        grad_z = x.new_zeros(x.shape[0], down.shape[1])
    if torch.is_grad_enabled():  # create_graph=True: these gradients are differentiated in turn
        weights = Weights(activated, activated_bias, None, None, down, down_bias)
        rule = rule_of(ctx.alpha, ctx.beta, mix, 0.0)
        nothing = x.new_empty(0, dtype=torch.bool)
        of_x, of = differentiable_gradients(grad_z, grad_l1, x, weights, rule, nothing)
        return of_x, of.activated, of.activated_bias, of.down, of.down_bias, *(None,) * 6
    needs = ctx.needs_input_grad[:5]
    inputs = x, activated, activated_bias, down, down_bias
    rule_arguments = ctx.alpha, ctx.beta, mix
    grads = packed_mlp_backward(grad_z, grad_l1, *inputs, *rule_arguments, *packed, ctx.room, needs)
    wanted = zip(grads, needs, strict=True)
    return *(grad if needed else None for grad, needed in wanted), *(None,) * 6


packed_mlp.register_autograd(_backward, setup_context=_save)
