"""The backward pass of a block on its support: an SDDMM, a transposition and four products."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from steppe.ops.cpu import calls
from steppe.ops.cpu.calls import Support
from steppe.ops.cpu.saved import Saved
from steppe.ops.reference import Rule, Weights


def sparse_gradients(
    grad_z: Tensor,
    grad_l1: Tensor | None,
    x: Tensor,
    weights: Weights,
    rule: Rule,
    saved: Saved,
    needs: Sequence[bool],
) -> list[Tensor | None]:
    """The gradients of x and of the weights.

    Args:
        grad_z: ``[T, D]``.
        grad_l1: of Σ|a| of each token, ``[T]``, or None.
        x: ``[T, D]``.
        weights: of the block.
        rule: activation and dropout.
        saved: of a forward pass that ran sparse.
        needs: whether each of the seven is needed.

    Returns:
        The seven gradients, None where none is needed.
    """
    r, up_values, kept, index, offsets = saved
    support = Support(index, offsets, x.shape[0], weights.down.shape[0])
    needs_x, needs_activated, needs_activated_bias, needs_up, needs_up_bias, needs_down, _ = needs
    panels_g = calls.pack(grad_z, "gradient")
    grad_hidden = calls.sampled(support, panels_g, weights.down)
    hidden = rule.hidden(r, up_values, kept)
    by_entry = None if grad_l1 is None else _by_entry(grad_l1.to(x.dtype), support)
    grad_p, grad_up = rule.split(grad_hidden, r, up_values, kept, by_entry)
    del grad_hidden, by_entry

    turned, (hidden_t, grad_p_t) = calls.transpose(support, hidden, grad_p)
    grads: list[Tensor | None] = [None] * 7
    if needs_down:
        grads[5] = calls.spmm_into(torch.empty_like(weights.down), hidden_t, turned, panels_g)
    if needs_activated:
        grads[1] = calls.spmm_into(torch.empty_like(weights.activated), grad_p_t, turned, x)
    if needs_activated_bias:
        grads[2] = calls.row_sums(grad_p_t, turned)
    if needs[6]:
        grads[6] = grad_z.sum(0)
    if needs_x:
        grads[0] = calls.spmm(grad_p, support, weights.activated)
    if weights.up is None or grad_up is None:
        return grads

    turned, (grad_up_t,) = calls.transpose(support, grad_up)
    if needs_up:
        grads[3] = calls.spmm_into(torch.empty_like(weights.up), grad_up_t, turned, x)
    if needs_up_bias:
        grads[4] = calls.row_sums(grad_up_t, turned)
    if grads[0] is not None:
        calls.spmm_into(grads[0], grad_up, support, weights.up, accumulate=True)
    return grads


def _by_entry(of_tokens: Tensor, support: Support) -> Tensor:
    """The number of each entry's token, ``[nnz]``.

    Args:
        of_tokens: ``[T]``.
        support: of the entries.
    """
    of_rows = of_tokens.repeat(support.tiles)
    return of_rows.repeat_interleave(support.offsets.diff(), output_size=support.entries)
