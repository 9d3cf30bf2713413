"""Step: times of an MLP block in bfloat16, eager and compiled: what kernels have to beat.

Beside it the same block after `accelerate_`, which must cost nothing where there are no kernels,
and with `RisingThreshold`, whose statistics cost something in training.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import steppe
from gpu_steps.step import Context
from gpu_steps.timing import time_turns
from steppe.bench import PATTERNS, Block

WIDTHS, TOKENS = (2048, 768, 4096), (4096, 512, 16384)  # what matters most comes first


def run(context: Context) -> None:
    """Time prefill and training; F is 4 D."""
    widths, tokens = ((8,), (4, 16)) if context.is_dry else (WIDTHS, TOKENS)
    context.keep(variants="compiled not in a dry run; us of a call")
    for number, width in itertools.product(tokens, widths):
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
    variants: dict[str, nn.Module] = {"eager": block, "accelerated": copy.deepcopy(block)}
    steppe.accelerate_(variants["accelerated"], patterns=PATTERNS)
    if case == "training":
        variants["threshold"] = copy.deepcopy(block)
        steppe.sparsify_(variants["threshold"], [steppe.RisingThreshold()], patterns=PATTERNS)
    if not context.is_dry:
        torch.compiler.reset()
        variants["compiled"] = copy.deepcopy(block)
        variants["compiled"].compile(dynamic=False)
    prepare = inferring if case == "prefill" else training
    runs = {name: prepare(variant, x) for name, variant in variants.items()}
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


def inferring(block: nn.Module, x: Tensor) -> Callable[[], None]:
    """A forward pass."""

    def step() -> None:
        with torch.no_grad():
            block(x)

    return step


def training(block: nn.Module, x: Tensor) -> Callable[[], None]:
    """A forward and a backward pass."""
    leaf, grad_z = x.clone().requires_grad_(), torch.randn_like(x)

    def step() -> None:
        block.zero_grad()
        leaf.grad = None
        block(leaf).backward(grad_z)

    return step
