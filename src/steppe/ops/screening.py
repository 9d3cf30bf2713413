"""The screen, which bounds p from an int8 product and so rules out inactive units: the definition.

A unit is active by the sign of ``p = x Kᵀ + b``, and most p are far from zero. With x and K rounded
to small integers, the integer product I gives p up to a bound, exactly::

    p ≤ s_x s_k I + b + ‖x‖ ‖k − k̃‖ + ‖x − x̃‖ ‖k̃‖ + rounding        (Cauchy–Schwarz)

A unit is inactive if its right side is not above zero, in whatever order p is summed in float32.
The others are candidates, and their p is computed in full. docs/screening.md has the proof. The
kernel, native/screen.h, decides as this does; `steppe.ops.cpu.screen` calls it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

_GRAIN = 128  # the width is padded with zeros to a multiple of it
_VECTORS = 16  # parts of a row that the rotation mixes
MOST_OF_BYTES = 127, 127 * 256 + 127  # of an integer of one, and of two that are its digits
_UNIT = 2.0**-24  # half the distance from 1 to the next float32
_TINY = 2.0**-126  # the least normal float32: flushing to zero loses at most this
_OURS = 2.0**-36  # of the float64 arithmetic here and in the kernel, many times over
# From such norms and biases on a sum of products could overflow on its way.
_LARGE_INPUT, _LARGE_ROW = 2.0**62, 2.0**63


class Grid(NamedTuple):
    """The rows of a matrix as small integers, and how far they are from them.

    Attributes:
        integers: int32 ``[N, D to 128]``, or ``[N, D]`` where nothing is rotated, as large as
            `quantise` was told at most.
        scale: float64 ``[N]``; a row is about ``scale · integers``.
        residual: float64 ``[N]``, not below ‖row − scale · integers‖.
        norm: float64 ``[N]``, not below ‖row‖; not finite for a row that is not.
        width: D.
    """

    integers: Tensor
    scale: Tensor
    residual: Tensor
    norm: Tensor
    width: int


def quantise(matrix: Tensor, most: int = MOST_OF_BYTES[0], rotates: bool = True) -> Grid:
    """The rows of a matrix on a grid of their own, after `rotate`.

    Args:
        matrix: ``[N, D]``, float32 or a dtype whose values are all in float32.
        most: the largest integer.
        rotates: without it the integers are ``[N, D]``; a product takes grids of one kind.
    """
    rotated = rotate(matrix.double()) if rotates else matrix.double()
    largest = rotated.abs().amax(1) if matrix.shape[1] else rotated.new_zeros(matrix.shape[0])
    usable = largest.isfinite() & (largest > 0)
    scale = torch.where(usable, largest / most, 1.0)
    integers = torch.where(usable[:, None], rotated / scale[:, None], 0.0).round()
    return Grid(
        integers.to(torch.int32),
        scale,
        _norm(rotated - integers * scale[:, None]),
        _norm(rotated),
        matrix.shape[1],
    )


def rotate(matrix: Tensor) -> Tensor:
    """The rows in another orthonormal basis, where no single feature is large; xᵀk stays.

    A Hadamard transform over 16 features that lie a sixteenth of the row apart. Without it one
    outlier makes the grid of a whole token coarse.

    Args:
        matrix: float64 ``[N, D]``.

    Returns:
        ``[N, D to 128]``: rows are padded with zeros first.
    """
    zeros = matrix.new_zeros(len(matrix), -matrix.shape[1] % _GRAIN)
    padded = torch.cat([matrix, zeros], 1)
    parts = padded.reshape(len(matrix), _VECTORS, padded.shape[1] // _VECTORS)
    apart = 1
    while apart < _VECTORS:
        one, other = parts.unflatten(1, (-1, 2, apart)).unbind(2)
        parts = torch.stack([one + other, one - other], 2).flatten(1, 3)
        apart *= 2
    return parts.flatten(1) / _VECTORS**0.5


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
        float64 ``[T, F]``; NaN where x or the weight is not finite, or so large that sums of their
        products may overflow on the way.
    """
    of_norm, of_residual, constant = slack_of_units(weight)
    norm = x.norm[:, None].where(x.norm[:, None] < _LARGE_INPUT, torch.nan)
    of_bias = 0.0 if bias is None else slack_of_bias(bias, weight.width)
    return norm * of_norm + x.residual[:, None] * of_residual + constant + of_bias


def slack_of_bias(bias: Tensor, width: int) -> Tensor:
    """What `slack` adds for a bias.

    Args:
        bias: ``[F]``.
        width: D.

    Returns:
        float64 ``[F]``.
    """
    return ((2 * width + 64) * _UNIT + _OURS) * bias.double().abs()


def slack_of_units(weight: Grid) -> tuple[Tensor, Tensor, Tensor]:
    """The parts of `slack` that do not depend on x.

    Args:
        weight: grid of ``[F, D]``.

    Returns:
        The coefficients of ‖x‖ and of ‖x − x̃‖ in a unit's slack, and its constant without the
        bias; float64 ``[F]`` each. The first is NaN for a row that is too large or not finite.
    """
    width = weight.width
    size = weight.norm + weight.residual  # not below ‖k̃‖
    rounding = (2 * width + 64) * _UNIT + _OURS
    of_norm = weight.residual + rounding * size + _TINY * width**0.5
    constant = _TINY * (width**0.5 * weight.norm + 2 * width + 64)
    inflated = 1.0 + 4 * _OURS
    return (
        (of_norm * inflated).where(weight.norm < _LARGE_ROW, torch.nan),
        size * inflated,
        constant * inflated,
    )


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
    return torch.linalg.vector_norm(rows, dim=1) * (1.0 + _OURS)
