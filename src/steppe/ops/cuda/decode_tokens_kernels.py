"""The Triton kernels that `steppe.ops.cuda.decode_tokens` launches, on up to 16 tokens.

`grids_of` puts each token on its grid. `find_active_of_tokens` has the first product of a block,
p = x Kᵀ + b, and in a gated block x Uᵀ + d of the units that are active for any token.
`add_rows_of_tokens` has the second product: it reads the rows of V of these units. The products
are on tensor cores, whose tiles have 16 rows, one for each token. They are compiled once for all
numbers of tokens.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from steppe.ops.cuda.decode_kernels import grid_of, places_of


@triton.jit(do_not_specialize=["T"])
def grids_of(
    x,  # [T, D]
    grids,  # [2, T, WORDS], the bytes of the integers of x: the upper ones, the lower ones
    sizes,  # [3, T], the scale, and not below ‖x‖ and ‖x − x̃‖
    T,
    D: tl.constexpr,
    WORDS: tl.constexpr,
    MOST: tl.constexpr,
    LONGER: tl.constexpr,
    WIDE: tl.constexpr,  # all words, to a power of two
    PDL: tl.constexpr,
):
    """Puts a token on its grid."""
    token = tl.program_id(0)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    j = tl.arange(0, WIDE)
    inside = j < WORDS
    high, low, scale, norm, residual = grid_of(x + token * D, j, inside, D, WORDS, MOST, LONGER)
    tl.store(grids + token * WORDS + j, high, mask=inside)
    tl.store(grids + (T + token) * WORDS + j, low, mask=inside)
    tl.store(sizes + token, scale)
    tl.store(sizes + T + token, norm)
    tl.store(sizes + 2 * T + token, residual)


@triton.jit
def product_of_bytes(
    grids, words, own, is_read, T, LENGTH: tl.constexpr, TOKENS: tl.constexpr, BYTES: tl.constexpr
):
    """I, the products of the integers of x and of K, [TOKENS, units], exactly."""
    token = tl.arange(0, TOKENS)
    high = tl.zeros((TOKENS, own.shape[0]), tl.int32)
    low = tl.zeros((TOKENS, own.shape[0]), tl.int32)
    for start in range(0, LENGTH, BYTES):
        j = start + tl.arange(0, BYTES)
        inside = j < LENGTH
        w = tl.load(
            words + own.to(tl.int64)[:, None] * LENGTH + j[None, :],
            mask=is_read[:, None] & inside[None, :],
            other=0,
        )
        place = grids + token[:, None] * LENGTH + j[None, :]
        is_there = (token < T)[:, None] & inside[None, :]
        high = tl.dot(tl.load(place, mask=is_there, other=0), tl.trans(w), high, out_dtype=tl.int32)
        low = tl.dot(
            tl.load(place + T * LENGTH, mask=is_there, other=0),
            tl.trans(w),
            low,
            out_dtype=tl.int32,
        )
    return (high << 8) + low


@triton.jit
def product_of_rows(
    x,
    weight,
    own,
    is_read,
    T,
    until,
    D: tl.constexpr,
    TOKENS: tl.constexpr,
    STEP: tl.constexpr,
):
    """The products of x with rows of a weight, [TOKENS, units]; rows not to be read are zeros.

    The number for a token and a unit depends on no other token and no other unit. `until` is D, or
    0 if no row is to be read.
    """
    token = tl.arange(0, TOKENS)
    column = tl.arange(0, STEP)
    sums = tl.zeros((TOKENS, own.shape[0]), tl.float32)
    for start in range(0, until, STEP):
        within = start + column < D
        xs = tl.load(
            x + token[:, None] * D + (start + column)[None, :],
            mask=(token < T)[:, None] & within[None, :],
            other=0.0,
        )
        ws = tl.load(
            weight + own.to(tl.int64)[:, None] * D + (start + column)[None, :],
            mask=is_read[:, None] & within[None, :],
            other=0.0,
        )
        sums = tl.dot(xs, tl.trans(ws), sums, input_precision="ieee")
    return sums


@triton.jit(do_not_specialize=["T"])
def find_active_of_tokens(
    x,  # [T, D]
    grids,  # int8 [2, T, 4 WORDS]; without SCREENS these three and bounds are not used
    sizes,  # [3, T]
    words,  # int8 [F, 4 WORDS]
    bounds,  # [4, F]
    weight,  # K, [F, D]
    bias,  # [F]
    up,  # U, [F, D], of a gated block, else None
    up_bias,  # [F], or None
    counts,  # [programs]
    units,  # [programs, ROWS]
    values,  # [programs, ROWS, TOKENS]
    T,
    F,
    alpha,
    beta,
    D: tl.constexpr,
    WORDS: tl.constexpr,
    MORE: tl.constexpr,  # of ‖x‖ ‖k‖, for the rounding of tensor cores
    SCREENS: tl.constexpr,
    PDL: tl.constexpr,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,  # units of a program
    BYTES: tl.constexpr,  # columns of the copy of K at a time
    STEP: tl.constexpr,  # columns of K and of U at a time
):
    """Lists those of ROWS units that are active for any token, and their activations."""
    program = tl.program_id(0)
    first = program * ROWS
    row = tl.arange(0, ROWS)
    own = first + row
    there = own < F
    token = tl.arange(0, TOKENS)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()

    if SCREENS:
        product = product_of_bytes(grids, words, own, there, T, 4 * WORDS, TOKENS, BYTES)
        scale = tl.load(sizes + token, mask=token < T, other=0.0)
        norm = tl.load(sizes + T + token, mask=token < T, other=0.0)
        residual = tl.load(sizes + 2 * T + token, mask=token < T, other=0.0)
        unit = bounds + own
        bound = product.to(tl.float32) * scale[:, None]
        bound *= tl.load(unit, mask=there, other=0.0)[None, :]
        bound += norm[:, None] * tl.load(unit + F, mask=there, other=0.0)[None, :]
        of_residual = tl.load(unit + 2 * F, mask=there, other=0.0)
        bound += (residual + MORE * norm)[:, None] * of_residual[None, :]
        bound += tl.load(unit + 3 * F, mask=there, other=0.0)[None, :]
        possible = (token < T)[:, None] & there[None, :] & ~(bound <= 0.0)
        any_possible = tl.max(possible.to(tl.int32), 0)
        candidate = any_possible > 0
        until = tl.max(any_possible, 0) * D
    else:
        candidate = there
        until = D

    p = product_of_rows(x, weight, own, candidate, T, until, D, TOKENS, STEP)
    p += tl.load(bias + own, mask=candidate, other=0.0).to(tl.float32)[None, :]
    active = (token < T)[:, None] & candidate[None, :] & ~(p <= 0.0)  # NaN is active
    a = tl.where(beta == 0.0, alpha * p, p * (alpha + beta * p))  # without 0 · ∞
    one = tl.max(active.to(tl.int32), 0)
    if up is not None:
        until = tl.max(one, 0) * D
        factor = product_of_rows(x, up, own, one > 0, T, until, D, TOKENS, STEP)
        if up_bias is not None:
            factor += tl.load(up_bias + own, mask=one > 0, other=0.0).to(tl.float32)[None, :]
        a *= factor
    to = first + tl.cumsum(one, 0) - one
    tl.store(units + to, own, mask=one > 0)
    tl.store(
        values + to[None, :] * TOKENS + token[:, None],
        tl.where(active, a, 0.0),
        mask=(one > 0)[None, :] & (token < TOKENS)[:, None],
    )
    tl.store(counts + program, tl.sum(one, 0))


@triton.jit(do_not_specialize=["T"])
def add_rows_of_tokens(
    counts,
    units,
    values,
    weight,  # V, [F, D]
    bias,  # [D]
    z,  # [T, D]
    T,
    D,
    LISTS,
    ALL: tl.constexpr,  # lists, to a power of two
    ROWS: tl.constexpr,  # places of a list
    TOKENS: tl.constexpr,
    PARTS: tl.constexpr,  # sums of their own, one for each warp
    BATCH: tl.constexpr,  # rows of V at a time
    COLUMNS: tl.constexpr,  # of a program
    PRECISION: tl.constexpr,
    PDL: tl.constexpr,
):
    """Some columns of z: the sums of the rows of V that the lists name."""
    d = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    inside = d < D
    token = tl.arange(0, TOKENS)
    b = tl.load(bias + d, mask=inside, other=0.0).to(tl.float32)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    number = tl.arange(0, ALL)
    count = tl.load(counts + number, mask=number < LISTS, other=0)
    end = tl.cumsum(count, 0)
    total = tl.sum(count, 0)
    sums = tl.zeros((PARTS, TOKENS, COLUMNS), tl.float32)
    for start in range(0, total, BATCH):
        entry = start + tl.arange(0, BATCH)
        real = entry < total
        place = places_of(count, end, start, entry, ALL, ROWS, BATCH)
        i = tl.load(units + place, mask=real, other=0)
        a = tl.load(
            values + place[:, None] * TOKENS + token[None, :], mask=real[:, None], other=0.0
        )
        w = tl.load(
            weight + i.to(tl.int64)[:, None] * D + d[None, :],
            mask=real[:, None] & inside[None, :],
            other=0.0,
        ).to(tl.float32)
        a = tl.permute(tl.reshape(a, (PARTS, BATCH // PARTS, TOKENS)), (0, 2, 1))
        w = tl.reshape(w, (PARTS, BATCH // PARTS, COLUMNS))
        sums = tl.dot(a, w, sums, input_precision=PRECISION)
    total_of_token = tl.sum(sums, 0) + b[None, :]
    tl.store(
        z + token[:, None] * D + d[None, :],
        total_of_token.to(z.dtype.element_ty),
        mask=(token < T)[:, None] & inside[None, :],
    )
