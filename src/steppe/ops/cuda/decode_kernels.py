"""The Triton kernels that `steppe.ops.cuda.decode` launches.

`find_active` has the first product of a block, p = x Kᵀ + b, on one token. With a screen it reads
an int8 copy of K, and of K the rows of the candidates; without one, all of K. `add_rows` has the
second product: it reads the rows of V of the active units.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def dot_of_bytes(w, x, total, DP4A: tl.constexpr):
    """The product of the four int8 in each w with the four in each x, added to total."""
    if DP4A:
        return tl.inline_asm_elementwise(
            "dp4a.s32.s32 $0, $1, $2, $3;",
            "=r,r,r,r",
            [w, x, total],
            dtype=tl.int32,
            is_pure=True,
            pack=1,
        )
    else:
        for left in tl.static_range(0, 32, 8):
            total += ((w << left) >> 24) * ((x << left) >> 24)
        return total


@triton.jit
def word_of(a, b, c, d):
    """An int32 of four int8, a in its lowest byte."""
    return (a & 255) | ((b & 255) << 8) | ((c & 255) << 16) | (d << 24)


@triton.jit
def integers_of(v):
    """The integer next to each v, in float32, as its 256ths, and the rest, in −128 … 127."""
    q = tl.floor(v + 0.5).to(tl.int32)
    low = ((q + 128) & 255) - 128
    return q.to(tl.float32), (q - low) >> 8, low


@triton.jit
def grid_of(
    x, j, inside, D: tl.constexpr, WORDS: tl.constexpr, MOST: tl.constexpr, LONGER: tl.constexpr
):
    """The grid of x, of two bytes, as words like those of K, and its parts of the bound.

    Lengths are sums of squares in units of the grid, which neither overflow nor underflow.
    """
    v0 = tl.load(x + j, mask=inside & (j < D), other=0.0).to(tl.float32)
    v1 = tl.load(x + WORDS + j, mask=inside & (WORDS + j < D), other=0.0).to(tl.float32)
    v2 = tl.load(x + 2 * WORDS + j, mask=inside & (2 * WORDS + j < D), other=0.0).to(tl.float32)
    v3 = tl.load(x + 3 * WORDS + j, mask=inside & (3 * WORDS + j < D), other=0.0).to(tl.float32)
    near = tl.maximum(tl.abs(v0), tl.abs(v1))
    far = tl.maximum(tl.abs(v2), tl.abs(v3))
    largest = tl.max(tl.maximum(near, far), 0)
    scale = largest / MOST
    inverse = tl.where(largest > 0.0, MOST / largest, 0.0)
    v0 *= inverse
    v1 *= inverse
    v2 *= inverse
    v3 *= inverse
    e0, h0, l0 = integers_of(v0)
    e1, h1, l1 = integers_of(v1)
    e2, h2, l2 = integers_of(v2)
    e3, h3, l3 = integers_of(v3)
    high = word_of(h0, h1, h2, h3)
    low = word_of(l0, l1, l2, l3)
    length = tl.sum(v0 * v0 + v1 * v1 + v2 * v2 + v3 * v3, 0)
    e0 -= v0
    e1 -= v1
    e2 -= v2
    e3 -= v3
    off = tl.sum(e0 * e0 + e1 * e1 + e2 * e2 + e3 * e3, 0)
    norm = tl.sqrt(length) * scale * LONGER
    residual = tl.sqrt(off) * scale * LONGER + norm * 1e-6
    # NaN makes all units candidates. What is not finite in x has made NaN of e.
    usable = (largest >= 1e-29) | (largest == 0.0)
    norm = tl.where(usable & (norm < 4.6e18), norm, float("nan"))
    return high, low, scale, norm, residual


@triton.jit
def find_active(
    x,  # [D]
    words,  # [F, WORDS], K as int8; without SCREENS neither this nor bounds is used
    bounds,  # [4, F]
    weight,  # K, [F, D]
    bias,  # [F]
    counts,  # [programs]
    units,  # [programs, ROWS]
    values,  # [programs, ROWS]
    F,
    alpha,
    beta,
    D: tl.constexpr,
    WORDS: tl.constexpr,
    MOST: tl.constexpr,
    LONGER: tl.constexpr,
    SCREENS: tl.constexpr,
    DP4A: tl.constexpr,
    PDL: tl.constexpr,
    ROWS: tl.constexpr,  # units of a program
    GROUP: tl.constexpr,  # units that are screened at a time
    BATCH: tl.constexpr,  # candidates that are computed at a time
    STEP: tl.constexpr,  # columns of K at a time
    WIDE: tl.constexpr,  # all words, to a power of two
):
    """Lists the active ones of ROWS units, and their activations."""
    program = tl.program_id(0)
    first = program * ROWS
    row = tl.arange(0, ROWS)
    if SCREENS:
        j = tl.arange(0, WIDE)
        inside = j < WORDS
        near = tl.arange(0, GROUP)
        rows = words + first.to(tl.int64) * WORDS
        place = near[:, None] * WORDS + j[None, :]
        is_row = first + near < F
        ahead = tl.load(rows + place, mask=inside[None, :] & is_row[:, None], other=0)
        # These loads are on their way before the kernel that makes x has ended. Either line also
        # keeps the compiler from putting them behind those of x.
        if PDL:
            gdc_wait()
        else:
            tl.debug_barrier()
        high, low, scale, norm, residual = grid_of(x, j, inside, D, WORDS, MOST, LONGER)

        products = tl.zeros((ROWS // GROUP, GROUP), tl.int32)
        group = tl.arange(0, ROWS // GROUP)[:, None]
        for number in range(0, ROWS // GROUP):
            now = ahead
            start = (number + 1) * GROUP
            is_row = (start + near < ROWS) & (first + start + near < F)
            ahead = tl.load(
                rows + start * WORDS + place, mask=inside[None, :] & is_row[:, None], other=0
            )
            part = dot_of_bytes(now, high[None, :], 0, DP4A)
            part = dot_of_bytes(now, low[None, :], part << 8, DP4A)
            products = tl.where(group == number, tl.sum(part, 1)[None, :], products)

        there = first + row < F
        unit = bounds + first + row
        bound = tl.reshape(products, (ROWS,)).to(tl.float32) * scale
        bound *= tl.load(unit, mask=there, other=0.0)
        bound += norm * tl.load(unit + F, mask=there, other=0.0)
        bound += residual * tl.load(unit + 2 * F, mask=there, other=0.0)
        bound += tl.load(unit + 3 * F, mask=there, other=0.0)
        candidate = there & ~(bound <= 0.0)
        chosen = candidate.to(tl.int32)
        before = tl.where(candidate, tl.cumsum(chosen, 0) - chosen, -1)
        total = tl.sum(chosen, 0)
    else:
        if PDL:
            gdc_wait()
        total = tl.minimum(F - first, ROWS)
    if PDL:
        gdc_launch_dependents()

    found = 0
    batch = tl.arange(0, BATCH)
    column = tl.arange(0, STEP)
    for begin in range(0, total, BATCH):
        entry = begin + batch
        if SCREENS:
            own = tl.sum(tl.where(before[None, :] == entry[:, None], row[None, :], 0), 1)
        else:
            own = entry
        own = first + own
        real = entry < total
        sums = tl.zeros((BATCH, STEP), tl.float32)
        for c in tl.static_range(0, D, STEP):
            within = c + column < D
            xs = tl.load(x + c + column, mask=within, other=0.0).to(tl.float32)
            ws = tl.load(
                weight + own.to(tl.int64)[:, None] * D + (c + column)[None, :],
                mask=real[:, None] & within[None, :],
                other=0.0,
            ).to(tl.float32)
            sums += ws * xs[None, :]
        p = tl.sum(sums, 1) + tl.load(bias + own, mask=real, other=0.0).to(tl.float32)
        active = real & ~(p <= 0.0)  # NaN is active
        a = tl.where(beta == 0.0, alpha * p, p * (alpha + beta * p))  # without 0 · ∞
        one = active.to(tl.int32)
        to = first + found + tl.cumsum(one, 0) - one
        tl.store(units + to, own, mask=active)
        tl.store(values + to, a, mask=active)
        found += tl.sum(one, 0)
    tl.store(counts + program, found)


@triton.jit
def places_of(count, end, start, entry, ALL: tl.constexpr, ROWS: tl.constexpr, BATCH: tl.constexpr):
    """Where the entries start + arange(BATCH) of all lists lie.

    The list of an entry is the number of lists that end at it or before. Those that end at the
    first entry or before are counted; then one more ends where the histogram says so.
    """
    behind = end - start
    later = (behind > 0) & (behind < BATCH)
    ends = tl.histogram(tl.where(later, behind, 0), BATCH)
    ends = tl.where(entry == start, 0, ends)
    own = tl.sum((behind <= 0).to(tl.int32), 0) + tl.cumsum(ends, 0)
    before = tl.gather(end - count, tl.minimum(own, ALL - 1), 0)
    return own * ROWS + entry - before


@triton.jit
def add_rows(
    counts,
    units,
    values,
    weight,  # V, [F, D]
    bias,  # [D]
    z,  # [D]
    D,
    LISTS,
    ALL: tl.constexpr,  # lists, to a power of two
    ROWS: tl.constexpr,  # places of a list
    BATCH: tl.constexpr,  # rows of V at a time
    COLUMNS: tl.constexpr,  # of a program
    PDL: tl.constexpr,
):
    """Some columns of z: the sum of the rows of V that the lists name."""
    d = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    inside = d < D
    b = tl.load(bias + d, mask=inside, other=0.0).to(tl.float32)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    number = tl.arange(0, ALL)
    count = tl.load(counts + number, mask=number < LISTS, other=0)
    end = tl.cumsum(count, 0)
    total = tl.sum(count, 0)
    sums = tl.zeros((BATCH, COLUMNS), tl.float32)
    for start in range(0, total, BATCH):
        entry = start + tl.arange(0, BATCH)
        real = entry < total
        place = places_of(count, end, start, entry, ALL, ROWS, BATCH)
        i = tl.load(units + place, mask=real, other=0)
        a = tl.load(values + place, mask=real, other=0.0)
        w = tl.load(
            weight + i.to(tl.int64)[:, None] * D + d[None, :],
            mask=real[:, None] & inside[None, :],
            other=0.0,
        )
        sums += w.to(tl.float32) * a[:, None]
    tl.store(z + d, (tl.sum(sums, 0) + b).to(z.dtype.element_ty), mask=inside)
