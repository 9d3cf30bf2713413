"""The launches of a block on up to 16 tokens, and of a gated one, for `steppe.ops.cuda.decode`.

As for one token, but the products are on tensor cores, whose tiles have 16 rows: one for each
token, and zeros for those that are not there. Three kernels, two without a screen:

- `grids_of` puts each token on its grid, once for all programs.
- `find_active_of_tokens` screens with int8 products, which are exact on tensor cores too. It reads
  a unit's row of K unless the unit is ruled out for each token, and its row of U, of a gated block,
  only if the unit is active for any. It lists these units with their activations, zero for a token
  that does not have them active.
- `add_rows_of_tokens` reads the rows of V of the listed units.

What is computed for a token and a unit does not depend on the other tokens, on the other units or
on the screen, and each sum has one order.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from steppe.ops.cuda.decode_launch import Lists, has_pdl, pdl_of
from steppe.ops.cuda.decode_screen import Screen, grid_constants_of, words_of
from steppe.ops.cuda.decode_tokens_kernels import (
    add_rows_of_tokens,
    find_active_of_tokens,
    grids_of,
)
from steppe.ops.decoding import MOST_TOKENS
from steppe.ops.reference import ceil_div


class Config(NamedTuple):
    """How the kernels are launched; the result's last bits depend on it, and nothing else.

    Attributes:
        rows: units of a program of `find_active_of_tokens`.
        bytes: columns of the copy of K at a time.
        step: columns of K and of U at a time.
        warps: of a program.
        stages: steps that are read ahead, with the one in use.
        down_batch: rows of V that a program of `add_rows_of_tokens` reads at a time.
        down_columns: columns that it adds.
        down_warps: of a program.

    All but `stages` are powers of two, and those that a product has as a side at least 16.
    """

    rows: int
    bytes: int
    step: int
    warps: int
    stages: int
    down_batch: int
    down_columns: int
    down_warps: int


# By arithmetic, not measured: no card has run these kernels. 8 KB of a matrix are underway in each
# program, and there are 192 programs or more from D 768 on, F = 4 D. A float32 product is not on
# tensor cores, whose TF32 is too coarse, and longer steps of it would be much code.
_CONFIGS = {
    2: (Config(16, 256, 256, 2, 3, 256, 16, 8), Config(32, 256, 256, 4, 3, 256, 16, 8)),
    4: (Config(16, 256, 64, 2, 3, 128, 16, 4), Config(32, 256, 64, 4, 3, 128, 16, 4)),
}
_NARROW = 1024


def config_of(width: int, dtype: torch.dtype) -> Config:
    """The launch for blocks of a width D and a dtype."""
    return _CONFIGS[dtype.itemsize][width > _NARROW]


def grids_constants_of(width: int, pdl: bool) -> dict[str, Any]:
    """The constants of `grids_of`, and what else its launch takes."""
    return {**grid_constants_of(width), "num_warps": 4, **pdl_of(pdl)}


def constants_of(width: int, screens: bool, config: Config, pdl: bool) -> dict[str, Any]:
    """Those of `find_active_of_tokens`."""
    return {
        "D": width,
        "WORDS": words_of(width),
        # As much again as the screen has for any float32 sum: see docs/screening.md.
        "MORE": (2 * width + 64) * 2.0**-24,
        "SCREENS": screens,
        "TOKENS": MOST_TOKENS,
        "ROWS": config.rows,
        "BYTES": config.bytes,
        "STEP": config.step,
        "num_warps": config.warps,
        "num_stages": config.stages,
        **pdl_of(pdl),
    }


def down_constants_of(lists: int, config: Config, dtype: torch.dtype, pdl: bool) -> dict[str, Any]:
    """Those of `add_rows_of_tokens`."""
    return {
        "ALL": triton.next_power_of_2(lists),
        "ROWS": config.rows,
        "TOKENS": MOST_TOKENS,
        "PARTS": config.down_warps,
        "BATCH": config.down_batch,
        "COLUMNS": config.down_columns,
        # Entries of 16 bits are TF32 numbers, and an activation is the sum of two of them to 2⁻²².
        "PRECISION": "ieee" if dtype == torch.float32 else "tf32x3",
        "num_warps": config.down_warps,
        "num_stages": 1,
        **pdl_of(pdl),
    }


def launch_find(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    up: Tensor | None,
    up_bias: Tensor | None,
    screen: Screen | None,
    coefficients: tuple[float, float],
    config: Config,
) -> Lists:
    """The first product; arguments as of `decode_token`."""
    tokens, (units, width) = len(x), weight.shape
    programs = ceil_div(units, config.rows)
    lists = Lists.empty(x, programs, config.rows, MOST_TOKENS)
    pdl = has_pdl(x.device)
    grids, sizes, words, bounds = lists.units, lists.values, lists.units, lists.values  # not used
    if screen is not None:
        grids = x.new_empty(2, tokens, words_of(width), dtype=torch.int32)
        sizes = x.new_empty(3, tokens, dtype=torch.float32)
        grids_of[(tokens,)](x, grids, sizes, tokens, **grids_constants_of(width, pdl))
        grids, words, bounds = grids.view(torch.int8), screen.words.view(torch.int8), screen.bounds
    find_active_of_tokens[(programs,)](
        x,
        grids,
        sizes,
        words,
        bounds,
        weight,
        bias,
        up,
        up_bias,
        *lists,
        tokens,
        units,
        *coefficients,
        **constants_of(width, screen is not None, config, pdl),
    )
    return lists


def launch(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    down: Tensor,
    down_bias: Tensor,
    up: Tensor | None,
    up_bias: Tensor | None,
    screen: Screen | None,
    coefficients: tuple[float, float],
    config: Config,
) -> Tensor:
    """Both products, z ``[T, D]``; arguments as of `decode_token`."""
    lists = launch_find(x, weight, bias, up, up_bias, screen, coefficients, config)
    z = torch.empty_like(x)
    width, number = down.shape[1], len(lists.counts)
    add_rows_of_tokens[(ceil_div(width, config.down_columns),)](
        *lists,
        down,
        down_bias,
        z,
        len(x),
        width,
        number,
        **down_constants_of(number, config, x.dtype, has_pdl(x.device)),
    )
    return z
