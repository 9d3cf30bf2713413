"""Step: eight MLP blocks with weights of their own, one after the other, as a CUDA graph.

Together they are larger than the L2 cache, so each reads its weights from memory, as in decoding.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from gpu_steps.step import Context
from gpu_steps.timing import graph_of, time_turns
from steppe.bench import Block

BLOCKS = 8
WIDTHS, TOKENS = (2048, 768, 1024, 4096), (1, 4, 16, 2, 8)  # what matters most comes first


def run(context: Context) -> None:
    """Time them in bfloat16; F is 4 D."""
    widths, tokens = ((8,), (1, 2)) if context.is_dry else (WIDTHS, TOKENS)
    context.keep(variants="a graph of eager calls, and of compiled ones; us of a block")
    for number, width in itertools.product(tokens, widths):
        context.attempt(
            f"D{width}_T{number}",
            lambda width=width, number=number: times(context, width, number),
            needs=4.0,
        )


def times(context: Context, width: int, tokens: int) -> dict[str, Any]:
    """Times of a block, and the speed at which weights are read."""
    torch.manual_seed(0)
    with torch.device(context.device):
        blocks = nn.Sequential(*(Block(width, 4 * width).bfloat16() for _ in range(BLOCKS)))
    blocks.requires_grad_(False)
    x = torch.randn(tokens, width, device=context.device, dtype=torch.bfloat16)
    runs: dict[str, Callable[[], object]] = {"eager": lambda: blocks(x)}
    if context.device == "cuda":
        runs = {
            name: graph_of(lambda call=call: call(x)).replay
            for name, call in (("eager", blocks), ("compiled", compiled(blocks)))
        }
    found = time_turns(runs, context.device, seconds=0.5, calls=4)
    size = sum(weight.numel() * weight.element_size() for weight in blocks.parameters())
    for row in found.values():
        row["gb_per_s"] = size / row["us"] / 1e3
        row["us"] /= BLOCKS
        row["quartiles"] = [one / BLOCKS for one in row["quartiles"]]
    return found


def compiled(blocks: nn.Sequential) -> Callable[[Tensor], Tensor]:
    """The blocks by torch.compile, one graph for each of them."""
    torch.compiler.reset()
    block = torch.compile(Block.forward, dynamic=False)

    def call(x: Tensor) -> Tensor:
        for one in blocks:
            x = block(one, x)
        return x

    return call
