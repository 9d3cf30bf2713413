"""The native kernels of the single products, float32 and bfloat16; else the reference runs."""

from __future__ import annotations

from torch import Tensor

from steppe.ops import products, reference
from steppe.ops.cpu import calls
from steppe.ops.cpu.calls import Support
from steppe.ops.cpu.library import load


def runs(*tensors: Tensor | None) -> bool:
    """Whether the native kernels are there and take these tensors, which are of one dtype."""
    given = [tensor for tensor in tensors if tensor is not None]
    dtype = given[0].dtype
    return (
        load() is not None
        and dtype in calls.DTYPES
        and all(tensor.dtype == dtype for tensor in given)
    )


@products.compact.register_kernel("cpu")
def _(p: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    if not runs(p):
        return reference.compact(p)
    listed = calls.compact(p.contiguous())
    assert listed is not None  # of any density
    values, support = listed
    return values, support.index, support.offsets


@products.spmm.register_kernel("cpu")
def _(values: Tensor, index: Tensor, offsets: Tensor, rows: int, matrix: Tensor) -> Tensor:
    if not runs(values, matrix):
        return reference.spmm(values, index, offsets, rows, matrix)
    support = Support(index, offsets, rows, matrix.shape[0])
    return calls.spmm(values.contiguous(), support, matrix)


@products.spmm_t.register_kernel("cpu")
def _(values: Tensor, index: Tensor, offsets: Tensor, matrix: Tensor, columns: int) -> Tensor:
    if not runs(values, matrix):
        return reference.spmm_t(values, index, offsets, matrix, columns)
    support = Support(index, offsets, matrix.shape[0], columns)
    turned, (turned_values,) = calls.transpose(support, values.contiguous())
    return calls.spmm(turned_values, turned, matrix)


@products.sddmm.register_kernel("cpu")
def _(index: Tensor, offsets: Tensor, left: Tensor, right: Tensor) -> Tensor:
    if not runs(left, right):
        return reference.sddmm(index, offsets, left, right)
    support = Support(index, offsets, left.shape[0], right.shape[0])
    return calls.sampled(support, calls.pack(left), right)
