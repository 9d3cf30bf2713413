"""Step: how many hidden units are active for any of the tokens of a tile, on a trained model.

A GEMM that gathers the union of the active units of each tile of tokens pays where that is small.
Tokens may be put in any order for it: here by the signs of the principal components of a block's
input.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import steppe
from gpu_steps import training
from gpu_steps.gpt import PATTERNS, Sizes
from gpu_steps.step import Context
from gpu_steps.text import batch_of, python_sources

TILES = (16, 32, 64, 128)
_COMPONENTS = 12  # bits of the key that tokens are sorted by


def run(context: Context) -> None:
    """Measure each arm that was trained before; one with random weights if there is none."""
    sizes = training.TINY if context.is_dry else Sizes()
    arms = [arm for arm in training.ARMS if training.weights_file(context.folder, arm).exists()]
    if not arms:
        context.keep(model="random weights: no trained model is at hand")
        model = training.with_plugins(training.GPT(sizes), "vanilla", sizes)
        context.attempt("random", lambda: of_model(context, model, sizes), needs=3.0)
    for arm in arms:
        context.attempt(
            arm,
            lambda arm=arm: of_model(context, training.load(arm, context.folder, sizes), sizes),
            needs=3.0,
        )


def of_model(context: Context, model: training.GPT, sizes: Sizes) -> list[dict[str, Any]]:
    """A row for each block, on held-out tokens."""
    model = model.to(context.device).eval()
    text = python_sources(2**16 if context.is_dry else 32 * 2**20)
    held_out = text.held_out.to(context.device)
    generator = torch.Generator(context.device).manual_seed(4)
    rows = []
    for block in steppe.find_blocks(model, patterns=PATTERNS):
        parts: dict[str, list[Tensor]] = {"x": [], "a": []}
        hooks = [
            block.up.register_forward_pre_hook(
                lambda _, inputs, parts=parts: parts["x"].append(inputs[0].flatten(0, 1))
            ),
            block.down.register_forward_pre_hook(
                lambda _, inputs, parts=parts: parts["a"].append(inputs[0].flatten(0, 1) != 0)
            ),
        ]
        generator.manual_seed(4)
        try:
            # Half of the tokens say which directions are principal, the other half are sorted.
            for _ in range(8 if context.is_dry else 16):
                ids = batch_of(held_out, 2, sizes.tokens, generator)
                with torch.no_grad(), torch.autocast(context.device, torch.bfloat16):
                    model(ids)
        finally:
            for hook in hooks:
                hook.remove()
        x, active = torch.cat(parts["x"]).float(), torch.cat(parts["a"])
        half = len(x) // 2
        order = by_signs(x[:half], x[half:])
        rows.append({"block": block.name, **shares(active[half:], order)})
    return rows


def by_signs(known: Tensor, x: Tensor) -> Tensor:
    """An order of tokens in which neighbours have the same signs in the principal components.

    Args:
        known: ``[N, D]``, float32, of which the components are taken.
        x: ``[T, D]``, likewise, to be sorted.

    Returns:
        int64 ``[T]``, a permutation.
    """
    mean = known.mean(0)
    centred = known - mean
    vectors = torch.linalg.eigh(centred.T @ centred).eigenvectors.flip(1)  # largest first
    signs = (x - mean) @ vectors[:, :_COMPONENTS] > 0
    bits = torch.arange(signs.shape[1] - 1, -1, -1, device=x.device)
    return (signs.long() << bits).sum(1).argsort(stable=True)


def shares(active: Tensor, order: Tensor) -> dict[str, Any]:
    """Shares of the units in the unions of tiles, and those of independent tokens.

    Args:
        active: bool ``[T, F]``.
        order: int64 ``[T]``, a permutation.

    Returns:
        ``density``, and by size of tile ``in_sequence``, ``sorted``, ``independent``.
    """
    frequency = active.double().mean(0)
    return {
        "density": frequency.mean().item(),
        "in_sequence": {tile: union(active, tile) for tile in TILES},
        "sorted": {tile: union(active[order], tile) for tile in TILES},
        "independent": {tile: (1.0 - (1.0 - frequency).pow(tile)).mean().item() for tile in TILES},
    }


def union(active: Tensor, tile: int) -> float:
    """Mean share of the units that are active for a token of a tile; a last part is left out."""
    whole = active[: len(active) // tile * tile]
    return whole.unflatten(0, (-1, tile)).any(1).double().mean().item()
