"""The screen's definition misses no unit that any float32 evaluation finds active."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from ops.screening_cases import (
    CASES,
    Make,
    active_somewhere,
    along_inputs_residual,
    along_residual,
    cancelling_sums,
    flushed_to_zero,
    gaussian,
    overflowing,
    rounding_up,
)
from steppe.ops import screening
from steppe.ops.screening import MOST_OF_BYTES, candidates, estimate, quantise, rotate, slack


def missed(x: Tensor, weight: Tensor, bias: Tensor, most: int) -> int:
    """Units that an evaluation finds active, float64's among them, and the screen does not."""
    found = candidates(quantise(x, most), quantise(weight), bias)
    return int((active_somewhere(x, weight, bias) & ~found).sum())


@pytest.mark.parametrize("flushed", [False, True])
@pytest.mark.parametrize("most", MOST_OF_BYTES)
@pytest.mark.parametrize("make", CASES, ids=lambda make: make.__name__)
def test_no_unit_is_missed(make: Make, most: int, flushed: bool) -> None:
    for seed in range(3):
        x, weight, bias = make(torch.Generator().manual_seed(seed))
        torch.set_flush_denormal(flushed)
        try:
            assert missed(x, weight, bias, most) == 0
        finally:
            torch.set_flush_denormal(False)


@pytest.mark.parametrize(
    ("make", "name", "value"),
    [
        (rounding_up, "_UNIT", 0.0),
        (cancelling_sums, "_UNIT", 0.0),
        (flushed_to_zero, "_TINY", 0.0),
        (overflowing(1e25, 3e13), "_LARGE_INPUT", math.inf),
        (overflowing(1e13, 3e25), "_LARGE_ROW", math.inf),
    ],
)
def test_without_a_part_of_the_bound_units_are_missed(
    make: Make, name: str, value: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(screening, name, value)
    case = make(torch.Generator().manual_seed(0))
    torch.set_flush_denormal(True)
    try:
        assert missed(*case, most=127) > 0
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


@pytest.mark.parametrize("most", MOST_OF_BYTES)
def test_a_bound_a_hundredth_smaller_misses_units(most: int) -> None:
    x, weight, bias = along_residual(torch.Generator().manual_seed(0))
    one, other = quantise(x, most), quantise(weight)
    assert float(one.residual.max() / one.norm.max()) < 1e-4
    _assert_tight(x, weight, bias, estimate(one, other), slack(one, other, bias))
    if most == 127:
        x, weight, bias = along_inputs_residual(torch.Generator().manual_seed(0))
        one, other = quantise(x), quantise(weight)
        assert float(other.residual.max() / other.norm.max()) < 1e-4
        _assert_tight(x, weight, bias, estimate(one, other), slack(one, other, bias))


def _assert_tight(x: Tensor, weight: Tensor, bias: Tensor, centre: Tensor, whole: Tensor) -> None:
    """Units of the diagonal are active, and only the whole of the bound tells it."""
    centre, whole = (centre + bias.double()).diagonal(), whole.diagonal()
    active = ((x.double() * weight.double()).sum(1) + bias.double()) > 0
    assert bool(active.all())
    assert not (active & ~(centre + whole > 0)).any()
    assert int((active & ~(centre + 0.99 * whole > 0)).sum()) > 32


def test_few_others_are_candidates() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(256, 768, generator=generator)
    weight = torch.randn(512, 768, generator=generator) / 768**0.5
    bias = torch.full((512,), -1.645)  # one in twenty is active
    shares = [
        float(candidates(quantise(x, most), quantise(weight), bias).double().mean())
        for most in MOST_OF_BYTES
    ]
    assert 0.05 < shares[1] < 0.085
    assert shares[1] < shares[0] < 0.13
    x[:, :6] *= 15
    spread = candidates(quantise(x), quantise(weight), None).double().mean()
    plain = [quantise(rotate(matrix.double()).float()) for matrix in (x, weight)]
    # Rotated twice is not rotated at all.
    assert spread < candidates(*plain, None).double().mean()


@pytest.mark.parametrize("width", [0, 1, 96, 128, 257, 768])
def test_the_rotation_keeps_products(width: int) -> None:
    one, other = torch.randn(2, 8, width, dtype=torch.float64).unbind()
    padded = -width % 128
    assert rotate(one).shape == (8, width + padded)
    torch.testing.assert_close(rotate(one) @ rotate(other).T, one @ other.T)
    torch.testing.assert_close(rotate(rotate(one)), F.pad(one, (0, padded)))
    assert width == 0 or not torch.allclose(rotate(one)[:, :width], one)


def test_the_rotation_spreads_one_feature_over_sixteen() -> None:
    spread = rotate(torch.eye(256, dtype=torch.float64))
    assert ((spread.abs() == 0.25).sum(1) == 16).all()
    assert (spread.count_nonzero(1) == 16).all()


@pytest.mark.parametrize("most", MOST_OF_BYTES)
@pytest.mark.parametrize("width", [0, 1, 33, 128, 300])
def test_the_largest_of_a_row_is_the_grids_last_integer(most: int, width: int) -> None:
    matrix = torch.randn(5, width)
    grid = quantise(matrix, most)
    assert grid.width == width
    assert grid.integers.shape == (5, width + -width % 128)
    assert not grid.norm.isnan().any()
    if width:
        assert (grid.integers.abs().amax(1) == most).all()
        torch.testing.assert_close(
            grid.scale * most, rotate(matrix.double()).abs().amax(1), rtol=1e-12, atol=0.0
        )


def test_the_parts_of_the_bound_are_not_below_the_exact_ones() -> None:
    matrix = torch.randn(4, 33) * torch.tensor([[1e-42], [1e-3], [1.0], [1e30]])
    grid = quantise(matrix)
    assert grid.residual.shape == grid.norm.shape == (4,)
    of_grid = grid.norm + grid.residual
    for row, integers, scale, *told in zip(
        matrix, grid.integers, grid.scale, grid.residual, of_grid, grid.norm, strict=True
    ):
        exact = _rotated_exactly(row)
        on_grid = [int(i) * Fraction(float(scale)) for i in integers]
        squares = [
            sum((a - b) ** 2 for a, b in zip(exact, on_grid, strict=True)),
            sum(b * b for b in on_grid),
            sum(a * a for a in exact),
        ]
        for square, bound, most in zip(squares, told, (1.001, 1.02, 1.001), strict=True):
            assert square <= Fraction(float(bound)) ** 2 <= square * Fraction(most)


def _rotated_exactly(row: Tensor) -> list[Fraction]:
    """By the definition of a Hadamard matrix: the sign is the parity of the common bits."""
    step = (len(row) + -len(row) % 128) // 16
    padded = [Fraction(v) for v in F.pad(row, (0, 16 * step - len(row))).tolist()]
    return [
        sum(padded[other * step + i] * (-1) ** (part & other).bit_count() for other in range(16))
        / 4
        for part in range(16)
        for i in range(step)
    ]
