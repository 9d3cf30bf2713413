"""One token through a block, in the interpreter: against float64, and with a screen and without."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from ops.cuda import interpreter
from ops.screening_cases import (
    CASES,
    Case,
    Make,
    active_somewhere,
    along_residual,
    cancelling_sums,
    flushed_to_zero,
    largest_sums,
    midpoints,
    rounding_up,
    ties,
)
from steppe.errors import KernelError
from steppe.ops import screening
from steppe.ops.cuda import decode
from steppe.ops.cuda.decode import (
    Config,
    Screen,
    decode_token,
    launch,
    launch_find,
    most_of,
    screen_of,
)
from steppe.ops.screening import rotate

pytestmark = [interpreter.NEEDED, pytest.mark.usefixtures("poisoned")]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SMALL = Config(32, 16, 8, 64, 4, 8, 64, 4)  # several programs, groups, batches and steps
# D, F and density.
BLOCKS = [
    (80, 100, 0.1), (131, 77, 0.1), (64, 64, 0.3), (16, 15, 0.5), (1, 1, 0.5), (64, 40, 0.0),
    (64, 40, 1.0),
]  # fmt: skip
TOKENS = 4  # of each case: an interpreted one takes a tenth of a second
# What one rounding of z and the float32 sums may lose, of ‖z‖.
TOLERANCES = {torch.float32: 2e-6, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}

Block = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]  # x, K, b, V, c


def block_of(width: int, units: int, density: float, dtype: torch.dtype) -> Block:
    """A block and a token, of which about that share of the units is active."""
    x, weight, down = (torch.randn(rows, width).to(dtype) for rows in (1, units, units))
    p = (x.double() @ weight.double().T)[0]
    bias = -torch.quantile(p, 1.0 - density).repeat(units) + (1.0 if density == 1.0 else 0.0)
    return x, weight, bias.to(dtype), down, torch.randn(width).to(dtype)


def expected(block: Block, alpha: float, beta: float) -> Tensor:
    x, weight, bias, down, down_bias = (part.double() for part in block)
    r = torch.relu(x @ weight.T + bias)
    return (alpha * r + beta * r * r) @ down + down_bias


def both_ways(block: Block, beta: float = 0.0, config: Config = SMALL) -> Tensor:
    """z, after it was found to be the same bits with the screen, without it, and once more."""
    _, weight, bias, *_ = block
    screen = screen_of(weight, bias)
    z = launch(*block, screen, (1.0, beta), config)
    for again in (screen, None):
        other = launch(*block, again, (1.0, beta), config)
        assert torch.equal(z.isnan(), other.isnan())
        assert torch.equal(z[~z.isnan()], other[~other.isnan()])
    return z


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("width", "units", "density"), BLOCKS)
def test_a_token_has_its_z(width: int, units: int, dtype: torch.dtype, density: float) -> None:
    torch.manual_seed(0)
    block = block_of(width, units, density, dtype)
    z = both_ways(block, 0.5)
    assert z.dtype == dtype
    wanted = expected(block, 1.0, 0.5)
    if wanted.abs().max() < torch.finfo(dtype).max:
        assert torch.dist(z.double(), wanted) <= TOLERANCES[dtype] * wanted.norm()


@pytest.mark.parametrize("screens", [False, True])
@pytest.mark.parametrize("most", [most for most, *_ in decode._CONFIGS])
def test_the_launches_that_are_shipped_compute_the_same(most: int, screens: bool) -> None:
    torch.manual_seed(0)
    block = block_of(64, 80, 0.1, torch.float32)
    wanted = expected(block, 1.0, 0.0)
    z = both_ways(block, config=decode.config_of(most, screens))
    assert torch.dist(z.double(), wanted) <= TOLERANCES[torch.float32] * wanted.norm()


@pytest.mark.parametrize("where", ["x", "weight", "bias"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_comes_out_as_without_steppe(where: str, value: float) -> None:
    torch.manual_seed(0)
    block = block_of(64, 32, 0.1, torch.float32)
    x, weight, bias, down, down_bias = block
    weight[5] = 0.0  # its p is b, which is below zero: −∞ keeps it inactive
    {"x": x, "weight": weight, "bias": bias}[where].view(-1)[5] = value
    r = torch.relu(x @ weight.T + bias)
    active = ~(r[0] <= 0)
    z = both_ways(block)
    # Rows of V that are not read are no 0 · NaN.
    assert torch.equal(
        z.isfinite().all(), (r[:, active] @ down[active] + down_bias).isfinite().all()
    )
    assert torch.equal(z.isnan(), (r[:, active] @ down[active] + down_bias).isnan())


def test_zeros_are_inactive_and_what_is_below_them_is_not_read() -> None:
    torch.manual_seed(0)
    x, weight, _, down, down_bias = block_of(64, 32, 0.1, torch.float32)
    bias = torch.full((32,), -0.0)
    weight[:] = 0.0
    down[:] = math.nan
    z = both_ways((x, weight, bias, down, down_bias))
    assert torch.equal(z[0], down_bias)
    bias[3] = 1e-45  # the least number above zero
    assert both_ways((x, weight, bias, down, down_bias)).isnan().all()


def turned(make: Make) -> Make:
    """A case in the basis that the CPU's screen rotates to, where it lies on this screen's grid."""

    def other(generator: torch.Generator) -> Case:
        x, weight, bias = make(generator)
        return rotate(x.double()).float(), rotate(weight.double()).float(), bias

    other.__name__ = f"{make.__name__}, turned"
    return other


def along_inputs_residual_of_two_bytes(generator: torch.Generator) -> Case:
    """K on its grid, and along x − x̃."""
    weight, x, _ = turned(along_residual)(generator)
    x[:, 1] = most_of(128)
    above = 1e-3 * weight.double().square().sum(1) / 256
    return x, weight, (above - (x.double() * weight.double()).sum(1)).float()


ON_THE_GRID = [
    *(ties, midpoints, along_residual, rounding_up, cancelling_sums, flushed_to_zero),
    *map(largest_sums, (128, 4096)),
]
ALL_CASES = [*CASES, *map(turned, ON_THE_GRID), along_inputs_residual_of_two_bytes]


def run_case(make: Make) -> tuple[Case, Screen]:
    x, weight, bias = make(torch.Generator().manual_seed(1))
    return (x[:TOKENS].contiguous(), weight, bias), screen_of(weight, bias)


def candidates_of(case: Case, screen: Screen) -> Tensor:
    """bool ``[T, F]``: with an infinite bias all that are computed are active."""
    x, weight, _ = case
    units, width = weight.shape
    rows = 1 << (units - 1).bit_length()
    step = min(1 << (width - 1).bit_length(), 4096)
    config = Config(rows, rows, 16, step, 4, 16, 64, 4)
    bias = torch.full((units,), math.inf)
    found = torch.zeros(len(x), units, dtype=torch.bool)
    for one, row in zip(x.split(1), found, strict=True):
        lists = launch_find(one, weight, bias, screen, (1.0, 0.0), config)
        row[lists.units[0, : int(lists.counts)].long()] = True
    return found


@pytest.mark.parametrize("make", ALL_CASES, ids=lambda make: make.__name__)
def test_no_active_unit_is_missed_and_few_others_are_taken(make: Make) -> None:
    case, screen = run_case(make)
    x, weight, bias = case
    found = candidates_of(case, screen)
    assert not (active_somewhere(*case) & ~found).any()
    # What float64 takes with a bound that is a twentieth longer; all of what is tiny are taken.
    of_x = screening.quantise(x, most_of(x.shape[1]), rotates=False)
    of_weight = screening.quantise(weight, rotates=False)
    slack = screening.slack(of_x, of_weight, bias)
    longer = screening.estimate(of_x, of_weight) + 1.05 * slack + bias.double()
    is_tiny = (x.abs().amax(1) < 1e-28)[:, None] | (weight.abs().amax(1) < 1e-28)
    assert not (found & (longer <= 0) & ~is_tiny).any()


@pytest.mark.parametrize(
    ("make", "part", "factor"),
    # ‖x − x̃‖ is only a ten-thousandth of ‖x‖, so the room for rounding is a quarter of its part.
    [(turned(along_residual), 1, 0.99), (along_inputs_residual_of_two_bytes, 2, 0.7)],
    ids=["residual of K", "residual of x"],
)
def test_a_shorter_bound_would_miss_units(make: Make, part: int, factor: float) -> None:
    case, screen = run_case(make)
    screen.bounds[part] *= factor
    assert (active_somewhere(*case) & ~candidates_of(case, screen)).any()


def test_the_words_are_the_integers_in_their_order() -> None:
    torch.manual_seed(0)
    weight = torch.randn(5, 37)
    screen = screen_of(weight, torch.zeros(5), rows=2)  # in three parts
    integers = screen.words.view(torch.int8).view(5, -1, 4).transpose(1, 2).reshape(5, -1)
    grid = screening.quantise(weight, rotates=False)
    assert torch.equal(integers[:, :37].int(), grid.integers)
    assert not integers[:, 37:].any()
    assert torch.equal(screen.bounds[0], grid.scale.float())
    assert integers.abs().max() == 127


def test_the_largest_product_fits_into_int32() -> None:
    for width in (1, 768, 2048, 4096, decode.MOST_WIDTH):
        most = most_of(width)
        assert 127 < most <= 127 * 256 + 127
        assert 127 * most * width < 2**31


def test_it_is_an_op() -> None:
    torch.manual_seed(0)
    block = block_of(64, 32, 0.1, torch.float32)
    _, weight, bias, *_ = block
    for words, bounds in (screen_of(weight, bias), (None, None)):
        arguments = (*block, words, bounds, 1.0, 0.0)
        torch.library.opcheck(torch.ops.steppe.decode_token.default, arguments)


def test_what_it_cannot_take_is_refused() -> None:
    x, weight, bias, down, down_bias = block_of(64, 32, 0.1, torch.float32)
    screen = screen_of(weight, bias)
    with pytest.raises(KernelError, match=r"x: expected torch\.float32 \[1, 64\]"):
        decode_token(x[:, :63], weight, bias, down, down_bias, screen)
    with pytest.raises(KernelError, match=r"got torch\.float64"):
        decode_token(x.double(), weight, bias, down, down_bias, screen)
    with pytest.raises(KernelError, match="down: expected"):
        decode_token(x, weight, bias, down.T.contiguous().T, down_bias, screen, 1.0, 0.0)
    other = screen_of(torch.randn(32, 80), bias)
    with pytest.raises(KernelError, match=r"words: expected torch\.int32 \[32, 16\]"):
        decode_token(x, weight, bias, down, down_bias, other)
    wide = torch.empty(1, decode.MOST_WIDTH + 1)
    with pytest.raises(KernelError, match="with D at most"):
        decode_token(wide, wide, wide[0, :1], wide, wide[0], None)
