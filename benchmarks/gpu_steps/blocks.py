"""Step: times of an MLP block in bfloat16, eager and compiled: what kernels have to beat."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from gpu_steps.step import Context
from gpu_steps.timing import time_turns
from steppe.bench import Block

WIDTHS, TOKENS = (2048, 768, 4096), (4096, 512, 16384)


def run(context: Context) -> None:
    """Time prefill and training; F is 4 D."""
    widths, tokens = ((8,), (4, 16)) if context.is_dry else (WIDTHS, TOKENS)
    context.keep(variants="eager, and torch.compile unless it is a dry run; us of a call")
    for width, number in itertools.product(widths, tokens):
        for case in ("prefill", "training"):
            context.attempt(
                f"{case}_D{width}_T{number}",
                lambda width=width, number=number, case=case: times(context, width, number, case),
                needs=6.0,
            )


def times(context: Context, width: int, tokens: int, case: str) -> dict[str, Any]:
    """Times of a block; of training, forward and backward to weights and input."""
    torch.manual_seed(0)
    with torch.device(context.device):
        block = Block(width, 4 * width).to(torch.bfloat16)
    x = torch.randn(tokens, width, device=context.device, dtype=torch.bfloat16)
    variants: dict[str, nn.Module | Callable[[Tensor], Tensor]] = {"eager": block}
    if not context.is_dry:
        torch.compiler.reset()
        variants["compiled"] = torch.compile(block, dynamic=False)
    runs = {
        name: (lambda call=call: infer(call, x)) if case == "prefill" else trained(call, block, x)
        for name, call in variants.items()
    }
    found = time_turns(runs, context.device, seconds=1.0, calls=4, flush=not context.is_dry)
    if context.device == "cuda":
        for name, one in runs.items():
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            one()
            found[name]["peak_bytes"] = torch.cuda.max_memory_allocated() - before
    products = 2 if case == "prefill" else 6
    flop = 2 * products * tokens * width * 4 * width
    for row in found.values():
        row["tflop_per_s"] = flop / row["us"] / 1e6
    return found


def infer(call: Callable[[Tensor], Tensor], x: Tensor) -> None:
    """A forward pass."""
    with torch.no_grad():
        call(x)


def trained(call: Callable[[Tensor], Tensor], block: nn.Module, x: Tensor) -> Callable[[], None]:
    """A forward and a backward pass."""
    leaf, grad_z = x.clone().requires_grad_(), torch.randn_like(x)

    def step() -> None:
        block.zero_grad()
        leaf.grad = None
        call(leaf).backward(grad_z)

    return step
