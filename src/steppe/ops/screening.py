"""Which units of a block can be active at all, told from an int8 product: the definition.

Of ``p = x Kᵀ + b`` only the sign decides whether a unit is active, and most are far from zero. With
x and K rounded to small integers, the integer product I tells p up to a bound, exactly::

    p ≤ s_x s_k I + b + ‖x‖ ‖k − k̃‖ + ‖x − x̃‖ ‖k̃‖ + rounding        (Cauchy–Schwarz)

A unit whose right side is not above zero is inactive, whatever way p is summed in float32; the
others are candidates, whose p is computed in full. docs/screening.md has the proof. What runs here
is float64, for tests and where no kernel does.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

_ROTATED = 256  # features that are rotated together, 16 vectors of 16
_VECTORS = 16
_UNIT = 2.0**-24  # half the distance from 1 to the next float32
_TINY = 2.0**-126  # the least normal float32: what flushing to zero loses at most
_OVERFLOW = 2.0**126  # what no sum of products may reach on its way
_OUR_ROUNDING = 1.0 + 2.0**-40  # of the float64 arithmetic here, many times over


class Grid(NamedTuple):
    """The rows of a matrix as small integers, and how far they are from them.

    Attributes:
        integers: int32 ``[N, D]``, of ±127 or, with 16 bits, ±32767 at most.
        scale: float64 ``[N]``; a row is about ``scale · integers``.
        residual: float64 ``[N]``, not below ‖row − scale · integers‖; NaN for a row that is not
            finite.
        size: float64 ``[N]``, not below ‖scale · integers‖.
        norm: float64 ``[N]``, not below ‖row‖.
    """

    integers: Tensor
    scale: Tensor
    residual: Tensor
    size: Tensor
    norm: Tensor


def quantise(matrix: Tensor, bits: int = 8) -> Grid:
    """The rows of a matrix on a grid of their own, after `rotate`.

    Args:
        matrix: ``[N, D]``, float32 or bfloat16.
        bits: 8, or 16 for inputs of few tokens.
    """
    rotated = rotate(matrix.double())
    most = 2 ** (bits - 1) - 1
    largest = rotated.abs().amax(1) if matrix.shape[1] else rotated.new_zeros(matrix.shape[0])
    usable = largest.isfinite() & (largest > 0)
    scale = torch.where(usable, largest / most, 1.0)
    integers = torch.where(usable[:, None], rotated / scale[:, None], 0.0).round()
    on_grid = integers * scale[:, None]
    return Grid(
        integers.to(torch.int32),
        scale,
        _norm(rotated - on_grid),
        _norm(on_grid),
        _norm(rotated),
    )


def rotate(matrix: Tensor) -> Tensor:
    """The rows in another orthonormal basis, where no single feature is large; xᵀk stays.

    A Hadamard transform over 16 features that lie 16 apart, in each 256; of D % 256 ≠ 0 nothing is
    rotated. Without it one outlier makes the grid of a whole token coarse.

    Args:
        matrix: float64 ``[N, D]``.
    """
    rows, columns = matrix.shape
    if columns % _ROTATED or not columns:
        return matrix
    parts = matrix.reshape(-1, _VECTORS, _ROTATED // _VECTORS)
    width = 1
    while width < _VECTORS:
        pairs = parts.reshape(-1, _VECTORS // (2 * width), 2, width, parts.shape[-1])
        one, other = pairs.unbind(2)
        parts = torch.stack([one + other, one - other], 2)
        width *= 2
    return parts.reshape(rows, columns) / _VECTORS**0.5


def estimate(x: Grid, weight: Grid) -> Tensor:
    """s_x s_k I, the product of the grids, exact up to float64.

    Args:
        x: grid of ``[T, D]``.
        weight: grid of ``[F, D]``.

    Returns:
        float64 ``[T, F]``.
    """
    product = x.integers.double() @ weight.integers.double().T  # integers below 2⁵³: exact
    return product * x.scale[:, None] * weight.scale


def slack(x: Grid, weight: Grid, bias: Tensor | None = None) -> Tensor:
    """How far above `estimate` plus bias a float32 evaluation can come, at most.

    Args:
        x: grid of ``[T, D]``.
        weight: grid of ``[F, D]``.
        bias: ``[F]``, or None for zero.

    Returns:
        float64 ``[T, F]``; infinite where partial sums may overflow, NaN where x or the weight is
        not finite.
    """
    width = x.integers.shape[1]
    x_norm, b = x.norm[:, None], 0.0 if bias is None else bias.double().abs()
    off_grid = x_norm * weight.residual + x.residual[:, None] * weight.size
    rounding = (2 * width + 64) * _UNIT * (x_norm * weight.norm + b)
    flushed = _TINY * (width**0.5 * (x_norm + weight.norm) + 2 * width + 64)
    total = (off_grid + rounding + flushed) * _OUR_ROUNDING
    total = total + 2.0**-40 * (x.size[:, None] * weight.size + b)  # of estimate and bias
    return torch.where(x_norm * weight.norm + b >= _OVERFLOW, torch.inf, total)


def candidates(x: Grid, weight: Grid, bias: Tensor | None = None) -> Tensor:
    """The units that may be active: all that are in some float32 evaluation, and few others.

    Args:
        x: grid of ``[T, D]``.
        weight: grid of ``[F, D]``.
        bias: ``[F]``, or None for zero.

    Returns:
        bool ``[T, F]``; NaN counts as active, as ReLU keeps it.
    """
    bound = estimate(x, weight) + slack(x, weight, bias)
    if bias is not None:
        bound = bound + bias.double()
    return ~(bound <= 0)


def _norm(rows: Tensor) -> Tensor:
    """Euclidean norms ``[N]`` of float64 rows, not below the exact ones."""
    return torch.linalg.vector_norm(rows, dim=1) * _OUR_ROUNDING
