"""Activation and pack in two passes over p, unpack and gradient in one: Triton kernels.

`steppe.ops.bitmask` defines what is computed; these give the same bits. A program has one row and
walks along it, so nothing passes between programs: where a row's values start is counted in a first
pass and summed by `torch.cumsum`. A place in the pool taken by one atomic a program would save that
pass, which is one more read of p: by arithmetic 22 µs of a block's 1.3 ms of training at T 4096,
F 8192 in bfloat16 on an H100. But then the order of the values, and on overflow the rows that are
lost, would depend on which program came first; here the bits are always the same, the rows that
are kept are the first ones. And a result of the interpreter, which runs the programs one after the
other, holds on a card, which runs them at once.

Compiled for sm_80, 89, 90 and 100 and interpreted in the tests. An H200 gave the definition's
results, at a third of its memory's speed; docs/gpu.md has the numbers. `recompute_rows`, for values
that did not fit, has run on no card yet.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from steppe.errors import KernelError
from steppe.ops.bitmask import (
    WORD,
    Packed,
    check_gradient,
    check_pre_activations,
    check_sources,
)
from steppe.ops.reference import ceil_div

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
BLOCK = 1024  # columns a step: at 4 warps, one 16-byte load of a 16-bit dtype a thread
# A product and a sum in one rounding would be other bits than torch's, and nothing here waits for
# arithmetic.
OPTIONS: dict[str, Any] = {"num_warps": 4, "enable_fp_fusion": False}
# Of the product of rows that did not fit: rows and columns of a program, and terms a step.
TILE: dict[str, Any] = {"ROWS": 64, "COLUMNS": 64, "STEP": 32}


@triton.jit
def activation(r, alpha, beta):
    """σ from r ≠ 0; without 0 · ∞ where β is 0."""
    return tl.where(beta == 0.0, alpha * r, r * (alpha + beta * r))


@triton.jit
def slope(r, alpha, beta):
    """σ′ from r ≠ 0; without 0 · ∞ where β is 0."""
    return tl.where(beta == 0.0, alpha, alpha + 2.0 * beta * r)


@triton.jit
def count_rows(p, starts, F, BLOCK: tl.constexpr):
    """``starts[t + 1]`` = active entries of row t; ``starts[0]`` = 0."""
    row = tl.program_id(0).to(tl.int64)
    count = tl.zeros((BLOCK,), tl.int32)
    for first in range(0, F, BLOCK):
        column = first + tl.arange(0, BLOCK)
        x = tl.load(p + row * F + column, mask=column < F, other=0.0).to(tl.float32)
        count += (~(x <= 0.0)).to(tl.int32)
    tl.store(starts + 1 + row, tl.sum(count, 0))
    if row == 0:
        tl.store(starts, 0)


@triton.jit(do_not_specialize=["capacity"])
def pack_rows(p, a, words, values, starts, coefficients, F, capacity, BLOCK: tl.constexpr):
    """One row of a, of the bit mask and, if all of it fits, of the values."""
    row = tl.program_id(0).to(tl.int64)
    alpha = tl.load(coefficients)
    beta = tl.load(coefficients + 1)
    start = tl.load(starts + row)
    fits = tl.load(starts + row + 1) <= capacity
    words_a_row = (F + 31) // 32
    lane = tl.arange(0, 32)[None, :]
    # A row of this tile is a word, and the bits of a word are in neighbouring threads.
    for first in range(0, F, BLOCK):
        place = first // 32 + tl.arange(0, BLOCK // 32)
        column = place[:, None] * 32 + lane
        inside = column < F
        x = tl.load(p + row * F + column, mask=inside, other=0.0)
        r = x.to(tl.float32)
        active = ~(r <= 0.0)  # NaN is active
        y = tl.where(active, activation(r, alpha, beta), 0.0)
        tl.store(a + row * F + column, y.to(a.dtype.element_ty), mask=inside)

        bit = active.to(tl.int32)
        word = tl.sum(bit << lane, 1)
        tl.store(words + row * words_a_row + place, word, mask=place < words_a_row)

        count = tl.sum(bit, 1)
        before = (tl.cumsum(count, 0) - count)[:, None] + tl.cumsum(bit, 1) - bit
        tl.store(values + start + before, x, mask=active & fits)
        start += tl.sum(count, 0)


@triton.jit(do_not_specialize=["capacity"])
def unpack_rows(
    grad_a, words, values, starts, coefficients, grad_p, a, F, capacity, BLOCK: tl.constexpr
):
    """One row of ∂ℓ/∂p and of a; NaN for values that were not kept."""
    row = tl.program_id(0).to(tl.int64)
    alpha = tl.load(coefficients)
    beta = tl.load(coefficients + 1)
    start = tl.load(starts + row)
    fits = tl.load(starts + row + 1) <= capacity
    words_a_row = (F + 31) // 32
    for first in range(0, F, BLOCK):
        column = first + tl.arange(0, BLOCK)
        inside = column < F
        word = tl.load(words + row * words_a_row + column // 32, mask=inside, other=0)
        bit = (word >> (column % 32)) & 1
        active = bit != 0
        before = tl.cumsum(bit, 0) - bit  # active entries to the left, in this step
        x = tl.load(values + start + before, mask=active & fits, other=float("nan"))
        r = x.to(tl.float32)
        g = tl.load(grad_a + row * F + column, mask=inside, other=0.0).to(tl.float32)
        dp = tl.where(active, g * slope(r, alpha, beta), 0.0)
        tl.store(grad_p + row * F + column, dp.to(grad_p.dtype.element_ty), mask=inside)
        y = tl.where(active, activation(r, alpha, beta), 0.0)
        tl.store(a + row * F + column, y.to(a.dtype.element_ty), mask=inside)
        start += tl.sum(bit, 0)


@triton.jit(do_not_specialize=["capacity"])
def recompute_rows(
    x,  # [T, D], of any strides
    weight,  # [F, D], of any strides
    bias,  # [F]
    grad_a,
    words,
    starts,
    coefficients,
    grad_p,
    a,
    T,
    F,
    D,
    capacity,
    x_row,
    x_column,
    weight_row,
    weight_column,
    HAS_BIAS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STEP: tl.constexpr,
):
    """∂ℓ/∂p and a of the rows that were not kept, from another p = x Wᵀ + b.

    Rows that are not kept are the last ones, so a program whose last row is kept has nothing to do.
    """
    first = tl.program_id(0) * ROWS
    if tl.load(starts + tl.minimum(first + ROWS, T)) > capacity:
        row = first + tl.arange(0, ROWS)
        column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
        term = tl.arange(0, STEP)
        wide_row = row.to(tl.int64)[:, None]
        wide_column = column.to(tl.int64)[None, :]
        sums = tl.zeros((ROWS, COLUMNS), tl.float32)
        for start in range(0, D, STEP):
            now = start + term
            xs = tl.load(
                x + wide_row * x_row + now[None, :] * x_column,
                mask=(row < T)[:, None] & (now < D)[None, :],
                other=0.0,
            )
            ws = tl.load(
                weight + wide_column * weight_row + now[:, None] * weight_column,
                mask=(column < F)[None, :] & (now < D)[:, None],
                other=0.0,
            )
            sums = tl.dot(xs, ws, sums, input_precision="ieee")
        if HAS_BIAS:
            sums += tl.load(bias + column, mask=column < F, other=0.0).to(tl.float32)[None, :]
        p = sums.to(x.dtype.element_ty).to(tl.float32)
        r = tl.where(p <= 0.0, 0.0, p)  # which leaves NaN as it is

        lost = (row < T) & (tl.load(starts + row + 1, mask=row < T, other=0) > capacity)
        mask = lost[:, None] & (column < F)[None, :]
        words_a_row = (F + 31) // 32
        word = tl.load(words + wide_row * words_a_row + (column // 32)[None, :], mask=mask, other=0)
        active = ((word >> (column % 32)[None, :]) & 1) != 0
        alpha = tl.load(coefficients)
        beta = tl.load(coefficients + 1)
        place = wide_row * F + wide_column
        g = tl.load(grad_a + place, mask=mask, other=0.0).to(tl.float32)
        dp = tl.where(active, g * slope(r, alpha, beta), 0.0)
        tl.store(grad_p + place, dp.to(grad_p.dtype.element_ty), mask=mask)
        y = tl.where(active, activation(r, alpha, beta), 0.0)
        tl.store(a + place, y.to(a.dtype.element_ty), mask=mask)


# Under TRITON_INTERPRET=1 the kernels take tensors of any device.
INTERPRETED = not isinstance(pack_rows, triton.JITFunction)


def act_pack(
    p: Tensor, coefficients: Tensor, capacity: int, block: int = BLOCK
) -> tuple[Tensor, Packed]:
    """`steppe.ops.bitmask.act_pack` on a GPU.

    Args:
        p: ``[T, F]``, float32, bfloat16 or float16, contiguous.
        coefficients: α and β, float32 ``[2]``.
        capacity: how many values there is room for.
        block: columns a step, a power of two ≥ 32; the results do not depend on it.

    Returns:
        a = σ(p), ``[T, F]``, in p's dtype; and the pack.

    Raises:
        KernelError: shapes, dtypes or devices are others.
    """
    check_pre_activations("act_pack", p, coefficients, capacity)
    _check_launch("act_pack", p, block)
    rows, columns = p.shape
    a = torch.empty_like(p)
    words = p.new_empty(rows, ceil_div(columns, WORD), dtype=torch.int32)
    starts = p.new_empty(rows + 1, dtype=torch.int64)
    values = p.new_empty(capacity)
    if not p.numel():
        return a, Packed(words, starts.zero_(), values)
    with torch.cuda.device_of(p):
        count_rows[(rows,)](p, starts, columns, BLOCK=block, **OPTIONS)
        starts = starts.cumsum(0)
        pack_rows[(rows,)](
            p, a, words, values, starts, coefficients, columns, capacity, BLOCK=block, **OPTIONS
        )
    return a, Packed(words, starts, values)


def unpack_grad(
    grad_a: Tensor, packed: Packed, coefficients: Tensor, block: int = BLOCK
) -> tuple[Tensor, Tensor]:
    """`steppe.ops.bitmask.unpack_grad` on a GPU.

    Args:
        grad_a: ∂ℓ/∂a, ``[T, F]``, dtype of the values, contiguous.
        packed: as `act_pack` gave it.
        coefficients: α and β, as for `act_pack`.
        block: columns a step, a power of two ≥ 32; the results do not depend on it.

    Returns:
        ∂ℓ/∂p and a, ``[T, F]`` each, in grad_a's dtype.

    Raises:
        KernelError: shapes, dtypes or devices are others.
    """
    check_gradient("unpack_grad", grad_a, packed, coefficients)
    _check_launch("unpack_grad", grad_a, block)
    words, starts, values = packed
    grad_p, a = torch.empty_like(grad_a), torch.empty_like(grad_a)
    rows, columns = grad_a.shape
    if not grad_a.numel():
        return grad_p, a
    capacity = values.shape[0]
    with torch.cuda.device_of(grad_a):
        unpack_rows[(rows,)](
            grad_a,
            words,
            values,
            starts,
            coefficients,
            grad_p,
            a,
            columns,
            capacity,
            BLOCK=block,
            **OPTIONS,
        )
    return grad_p, a


def recompute_lost_(
    grad_p: Tensor,
    a: Tensor,
    grad_a: Tensor,
    packed: Packed,
    coefficients: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    tile: dict[str, Any] = TILE,
) -> None:
    """`steppe.ops.bitmask.recompute_lost_` on a GPU; where all rows are kept its programs exit.

    Float32 products are of float32, not of TF32.

    Args:
        grad_p: ``[T, F]``, as `unpack_grad` gave it, contiguous; is changed.
        a: so is this.
        grad_a: ∂ℓ/∂a, ``[T, F]``, contiguous.
        packed: as `act_pack` gave it.
        coefficients: α and β, as for `act_pack`.
        x: ``[T, D]``, in grad_a's dtype, of any strides.
        weight: W, ``[F, D]``, in the same dtype, of any strides.
        bias: b, ``[F]``, or None.
        tile: rows and columns of a program, and terms a step; powers of two ≥ 16.

    Raises:
        KernelError: shapes, dtypes or devices are others.
    """
    check_sources("recompute_lost_", grad_p, a, grad_a, packed, coefficients, x, weight, bias)
    _check_launch("recompute_lost_", grad_a, WORD)
    if not grad_a.numel():
        return
    words, starts, values = packed
    (rows, columns), width = grad_a.shape, x.shape[1]
    grid = (ceil_div(rows, tile["ROWS"]), ceil_div(columns, tile["COLUMNS"]))
    with torch.cuda.device_of(grad_a):
        recompute_rows[grid](
            x,
            weight,
            weight if bias is None else bias.contiguous(),
            grad_a,
            words,
            starts,
            coefficients,
            grad_p,
            a,
            rows,
            columns,
            width,
            values.shape[0],
            *x.stride(),
            *weight.stride(),
            HAS_BIAS=bias is not None,
            **tile,
            **OPTIONS,
        )


def _check_launch(where: str, tensor: Tensor, block: int) -> None:
    if not (tensor.is_cuda or INTERPRETED):
        raise KernelError(
            f"{where}: expected tensors on a CUDA device, got {tensor.device}. "
            f"steppe.ops.bitmask.{where} computes the same on any device"
        )
    if tensor.dtype not in DTYPES:
        raise KernelError(
            f"{where}: expected float32, bfloat16 or float16, got {tensor.dtype}. "
            f"steppe.ops.bitmask.{where} takes any floating-point dtype"
        )
    if block < WORD or block & (block - 1):
        raise KernelError(f"{where}: block: expected a power of two ≥ {WORD}, got {block}")
