"""The sparse products as PyTorch custom ops: schema, fake kernel, autograd.

The bodies are the reference. `compact`, `spmm`, `spmm_t` and `sampled` are closed under
differentiation: the gradient of each is made of the others, so all of them can be differentiated
again. `steppe.ops.reference` describes the lists.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from steppe.ops import reference


@torch.library.custom_op("steppe::compact", mutates_args=())
def compact(p: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """See `reference.compact`."""
    return reference.compact(p)


@torch.library.custom_op("steppe::spmm", mutates_args=())
def spmm(values: Tensor, index: Tensor, offsets: Tensor, rows: int, matrix: Tensor) -> Tensor:
    """See `reference.spmm`."""
    return reference.spmm(values, index, offsets, rows, matrix)


@torch.library.custom_op("steppe::spmm_t", mutates_args=())
def spmm_t(values: Tensor, index: Tensor, offsets: Tensor, matrix: Tensor, columns: int) -> Tensor:
    """See `reference.spmm_t`."""
    return reference.spmm_t(values, index, offsets, matrix, columns)


@torch.library.custom_op("steppe::sampled", mutates_args=())
def sampled(index: Tensor, offsets: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """See `reference.sampled`."""
    return reference.sampled(index, offsets, left, right)


@torch.library.custom_op("steppe::scatter", mutates_args=())
def scatter(values: Tensor, index: Tensor, offsets: Tensor, rows: int, columns: int) -> Tensor:
    """See `reference.densify`."""
    return reference.densify(values, index, offsets, rows, columns)


@torch.library.custom_op("steppe::gather", mutates_args=())
def gather(matrix: Tensor, index: Tensor, offsets: Tensor) -> Tensor:
    """The entries of a matrix ``[T, F]`` on a support: the inverse of `scatter`."""
    return matrix[reference.positions(index, offsets, *matrix.shape)]


@compact.register_fake
def _(p: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    entries = torch.library.get_ctx().new_dynamic_size()
    return (
        p.new_empty(entries),
        p.new_empty(entries, dtype=torch.int16),
        p.new_empty(torch.library.get_ctx().new_dynamic_size(), dtype=torch.int64),
    )


@spmm.register_fake
def _(values: Tensor, index: Tensor, offsets: Tensor, rows: int, matrix: Tensor) -> Tensor:
    return values.new_empty(rows, matrix.shape[1])


@spmm_t.register_fake
def _(values: Tensor, index: Tensor, offsets: Tensor, matrix: Tensor, columns: int) -> Tensor:
    return values.new_empty(columns, matrix.shape[1])


@sampled.register_fake
def _(index: Tensor, offsets: Tensor, left: Tensor, right: Tensor) -> Tensor:
    return left.new_empty(index.shape[0])


@scatter.register_fake
def _(values: Tensor, index: Tensor, offsets: Tensor, rows: int, columns: int) -> Tensor:
    return values.new_empty(rows, columns)


@gather.register_fake
def _(matrix: Tensor, index: Tensor, offsets: Tensor) -> Tensor:
    return matrix.new_empty(index.shape[0])


def _save_compact(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, index, offsets = output
    ctx.save_for_backward(index, offsets)
    ctx.shape = inputs[0].shape
    ctx.set_materialize_grads(False)


def _compact_backward(ctx: Any, grad: Tensor | None, *_: Any) -> Tensor | None:
    index, offsets = ctx.saved_tensors
    return None if grad is None else scatter(grad, index, offsets, *ctx.shape)


def _save_spmm(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    values, index, offsets, ctx.rows, matrix = inputs
    ctx.save_for_backward(values, index, offsets, matrix)


def _spmm_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    values, index, offsets, matrix = ctx.saved_tensors
    needs = ctx.needs_input_grad
    grad_values = sampled(index, offsets, grad, matrix) if needs[0] else None
    grad_matrix = spmm_t(values, index, offsets, grad, matrix.shape[0]) if needs[4] else None
    return grad_values, None, None, None, grad_matrix


def _save_spmm_t(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    values, index, offsets, matrix, _ = inputs
    ctx.save_for_backward(values, index, offsets, matrix)


def _spmm_t_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    values, index, offsets, matrix = ctx.saved_tensors
    needs = ctx.needs_input_grad
    grad_values = sampled(index, offsets, matrix, grad) if needs[0] else None
    grad_matrix = spmm(values, index, offsets, matrix.shape[0], grad) if needs[3] else None
    return grad_values, None, None, grad_matrix, None


def _save_sampled(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _sampled_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    index, offsets, left, right = ctx.saved_tensors
    needs = ctx.needs_input_grad
    grad_left = spmm(grad, index, offsets, left.shape[0], right) if needs[2] else None
    grad_right = spmm_t(grad, index, offsets, left, right.shape[0]) if needs[3] else None
    return None, None, grad_left, grad_right


def _save_scatter(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(inputs[1], inputs[2])


def _scatter_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return gather(grad, *ctx.saved_tensors), None, None, None, None


def _save_gather(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(inputs[1], inputs[2])
    ctx.shape = inputs[0].shape


def _gather_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return scatter(grad, *ctx.saved_tensors, *ctx.shape), None, None


compact.register_autograd(_compact_backward, setup_context=_save_compact)

spmm.register_autograd(_spmm_backward, setup_context=_save_spmm)

spmm_t.register_autograd(_spmm_t_backward, setup_context=_save_spmm_t)

sampled.register_autograd(_sampled_backward, setup_context=_save_sampled)

scatter.register_autograd(_scatter_backward, setup_context=_save_scatter)

gather.register_autograd(_gather_backward, setup_context=_save_gather)
