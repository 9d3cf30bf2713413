"""The int8 copy of K that decoding on a GPU screens with, and its bounds.

docs/screening.md has the bound and its proof.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from steppe.ops.reference import ceil_div
from steppe.ops.screening import MOST_OF_BYTES, quantise, slack_of_bias, slack_of_units

_KERNEL = 64 * 2.0**-24  # of the products that the kernel rounds
_ABOVE = 2.0**-20  # of each part, for the sum of the four
_TINY = 2.0**-126  # what may be lost to underflow


class Screen(NamedTuple):
    """K as int8, and how far x Kᵀ + b may be above what they say.

    Attributes:
        words: int32 ``[F, WORDS]``, four integers each: column c is byte ``c // WORDS`` of word
            ``c % WORDS``, so that x is read in order.
        bounds: float32 ``[4, F]``: the scale of each row; the coefficients of ‖x‖ and of ‖x − x̃‖;
            b and what is added besides.
    """

    words: Tensor
    bounds: Tensor


def words_of(width: int) -> int:
    """Words of a row of D integers; rows are of whole 16 bytes."""
    return 4 * ceil_div(width, 16)


def most_of(width: int) -> int:
    """The largest integer on the grid of x: two bytes, and a product with int8 fits into int32."""
    return min(MOST_OF_BYTES[1], (2**31 - 1) // (127 * 4 * words_of(width)))


def screen_of(weight: Tensor, bias: Tensor, rows: int = 2048) -> Screen:
    """K and b as `decode_token` screens with them; waits for the device.

    Args:
        weight: K, ``[F, D]``, of one of `DTYPES`.
        bias: b, ``[F]``.
        rows: how many of K are in float64 at a time.
    """
    parts = [
        _part_of_screen(*part) for part in zip(weight.split(rows), bias.split(rows), strict=True)
    ]
    words, bounds = (list(same) for same in zip(*parts, strict=True))
    screen = Screen(torch.cat(words), torch.cat(bounds, 1))
    if weight.is_cuda:
        # `find_active` reads the words before it waits for the kernels that came before it.
        torch.cuda.current_stream(weight.device).synchronize()
    return screen


def _part_of_screen(weight: Tensor, bias: Tensor) -> Screen:
    rows, width = weight.shape
    grid = quantise(weight, rotates=False)
    integers = torch.zeros(rows, 4 * words_of(width), dtype=torch.int8, device=weight.device)
    integers[:, :width] = grid.integers
    words = integers.view(rows, 4, -1).transpose(1, 2).contiguous().view(torch.int32).squeeze(2)

    of_norm, of_residual, constant = slack_of_units(grid)
    # The kernel's own rounding, see docs/screening.md.
    of_norm = of_norm + _KERNEL * of_residual + _TINY * width**0.5
    b = bias.double()
    constant = b + constant + slack_of_bias(bias, width) + _KERNEL * b.abs() + 16 * _TINY
    above = torch.stack([of_norm, of_residual, constant])
    return Screen(words, torch.cat([grid.scale[None], above + _ABOVE * above.abs()]).float())


def grid_constants_of(width: int) -> dict[str, Any]:
    """The constants of a kernel that puts x on its grid."""
    words = words_of(width)
    return {
        "D": width,
        "WORDS": words,
        "MOST": most_of(width),
        "LONGER": 1.0 + (width + 64) * 2.0**-24 + 2.0**-18,
        "WIDE": 1 << (words - 1).bit_length(),
    }
