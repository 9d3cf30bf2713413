"""Step: eight MLP blocks with weights of their own, one after the other, as a CUDA graph.

Together they are larger than the L2 cache, so each reads its weights from memory, as in decoding.
"""

from __future__ import annotations

import copy
import importlib
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

import steppe
from gpu_steps.step import Context
from gpu_steps.timing import graph_of, time_turns
from steppe.bench import PATTERNS, Block

BLOCKS = 8
DENSITY = 0.05
DENSITIES = (0.1, 0.03, 0.15, 0.25)  # of one token besides, from which limits can be measured
_SCREENS = {"unscreened": False, "screened": True}
WIDTHS, GATED_WIDTHS, TOKENS = (2048, 768, 1024, 4096), (2048, 4096), (1, 4, 16)
MORE_TOKENS = (2, 8)


def cases(is_dry: bool) -> Iterator[tuple[int, int, bool, float]]:
    """T, D, whether the blocks are gated, and their density; what matters most comes first."""
    if is_dry:
        yield from itertools.product((1, 2), (8,), (False, True), (DENSITY,))
        return
    yield from itertools.product((1,), WIDTHS, (False,), (DENSITY, *DENSITIES))
    yield from itertools.product(TOKENS[1:], WIDTHS, (False,), (DENSITY,))
    yield from itertools.product(TOKENS, GATED_WIDTHS, (True,), (DENSITY,))
    yield from itertools.product(MORE_TOKENS, WIDTHS, (False,), (DENSITY,))


def run(context: Context) -> None:
    """Time them in bfloat16; F is 4 D."""
    context.keep(
        variants="a graph of eager calls, of compiled ones, of steppe's kernels without a screen"
        " and with it, and of an accelerated model, which chooses; dense and accelerated calls"
        " without a graph; us of a block",
    )
    for case in cases(context.is_dry):
        tokens, width, gated, density = case
        context.attempt(
            f"D{width}_T{tokens}{'_gated' if gated else ''}_density{density}",
            lambda case=case: times(context, *case),
            needs=4.0,
        )


def times(context: Context, tokens: int, width: int, gated: bool, density: float) -> dict[str, Any]:
    """Times of a block, and the speed at which weights are read."""
    torch.manual_seed(0)
    with torch.device(context.device):
        blocks = nn.Sequential(
            *(Block(width, 4 * width, gated=gated).bfloat16() for _ in range(BLOCKS))
        )
    blocks.requires_grad_(False).eval()
    x = torch.randn(tokens, width, device=context.device, dtype=torch.bfloat16)
    for block in blocks:
        activated = activated_of(block)
        p = nn.functional.linear(x, activated.weight).float()
        activated.bias.fill_(-p.quantile(1.0 - density))
    fast = steppe.accelerate_(copy.deepcopy(blocks), patterns=PATTERNS, weights_are_final=True)
    calls: dict[str, Callable[[], object]] = {"eager": lambda: [block(x) for block in blocks]}
    if context.device == "cuda":
        calls["compiled"] = compiled(blocks, x)
        calls |= {name: kernels(blocks, x, screens) for name, screens in _SCREENS.items()}
    calls["accelerated"] = inferring(fast, x)
    runs = calls
    if context.device == "cuda":
        runs = {name: graph_of(call).replay for name, call in calls.items()}
        runs |= {f"{name}, no graph": calls[name] for name in ("eager", "accelerated")}
    found = time_turns(runs, context.device, seconds=0.5, calls=4)
    size = sum(weight.numel() * weight.element_size() for weight in blocks.parameters())
    for row in found.values():
        row["gb_per_s"] = size / row["us"] / 1e3
        row["us"] /= BLOCKS
        row["quartiles"] = [one / BLOCKS for one in row["quartiles"]]
    explained = steppe.explain(fast).blocks
    found["accelerated"]["in_graphs"] = sorted({block.in_graphs for block in explained})
    found["accelerated"]["candidates"] = [block.candidates for block in explained]
    return found


def inferring(blocks: nn.Sequential, x: Tensor) -> Callable[[], object]:
    """The blocks on one input, without gradients."""

    def call() -> list[Tensor]:
        with torch.no_grad():
            return [block(x) for block in blocks]

    return call


def activated_of(block: Block) -> nn.Linear:
    """The layer whose output the activation reads."""
    return block.up if block.gate is None else block.gate


def compiled(blocks: nn.Sequential, x: Tensor) -> Callable[[], object]:
    """The blocks by torch.compile, one graph for each of them."""
    torch.compiler.reset()
    block = torch.compile(Block.forward, dynamic=False)
    return lambda: [block(one, x) for one in blocks]


def kernels(blocks: nn.Sequential, x: Tensor, screens: bool) -> Callable[[], object]:
    """The blocks by `steppe.ops.cuda.decode`."""
    decode = importlib.import_module("steppe.ops.cuda.decode")  # which needs Triton
    arguments = []
    for block in blocks:
        activated = activated_of(block)
        screen = decode.screen_of(activated.weight, activated.bias) if screens else None
        weights = (activated.weight, activated.bias, block.down.weight.T.contiguous())
        up = () if block.gate is None else (block.up.weight, block.up.bias)
        arguments.append((*weights, block.down.bias, screen, 1.0, 0.0, *up))
    return lambda: [decode.decode_token(x, *one) for one in arguments]
