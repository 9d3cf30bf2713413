"""The screen misses no unit that any float32 evaluation finds active."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from fractions import Fraction

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from steppe.ops.screening import Grid, candidates, estimate, quantise, rotate, slack

BITS = (8, 16)
Case = tuple[Tensor, Tensor, Tensor]


def evaluations(x: Tensor, weight: Tensor, bias: Tensor) -> Iterator[Tensor]:
    """x Kᵀ + b in float32, summed in different orders."""
    yield x @ weight.T + bias
    yield F.linear(x, weight, bias)
    products = x[:, None] * weight
    yield serial(products) + bias
    yield serial(products.flip(-1)) + bias
    fours = F.pad(products, (0, -products.shape[-1] % 4)).unflatten(-1, (-1, 4))
    yield fours.sum(-1).sum(-1) + bias


def serial(products: Tensor) -> Tensor:
    """One after the other, each sum rounded; ``cumsum`` adds in float64."""
    total = torch.zeros_like(products[..., 0])
    for product in products.unbind(-1):
        total = total + product
    return total


def missed(x: Tensor, weight: Tensor, bias: Tensor, bits: int) -> int:
    """Units that an evaluation finds active, float64's among them, and the screen does not."""
    found = candidates(quantise(x, bits), quantise(weight), bias)
    exact = x.double() @ weight.double().T + bias.double()
    active = ~(exact <= 0)
    for p in evaluations(x, weight, bias):
        active |= ~(p <= 0)
    return int((active & ~found).sum())


def gaussian(
    generator: torch.Generator, width: int = 256, tokens: int = 32, units: int = 96
) -> Case:
    x = torch.randn(tokens, width, generator=generator)
    weight = torch.randn(units, width, generator=generator) / width**0.5
    return x, weight, torch.randn(units, generator=generator) - 1.3


def ties(generator: torch.Generator) -> Case:
    """Each token's p is zero in one unit, by one evaluation of it."""
    x, weight, bias = gaussian(generator, tokens=96)
    bias = -(x * weight).sum(1)
    return x, weight, bias


def one_above(generator: torch.Generator) -> Case:
    x, weight, bias = ties(generator)
    return x, weight, torch.nextafter(bias, torch.tensor(math.inf))


def one_below(generator: torch.Generator) -> Case:
    x, weight, bias = ties(generator)
    return x, weight, torch.nextafter(bias, torch.tensor(-math.inf))


def integer_zeros(generator: torch.Generator) -> Case:
    x = torch.randint(-3, 4, (64, 256), generator=generator).float()
    weight = torch.randint(-3, 4, (64, 256), generator=generator).float()
    return x, weight, -(x @ weight.T).diagonal().clone()


def midpoints(generator: torch.Generator) -> Case:
    """Every entry halfway between two integers of the grid."""
    x = torch.randint(-126, 126, (48, 128), generator=generator) + 0.5
    weight = torch.randint(-126, 126, (48, 128), generator=generator) + 0.5
    x[:, 0] = weight[:, 0] = 127.0
    return x, weight, -(x @ weight.T).diagonal() * (1 - 1e-6)


def along_residual(generator: torch.Generator) -> Case:
    """x on the grid, and along k − k̃: what Cauchy and Schwarz allow is reached."""
    x = torch.randint(-127, 128, (64, 128), generator=generator).float()
    x[:, 0] = 127.0
    steps = torch.randint(-120, 121, (64, 128), generator=generator).float()
    weight = steps + x / 260  # less than half a step
    weight[:, 1] = 127.0
    x[:, 1] = 0.0
    exact = (x.double() * weight.double()).sum(1)
    # Active by a thousandth of the bound, which therefore cannot be a hundredth smaller.
    return x, weight, (1e-3 * x.square().sum(1) / 260 - exact).float()


def along_inputs_residual(generator: torch.Generator) -> Case:
    """The same of k on the grid, and along x − x̃."""
    weight, x, _ = along_residual(generator)
    exact = (x.double() * weight.double()).sum(1)
    return x, weight, (1e-3 * weight.square().sum(1) / 260 - exact).float()


def rounding_up(generator: torch.Generator) -> Case:
    """Whole numbers on the grid, whose sums no float32 holds: only rounding is left."""
    x = torch.full((4, 16385), 127.0)
    weight = torch.randint(1, 128, (8, 16385), generator=generator).float()
    weight[:, 0] = 127.0
    return x, weight, -serial(x[:1, None] * weight)[0]


def flushed_to_zero(generator: torch.Generator) -> Case:
    """Only the positive product is large enough not to be flushed."""
    weight = torch.tensor([[1.3e-19, -1.1e-19, -1.1e-19]])
    return torch.full((1, 3), 1e-19), weight, torch.zeros(1)


def outliers(generator: torch.Generator) -> Case:
    x, weight, bias = gaussian(generator)
    x[:, 3] = 1e6
    return x, weight, bias


def decades(generator: torch.Generator) -> Case:
    """Rows of many sizes, each with features of many sizes."""
    x, weight, bias = gaussian(generator)
    tens = torch.logspace(-18, 18, 256)
    return x * tens[torch.randperm(256, generator=generator)], weight * tens.flip(0), bias


def scaled(to: float) -> Callable[[torch.Generator], Case]:
    def make(generator: torch.Generator) -> Case:
        x, weight, bias = gaussian(generator)
        return x * to, weight * to, bias * to

    make.__name__ = f"scaled to {to}"
    return make


def denormal(generator: torch.Generator) -> Case:
    x, weight, _ = gaussian(generator)
    return x * 1e-20, weight * 1e-20, torch.full((96,), -1e-45)


def overflowing(generator: torch.Generator) -> Case:
    """Partial sums overflow, and the sum would not."""
    x = torch.full((4, 256), 1e19)
    weight = torch.full((6, 256), 3e19)
    weight[:, 128:] *= -1
    return x, weight, torch.full((6,), -1.0)


def one_hot(generator: torch.Generator) -> Case:
    weight = torch.randn(64, 256, generator=generator)
    return torch.eye(256)[:64], weight, -weight.diagonal().clone()


def zeros(generator: torch.Generator) -> Case:
    x, weight, bias = gaussian(generator)
    x[::2], weight[::2] = 0.0, 0.0
    return x, weight, bias.sign() * 1e-45


def same_sign(generator: torch.Generator) -> Case:
    x, weight, _ = gaussian(generator, width=4096, units=8, tokens=8)
    x, weight = x.abs(), weight.abs()
    return x, weight, -(x * weight).sum(1)


CASES = [
    *(gaussian, ties, one_above, one_below, integer_zeros, midpoints, along_residual),
    *(along_inputs_residual, rounding_up, flushed_to_zero, outliers, decades, denormal),
    *(overflowing, one_hot, zeros, same_sign),
    *(scaled(to) for to in (1e10, 1e18, 1e-10, 1e-19, 1e-22)),
]


@pytest.mark.parametrize("flushed", [False, True])
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("make", CASES, ids=lambda make: make.__name__)
def test_no_unit_is_missed(
    make: Callable[[torch.Generator], Case], bits: int, flushed: bool
) -> None:
    for seed in range(3):
        x, weight, bias = make(torch.Generator().manual_seed(seed))
        torch.set_flush_denormal(flushed)
        try:
            assert missed(x, weight, bias, bits) == 0
        finally:
            torch.set_flush_denormal(False)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", [0, 1, 2])
def test_what_is_not_finite_is_a_candidate(value: float, place: int) -> None:
    case = gaussian(torch.Generator().manual_seed(0))
    case[place].flatten()[5] = value
    x, weight, bias = case
    found = candidates(quantise(x), quantise(weight), bias)
    p = F.linear(x, weight, bias)
    assert found[~p.isfinite() & ~(p == -math.inf)].all()
    assert missed(x, weight, bias, 8) == 0


@pytest.mark.parametrize("bits", BITS)
def test_a_bound_a_hundredth_smaller_misses_units(bits: int) -> None:
    x, weight, bias = along_residual(torch.Generator().manual_seed(0))
    one, other = quantise(x, bits), quantise(weight)
    assert float(one.residual.max() / one.norm.max()) < 1e-4
    centre = (estimate(one, other) + bias.double()).diagonal()
    active = ((x.double() * weight.double()).sum(1) + bias.double()) > 0
    whole = slack(one, other, bias).diagonal()
    assert bool(active.all())
    assert not (active & ~(centre + whole > 0)).any()
    assert int((active & ~(centre + 0.99 * whole > 0)).sum()) > 32


def test_few_others_are_candidates() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(256, 768, generator=generator)
    weight = torch.randn(512, 768, generator=generator) / 768**0.5
    bias = torch.full((512,), -1.645)  # one in twenty is active
    shares = [
        float(candidates(quantise(x, bits), quantise(weight), bias).double().mean())
        for bits in BITS
    ]
    assert 0.05 < shares[1] < 0.085
    assert shares[1] < shares[0] < 0.13
    x[:, :6] *= 15
    spread = candidates(quantise(x), quantise(weight), None).double().mean()
    plain = candidates(_unrotated(x), _unrotated(weight), None).double().mean()
    assert spread < plain


def _unrotated(matrix: Tensor) -> Grid:
    """The grid of the same rows, in a width that is not rotated."""
    return quantise(F.pad(matrix, (0, 1)))


@pytest.mark.parametrize("width", [256, 512, 768])
def test_the_rotation_keeps_products(width: int) -> None:
    one, other = torch.randn(2, 8, width, dtype=torch.float64).unbind()
    torch.testing.assert_close(rotate(one) @ rotate(other).T, one @ other.T)
    torch.testing.assert_close(rotate(rotate(one)), one)  # it is its own inverse
    assert not torch.allclose(rotate(one), one)


@pytest.mark.parametrize("width", [0, 1, 96, 257])
def test_other_widths_are_not_rotated(width: int) -> None:
    matrix = torch.randn(3, width, dtype=torch.float64)
    assert rotate(matrix).equal(matrix)
    grid = quantise(matrix.float())
    assert grid.integers.shape == (3, width)
    assert not grid.norm.isnan().any()


def test_the_parts_of_the_bound_are_not_below_the_exact_ones() -> None:
    matrix = torch.randn(4, 33) * torch.tensor([[1e-42], [1e-3], [1.0], [1e30]])
    grid = quantise(matrix)
    for row, integers, scale, *told in zip(matrix, *grid, strict=True):
        exact = [Fraction(v) for v in row.tolist()]
        on_grid = [int(i) * Fraction(float(scale)) for i in integers]
        squares = [
            sum((a - b) ** 2 for a, b in zip(exact, on_grid, strict=True)),
            sum(b * b for b in on_grid),
            sum(a * a for a in exact),
        ]
        for square, bound in zip(squares, told, strict=True):
            assert square <= Fraction(float(bound)) ** 2 <= square * Fraction(1001, 1000)
