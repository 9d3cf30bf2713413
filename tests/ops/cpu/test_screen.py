"""The native screens, of many rows and of few, find what the definition finds and miss nothing."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ops.screening_cases import (
    CASES,
    Make,
    active_somewhere,
    along_residual,
    along_wide_residual,
    cancelling_sums,
    flushed_to_zero,
    gaussian,
    of_few_rows,
    overflowing,
)
from steppe.errors import KernelError
from steppe.ops.cpu import calls, screen
from steppe.ops.cpu.calls import DECODE_ROWS
from steppe.ops.cpu.decode import DecodeBlock
from steppe.ops.cpu.library import kernels
from steppe.ops.cpu.screen import (
    Screen,
    compact_product,
    find_candidates,
    screen_of,
    token_most,
)
from steppe.ops.outcome import noted
from steppe.ops.reference import Weights, ceil_div, densify
from steppe.ops.screening import Grid, candidates, estimate, quantise, rotate, slack

pytestmark = pytest.mark.skipif(kernels().name != "native", reason=kernels().reason)
DTYPES = [torch.float32, torch.bfloat16]
WIDTHS = [0, 1, 15, 16, 17, 63, 64, 65, 127, 128, 129, 200, 768]
Find = Callable[..., Tensor]


def of_many(x: Tensor, weight: Tensor, bias: Tensor | None, screen: Screen | None = None) -> Tensor:
    """The candidates of `find_candidates`, bool ``[T, F]``."""
    found = find_candidates(x, screen or screen_of(weight), bias)
    assert found is not None  # of any share
    bits = found.masks[..., None] >> torch.arange(64) & 1
    listed = bits.bool().flatten(1)[:, : weight.shape[0]]
    assert torch.equal(bits.sum(-1), found.counts.long())  # none past the last unit either
    assert int(listed.sum()) == int(found.counts.sum())
    assert found.share == int(listed.sum()) / max(listed.numel(), 1)
    return listed


def of_few(x: Tensor, weight: Tensor, bias: Tensor | None, screen: Screen | None = None) -> Tensor:
    """Those that a block on at most `DECODE_ROWS` rows computes, bool ``[T, F]``.

    In place of the weight the block is given NaN to multiply with once it is screened, so that all
    candidates stay listed.
    """
    hidden, width = weight.shape
    zeros = weight.new_zeros(hidden, width)
    block = DecodeBlock(Weights(weight, bias, None, None, zeros, None), screens=True, stays=True)
    nan, bytes_of = torch.full_like(zeros, math.nan), screen
    block._structure.w, block._structure.w_stride = nan.data_ptr(), width
    if bytes_of is not None:
        block._structure.bytes = bytes_of.integers.data_ptr()
        block._structure.bounds = bytes_of.bounds.data_ptr()
    listed = []
    for rows in x.contiguous().split(DECODE_ROWS):
        r, z = x.new_zeros(len(rows), hidden), torch.empty_like(rows)
        assert block.run(rows, (1.0, 0.0), 1.0, 1.0, (z, r, r))
        listed.append(r.isnan())
        outcome = noted()
        assert outcome is not None
        share = int(listed[-1].sum()) / max(listed[-1].numel(), 1)
        assert not rows.numel() or outcome.candidates == pytest.approx(share, abs=1e-12)
    return torch.cat(listed) if listed else torch.zeros(0, hidden, dtype=torch.bool)


FINDERS = [(of_many, DECODE_ROWS + 1), (of_few, DECODE_ROWS)]
each_way = pytest.mark.parametrize(("find", "least_rows"), FINDERS, ids=["many", "few"])


@pytest.mark.parametrize("flushed", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@each_way
@pytest.mark.parametrize("make", CASES, ids=lambda make: make.__name__)
def test_no_unit_is_missed(
    make: Make, find: Find, least_rows: int, dtype: torch.dtype, flushed: bool
) -> None:
    for seed in range(2):
        x, weight, bias = (part.to(dtype) for part in make(torch.Generator().manual_seed(seed)))
        torch.set_flush_denormal(flushed)
        try:
            found = find(x, weight, bias)
            active = active_somewhere(x.float(), weight.float(), bias.float())
            active |= computed_active(x, weight, bias)
        finally:
            torch.set_flush_denormal(False)
        assert int((active & ~found).sum()) == 0
        if not flushed:
            assert_those_of_the_definition(found, x, weight, bias, least_rows)


def on_its_grid(x: Tensor, rows: int) -> Grid:
    """x on the grids that the kernels use in a call of so many rows."""
    return quantise(x, most=token_most(x.shape[1], rows))


def computed_active(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """What the kernels that compute candidates find active, bool ``[T, F]``."""
    rows, hidden = x.shape[0], weight.shape[0]
    everything, support = listed_everywhere(rows, hidden, x.dtype)
    values = calls.sampled(support, calls.pack(x), calls.pack(weight), bias)
    p = densify(values, support.index, support.offsets, rows, hidden)
    return ~(p <= 0) | ~(of_few_rows(x, weight, bias) <= 0) | (everything == 0)


def listed_everywhere(rows: int, hidden: int, dtype: torch.dtype) -> tuple[Tensor, calls.Support]:
    """A matrix of ones, and a support that has every entry."""
    ones = torch.ones(rows, hidden, dtype=dtype)
    listed = calls.compact(ones)
    assert listed is not None
    return ones, listed[1]


def assert_those_of_the_definition(
    found: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, least_rows: int
) -> None:
    """Equal, but where rounding in float64 decides: of a number on the grid, or of the bound."""
    one, other = on_its_grid(x, least_rows), quantise(weight)
    halfway = torch.zeros_like(found)
    for axis, matrix, grid in ((0, x, one), (1, weight, other)):
        steps = rotate(matrix.double()) / grid.scale[:, None]
        close = ((steps - steps.floor() - 0.5).abs() < 1e-9).any(1)
        halfway |= close.unsqueeze(1 - axis)
    expected = candidates(one, other, bias)
    middle, above = estimate(one, other), slack(one, other, bias)
    b = torch.zeros(()) if bias is None else bias.double()
    size = middle.abs() + above + b.abs()
    undecided = (middle + above + b).abs() <= 2.0**-34 * size
    assert not ((found != expected) & ~undecided & ~halfway).any()
    assert int((found != expected).sum()) <= 2 + found.numel() // 100


@each_way
@settings(max_examples=60, deadline=None)
@given(
    rows=st.sampled_from([0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 12, 13, 97, 200]),
    width=st.one_of(st.sampled_from(WIDTHS), st.integers(0, 400)),
    hidden=st.one_of(st.sampled_from([0, 1, 63, 64, 65, 128]), st.integers(0, 300)),
    shift=st.sampled_from([-3.0, -1.5, 0.0, 1.0]),
    dtype=st.sampled_from(DTYPES),
    with_bias=st.booleans(),
    transposed=st.booleans(),
    gap=st.sampled_from([0, 3]),
    threads=st.sampled_from([1, 3, 17]),
    seed=st.integers(0, 999),
)
def test_the_candidates_are_those_of_the_definition(
    find: Find,
    least_rows: int,
    rows: int,
    width: int,
    hidden: int,
    shift: float,
    dtype: torch.dtype,
    with_bias: bool,
    transposed: bool,
    gap: int,
    threads: int,
    seed: int,
) -> None:
    if find is of_few and not width * hidden:
        return  # such a block has nothing to lay out
    torch.manual_seed(seed)
    torch.set_num_threads(threads)
    x = torch.randn(rows, width + gap).to(dtype)[:, :width]
    weight = (torch.randn(hidden, width) * max(width, 1) ** -0.5).to(dtype)
    if transposed:
        weight = weight.T.contiguous().T
    bias = (torch.randn(hidden) + shift).to(dtype) if with_bias else None
    found = find(x, weight, bias)
    assert found.shape == (rows, hidden)
    if dtype == torch.float32:
        assert torch.equal(found, candidates(on_its_grid(x, least_rows), quantise(weight), bias))
    else:  # of so few digits that some are halfway between two integers of the grid
        assert_those_of_the_definition(found, x, weight, bias, least_rows)


@each_way
def test_the_share_of_candidates_says_that_something_is_left_out(
    find: Find, least_rows: int
) -> None:
    x, weight = torch.randn(64, 768), torch.randn(512, 768) / 768**0.5
    bias = torch.full((512,), -1.645)
    share = float(find(x, weight, bias).double().mean())
    assert 0.05 < share < (0.13 if token_most(768, least_rows) == 127 else 0.085)


@pytest.mark.parametrize("find", [of_many, of_few])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", [0, 1, 2])
def test_what_is_not_finite_is_a_candidate(value: float, place: int, find: Find) -> None:
    for dtype in DTYPES:
        case = gaussian(torch.Generator().manual_seed(0))
        case[place].flatten()[5] = value
        x, weight, bias = (part.to(dtype) for part in case)
        found = find(x, weight, bias)
        p = torch.nn.functional.linear(x.float(), weight.float(), bias.float())
        assert found[~p.isfinite() & ~(p == -math.inf)].all()
        assert not (active_somewhere(x.float(), weight.float(), bias.float()) & ~found).any()
        assert not found.all()
        row = found[0] if place == 0 else found[:, 0 if place == 1 else 5]
        assert row.all()


def scaled_rows(screen: Screen, factors: tuple[float, float, float]) -> Screen:
    """With of_norm, of_residual and the constant multiplied."""
    bounds = screen.bounds.clone()
    for row, factor in enumerate(factors, 1):
        bounds[row].mul_(factor).nan_to_num_(nan=0.0)
    return screen._replace(bounds=bounds)


@pytest.mark.parametrize(
    ("make", "find", "factors", "least"),
    [
        (along_residual, of_many, (0.99, 1.0, 1.0), 32),
        (along_residual, of_few, (0.99, 1.0, 1.0), 32),
        (along_wide_residual, of_many, (0.0, 0.99, 1.0), 32),
        (along_residual, of_many, (0.99, 0.99, 1.0), 32),
        (cancelling_sums, of_many, (0.0, 1.0, 1.0), 1),
        (cancelling_sums, of_few, (0.0, 1.0, 1.0), 1),
        (flushed_to_zero, of_many, (1.0, 1.0, 0.0), 1),
        (flushed_to_zero, of_few, (1.0, 1.0, 0.0), 1),
        (overflowing(1e13, 3e25), of_many, (1.0, 1.0, 1.0), 1),  # NaN is taken away
        (overflowing(1e13, 3e25), of_few, (1.0, 1.0, 1.0), 1),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_a_smaller_bound_misses_units(
    make: Make, find: Find, factors: tuple[float, float, float], least: int
) -> None:
    x, weight, bias = make(torch.Generator().manual_seed(0))
    screen = screen_of(weight)
    torch.set_flush_denormal(True)
    try:
        active = active_somewhere(x, weight, bias)
    finally:
        torch.set_flush_denormal(False)
    assert int((active & ~find(x, weight, bias, screen)).sum()) == 0
    smaller = scaled_rows(screen, factors)
    assert int((active & ~find(x, weight, bias, smaller)).sum()) >= least


@pytest.mark.parametrize("rows", [3, 100])
def test_no_more_than_a_share_are_listed(rows: int) -> None:
    x, weight = torch.randn(rows, 100), torch.randn(70, 100) / 10
    screen = screen_of(weight)
    found = find_candidates(x, screen, None)
    assert found is not None
    assert 0.3 < found.share < 0.9
    exactly = found.share + 1e-9
    again = find_candidates(x, screen, None, exactly)
    assert again is not None
    assert again.share == found.share
    assert find_candidates(x, screen, None, exactly - 1 / (rows * 70)) is None
    assert find_candidates(x, screen, None, 0.0) is None


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [5, 97])
def test_a_value_does_not_depend_on_which_others_are_candidates(
    rows: int, dtype: torch.dtype
) -> None:
    x, weight = torch.randn(rows, 200).to(dtype), (torch.randn(333, 200) / 14).to(dtype)
    bias = (torch.randn(333) - 1).to(dtype)
    panels = calls.pack(x), calls.pack(weight), bias

    def product(drop: float) -> Tensor:
        found = find_candidates(x, screen_of(weight), bias)
        assert found is not None
        for word in range(found.masks.shape[1]):
            kept = (torch.rand(rows, 64) >= drop).long() << torch.arange(64)
            found.masks[:, word] &= kept.sum(1)
        bits = found.masks[..., None] >> torch.arange(64) & 1
        found.counts.copy_(bits.sum(-1))
        values, support = compact_product(*panels, found._replace(share=1 - drop))
        assert bool((values > 0).all())
        return densify(values, support.index, support.offsets, rows, 333)

    whole = product(0.0)
    assert torch.equal(whole > 0, computed(x, weight, bias) > 0)
    for drop in (0.01, 0.3, 0.9):
        fewer = product(drop)
        there = fewer != 0
        assert 0 < int(there.sum()) < int((whole != 0).sum())
        assert torch.equal(fewer[there], whole[there])


def computed(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The whole product by the sampled kernel."""
    rows, hidden = x.shape[0], weight.shape[0]
    _, support = listed_everywhere(rows, hidden, x.dtype)
    values = calls.sampled(support, calls.pack(x), calls.pack(weight), bias)
    return densify(values, support.index, support.offsets, rows, hidden)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shift", [-99.0, -1.0, 99.0])
@pytest.mark.parametrize("rows", [0, 1, 6, 97])
@pytest.mark.parametrize("threads", [1, 3, 17])
def test_what_is_listed_is_what_compact_lists_of_the_product(
    threads: int, rows: int, shift: float, dtype: torch.dtype
) -> None:
    torch.set_num_threads(threads)
    x, weight = torch.randn(rows, 130).to(dtype), (torch.randn(333, 130) / 11).to(dtype)
    x[:2], bias = math.nan, (torch.randn(333) + shift).to(dtype)
    found = find_candidates(x, screen_of(weight), bias)
    assert found is not None
    values, support = compact_product(calls.pack(x), calls.pack(weight), bias, found)
    p = computed(x, weight, bias)
    got = densify(values, support.index, support.offsets, rows, 333)
    expected = torch.where(p <= 0, 0.0, p)
    assert torch.equal(got.isnan(), p.isnan())
    assert torch.equal(got.nan_to_num(), expected.nan_to_num())
    assert len(values) == int((~(p <= 0)).sum())


@pytest.mark.parametrize("rows", [1, 4, 150])
@pytest.mark.parametrize("dtype", DTYPES)
def test_results_are_the_same_bits_for_any_number_of_threads(rows: int, dtype: torch.dtype) -> None:
    x, weight = torch.randn(rows, 300).to(dtype), (torch.randn(1000, 300) / 17).to(dtype)
    bias, results = (torch.randn(1000) - 1).to(dtype), []
    for threads in (1, 2, 3, 17, 64, 2):
        torch.set_num_threads(threads)
        screen = screen_of(weight)
        found = find_candidates(x, screen, bias)
        assert found is not None
        values, support = compact_product(calls.pack(x), calls.pack(weight), bias, found)
        results.append((*screen[:2], found.masks.clone(), values, *vars(support).values()))
    for other in results[1:]:
        for first, second in zip(results[0], other, strict=True):
            same = first.equal(second) if isinstance(first, Tensor) else first == second
            assert same


def test_the_rows_that_are_looked_at_first_are_spread_and_few() -> None:
    for rows in (1, 5, 16, 17, 100, 1024):
        x = torch.arange(rows, dtype=torch.float32)[:, None]
        sample = screen.sample(x).flatten()
        assert len(sample) == min(max(ceil_div(rows, 32), 2), rows)
        assert len(sample.unique()) == len(sample)
        assert float(sample.max()) < rows
        if rows >= 100:
            assert float(sample.diff().max()) < 64
        for period in (2, 4, 8):
            if rows == 1024:
                counts = (sample.long() % period).bincount(minlength=period)
                assert int(counts.min()) > 0


@pytest.mark.parametrize(
    "call",
    [
        lambda x, s, b: find_candidates(x[:, :-1], s, b),
        lambda x, s, b: find_candidates(x.T.contiguous().T, s, b),
        lambda x, s, b: find_candidates(x.double(), s, None),
        lambda x, s, b: find_candidates(x, s, b[:-1]),
        lambda x, s, b: find_candidates(x, s, b.bfloat16()),
        lambda x, s, b: screen_of(torch.zeros(1, screen.MAX_WIDTH)),
        lambda x, s, b: compact_product(
            calls.pack(x), calls.pack(torch.zeros(200, 30)), None, find_candidates(x, s, b)
        ),
    ],
)
def test_wrong_lengths_and_dtypes_never_reach_the_native_code(call: Callable[..., Any]) -> None:
    x, weight = torch.randn(20, 30), torch.randn(70, 30)
    with pytest.raises(KernelError, match="expected"):
        call(x, screen_of(weight), torch.zeros(70))
