"""A few tokens by `decode_token` on a card; on the CPU its definition, so that these tests run.

`tests/ops/cuda` has the kernels in Triton's interpreter, which does not add as tensor cores do.
"""

from __future__ import annotations

import importlib
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from gpu_steps.timing import graph_of
from steppe.ops.reference import Rule, Weights
from steppe.ops.reference import mlp as definition

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# What one rounding of z and the sums may lose, of ‖z‖.
TOLERANCES = {torch.float32: 4e-6, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
SIZES = {"cpu": [(64, 96)], "cuda": [(64, 96), (131, 77), (768, 3072), (2048, 8192)]}  # D, F

Block = list[Tensor | None]  # x, K, b, V, c, U and d


def in_float64(block: Block, beta: float) -> Tensor:
    x, weight, bias, down, down_bias, up, up_bias = (
        None if part is None else part.double() for part in block
    )
    weights = Weights(weight, bias, up, up_bias, down, down_bias)
    return definition(x, weights, Rule(1.0, beta, 0.0))[0]


def defined(*arguments: Any) -> Tensor:
    """As `decode_token`."""
    *block, _, _, beta, up, up_bias = arguments
    return in_float64([*block, up, up_bias], beta).to(block[0].dtype)


def decode_on(device: str) -> Any:
    """The kernels."""
    if device == "cpu":
        return SimpleNamespace(decode_token=defined, screen_of=lambda *_: None)
    pytest.importorskip("triton")
    return importlib.import_module("steppe.ops.cuda.decode")


def block_of(
    device: str, tokens: int, width: int, units: int, dtype: torch.dtype, gated: bool
) -> Block:
    """One of whose units a twentieth is active, of each token."""
    x, *weights = (
        torch.randn(rows, width, device=device).to(dtype) for rows in (tokens, units, units, units)
    )
    weight, down, up = weights
    p = x.double() @ weight.double().T
    bias = torch.full((units,), -p[0].quantile(0.95).item(), device=device).to(dtype)
    ends = (torch.randn(size, device=device).to(dtype) for size in (width, units))
    down_bias, up_bias = ends
    return [x, weight, bias, down, down_bias, *((up, up_bias) if gated else (None, None))]


def decoded(device: str, block: Block, screens: bool, beta: float = 0.0) -> Tensor:
    decode = decode_on(device)
    screen = decode.screen_of(block[1], block[2]) if screens else None
    z = decode.decode_token(*block[:5], screen, 1.0, beta, *block[5:])
    assert z.shape == block[0].shape
    return z


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("tokens", [1, 2, 5, 16])
def test_tokens_have_their_z(device: str, tokens: int, gated: bool, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    for width, units in SIZES[device]:
        block = block_of(device, tokens, width, units, dtype, gated)
        z = decoded(device, block, True, 0.5)
        if tokens > 1 or gated:  # one token is launched in another way without a screen
            assert torch.equal(z, decoded(device, block, False, 0.5))
        wanted = in_float64(block, 0.5)
        for got, one in zip(z, wanted, strict=True):
            assert torch.dist(got.double(), one) <= 1.2 * TOLERANCES[dtype] * one.norm()


def cut_off_below(device: str) -> Block:
    """Sums that tensor cores would have above zero, as they cut off small products beside a sum.

    All numbers are on the screen's grids: −4128 · 127, 272 times; −15 · 1, each less than the last
    bit of the sum so far; and the first ones again, positive. The exact sum is far below zero. The
    first token has 15 more of +15 · 1 at its end, the second one nothing but these.
    """
    width, large, more = 4096, 272, 15
    x, weight = torch.full((2, width), 15.0), torch.full((64, width), -1.0)
    x[:, :large], x[:, -large - more : -more] = 4128.0, 4128.0
    weight[:, :large], weight[:, -large - more : -more] = -127.0, 127.0
    weight[:, -more:] = 1.0
    x[1, :-more] = 0.0
    weight[32:, -more:] = -1.0  # not for the second token, so these units are the first one's alone
    x, weight = x.bfloat16(), weight.bfloat16()
    none = torch.zeros(64).bfloat16()
    parts = [x, weight, none, torch.ones_like(weight), torch.zeros(width).bfloat16()]
    return [*(part.to(device) for part in parts), None, None]


def test_what_tensor_cores_have_above_zero_is_not_missed(device: str) -> None:
    """Whatever they make of it, a screen must not change it."""
    block = cut_off_below(device)
    z = decoded(device, block, True)
    assert torch.equal(z, decoded(device, block, False))
    assert (z[1] == 32 * 15 * 15).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_units_at_the_bound_are_not_missed(device: str, dtype: torch.dtype) -> None:
    """p is next to zero, and K is off its grid as far along x as it can be."""
    generator = torch.Generator().manual_seed(0)
    width, units = (64, 32) if device == "cpu" else (2048, 4096)
    x = torch.randint(-63, 64, (2, width), generator=generator).float()
    x[:, 0], x[:, 1], x[1] = 63.0, 0.0, 0.0  # the second token has units with b > 0 active
    steps = torch.randint(-60, 61, (units, width), generator=generator).float()
    steps[:, 1] = 127.0
    weight = (steps + x[0] / 128).to(dtype)
    zero = -(x[:1].double() @ weight.double().T)[0]
    for bias in (zero, zero + 1e-3 * x[0].double().square().sum() / 128):
        down = torch.randn(units, width, generator=generator).to(dtype)
        block = [x.to(dtype), weight, bias.to(dtype), down, torch.zeros(width).to(dtype)]
        block = [*(part.to(device) for part in block), None, None]
        z = decoded(device, block, True)
        assert z.any()
        assert torch.equal(z, decoded(device, block, False))


@pytest.mark.parametrize("gated", [False, True])
def test_a_token_that_is_not_finite_leaves_the_others_alone(device: str, gated: bool) -> None:
    torch.manual_seed(0)
    block = block_of(device, 4, 64, 96, torch.bfloat16, gated)
    wanted = in_float64(block, 0.0)
    block[0][2, 7] = torch.nan
    for screens in (False, True):
        z = decoded(device, block, screens)
        assert z[2].isnan().all()
        for token in (0, 1, 3):
            error = torch.dist(z[token].double(), wanted[token]) / wanted[token].norm()
            assert error <= 1.2 * TOLERANCES[torch.bfloat16]


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("tokens", [1, 3, 16])
def test_calls_and_a_graph_give_the_same_bits_and_do_not_wait(
    device: str, tokens: int, gated: bool
) -> None:
    torch.manual_seed(0)
    decode = decode_on(device)
    width, units = SIZES[device][-1]
    block = block_of(device, tokens, width, units, torch.bfloat16, gated)
    x, *weights = block[:5]
    rest = (*weights, decode.screen_of(*weights[:2]), 1.0, 0.5, *block[5:])
    first = decode.decode_token(x, *rest)
    if device == "cuda":
        torch.cuda.set_sync_debug_mode("error")
    try:
        results = [decode.decode_token(x, *rest) for _ in range(10)]
    finally:
        if device == "cuda":
            torch.cuda.set_sync_debug_mode("default")
    assert all(torch.equal(z, first) for z in results)
    if device == "cuda":
        outputs: list[Tensor] = []
        graph = graph_of(lambda: outputs.append(decode.decode_token(x, *rest)))
        x.copy_(torch.randn_like(x))
        graph.replay()
        assert torch.equal(outputs[-1], decode.decode_token(x, *rest))
