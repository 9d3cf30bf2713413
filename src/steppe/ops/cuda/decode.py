"""A few tokens through an MLP block on a GPU, reading only the weights that can matter.

Reading the weights from memory is all that takes time. For one token two kernels in Triton:

- `find_active` has the first product, p = x Kᵀ + b. Of each unit it reads the row of an int8 copy
  of K, half of its bytes, and rules the unit out if the bound of `steppe.ops.screening` allows. It
  reads the unit's row of K only otherwise. It lists the active units with their activations.
- `add_rows` has the second product: the rows of V of the active units, and no others.

`steppe.ops.cuda.decode_tokens` has those for more tokens and for gated blocks.

Each sum has one order, whichever program comes first, so the bits are the same in each call. What
is computed of a unit does not depend on the screen: launched in the same way, both give the same
bits. docs/screening.md has the bound and its proof, and docs/gpu.md has the measurements.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from steppe.errors import KernelError
from steppe.ops.cuda import decode_tokens
from steppe.ops.cuda.decode_kernels import add_rows, find_active
from steppe.ops.cuda.decode_launch import INTERPRETED, Lists, has_pdl, pdl_of
from steppe.ops.cuda.decode_screen import (
    Screen,
    grid_constants_of,
    most_of,
    screen_of,
    words_of,
)
from steppe.ops.decoding import DTYPES, MOST_TOKENS, MOST_WIDTH
from steppe.ops.reference import ceil_div

__all__ = ["DTYPES", "MOST_TOKENS", "MOST_WIDTH", "Screen", "decode_token", "most_of", "screen_of"]


class Config(NamedTuple):
    """How the kernels are launched; the result's last bits depend on it, and nothing else.

    Attributes:
        rows: units of a program of `find_active`.
        group: units that it screens at a time.
        batch: candidates that it computes at a time.
        step: columns of K at a time.
        warps: of a program.
        down_batch: rows of V that a program of `add_rows` reads at a time.
        down_columns: columns that it adds.
        down_warps: of a program.

    All are powers of two.
    """

    rows: int
    group: int
    batch: int
    step: int
    warps: int
    down_batch: int
    down_columns: int
    down_warps: int


# Up to a width D, without a screen and with it. Of those that an H200 has run in bfloat16 with
# F = 4 D, one token and 5 % active units, the fastest: benchmarks/results/gpu-h200-decode.json.
_CONFIGS = (
    (1024, Config(8, 4, 4, 1024, 4, 256, 16, 8), Config(8, 8, 4, 1024, 4, 256, 16, 8)),
    (2048, Config(8, 4, 8, 1024, 4, 512, 16, 8), Config(16, 8, 4, 1024, 4, 512, 16, 8)),
    (MOST_WIDTH, Config(16, 4, 4, 2048, 8, 512, 32, 8), Config(32, 4, 4, 1024, 4, 512, 32, 8)),
)


def config_of(width: int, screens: bool) -> Config:
    """The launch for blocks of a width D, at most `MOST_WIDTH`."""
    return next(configs[screens] for most, *configs in _CONFIGS if width <= most)


def constants_of(width: int, screens: bool, config: Config, pdl: bool) -> dict[str, Any]:
    """The constants of `find_active`, and what else its launch takes."""
    return {
        **grid_constants_of(width),
        "SCREENS": screens,
        "DP4A": not INTERPRETED,
        "ROWS": config.rows,
        "GROUP": config.group,
        "BATCH": config.batch,
        "STEP": config.step,
        "num_warps": config.warps,
        **pdl_of(pdl),
    }


def down_constants_of(lists: int, config: Config, pdl: bool) -> dict[str, Any]:
    """Those of `add_rows`."""
    return {
        "ALL": triton.next_power_of_2(lists),
        "ROWS": config.rows,
        "BATCH": config.down_batch,
        "COLUMNS": config.down_columns,
        "num_warps": config.down_warps,
        **pdl_of(pdl),
    }


def takes_one(x: Tensor, up: Tensor | None) -> bool:
    """Whether the kernels of one token run: one token, in a block without a gate."""
    return len(x) == 1 and up is None


def launch_find(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    screen: Screen | None,
    coefficients: tuple[float, float],
    config: Config,
) -> Lists:
    """The first product; arguments as of `decode_token`."""
    units, width = weight.shape
    programs = ceil_div(units, config.rows)
    lists = Lists.empty(x, programs, config.rows)
    words, bounds = (lists.units, lists.values) if screen is None else screen
    find_active[(programs,)](
        x,
        words,
        bounds,
        weight,
        bias,
        *lists,
        units,
        *coefficients,
        **constants_of(width, screen is not None, config, has_pdl(x.device)),
    )
    return lists


def launch(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    down: Tensor,
    down_bias: Tensor,
    screen: Screen | None,
    coefficients: tuple[float, float],
    config: Config,
) -> Tensor:
    """Both products, z ``[1, D]``; arguments as of `decode_token`."""
    lists = launch_find(x, weight, bias, screen, coefficients, config)
    z = torch.empty_like(x)
    width, number = down.shape[1], len(lists.counts)
    add_rows[(ceil_div(width, config.down_columns),)](
        *lists,
        down,
        down_bias,
        z,
        width,
        number,
        **down_constants_of(number, config, has_pdl(x.device)),
    )
    return z


def candidates_of(
    x: Tensor, weight: Tensor, bias: Tensor, screen: Screen, up: Tensor | None
) -> Tensor:
    """The share of units that the screen leaves for any token, 0-dim float32.

    Arguments as of `decode_token`. With an infinite bias all that it leaves are active.
    """
    bias = torch.full_like(bias, math.inf)
    units, width = weight.shape
    with torch.cuda.device_of(x):
        if takes_one(x, up):
            lists = launch_find(x, weight, bias, screen, (1.0, 0.0), config_of(width, True))
        else:
            config = decode_tokens.config_of(width, x.dtype)
            lists = decode_tokens.launch_find(
                x, weight, bias, None, None, screen, (1.0, 0.0), config
            )
    return lists.counts.sum() / units


torch.library.define(
    "steppe::decode_token",
    "(Tensor x, Tensor weight, Tensor bias, Tensor down, Tensor down_bias,"
    " Tensor? words, Tensor? bounds, float alpha, float beta,"
    " Tensor? up=None, Tensor? up_bias=None) -> Tensor",
)


@torch.library.impl("steppe::decode_token", ("cuda", "cpu"))
def _decode_token(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    down: Tensor,
    down_bias: Tensor,
    words: Tensor | None,
    bounds: Tensor | None,
    alpha: float,
    beta: float,
    up: Tensor | None = None,
    up_bias: Tensor | None = None,
) -> Tensor:
    screen = None if words is None or bounds is None else Screen(words, bounds)
    _check(x, weight, bias, down, down_bias, screen, up, up_bias)
    block = x, weight, bias, down, down_bias
    width = weight.shape[1]
    with torch.cuda.device_of(x):
        if takes_one(x, up):
            return launch(*block, screen, (alpha, beta), config_of(width, screen is not None))
        return decode_tokens.launch(
            *block, up, up_bias, screen, (alpha, beta), decode_tokens.config_of(width, x.dtype)
        )


@torch.library.register_fake("steppe::decode_token")
def _(x: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(x)


def decode_token(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    down: Tensor,
    down_bias: Tensor,
    screen: Screen | None,
    alpha: float = 1.0,
    beta: float = 0.0,
    up: Tensor | None = None,
    up_bias: Tensor | None = None,
) -> Tensor:
    """An MLP block on a few tokens: z = a V + c with a = σ(x Kᵀ + b).

    σ(p) = α r + β r² with r = max(p, 0). In a gated block a = σ(x Kᵀ + b) ⊙ (x Uᵀ + d), so K is the
    weight of what is called the gate.

    The op ``steppe::decode_token``. Its shapes are static and nothing waits for the device, so a
    CUDA graph can capture it. It has no gradient.

    Args:
        x: ``[T, D]``, of one of `DTYPES`; T at most `MOST_TOKENS` and D at most `MOST_WIDTH`.
            Contiguous, like all others.
        weight: K, ``[F, D]``, in x's dtype like the next three.
        bias: b, ``[F]``.
        down: V, ``[F, D]``; an ``nn.Linear`` holds its transpose.
        down_bias: c, ``[D]``.
        screen: of K and b as they are now, by `screen_of`; None to read all of K.
        alpha: α.
        beta: β.
        up: U of a gated block, ``[F, D]``, in x's dtype; its rows are read of units that are active
            for any token.
        up_bias: d, ``[F]``; None for zero.

    Returns:
        z, ``[T, D]``, summed in float32 and rounded once; the same bits in each call. Its last bits
        depend on whether T is 1.

    Raises:
        KernelError: shapes, dtypes, devices or layouts are others.
    """
    words, bounds = (None, None) if screen is None else screen
    z: Tensor = torch.ops.steppe.decode_token(
        x, weight, bias, down, down_bias, words, bounds, alpha, beta, up, up_bias
    )
    return z


def _check(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    down: Tensor,
    down_bias: Tensor,
    screen: Screen | None,
    up: Tensor | None,
    up_bias: Tensor | None,
) -> None:
    if not (x.is_cuda or INTERPRETED):
        raise KernelError(f"decode_token: expected tensors on a CUDA device, got {x.device}")
    if x.dtype not in DTYPES:
        raise KernelError(f"decode_token: expected float32, bfloat16 or float16, got {x.dtype}")
    if weight.dim() != 2 or not weight.numel() or weight.shape[1] > MOST_WIDTH:
        raise KernelError(
            f"decode_token: weight: expected [F, D], not empty, with D at most {MOST_WIDTH}; got"
            f" {list(weight.shape)}"
        )
    units, width = weight.shape
    if x.dim() != 2 or not 1 <= len(x) <= MOST_TOKENS:
        raise KernelError(
            f"decode_token: x: expected [T, {width}] with T from 1 to {MOST_TOKENS}; got"
            f" {list(x.shape)}"
        )
    if up is None and up_bias is not None:
        raise KernelError("decode_token: up_bias: expected None, as up is None")
    expected = [
        ("x", x, (len(x), width), x.dtype),
        ("weight", weight, (units, width), x.dtype),
        ("bias", bias, (units,), x.dtype),
        ("down", down, (units, width), x.dtype),
        ("down_bias", down_bias, (width,), x.dtype),
    ]
    if screen is not None:
        expected += [
            ("words", screen.words, (units, words_of(width)), torch.int32),
            ("bounds", screen.bounds, (4, units), torch.float32),
        ]
    if up is not None:
        expected.append(("up", up, (units, width), x.dtype))
    if up_bias is not None:
        expected.append(("up_bias", up_bias, (units,), x.dtype))
    for name, tensor, shape, dtype in expected:
        got = tensor.shape, tensor.dtype, tensor.device
        if got != (shape, dtype, x.device) or not tensor.is_contiguous():
            raise KernelError(
                f"decode_token: {name}: expected {dtype} {list(shape)} on {x.device}, contiguous;"
                f" got {tensor.dtype} {list(tensor.shape)} on {tensor.device} with strides"
                f" {list(tensor.stride())}"
            )
