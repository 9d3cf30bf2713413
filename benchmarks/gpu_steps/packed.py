"""Step: time and memory of training with packed activations, and dense.

A block, and the GPT of the other steps, each eager and compiled. Biases are such that a twentieth
or a tenth of the units is active, as in a model that was trained for it.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

import steppe
from gpu_steps.blocks import training
from gpu_steps.gpt import GPT, PATTERNS, Sizes, loss_of
from gpu_steps.step import Context
from gpu_steps.timing import time_turns
from gpu_steps.training import TINY
from steppe.bench import PATTERNS as BLOCK_PATTERNS
from steppe.bench import Block

SHAPES = ((4096, 2048), (16384, 1024), (4096, 4096))  # T, D; what matters most comes first
DENSITIES = (0.05, 0.10)
_SETTLING = 4  # calls until the room is that of the density


def run(context: Context) -> None:
    """Measure both; F is 4 D."""
    shapes = ((16, 8),) if context.is_dry else SHAPES
    context.keep(variants="compiled not in a dry run; us of a forward and a backward pass")
    context.attempt("gpt", lambda: times_of_gpt(context), needs=20.0)
    for (tokens, width), density in itertools.product(shapes, DENSITIES):
        context.attempt(
            f"block_D{width}_T{tokens}_density{density}",
            lambda tokens=tokens, width=width, density=density: times_of_block(
                context, tokens, width, density
            ),
            needs=8.0,
        )


def dtype_of(context: Context) -> torch.dtype:
    """Bfloat16; in a dry run one that the CPU has no kernels for, so that it packs."""
    return torch.float64 if context.is_dry else torch.bfloat16


def times_of_block(context: Context, tokens: int, width: int, density: float) -> dict[str, Any]:
    """Of a block with ReLU."""
    torch.manual_seed(0)
    dtype = dtype_of(context)
    with torch.device(context.device):
        block = Block(width, 4 * width).to(dtype)
    x = torch.randn(tokens, width, device=context.device, dtype=dtype)
    with torch.no_grad():
        p = nn.functional.linear(x[:64], block.up.weight).float()
        block.up.bias.fill_(-p.flatten()[: 2**20].quantile(1.0 - density))
    models: dict[str, nn.Module] = {"eager": block}
    models |= with_packing(models["eager"], BLOCK_PATTERNS, context)
    return measured(models, {name: training(one, x) for name, one in models.items()}, context)


def times_of_gpt(context: Context) -> dict[str, Any]:
    """Of the GPT in mixed precision, one batch of the size that it is trained with."""
    torch.manual_seed(0)
    sizes, rows = (TINY, 2) if context.is_dry else (Sizes(), 32)
    model = GPT(sizes).to(context.device)
    if context.is_dry:
        model.double()
    ids = torch.randint(sizes.vocabulary, (rows, sizes.tokens), device=context.device)
    with torch.no_grad():
        for layer in model.layers:
            layer.up.bias.fill_(-0.75)  # of pre-activations whose deviation is .45
    models: dict[str, nn.Module] = {"eager": model}
    models |= with_packing(models["eager"], PATTERNS, context)
    runs = {name: step_of(one, ids, context) for name, one in models.items()}
    return measured(models, runs, context)


def step_of(model: nn.Module, ids: Tensor, context: Context) -> Callable[[], None]:
    """A forward and a backward pass in bfloat16 by autocast."""

    def step() -> None:
        model.zero_grad()
        with torch.autocast(context.device, torch.bfloat16, enabled=not context.is_dry):
            logits = model(ids)
        loss_of(logits, ids).backward()

    return step


def with_packing(model: nn.Module, patterns: Any, context: Context) -> dict[str, nn.Module]:
    """A packed copy of a model, and compiled ones of both."""
    packed = steppe.accelerate_(copy.deepcopy(model), patterns=patterns, pack=True)
    variants = {"packed": packed}
    if not context.is_dry:
        torch.compiler.reset()
        variants["compiled"] = copy.deepcopy(model)
        variants["packed, compiled"] = steppe.accelerate_(
            copy.deepcopy(model), patterns=patterns, pack=True
        )
        for name in ("compiled", "packed, compiled"):
            for part in getattr(variants[name], "layers", [variants[name]]):
                part.compile()
    return variants


def measured(
    models: Mapping[str, nn.Module], runs: Mapping[str, Callable[[], None]], context: Context
) -> dict[str, Any]:
    """Times in turns, peak memory, and how the packed blocks ran."""
    for one in runs.values():
        for _ in range(_SETTLING):
            one()
            if context.device == "cuda":
                torch.cuda.synchronize()
    found = time_turns(runs, context.device, seconds=2.0, calls=2, flush=not context.is_dry)
    if context.device == "cuda":
        for name, one in runs.items():
            models[name].zero_grad()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            one()
            found[name]["peak_bytes"] = torch.cuda.max_memory_allocated() - before
    explained = steppe.explain(models["packed"]).blocks
    found["packed"]["ran"] = sorted({block.how for block in explained})
    found["packed"]["mean_density"] = sum(block.density for block in explained) / len(explained)
    return found
