"""Step: the kernels of `steppe.ops.cuda`, each against its definition in float64.

In a dry run the definitions of the kernels take their place.
"""

from __future__ import annotations

import importlib
import importlib.util
import itertools
import pkgutil
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gpu_steps.step import Context
from gpu_steps.timing import graph_of, time_one

PACKAGE = "steppe.ops.cuda"
SHAPES = ((1, 32), (1, 8192), (3, 100), (16, 2048), (17, 3073), (257, 768), (256, 4096), (0, 64))
DECODE_SHAPES = ((64, 256), (2048, 8192), (768, 3072), (131, 77), (4096, 16384))  # D, F


class Few(NamedTuple):
    """Tokens, and whether the block is gated."""

    tokens: int
    gated: bool


ONE, FEW = Few(1, False), (Few(4, False), Few(16, False), Few(1, True), Few(5, True))
DENSITIES = (0.0, 0.01, 0.05, 0.3, 1.0)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# One rounding of the result, and what float32 loses before it.
_TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


def run(context: Context) -> None:
    """Check the modules there are."""
    if importlib.util.find_spec("steppe.ops.cuda") is None:
        context.keep(kernels="none yet: there is no steppe.ops.cuda")
        return
    folder = importlib.util.find_spec(PACKAGE).submodule_search_locations
    names = [found.name for found in pkgutil.iter_modules(folder)]
    context.keep(kernels=names, unchecked=[name for name in names if name not in CHECKS])
    for name in names:
        for part in CHECKS.get(name, ()):
            context.attempt(f"{name}: {part.__name__}", lambda part=part: part(context), needs=3.0)


def pack_module(context: Context) -> ModuleType:
    """The kernels that pack, or their definition."""
    name = "steppe.ops.bitmask" if context.is_dry else f"{PACKAGE}.pack"
    return importlib.import_module(name)


def pre_activations(rows: int, columns: int, density: float, dtype: Any, device: str) -> Tensor:
    """Gaussian entries, of which a share is positive."""
    p = torch.randn(rows, columns, device=device).abs()
    sign = torch.where(torch.rand(rows, columns, device=device) < density, 1.0, -1.0)
    return (p * sign).to(dtype)


def against_float64(context: Context) -> dict[str, Any]:
    """The largest errors of a and ∂ℓ/∂p, relative, by dtype; the mask must be the right one."""
    pack = pack_module(context)
    torch.manual_seed(0)
    worst = {str(dtype): 0.0 for dtype in DTYPES}
    shapes = SHAPES[:4] if context.is_dry else SHAPES
    for (rows, columns), density, dtype in itertools.product(shapes, DENSITIES, DTYPES):
        p = pre_activations(rows, columns, density, dtype, context.device)
        grad_a = torch.randn_like(p)
        coefficients = torch.tensor([0.75, 0.5], device=context.device)
        a, packed = pack.act_pack(p, coefficients, p.numel())
        grad_p, again = pack.unpack_grad(grad_a, packed, coefficients)
        r, g = p.double().clamp(min=0.0), grad_a.double()
        wanted = {"a": 0.75 * r + 0.5 * r * r, "grad_p": torch.where(r > 0, g * (0.75 + r), 0.0)}
        where = f"{rows} × {columns}, density {density}, {dtype}"
        for name, got in (("a", a), ("grad_p", grad_p)):
            assert (wanted[name] == 0).equal(got == 0), f"{where}: {name} is zero elsewhere"
            if got.numel():
                off = (got.double() - wanted[name]).abs()
                error = (off / wanted[name].abs().clamp(min=1e-4)).max()
                worst[str(dtype)] = max(worst[str(dtype)], error.item())
                assert error <= _TOLERANCE[dtype], f"{where}: {name} is off by {error.item():.1e}"
        assert again.equal(a), f"{where}: unpacking gives other activations"
        assert packed.starts[-1].item() == int((r > 0).sum()), f"{where}: another number is active"
    return worst


def odd_values(context: Context) -> str:
    """NaN is active and stays NaN, ∞ stays ∞, −∞ and −0 are zero; an overflow is seen."""
    pack = pack_module(context)
    inf, nan = float("inf"), float("nan")
    p = torch.tensor([[nan, inf, -inf, -0.0, 0.0, 1.0]], device=context.device)
    one = torch.tensor([1.0, 0.0], device=context.device)
    a, packed = pack.act_pack(p, one, 8)
    assert a[0, 1:].tolist() == [inf, 0.0, 0.0, 0.0, 1.0], a
    assert a[0, 0].isnan(), a
    assert packed.starts.tolist() == [0, 3], packed.starts
    p = torch.ones(4, 40, device=context.device)
    jumping = torch.tensor([1.0, 0.5], device=context.device)
    _, packed = pack.act_pack(p, jumping, 100)
    grad_p, a = pack.unpack_grad(torch.ones_like(p), packed, jumping)
    assert packed.starts[-1].item() == 160, packed.starts
    assert grad_p[:2].equal(2.0 * p[:2]), "a row that fits was lost"
    assert grad_p[2:].isnan().all(), "a row that was not kept gave a gradient"
    assert a[2:].isnan().all(), "a row that was not kept gave activations"
    return "as defined"


def recomputed(context: Context) -> dict[str, Any]:
    """Rows that did not fit, against float64: the largest errors by dtype; and what it costs."""
    pack = pack_module(context)
    torch.manual_seed(0)
    worst, device = {}, context.device
    rows, width, columns = (20, 24, 70) if context.is_dry else (1000, 2048, 4100)
    for dtype in DTYPES:
        x, weight = torch.randn(rows, width), torch.randn(columns, width) / width**0.5
        x, weight = (part.to(device, dtype) for part in (x, weight))
        bias = torch.full((columns,), -1.0, device=device, dtype=dtype)
        p, grad_a = torch.addmm(bias, x, weight.T), torch.ones(rows, columns, device=device)
        grad_a, rule = grad_a.to(dtype), torch.tensor([1.0, 0.5], device=device)
        for share in (0.0, 0.5, 1.0):
            capacity = int(share * int((p > 0).sum()))
            a, packed = pack.act_pack(p, rule, capacity)
            grad_p, again = pack.unpack_grad(grad_a, packed, rule)
            pack.recompute_lost_(grad_p, again, grad_a, packed, rule, x, weight, bias)
            for got, wanted in ((again, a.double()), (grad_p, (p > 0) * (1.0 + p.double()))):
                error = ((got.double() - wanted).norm() / wanted.norm()).item()
                worst[f"{dtype}, {share} kept"] = error
                assert error <= 4 * _TOLERANCE[dtype], f"{dtype}, {share} kept: off by {error:.1e}"
                assert share < 1.0 or got is not again or got.equal(a), "a kept row was changed"
    return worst


def same_bits(context: Context) -> str:
    """Fifty calls give the same bits, and so does a CUDA graph with other inputs."""
    pack = pack_module(context)
    torch.manual_seed(0)
    shape = (8, 64) if context.is_dry else (1024, 8192)
    p = pre_activations(*shape, 0.05, torch.bfloat16, context.device)
    other = pre_activations(*shape, 0.05, torch.bfloat16, context.device)
    coefficients = torch.tensor([0.75, 0.5], device=context.device)

    def both(p: Tensor) -> tuple[Tensor, Tensor]:
        a, packed = pack.act_pack(p, coefficients, p.numel())
        return a, pack.unpack_grad(torch.ones_like(p), packed, coefficients)[0]

    first = both(p)
    for _ in range(3 if context.is_dry else 50):
        assert all(one.equal(two) for one, two in zip(both(p), first, strict=True))
    if context.device != "cuda":
        return "the same"
    static, outputs = p.clone(), []
    graph = graph_of(lambda: outputs.append(both(static)))
    static.copy_(other)
    graph.replay()
    for one, two in zip(outputs[-1], both(other), strict=True):
        assert one.equal(two), "a replayed graph computes something else"
    return "the same, in a CUDA graph too"


def times(context: Context) -> dict[str, Any]:
    """Microseconds and GB/s of both kernels, bfloat16, at 5 %."""
    pack = pack_module(context)
    rows, columns = (8, 64) if context.is_dry else (4096, 8192)
    p = pre_activations(rows, columns, 0.05, torch.bfloat16, context.device)
    one = torch.tensor([1.0, 0.0], device=context.device)
    capacity = int(0.1 * p.numel())
    _, packed = pack.act_pack(p, one, capacity)
    # p twice and a; ∂ℓ/∂a, ∂ℓ/∂p and a; the mask is a sixteenth of p.
    grad_p, a = pack.unpack_grad(p, packed, one)
    width = 8 if context.is_dry else 2048
    x, weight = p.new_zeros(rows, width), p.new_zeros(columns, width)
    calls = {
        "act_pack": lambda: pack.act_pack(p, one, capacity),
        "unpack_grad": lambda: pack.unpack_grad(p, packed, one),
        "recompute_lost_, nothing lost": lambda: pack.recompute_lost_(
            grad_p, a, p, packed, one, x, weight, None
        ),
    }
    found = {}
    for name, call in calls.items():
        us = time_one(call, context.device, 1.0)
        moved = 3 * p.numel() * p.element_size()
        found[name] = {"us": us, "gb_per_s": moved / us / 1e3, "T": rows, "F": columns}
    return found


def block_of(
    width: int, units: int, density: float, dtype: Any, device: str, few: Few = ONE
) -> list[Tensor]:
    """x, K, b, V and c, and of a gated block U and d; a share of the units being active."""
    shapes = (few.tokens, width), (units, width), (units, width), (width,)
    x, weight, down, down_bias = (torch.randn(s, device=device).to(dtype) for s in shapes)
    p = x[0].double() @ weight.double().T
    bias = -p.quantile(1.0 - density).repeat(units) + (density == 1.0)
    up = [torch.randn(s, device=device).to(dtype) for s in ((units, width), (units,))]
    return [x, weight, bias.to(dtype), down, down_bias, *(up if few.gated else ())]


def dense_tokens(block: list[Tensor], beta: float) -> Tensor:
    """`steppe.ops.cuda.decode.decode_token` by its definition, float64."""
    x, weight, bias, down, down_bias, *up = (part.double() for part in block)
    r = torch.relu(x @ weight.T + bias)
    a = r + beta * r * r
    if up:
        a = a * (x @ up[0].T + up[1])
    return a @ down + down_bias


def decode_tokens(context: Context, block: list[Tensor], beta: float = 0.0) -> list[Tensor]:
    """Z by the kernels: screened, and twice by the launch for that, with a screen and without."""
    if context.is_dry:
        return 3 * [dense_tokens(block, beta).to(block[0].dtype)]
    decode = importlib.import_module(f"{PACKAGE}.decode")
    few = importlib.import_module(f"{PACKAGE}.decode_tokens")
    (x, weight, bias), ungated, up = block[:3], block[:5], block[5:]
    screen, width = decode.screen_of(weight, bias), weight.shape[1]
    if len(x) == 1 and not up:
        config = decode.config_of(width, screens=True)
        again = [decode.launch(*block, one, (1.0, beta), config) for one in (screen, None)]
    else:
        config, of_up = few.config_of(width, x.dtype), up or (None, None)
        again = [few.launch(*ungated, *of_up, one, (1.0, beta), config) for one in (screen, None)]
    return [decode.decode_token(*ungated, screen, 1.0, beta, *up), *again]


def one_against_float64(context: Context) -> dict[str, Any]:
    """The largest distance of z by dtype, of its length; a screen must not change it."""
    return z_against_float64(context, DECODE_SHAPES, (ONE,))


def few_against_float64(context: Context) -> dict[str, Any]:
    """The same of several tokens, and of gated blocks."""
    return z_against_float64(context, DECODE_SHAPES[1:4], FEW)


def z_against_float64(context: Context, shapes: Any, counts: tuple[Few, ...]) -> dict[str, Any]:
    """The largest distance of z by dtype, of its length; a screen must not change it."""
    torch.manual_seed(0)
    worst = {str(dtype): 0.0 for dtype in DTYPES}
    shapes = DECODE_SHAPES[:1] if context.is_dry else shapes
    for (width, units), density, dtype, few in itertools.product(shapes, DENSITIES, DTYPES, counts):
        block = block_of(width, units, density, dtype, context.device, few)
        z, *others = decode_tokens(context, block, 0.5)
        where = f"D {width}, F {units}, {few}, density {density}, {dtype}"
        assert all(z.equal(other) for other in others), f"{where}: the screen changes z"
        wanted = dense_tokens(block, 0.5)
        if wanted.abs().max() < torch.finfo(dtype).max:
            error = ((z.double() - wanted).norm() / wanted.norm()).item()
            worst[str(dtype)] = max(worst[str(dtype)], error)
            assert error <= max(_TOLERANCE[dtype], 4e-6), f"{where}: z is off by {error:.1e}"
    return worst


def one_hard_to_screen(context: Context) -> str:
    """Units whose p is zero or the next number, and such as reach the bound: none is missed."""
    return hard_to_screen(context, ONE)


def few_hard_to_screen(context: Context) -> str:
    """The same of two tokens, of which the second is zero and brings in units with b > 0 only."""
    return hard_to_screen(context, Few(2, False))


def hard_to_screen(context: Context, few: Few) -> str:
    """Units whose p is zero or the next number, and such as reach the bound: none is missed."""
    generator = torch.Generator().manual_seed(0)
    width, units = (64, 32) if context.is_dry else (2048, 8192)
    x = torch.randint(-127, 128, (1, width), generator=generator).float()
    x[:, 0], x[:, 1] = 127.0, 0.0
    on_grid = torch.randint(-120, 121, (units, width), generator=generator).float()
    on_grid[:, 1] = 127.0
    tokens = torch.cat([x, x.new_zeros(few.tokens - 1, width)])
    for weight in (torch.randn(units, width, generator=generator), on_grid + x / 256):
        zero = -(x.double() * weight.double()).sum(1)
        above = zero + 1e-3 * x.double().square().sum() / 256
        for bias in (zero.float(), zero.float().nextafter(torch.tensor(torch.inf)), above.float()):
            block = [tokens, weight, bias, torch.randn(units, width), torch.zeros(width)]
            z, *others = decode_tokens(context, [part.to(context.device) for part in block])
            assert all(z.equal(other) for other in others), "a unit was missed"
        assert z.any(), "none is active, though all are by a thousandth of the bound"
    return "none is missed"


def one_again(context: Context) -> str:
    """Fifty calls give the same bits, and so does a CUDA graph with other inputs."""
    return again(context, ONE)


def few_again(context: Context) -> str:
    """The same of several tokens and a gated block."""
    return again(context, FEW[-1])


def again(context: Context, few: Few) -> str:
    """Fifty calls give the same bits, and so does a CUDA graph with other inputs."""
    torch.manual_seed(0)
    shape = (64, 32) if context.is_dry else (2048, 8192)
    block = block_of(*shape, 0.05, torch.bfloat16, context.device, few)
    first, *_ = decode_tokens(context, block)
    for _ in range(3 if context.is_dry else 50):
        assert decode_tokens(context, block)[0].equal(first)
    if context.device != "cuda":
        return "the same"
    decode = importlib.import_module(f"{PACKAGE}.decode")
    x, *weights = block[:5]
    rest = (decode.screen_of(*weights[:2]), 1.0, 0.0, *block[5:])
    static, outputs = x.clone(), []
    graph = graph_of(lambda: outputs.append(decode.decode_token(static, *weights, *rest)))
    static.copy_(torch.randn_like(x))
    graph.replay()
    fresh = decode.decode_token(static, *weights, *rest)
    assert outputs[-1].equal(fresh), "a replayed graph computes something else"
    return "the same, in a CUDA graph too"


CHECKS = {
    "pack": (against_float64, odd_values, recomputed, same_bits, times),
    "decode": (one_against_float64, one_hard_to_screen, one_again),
    "decode_tokens": (few_against_float64, few_hard_to_screen, few_again),
    # What these two launch, and what they have in common.
    **dict.fromkeys(("decode_kernels", "decode_tokens_kernels"), ()),
    **dict.fromkeys(("decode_launch", "decode_screen"), ()),
}
