"""The screened first product, by the native kernels; see `steppe.ops.screening` for the bound.

An int8 product and a bound find the candidates, an SDDMM computes their values, and a filter drops
those that are ≤ 0. The result is the CSR that `steppe.ops.cpu.calls.compact` makes from the whole
product.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from steppe.ops.cpu.calls import (
    DECODE_ROWS,
    Panels,
    Support,
    balanced,
    check_vector,
    dtype_code,
    pack,
    pointer,
    refuse,
    rows_are_contiguous,
    sampled,
    tile_for,
)
from steppe.ops.cpu.library import library
from steppe.ops.cpu.memory import lasting, scratch
from steppe.ops.cpu.team import threads
from steppe.ops.reference import TILE_UNIT, ceil_div

MAX_WIDTH = 131_072  # of int8 products: their sums are int32
_GRAIN = 128  # the width is padded to a multiple of it
_TOKEN_BYTES = 32
_TOKENS = 16  # on AMX x is multiplied by so many rows at once
_SAMPLED = 32  # one token in so many is screened first, and two at least
_GOLDEN = 0.6180339887498949


class Screen(NamedTuple):
    """A weight ``[F, D]`` as the screen reads it.

    Attributes:
        integers: uint8 ``[F to 64 / 16, 16 · D to 128]``, larger by 128 than on the grid; within a
            strip of 16 units in the order of the instruction set.
        bounds: float64 ``[4, F to 64]``.
        hidden: F.
        width: D.
    """

    integers: Tensor
    bounds: Tensor
    hidden: int
    width: int


def screen_of(weight: Tensor, buffer: str | None = None) -> Screen:
    """Round a weight to small integers, each row on a grid of its own.

    Args:
        weight: ``[F, D]``, float32 or bfloat16, of any strides.
        buffer: name of the `scratch` to write to; None for `lasting` memory.
    """
    hidden, width = weight.shape
    if width >= MAX_WIDTH:
        refuse(f"a width below {MAX_WIDTH}, got {width}")
    units = ceil_div(hidden, TILE_UNIT) * TILE_UNIT
    shape = (units // 16, 16 * _padded(width))
    if buffer is None:
        integers = lasting(shape, torch.uint8)
        bounds = lasting((4, units), torch.float64)
    else:
        integers = scratch(f"{buffer} integers", shape, _like(torch.uint8))
        bounds = scratch(f"{buffer} bounds", (4, units), _like(torch.float64))
    if rows_are_contiguous(weight):
        source, strides = weight, (weight.stride(0), TILE_UNIT)
    else:
        source = pack(weight, f"{buffer} panels" if buffer else None).data
        strides = (TILE_UNIT, hidden * TILE_UNIT)
    failed = library().steppe_screen_weight(
        source.data_ptr(),
        dtype_code(weight),
        hidden,
        width,
        *strides,
        integers.data_ptr(),
        bounds.data_ptr(),
        threads(),
    )
    if failed:
        raise MemoryError("screen_of: no memory for a row")
    return Screen(integers, bounds, hidden, width)


def token_most(width: int, rows: int) -> int:
    """The largest integer on the grids of x: 127 with VNNI, more on AMX and without either.

    Args:
        width: D.
        rows: of a call; at most `DECODE_ROWS` stands for decoding.
    """
    most: int = library().steppe_token_most(width, int(rows <= DECODE_ROWS))
    return most


class Candidates(NamedTuple):
    """The entries that may be above zero.

    Attributes:
        masks: int64 ``[T, ⌈F / 64⌉]``, a bit for each of 64 units.
        counts: int32 ``[T, ⌈F / 64⌉]``, of the bits that are set.
        share: of all T · F entries.
    """

    masks: Tensor
    counts: Tensor
    share: float


def find_candidates(
    x: Tensor, screen: Screen, bias: Tensor | None, max_share: float = 1.0
) -> Candidates | None:
    """The candidates of a first product.

    Args:
        x: ``[T, D]``, rows contiguous.
        screen: of the weight.
        bias: ``[F]`` of x's dtype, or None.
        max_share: the most of them.

    Returns:
        The candidates, in buffers that the next call writes to; None if they are more.
    """
    rows, width = x.shape
    if width != screen.width:
        refuse(f"width {screen.width}, got {width}")
    if not rows_are_contiguous(x):
        refuse(f"rows of x contiguous, got strides {x.stride()}")
    if bias is not None:
        check_vector(bias, screen.hidden, x)
    padded = ceil_div(rows, _TOKENS) * _TOKENS
    integers = scratch("x integers", (padded, _padded(width)), _like(torch.int16))  # or less: bytes
    tokens = scratch("x tokens", (rows, _TOKEN_BYTES), _like(torch.uint8))
    failed = library().steppe_screen_tokens(
        x.data_ptr(),
        dtype_code(x),
        rows,
        width,
        x.stride(0),
        integers.data_ptr(),
        tokens.data_ptr(),
        threads(),
    )
    if failed:
        raise MemoryError("find_candidates: no memory for a row")
    blocks, entries = ceil_div(screen.hidden, TILE_UNIT), rows * screen.hidden
    masks = scratch("masks", (rows, blocks), _like(torch.int64))
    counts = scratch("counts", (rows, blocks), _like(torch.int32))
    found = library().steppe_screen(
        integers.data_ptr(),
        tokens.data_ptr(),
        dtype_code(x),
        rows,
        width,
        screen.integers.data_ptr(),
        screen.bounds.data_ptr(),
        pointer(bias),
        screen.hidden,
        int(max_share * entries),
        masks.data_ptr(),
        counts.data_ptr(),
        threads(),
    )
    return None if found < 0 else Candidates(masks, counts, found / max(entries, 1))


def sample(x: Tensor) -> Tensor:
    """One row in `_SAMPLED`, spread so that no period of the input is met.

    Args:
        x: ``[T, D]``.
    """
    return x[_sampled_rows(x.shape[0])]


def compact_product(
    x: Panels, weight: Panels | Tensor, bias: Tensor | None, found: Candidates
) -> tuple[Tensor, Support]:
    """The CSR of the entries of ``x Wᵀ + bias`` that are not ≤ 0.

    Three steps: the CSR of the candidates, their values by an SDDMM, and a filter that drops those
    that are ≤ 0 after all.

    Args:
        x: ``[T, D]``.
        weight: ``[F, D]``, as panels or of any strides.
        bias: ``[F]``, or None.
        found: the candidates.

    Returns:
        Values and support.
    """
    rows = x.data.shape[1]
    columns = weight.data.shape[1] if isinstance(weight, Panels) else weight.shape[0]
    support = _support_of(found, rows, columns, x.data.dtype)
    return _filtered(sampled(support, x, weight, bias), support)


def _support_of(found: Candidates, rows: int, columns: int, dtype: torch.dtype) -> Support:
    """Where the candidates are."""
    blocks = ceil_div(columns, TILE_UNIT)
    if found.masks.shape != (rows, blocks):
        refuse(f"masks {(rows, blocks)}, got {tuple(found.masks.shape)}")
    tile = balanced(blocks, tile_for(found.share, rows, dtype))
    tiles = max(ceil_div(blocks * TILE_UNIT, tile), 1)
    offsets = torch.empty(tiles * rows + 1, dtype=torch.int64, device="cpu")
    entries = library().steppe_offsets(
        found.counts.data_ptr(), rows, columns, tile, offsets.data_ptr()
    )
    support = Support.made(offsets, entries, rows, columns, tile)
    library().steppe_index_masks(
        found.masks.data_ptr(),
        rows,
        columns,
        tile,
        offsets.data_ptr(),
        support.index.data_ptr(),
        threads(),
    )
    return support


def _filtered(values: Tensor, support: Support) -> tuple[Tensor, Support]:
    """The entries that are not ≤ 0, in tiles as wide as suits their density."""
    rows, columns, tile = support.rows, support.columns, support.tile
    blocks = ceil_div(columns, TILE_UNIT)
    tiles = max(ceil_div(blocks * TILE_UNIT, tile), 1)
    counts = scratch("kept counts", (tiles * rows,), _like(torch.int32))
    code = dtype_code(values)
    entries = library().steppe_filter_counts(
        values.data_ptr(),
        support.offsets.data_ptr(),
        code,
        tiles * rows,
        counts.data_ptr(),
        threads(),
    )
    density = entries / max(rows * columns, 1)
    merged = _merged(tile, tiles, blocks, tile_for(density, rows, values.dtype))
    offsets = torch.empty(ceil_div(tiles, merged) * rows + 1, dtype=torch.int64, device="cpu")
    kept = Support.made(offsets, entries, rows, columns, merged * tile)
    kept_values = values.new_empty(entries)
    library().steppe_filter(
        values.data_ptr(),
        support.index.data_ptr(),
        support.offsets.data_ptr(),
        counts.data_ptr(),
        code,
        rows,
        tile,
        tiles,
        merged,
        kept.offsets.data_ptr(),
        kept_values.data_ptr(),
        kept.index.data_ptr(),
        threads(),
    )
    return kept_values, kept


def _merged(tile: int, tiles: int, blocks: int, wanted: int) -> int:
    """How many tiles to merge into one of about the wanted width, so that `tile_of` gives it."""
    for merged in range(wanted // tile, 1, -1):
        if TILE_UNIT * ceil_div(blocks, ceil_div(tiles, merged)) == merged * tile:
            return merged
    return 1


def _padded(width: int) -> int:
    return ceil_div(width, _GRAIN) * _GRAIN


@lru_cache(maxsize=64)
def _like(dtype: torch.dtype) -> Tensor:
    """A tensor from which `scratch` takes a dtype."""
    with torch.inference_mode(False):
        return torch.empty(0, dtype=dtype, device="cpu")


@lru_cache(maxsize=64)
def _sampled_rows(rows: int) -> Tensor:
    """Different rows, one in `_SAMPLED`, by steps of the golden ratio."""
    count = min(max(ceil_div(rows, _SAMPLED), 2), rows)
    with torch.inference_mode(False):  # kept for calls in any mode
        steps = torch.arange(count, dtype=torch.float64, device="cpu") * _GOLDEN % 1.0
        return (steps * rows).long().unique()
