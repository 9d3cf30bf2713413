"""The native functions on tensors; every length is checked before a pointer is handed over."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple, NoReturn

import torch
from torch import Tensor

from steppe.errors import KernelError
from steppe.ops.cpu.library import library
from steppe.ops.cpu.memory import lasting, scratch
from steppe.ops.cpu.structures import MatrixStructure
from steppe.ops.cpu.team import threads
from steppe.ops.reference import TILE_UNIT, ceil_div, tile_of

DTYPES = {torch.float32: 0, torch.bfloat16: 1}
DECODE_ROWS = 8  # the most rows that a call of `steppe.ops.cpu.decode` takes
_DECODE_TILE = 256
# Where one row in so many has clearly too many active entries, the others are not counted: in
# bfloat16 counting takes 3 % of a dense forward pass.
_SAMPLE = 8
_CLEARLY = 0.1
# Columns per tile by density: the denser, the fewer, so that what many rows gather from stays in
# the first-level cache. Measured at d 768, T 1024.
_TILES = {
    torch.float32: ((0.08, 192), (0.03, 256), (0.015, 384), (0.0, 1024)),
    torch.bfloat16: ((0.15, 256), (0.015, 512), (0.0, 1024)),
}


@dataclass(frozen=True)
class Support:
    """The positions of the entries of a column-tiled CSR matrix; see `steppe.ops.reference`.

    Attributes:
        index: int16 ``[nnz]``.
        offsets: int64 ``[tiles · T + 1]``.
        rows: T.
        columns: F.
    """

    index: Tensor
    offsets: Tensor
    rows: int
    columns: int

    @classmethod
    def made(cls, offsets: Tensor, entries: int, rows: int, columns: int, tile: int) -> Support:
        """One with offsets that a kernel has written, and an index that is to be written.

        Args:
            offsets: int64 ``[tiles · T + 1]``.
            entries: their last.
            rows: T.
            columns: F.
            tile: columns per tile, which goes with the number of offsets.
        """
        support = cls(torch.empty(entries, dtype=torch.int16, device="cpu"), offsets, rows, columns)
        # Reading a number out of a tensor takes 10 µs where the code for it is not in a cache.
        support.__dict__.update(entries=entries, tile=tile, is_checked=True)
        return support

    @cached_property
    def is_checked(self) -> bool:
        """That the parts go together; its numbers are our own and are trusted.

        Raises:
            KernelError: they do not.
        """
        index, offsets = self.index, self.offsets
        if index.dtype != torch.int16 or not index.is_contiguous():
            refuse(f"a contiguous index of int16, got {index.dtype}")
        if offsets.dtype != torch.int64 or not offsets.is_contiguous():
            refuse(f"contiguous offsets of int64, got {offsets.dtype}")
        tiles = max(ceil_div(self.columns, self.tile), 1) if self.rows else 0
        if self.rows and offsets.numel() != tiles * self.rows + 1:
            refuse(f"{tiles * self.rows + 1} offsets, got {offsets.numel()}")
        if self.entries != index.numel():
            refuse(f"{self.entries} entries, got {index.numel()}")
        return True

    @cached_property
    def entries(self) -> int:
        """Number of entries, as the offsets tell it."""
        return int(self.offsets[-1])

    @cached_property
    def tile(self) -> int:
        """Columns per tile; at least one unit, also of no columns."""
        return max(tile_of(self.offsets, self.rows, self.columns), TILE_UNIT)

    @property
    def tiles(self) -> int:
        """Number of tiles."""
        return (self.offsets.numel() - 1) // self.rows if self.rows else 0


class Panels(NamedTuple):
    """A matrix cut into panels of 64 columns.

    Attributes:
        data: ``[⌈D / 64⌉, N, 64]``.
        width: D.
    """

    data: Tensor
    width: int


def compact(p: Tensor, max_density: float = 1.0) -> tuple[Tensor, Support] | None:
    """The entries of p that are not ≤ 0, in column-tiled CSR form.

    Args:
        p: ``[T, F]``, float32 or bfloat16, rows contiguous.
        max_density: the most of them, as a share.

    Returns:
        Values and support; None where there are more.
    """
    rows, columns = p.shape
    if not rows_are_contiguous(p):
        refuse(f"rows of p contiguous, got strides {p.stride()}")
    sample = rows // _SAMPLE
    if (
        max_density < 1.0
        and sample
        and _density(_counts(p[:sample]), sample, columns) > (max_density + _CLEARLY)
    ):
        return None
    counts, stride = _counts(p), p.stride(0)
    density = _density(counts, rows, columns)
    if density > max_density:
        return None
    blocks = ceil_div(columns, TILE_UNIT)
    tile = balanced(blocks, tile_for(density, rows, p.dtype))
    tiles = ceil_div(blocks * TILE_UNIT, tile)
    offsets = torch.empty(tiles * rows + 1, dtype=torch.int64, device="cpu")
    entries = library().steppe_offsets(counts.data_ptr(), rows, columns, tile, offsets.data_ptr())
    support = Support.made(offsets, entries, rows, columns, tile)
    values = p.new_empty(entries)
    library().steppe_fill(
        p.data_ptr(),
        dtype_code(p),
        rows,
        columns,
        stride,
        tile,
        offsets.data_ptr(),
        support.index.data_ptr(),
        values.data_ptr(),
        threads(),
    )
    return values, support


def _counts(p: Tensor) -> Tensor:
    """Number of active entries of each row and each 64 columns, int32 ``[T · ⌈F / 64⌉]``."""
    rows, columns = p.shape
    counts = torch.empty(rows * ceil_div(columns, TILE_UNIT), dtype=torch.int32, device="cpu")
    library().steppe_count(
        p.data_ptr(), dtype_code(p), rows, columns, p.stride(0), counts.data_ptr(), threads()
    )
    return counts


def _density(counts: Tensor, rows: int, columns: int) -> float:
    return int(counts.sum()) / max(rows * columns, 1)


def pack(matrix: Tensor, buffer: str | None = None) -> Panels:
    """The panels of a matrix ``[N, D]`` of any strides.

    Args:
        matrix: float32 or bfloat16.
        buffer: name of the `scratch` to write to; None for `lasting` memory.
    """
    rows, width = matrix.shape
    shape = (ceil_div(width, TILE_UNIT), rows, TILE_UNIT)
    data = lasting(shape, matrix.dtype) if buffer is None else scratch(buffer, shape, matrix)
    library().steppe_pack(
        matrix.data_ptr(),
        dtype_code(matrix),
        rows,
        width,
        *matrix.stride(),
        data.data_ptr(),
        threads(),
    )
    return Panels(data, width)


def spmm(
    values: Tensor, support: Support, matrix: Panels | Tensor, bias: Tensor | None = None
) -> Tensor:
    """``A M + bias``, ``[T, D]``; M ``[F, D]`` as panels, or of any strides."""
    width = matrix.width if isinstance(matrix, Panels) else matrix.shape[1]
    out = values.new_empty(support.rows, width)
    return spmm_into(out, values, support, matrix, bias)


def spmm_into(
    out: Tensor,
    values: Tensor,
    support: Support,
    matrix: Panels | Tensor,
    bias: Tensor | None = None,
    accumulate: bool = False,
) -> Tensor:
    """``A M + bias`` written to a tensor ``[T, D]`` of any strides, or added to it."""
    _check_csr(support, values)
    gathered = _matrix(matrix, support.columns, values)
    if out.shape != (support.rows, gathered.columns):
        refuse(f"an output {(support.rows, gathered.columns)}, got {tuple(out.shape)}")
    if bias is not None:
        check_vector(bias, gathered.columns, values)
    failed = library().steppe_spmm(
        values.data_ptr(),
        support.index.data_ptr(),
        support.offsets.data_ptr(),
        dtype_code(values),
        support.rows,
        support.tile,
        ctypes.byref(gathered),
        pointer(bias),
        out.data_ptr(),
        *out.stride(),
        accumulate,
        threads(),
    )
    if failed:
        raise MemoryError("spmm: no memory for the sums")
    return out


def sampled(
    support: Support, left: Panels, right: Panels | Tensor, bias: Tensor | None = None
) -> Tensor:
    """SDDMM, values of ``G Mᵀ + bias`` on a support; M panels or of any strides; bias ``[F]``."""
    _check_panels(left, support.rows, left.data)
    gathered = _matrix(right, support.columns, left.data)
    _check_csr(support, None)
    if left.width != gathered.columns:
        refuse(f"one width, got {left.width} and {gathered.columns}")
    if bias is not None:
        check_vector(bias, support.columns, left.data)
    values = left.data.new_empty(support.index.shape[0])
    failed = library().steppe_sampled(
        support.index.data_ptr(),
        support.offsets.data_ptr(),
        dtype_code(values),
        support.rows,
        support.tile,
        left.data.data_ptr(),
        ctypes.byref(gathered),
        pointer(bias),
        values.data_ptr(),
        threads(),
    )
    if failed:
        raise MemoryError("sampled: no memory for the sums")
    return values


def transpose(support: Support, *values: Tensor) -> tuple[Support, list[Tensor]]:
    """One or two CSR matrices on the same support, transposed."""
    if len(values) not in (1, 2):
        refuse(f"one or two lists of values, got {len(values)}")
    for one in values:
        _check_csr(support, one)
    rows, columns = support.rows, support.columns
    density = support.entries / max(rows * columns, 1)
    blocks = ceil_div(rows, TILE_UNIT)
    tile = balanced(blocks, tile_for(density, columns, values[0].dtype))
    tiles = max(ceil_div(blocks * TILE_UNIT, tile), 1)
    turned = Support(
        torch.empty_like(support.index),
        torch.empty(tiles * columns + 1, dtype=torch.int64, device="cpu"),
        columns,
        rows,
    )
    outputs = [torch.empty_like(one) for one in values]
    second = len(values) == 2
    library().steppe_transpose(
        values[0].data_ptr(),
        values[1].data_ptr() if second else None,
        support.index.data_ptr(),
        support.offsets.data_ptr(),
        dtype_code(values[0]),
        rows,
        columns,
        support.tile,
        tile,
        outputs[0].data_ptr(),
        outputs[1].data_ptr() if second else None,
        turned.index.data_ptr(),
        turned.offsets.data_ptr(),
        threads(),
    )
    return turned, outputs


def row_sums(values: Tensor, support: Support) -> Tensor:
    """Sum of each row, ``[T]``."""
    _check_csr(support, values)
    out = values.new_empty(support.rows)
    library().steppe_row_sums(
        values.data_ptr(),
        support.offsets.data_ptr(),
        dtype_code(values),
        support.rows,
        support.tiles,
        out.data_ptr(),
        threads(),
    )
    return out


def pointer(tensor: Tensor | None) -> int | None:
    """Where a tensor's elements are; None, which is NULL, for none."""
    return None if tensor is None else tensor.data_ptr()


def rows_are_contiguous(matrix: Tensor) -> bool:
    """Whether the elements of each row lie together."""
    return matrix.stride(1) == 1 or matrix.shape[1] <= 1


def tile_for(density: float, rows: int, dtype: torch.dtype) -> int:
    """The width of tiles that gathers fastest."""
    if rows <= DECODE_ROWS:
        return _DECODE_TILE
    return next(tile for above, tile in _TILES[dtype] if density >= above)


def balanced(blocks: int, tile: int) -> int:
    """Round a wanted tile width to that which `tile_of` computes back from the number of tiles."""
    tiles = max(ceil_div(blocks * TILE_UNIT, tile), 1)
    return TILE_UNIT * max(ceil_div(blocks, tiles), 1)


def dtype_code(tensor: Tensor) -> int:
    """The library's code of a tensor's dtype."""
    code = DTYPES.get(tensor.dtype)
    if code is None or not tensor.is_cpu:
        refuse(f"float32 or bfloat16 on the CPU, got {tensor.dtype} on {tensor.device}")
    return code


def _check_csr(support: Support, values: Tensor | None) -> None:
    """Refuse a CSR matrix of inconsistent parts."""
    if support.is_checked and values is not None:
        check_vector(values, support.index.numel(), values)


def check_vector(vector: Tensor, length: int, like: Tensor) -> None:
    """Refuse all but a contiguous vector of a length and of another's dtype."""
    if vector.shape != (length,) or not vector.is_contiguous() or vector.dtype != like.dtype:
        refuse(
            f"a contiguous vector of {length} {like.dtype},"
            f" got {tuple(vector.shape)} {vector.dtype}"
        )


def _check_panels(panels: Panels, rows: int, like: Tensor) -> None:
    shape = (ceil_div(panels.width, TILE_UNIT), rows, TILE_UNIT)
    data = panels.data
    if data.shape != shape or not data.is_contiguous() or data.dtype != like.dtype:
        refuse(f"panels {shape} of {like.dtype}, got {tuple(data.shape)} of {data.dtype}")


def _matrix(matrix: Panels | Tensor, rows: int, like: Tensor) -> MatrixStructure:
    """The matrix that a product gathers from, with memory for its panels if there are none."""
    if isinstance(matrix, Panels):
        _check_panels(matrix, rows, like)
        return MatrixStructure(rows=rows, columns=matrix.width, panels=matrix.data.data_ptr())
    if matrix.ndim != 2 or matrix.shape[0] != rows or matrix.dtype != like.dtype:
        refuse(f"{rows} rows of {like.dtype}, got {tuple(matrix.shape)} of {matrix.dtype}")
    width = matrix.shape[1]
    panels = scratch("panels", (ceil_div(width, TILE_UNIT), rows, TILE_UNIT), matrix)
    return MatrixStructure(matrix.data_ptr(), rows, width, *matrix.stride(), panels.data_ptr())


def check_rows(weight: Tensor, rows: int, like: Tensor) -> None:
    """Refuse a weight that has not so many rows, each contiguous, of another's dtype."""
    if (
        weight.ndim != 2
        or weight.shape[0] != rows
        or not rows_are_contiguous(weight)
        or weight.dtype != like.dtype
    ):
        refuse(
            f"{rows} contiguous rows of {like.dtype}, got {tuple(weight.shape)} {weight.dtype} with"
            f" strides {weight.stride()}"
        )


def refuse(expected: str) -> NoReturn:
    """Refuse a call, and say what was expected."""
    raise KernelError(f"native kernel: expected {expected}")
