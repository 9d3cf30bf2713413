"""Building blocks: single sparse products as PyTorch custom ops, for blocks of another kind.

`accelerate_` does not need them: it runs a whole block as one op, `steppe.ops.mlp`. They are for
whoever builds another layer from the same kernels. A sparse matrix ``[T, F]`` is column-tiled CSR,
three tensors: `values` ``[nnz]``, `index` and `offsets` (`steppe.ops.reference` has the layout).

| op | computes |
|---|---|
| `compact` | the CSR of max(p, 0) |
| `spmm` | A M, sparse × dense |
| `spmm_t` | Aᵀ G, transposed sparse × dense |
| `sddmm` | the entries of G Mᵀ on a support: sampled dense × dense |
| `scatter` | the dense matrix of a CSR |
| `gather` | the entries of a dense matrix on a support |

Each has a fake kernel and is differentiable in `values` and in the dense matrices. The gradient of
each is made of the others, so all of them can be differentiated again. Float32 and bfloat16 on the
CPU run the native kernels; any other dtype or device runs the bodies below, which are the
reference. docs/building_blocks.md builds a layer from them.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor

from steppe.ops import reference


@torch.library.custom_op("steppe::compact", mutates_args=())
def compact(p: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The column-tiled CSR of max(p, 0): the entries that are not ≤ 0, so NaN is kept.

    Args:
        p: ``[T, F]``, floating point.

    Returns:
        `values` ``[nnz]`` in p's dtype, `index` int16 ``[nnz]``, `offsets` int64
        ``[tiles · T + 1]``. Only `values` has a gradient.

    Example:
        >>> values, index, offsets = compact(torch.tensor([[-1.0, 2.0], [3.0, 0.0]]))
        >>> values.tolist(), index.tolist(), offsets.tolist()
        ([2.0, 3.0], [1, 0], [0, 1, 2])
    """
    return reference.compact(p)


@torch.library.custom_op("steppe::spmm", mutates_args=())
def spmm(values: Tensor, index: Tensor, offsets: Tensor, rows: int, matrix: Tensor) -> Tensor:
    """Sparse × dense, ``A M``.

    Args:
        values: of A ``[T, F]``, ``[nnz]``.
        index: int16 ``[nnz]``.
        offsets: int64 ``[tiles · T + 1]``.
        rows: T.
        matrix: M, ``[F, D]``, dtype of the values, of any strides.

    Returns:
        ``[T, D]``, dtype of the values.

    Example:
        >>> sparse = compact(torch.tensor([[-1.0, 2.0], [3.0, 0.0]]))
        >>> spmm(*sparse, 2, torch.tensor([[10.0], [1.0]])).tolist()
        [[2.0], [30.0]]
    """
    return reference.spmm(values, index, offsets, rows, matrix)


@torch.library.custom_op("steppe::spmm_t", mutates_args=())
def spmm_t(values: Tensor, index: Tensor, offsets: Tensor, matrix: Tensor, columns: int) -> Tensor:
    """Transposed sparse × dense, ``Aᵀ G``: the gradient of a weight.

    Args:
        values: of A ``[T, F]``, ``[nnz]``.
        index: int16 ``[nnz]``.
        offsets: int64 ``[tiles · T + 1]``.
        matrix: G, ``[T, D]``, dtype of the values, of any strides.
        columns: F.

    Returns:
        ``[F, D]``, dtype of the values.

    Example:
        >>> sparse = compact(torch.tensor([[-1.0, 2.0], [3.0, 0.0]]))
        >>> spmm_t(*sparse, torch.tensor([[10.0], [1.0]]), 2).tolist()
        [[3.0], [20.0]]
    """
    return reference.spmm_t(values, index, offsets, matrix, columns)


@torch.library.custom_op("steppe::sddmm", mutates_args=())
def sddmm(index: Tensor, offsets: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """Sampled dense × dense (SDDMM): the entries of ``G Mᵀ`` on a support.

    Args:
        index: of the support in ``[T, F]``, int16 ``[nnz]``.
        offsets: int64 ``[tiles · T + 1]``.
        left: G, ``[T, D]``.
        right: M, ``[F, D]``, dtype of G, of any strides.

    Returns:
        Values ``[nnz]``, dtype of G.

    Example:
        >>> _, index, offsets = compact(torch.tensor([[-1.0, 2.0], [3.0, 0.0]]))
        >>> sddmm(index, offsets, torch.ones(2, 1), torch.tensor([[10.0], [1.0]])).tolist()
        [1.0, 10.0]
    """
    return reference.sddmm(index, offsets, left, right)


@torch.library.custom_op("steppe::scatter", mutates_args=())
def scatter(values: Tensor, index: Tensor, offsets: Tensor, rows: int, columns: int) -> Tensor:
    """The dense matrix of a column-tiled CSR; zero off the support.

    Args:
        values: ``[nnz]``.
        index: int16 ``[nnz]``.
        offsets: int64 ``[tiles · T + 1]``.
        rows: T.
        columns: F.

    Returns:
        ``[T, F]``, dtype of the values.

    Example:
        >>> scatter(*compact(torch.tensor([[-1.0, 2.0], [3.0, 0.0]])), 2, 2).tolist()
        [[0.0, 2.0], [3.0, 0.0]]
    """
    return reference.densify(values, index, offsets, rows, columns)


@torch.library.custom_op("steppe::gather", mutates_args=())
def gather(matrix: Tensor, index: Tensor, offsets: Tensor) -> Tensor:
    """The entries of a dense matrix on a support: the inverse of `scatter`.

    Args:
        matrix: ``[T, F]``.
        index: int16 ``[nnz]``.
        offsets: int64 ``[tiles · T + 1]``.

    Returns:
        Values ``[nnz]``, dtype of the matrix.

    Example:
        >>> _, index, offsets = compact(torch.tensor([[-1.0, 2.0], [3.0, 0.0]]))
        >>> gather(torch.tensor([[1.0, 2.0], [3.0, 4.0]]), index, offsets).tolist()
        [2.0, 3.0]
    """
    return matrix[reference.positions(index, offsets, *matrix.shape)]


def sampled(index: Tensor, offsets: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """The old name of `sddmm`, here and as an op."""
    warnings.warn("steppe::sampled is now called steppe::sddmm", DeprecationWarning, stacklevel=2)
    return sddmm(index, offsets, left, right)


torch.library.define(
    "steppe::sampled", "(Tensor index, Tensor offsets, Tensor left, Tensor right) -> Tensor"
)
torch.library.impl("steppe::sampled", "CompositeImplicitAutograd", sampled)


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


@sddmm.register_fake
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
    grad_values = sddmm(index, offsets, grad, matrix) if needs[0] else None
    grad_matrix = spmm_t(values, index, offsets, grad, matrix.shape[0]) if needs[4] else None
    return grad_values, None, None, None, grad_matrix


def _save_spmm_t(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    values, index, offsets, matrix, _ = inputs
    ctx.save_for_backward(values, index, offsets, matrix)


def _spmm_t_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    values, index, offsets, matrix = ctx.saved_tensors
    needs = ctx.needs_input_grad
    grad_values = sddmm(index, offsets, matrix, grad) if needs[0] else None
    grad_matrix = spmm(values, index, offsets, matrix.shape[0], grad) if needs[3] else None
    return grad_values, None, None, grad_matrix, None


def _save_sddmm(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _sddmm_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
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

sddmm.register_autograd(_sddmm_backward, setup_context=_save_sddmm)

scatter.register_autograd(_scatter_backward, setup_context=_save_scatter)

gather.register_autograd(_gather_backward, setup_context=_save_gather)
