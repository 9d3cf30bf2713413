"""One token through an MLP block on a GPU, reading only the weights that can matter.

Reading the weights from memory is all that takes time. Two kernels in Triton:

- `find_active` has the first product, p = x Kᵀ + b. Of each unit it reads the row of an int8 copy
  of K, half of its bytes, and rules the unit out if the bound of `steppe.ops.screening` allows. It
  reads the unit's row of K only otherwise. It lists the active units with their activations.
- `add_rows` has the second product: the rows of V of the active units, and no others.

Each sum has one order, whichever program comes first, so the bits are the same in each call. What
is computed of a unit does not depend on the screen: launched in the same way, both give the same
bits. docs/screening.md has the bound and its proof, and docs/gpu.md has the measurements.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from steppe.errors import KernelError
from steppe.ops.cuda.decode_kernels import add_rows, find_active
from steppe.ops.reference import ceil_div
from steppe.ops.screening import MOST_OF_BYTES, quantise, slack_of_bias, slack_of_units

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_KERNEL = 64 * 2.0**-24  # of the products that the kernel rounds
_ABOVE = 2.0**-20  # of each part, for the sum of the four
_TINY = 2.0**-126  # what may be lost to underflow

# Under TRITON_INTERPRET=1 the kernels take tensors of any device.
INTERPRETED = not isinstance(find_active, triton.JITFunction)


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
    (4096, Config(16, 4, 4, 2048, 8, 512, 32, 8), Config(32, 4, 4, 1024, 4, 512, 32, 8)),
)
MOST_WIDTH = _CONFIGS[-1][0]


def config_of(width: int, screens: bool) -> Config:
    """The launch for blocks of a width D, at most `MOST_WIDTH`."""
    return next(configs[screens] for most, *configs in _CONFIGS if width <= most)


class Lists(NamedTuple):
    """The active units, in a list for each program of `find_active`.

    Attributes:
        counts: int32 ``[lists]``.
        units: int32 ``[lists, rows]``, ascending.
        values: float32 ``[lists, rows]``, σ(p).
    """

    counts: Tensor
    units: Tensor
    values: Tensor


def constants_of(width: int, screens: bool, config: Config, pdl: bool) -> dict[str, Any]:
    """The constants of `find_active`, and what else its launch takes."""
    return {
        "D": width,
        "WORDS": words_of(width),
        "MOST": most_of(width),
        "LONGER": 1.0 + (width + 64) * 2.0**-24 + 2.0**-18,
        "SCREENS": screens,
        "DP4A": not INTERPRETED,
        "ROWS": config.rows,
        "GROUP": config.group,
        "BATCH": config.batch,
        "STEP": config.step,
        "WIDE": triton.next_power_of_2(words_of(width)),
        "num_warps": config.warps,
        **_pdl_of(pdl),
    }


def down_constants_of(lists: int, config: Config, pdl: bool) -> dict[str, Any]:
    """Those of `add_rows`."""
    return {
        "ALL": triton.next_power_of_2(lists),
        "ROWS": config.rows,
        "BATCH": config.down_batch,
        "COLUMNS": config.down_columns,
        "num_warps": config.down_warps,
        **_pdl_of(pdl),
    }


def _pdl_of(pdl: bool) -> dict[str, Any]:
    return {"PDL": True, "launch_pdl": True} if pdl else {"PDL": False}


def _has_pdl(device: torch.device) -> bool:
    """Whether a kernel can start while the one before it ends: programmatic dependent launch."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


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
    lists = Lists(
        x.new_empty(programs, dtype=torch.int32),
        x.new_empty(programs, config.rows, dtype=torch.int32),
        x.new_empty(programs, config.rows, dtype=torch.float32),
    )
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
        **constants_of(width, screen is not None, config, _has_pdl(x.device)),
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
        **down_constants_of(number, config, _has_pdl(x.device)),
    )
    return z


torch.library.define(
    "steppe::decode_token",
    "(Tensor x, Tensor weight, Tensor bias, Tensor down, Tensor down_bias,"
    " Tensor? words, Tensor? bounds, float alpha, float beta) -> Tensor",
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
) -> Tensor:
    screen = None if words is None or bounds is None else Screen(words, bounds)
    _check(x, weight, bias, down, down_bias, screen)
    config = config_of(weight.shape[1], screen is not None)
    with torch.cuda.device_of(x):
        return launch(x, weight, bias, down, down_bias, screen, (alpha, beta), config)


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
) -> Tensor:
    """An MLP block, z = σ(x Kᵀ + b) V + c with σ(p) = α r + β r² and r = max(p, 0), on one token.

    The op ``steppe::decode_token``. Its shapes are static and nothing waits for the device, so a
    CUDA graph can capture it. It has no gradient.

    Args:
        x: ``[1, D]``, of one of `DTYPES`; D at most `MOST_WIDTH`. Contiguous, like all others.
        weight: K, ``[F, D]``, in x's dtype like the next three.
        bias: b, ``[F]``.
        down: V, ``[F, D]``; an ``nn.Linear`` holds its transpose.
        down_bias: c, ``[D]``.
        screen: of K and b as they are now, by `screen_of`; None to read all of K.
        alpha: α.
        beta: β.

    Returns:
        z, ``[1, D]``, summed in float32 and rounded once; the same bits in each call.

    Raises:
        KernelError: shapes, dtypes, devices or layouts are others.
    """
    words, bounds = (None, None) if screen is None else screen
    z: Tensor = torch.ops.steppe.decode_token(
        x, weight, bias, down, down_bias, words, bounds, alpha, beta
    )
    return z


def _check(
    x: Tensor, weight: Tensor, bias: Tensor, down: Tensor, down_bias: Tensor, screen: Screen | None
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
    expected = [
        ("x", x, (1, width), x.dtype),
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
    for name, tensor, shape, dtype in expected:
        got = tensor.shape, tensor.dtype, tensor.device
        if got != (shape, dtype, x.device) or not tensor.is_contiguous():
            raise KernelError(
                f"decode_token: {name}: expected {dtype} {list(shape)} on {x.device}, contiguous;"
                f" got {tensor.dtype} {list(tensor.shape)} on {tensor.device} with strides"
                f" {list(tensor.stride())}"
            )
