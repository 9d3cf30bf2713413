"""Step: eight MLP blocks with weights of their own, one after the other, as a CUDA graph.

Together they are larger than the L2 cache, so each reads its weights from memory, as in decoding.
"""

from __future__ import annotations

import importlib
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from gpu_steps.step import Context
from gpu_steps.timing import graph_of, time_turns
from steppe.bench import Block

BLOCKS = 8
DENSITY = 0.05
_SCREENS = {"unscreened": False, "screened": True}
WIDTHS, GATED_WIDTHS, TOKENS = (2048, 768, 1024, 4096), (2048, 4096), (1, 4, 16)
MORE_TOKENS = (2, 8)


def cases(is_dry: bool) -> Iterator[tuple[int, int, bool]]:
    """T, D and whether the blocks are gated; what matters most comes first."""
    if is_dry:
        yield from itertools.product((1, 2), (8,), (False, True))
        return
    yield from itertools.product(TOKENS, WIDTHS, (False,))
    yield from itertools.product(TOKENS, GATED_WIDTHS, (True,))
    yield from itertools.product(MORE_TOKENS, WIDTHS, (False,))


def run(context: Context) -> None:
    """Time them in bfloat16; F is 4 D."""
    context.keep(
        variants="a graph of eager calls, of compiled ones, and of steppe's kernels without a"
        " screen and with it; us of a block",
        density=DENSITY,
    )
    for case in cases(context.is_dry):
        tokens, width, gated = case
        context.attempt(
            f"D{width}_T{tokens}{'_gated' if gated else ''}",
            lambda case=case: times(context, *case),
            needs=4.0,
        )


def times(context: Context, tokens: int, width: int, gated: bool) -> dict[str, Any]:
    """Times of a block, and the speed at which weights are read."""
    torch.manual_seed(0)
    with torch.device(context.device):
        blocks = nn.Sequential(
            *(Block(width, 4 * width, gated=gated).bfloat16() for _ in range(BLOCKS))
        )
    blocks.requires_grad_(False)
    x = torch.randn(tokens, width, device=context.device, dtype=torch.bfloat16)
    for block in blocks:
        activated = activated_of(block)
        p = nn.functional.linear(x, activated.weight).float()
        activated.bias.fill_(-p.quantile(1.0 - DENSITY))
    calls: dict[str, Callable[[], object]] = {"eager": lambda: [block(x) for block in blocks]}
    if context.device == "cuda":
        calls["compiled"] = compiled(blocks, x)
        calls |= {name: kernels(blocks, x, screens) for name, screens in _SCREENS.items()}
    runs = calls
    if context.device == "cuda":
        runs = {name: graph_of(call).replay for name, call in calls.items()}
    found = time_turns(runs, context.device, seconds=0.5, calls=4)
    size = sum(weight.numel() * weight.element_size() for weight in blocks.parameters())
    for row in found.values():
        row["gb_per_s"] = size / row["us"] / 1e3
        row["us"] /= BLOCKS
        row["quartiles"] = [one / BLOCKS for one in row["quartiles"]]
    return found


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
