"""Inputs of a first product that try to have a screen miss a unit, and what must not be missed.

Those that need values on a grid are made in the rotated basis, of numbers that stay exact in
float32 when they are rotated back.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from steppe.ops.cpu.calls import DECODE_ROWS
from steppe.ops.cpu.decode import DecodeBlock
from steppe.ops.cpu.screen import token_most
from steppe.ops.reference import Weights
from steppe.ops.screening import rotate

Case = tuple[Tensor, Tensor, Tensor]
Make = Callable[[torch.Generator], Case]


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
    """One after the other, each sum rounded; torch's ``cumsum`` adds in float64."""
    with np.errstate(all="ignore"):
        sums = np.add.accumulate(products.numpy(), axis=-1, dtype=np.float32)
    return torch.from_numpy(np.ascontiguousarray(sums[..., -1]))


def active_somewhere(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """bool ``[T, F]``: active in float64 or in one of the `evaluations`."""
    active = ~(x.double() @ weight.double().T + bias.double() <= 0)
    for p in evaluations(x, weight, bias):
        active |= ~(p <= 0)
    return active


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
    x, weight = back(x), back(weight)
    return x, weight, -(x @ weight.T).diagonal() * (1 - 1e-6)


def along_residual(generator: torch.Generator) -> Case:
    """x on the grid, and along k − k̃: what Cauchy and Schwarz allow is reached."""
    x = torch.randint(-127, 128, (64, 128), generator=generator).float()
    x[:, 0] = 127.0
    steps = torch.randint(-120, 121, (64, 128), generator=generator).float()
    weight = steps + x / 256  # less than half a step
    weight[:, 1] = 127.0
    x[:, 1] = 0.0
    # Active by a thousandth of the bound, which therefore cannot be a hundredth smaller.
    above = 1e-3 * x.double().square().sum(1) / 256
    x, weight = back(x), back(weight)
    return x, weight, (above - (x.double() * weight.double()).sum(1)).float()


def along_inputs_residual(generator: torch.Generator) -> Case:
    """The same of k on the grid, and along x − x̃."""
    weight, x, bias = along_residual(generator)
    return x, weight, bias


def along_wide_residual(generator: torch.Generator) -> Case:
    """The same where the integers of x are of 16 bits: one of them is the largest of its row."""
    weight, x, _ = along_residual(generator)
    weight, x = rotate(weight.double()), rotate(x.double())
    x[:, 1] = token_most(128, DECODE_ROWS + 1)
    above = 1e-3 * weight.square().sum(1) / 256
    x, weight = back(x), back(weight)
    return x, weight, (above - (x.double() * weight.double()).sum(1)).float()


def largest_sums(width: int) -> Make:
    """All integers on the grids are the largest, of either sign."""

    def make(generator: torch.Generator) -> Case:
        signs = torch.randint(0, 2, (70, width), generator=generator).mul(2).sub(1).float()
        signs[:2] = torch.tensor([1.0, -1.0])[:, None]
        x = torch.cat([signs[:2], signs[30:50]])
        return back(x), back(signs), torch.linspace(-1.1 * width, 1.1 * width, 70)

    make.__name__ = f"largest sums of {width}"
    return make


def rounding_up(generator: torch.Generator) -> Case:
    """Both on the grid, and products of one sign whose sums no float32 holds."""
    x = torch.full((4, 16384), 127.0)
    weight = torch.randint(0, 128, (8, 16384), generator=generator).float()
    weight[:, 0] = 127.0
    x, weight = back(x), back(weight)
    bias = -serial(x[:1, None] * weight)[0]
    return x, weight, torch.nextafter(bias, torch.tensor(math.inf))


def cancelling_sums(generator: torch.Generator) -> Case:
    """The same, added up and taken away again: what stays is less than what was rounded."""
    weight = torch.randint(96, 126, (48, 32768), generator=generator).float()
    first = weight.view(48, 16, 2048)
    first[:, :, 1024:] = -first[:, :, :1024]
    weight[:, 0], first[:, 0, 1024] = 127.0, -127.0
    first[:, 1, 1024] -= 1.0
    return back(torch.full((1, 32768), 127.0)), back(weight), torch.zeros(48)


def flushed_to_zero(generator: torch.Generator) -> Case:
    """Both on the grid, and only the positive product is large enough not to be flushed."""
    x, weight = torch.zeros(1, 128), torch.zeros(1, 128)
    x[0, :6] = torch.tensor([508.0, 0.0, 4.0, 4.0, 4.0, 4.0])
    weight[0, :6] = torch.tensor([0.0, 508.0, 8.0, -4.0, -4.0, -4.0])
    return x * 2.0**-65, weight * 2.0**-66, torch.zeros(1)  # 4 · 8 · 2⁻¹³¹ = 2⁻¹²⁶


def outliers(generator: torch.Generator) -> Case:
    x, weight, bias = gaussian(generator)
    x[:, 3] = 1e6
    return x, weight, bias


def decades(generator: torch.Generator) -> Case:
    """Rows of many sizes, each with features of many sizes."""
    x, weight, bias = gaussian(generator)
    tens = torch.logspace(-18, 18, 256)
    return x * tens[torch.randperm(256, generator=generator)], weight * tens.flip(0), bias


def scaled(to: float) -> Make:
    def make(generator: torch.Generator) -> Case:
        x, weight, bias = gaussian(generator)
        return x * to, weight * to, bias * to

    make.__name__ = f"scaled to {to}"
    return make


def denormal(generator: torch.Generator) -> Case:
    x, weight, _ = gaussian(generator)
    return x * 1e-20, weight * 1e-20, torch.full((96,), -1e-45)


def denormal_inputs(generator: torch.Generator) -> Case:
    """Flushed as they are read, or not."""
    x, weight, _ = gaussian(generator)
    return x * 1e-39, weight * 1e3, torch.full((96,), -1e-42)


def overflowing(to_input: float, to_row: float) -> Make:
    """Partial sums overflow, and the sum is far below zero, or would be."""

    def make(generator: torch.Generator) -> Case:
        x, weight = torch.zeros(2, 256), torch.zeros(4, 256)
        x[:, :8] = to_input
        weight[:, :8] = to_row * torch.tensor([1.0, 1, -1, -1, -1, -1, -1, -1])
        x[1], weight[1], weight[2:, 8:] = to_input, to_row, 0.0
        weight[1, 128:] *= -1
        weight[3] = weight[3].flip(0)
        return x, weight, torch.full((4,), -1.0)

    make.__name__ = f"overflowing by {to_input} and {to_row}"
    return make


def large_biases(generator: torch.Generator) -> Case:
    """Sums that overflow by the bias alone, in either direction, and such as just do not."""
    x, weight = torch.zeros(8, 256), torch.zeros(16, 256)
    x[:, :8] = 2.0**60 * torch.randint(0, 2, (8, 8), generator=generator).mul(2).sub(1)
    weight[:, :8] = 2.0**60 * torch.randint(0, 2, (16, 8), generator=generator).mul(2).sub(1)
    biases = torch.tensor([3.4e38, 2.0**127, 2.0**125, 2.0**123])
    return x, weight, torch.cat([biases, -biases]).repeat(2)


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


CASES: list[Make] = [
    *(gaussian, ties, one_above, one_below, integer_zeros, midpoints, along_residual),
    *(along_inputs_residual, rounding_up, cancelling_sums, flushed_to_zero, outliers, decades),
    *(denormal, denormal_inputs, large_biases, one_hot, zeros, same_sign),
    *(overflowing(*by) for by in ((1e19, 3e19), (1e25, 3e13), (1e13, 3e25))),
    *(largest_sums(width) for width in (128, 768, 4096)),
    *(scaled(to) for to in (1e10, 1e18, 1e-10, 1e-19, 1e-22)),
]


def back(rotated: Tensor) -> Tensor:
    """The rows that `rotate` makes these of, in float32 without rounding."""
    rows = rotate(rotated.double())  # its own inverse
    assert rows.float().double().equal(rows)
    return rows.float()


def of_few_rows(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """r ``[T, F]`` as a block computes it for few rows at a time, unscreened."""
    block = DecodeBlock(Weights(weight, bias, None, None, weight, None), screens=False, stays=False)
    parts = []
    for rows in x.contiguous().split(DECODE_ROWS):
        r, z = rows.new_empty(len(rows), len(weight)), torch.empty_like(rows)
        assert block.run(rows, (1.0, 0.0), 1.0, 0.0, (z, r, r))
        parts.append(r)
    return torch.cat(parts)
