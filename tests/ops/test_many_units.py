"""A hundred million units: none that is active is screened out. ``make test-screening``."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from ops.screening_cases import of_few_rows
from steppe.ops.cpu.calls import DECODE_ROWS
from steppe.ops.cpu.decode import DecodeBlock
from steppe.ops.cpu.library import kernels
from steppe.ops.cpu.screen import find_candidates, screen_of
from steppe.ops.reference import Weights

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(kernels().name != "native", reason=kernels().reason),
]
UNITS_MANY, UNITS_FEW = 16_000_000, 1_000_000  # of each kind of input
WIDTHS = (64, 100, 256, 768, 1000, 2048, 4096)
Draw = Callable[[torch.Generator, int, int], Tensor]


def gaussian(generator: torch.Generator, rows: int, width: int) -> Tensor:
    return torch.randn(rows, width, generator=generator)


def log_normal(generator: torch.Generator, rows: int, width: int) -> Tensor:
    """Of both signs and of many sizes, features and rows alike."""
    sizes = torch.randn(rows, width, generator=generator).mul_(2).exp_()
    signs = torch.randint(0, 2, (rows, width), generator=generator) * 2 - 1
    return sizes * signs * torch.randn(rows, 1, generator=generator).mul_(3).exp_()


def with_outliers(generator: torch.Generator, rows: int, width: int) -> Tensor:
    x = gaussian(generator, rows, width)
    x[:, :: width // 6] *= 30
    x[:, 1] += 100
    return x


def sparse(generator: torch.Generator, rows: int, width: int) -> Tensor:
    x = gaussian(generator, rows, width)
    return torch.where(torch.rand(rows, width, generator=generator) < 0.05, x, 0.0)


def of_small_integers(generator: torch.Generator, rows: int, width: int) -> Tensor:
    """Whose products tie with the bias."""
    return torch.randint(-2, 3, (rows, width), generator=generator).float()


def halved(generator: torch.Generator, rows: int, width: int) -> Tensor:
    """As a ReLU leaves them: of one sign."""
    return gaussian(generator, rows, width).relu_()


KINDS = [gaussian, log_normal, with_outliers, sparse, of_small_integers, halved]


def blocks(draw: Draw, rows: int, seed: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """x, weights and biases without end; each bias is near a quantile of its unit's products."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        for width in WIDTHS:
            x = draw(generator, rows, width)
            weight = gaussian(generator, 768, width)
            if draw is of_small_integers:
                weight = of_small_integers(generator, 768, width)
            elif draw is log_normal:
                weight *= torch.randn(768, 1, generator=generator).mul_(3).exp_()
            products = (x[:64] @ weight.T).sort(0).values
            # A tenth is active, and a product of each unit ties with its bias or nearly.
            bias = -products[int(0.9 * len(products))]
            yield x, weight, bias


def active_of(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """As torch computes it in this dtype."""
    p = x @ weight.T
    p += bias
    return ~(p <= 0)


def screening_threads() -> Iterator[None]:
    """Have the kernels more threads in each round, and torch's product as many as are of use."""
    for threads in itertools.cycle((1, 3, 17)):
        torch.set_num_threads(threads)
        yield
        torch.set_num_threads(min(2, os.cpu_count() or 1))
        yield


@pytest.fixture(scope="module")
def checked() -> Iterator[dict[str, int]]:
    """How many units were checked, and how many of them were active, candidates and missed."""
    total = dict.fromkeys(("units", "active", "candidates", "missed"), 0)
    yield total
    told = ", ".join(f"{count:,} {name}" for name, count in total.items())
    print(f"\n{told}; none of the active may be missed")


def note(checked: dict[str, int], active: Tensor, found: Tensor) -> int:
    """Count; the number that was missed."""
    missed = int((active & ~found).sum())
    counts = active.numel(), int(active.sum()), int(found.sum()), missed
    for name, count in zip(checked, counts, strict=True):
        checked[name] += count
    return missed


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("draw", KINDS, ids=lambda draw: draw.__name__)
def test_no_unit_of_many_rows_is_missed(
    draw: Draw, dtype: torch.dtype, checked: dict[str, int]
) -> None:
    units = candidates = 0
    threads = screening_threads()
    for x, weight, bias in blocks(draw, 1024, seed=1):
        x, weight, bias = (part.to(dtype) for part in (x, weight, bias))
        next(threads)
        found = find_candidates(x, screen_of(weight), bias)
        next(threads)
        assert found is not None
        bits = found.masks.view(torch.uint8)[..., None] >> torch.arange(8, dtype=torch.uint8) & 1
        listed = bits.bool().flatten(1)
        active = active_of(x.float(), weight.float(), bias.float())
        active |= active_of(x.double(), weight.double(), bias.double()) if units == 0 else active
        assert note(checked, active, listed) == 0
        units += listed.numel()
        candidates += int(listed.sum())
        if units >= UNITS_MANY:
            break
    assert candidates < 0.6 * units


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("draw", KINDS, ids=lambda draw: draw.__name__)
def test_no_unit_of_few_rows_is_missed(
    draw: Draw, dtype: torch.dtype, checked: dict[str, int]
) -> None:
    units = candidates = 0
    threads = screening_threads()
    for x, weight, bias in blocks(draw, 64 * DECODE_ROWS, seed=2):
        x, weight, bias = (part.to(dtype) for part in (x, weight, bias))
        block = DecodeBlock(Weights(weight, bias, None, None, weight, None), True, stays=True)
        nan = torch.full_like(weight, torch.nan)
        # Multiplied with NaN, all candidates stay listed.
        block._structure.w, block._structure.w_stride = nan.data_ptr(), weight.shape[1]
        listed = torch.empty(len(x), len(weight), dtype=torch.bool)
        next(threads)
        for start in range(0, len(x), DECODE_ROWS):
            rows = x[start : start + DECODE_ROWS]
            r, z = rows.new_empty(DECODE_ROWS, len(weight)), torch.empty_like(rows)
            assert block.run(rows, (1.0, 0.0), 1.0, 1.0, (z, r, r))
            listed[start : start + DECODE_ROWS] = r.isnan()
        next(threads)
        active = active_of(x.float(), weight.float(), bias.float())
        active |= ~(of_few_rows(x, weight, bias) <= 0)
        assert note(checked, active, listed) == 0
        units += listed.numel()
        candidates += int(listed.sum())
        if units >= UNITS_FEW:
            break
    assert candidates < 0.6 * units


def test_so_many_were_checked(checked: dict[str, int]) -> None:
    assert checked["units"] >= 10**8
    assert checked["active"] >= 10**6
    assert checked["candidates"] <= checked["units"] // 2
    assert checked["missed"] == 0
