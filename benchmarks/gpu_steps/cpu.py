"""Step: the CPU kernels of the same machine, with 1, 4, 8 and 16 threads."""

from __future__ import annotations

import os
from typing import Any

import torch

import steppe
from gpu_steps.native import LIBRARY, folder_of
from gpu_steps.step import Context
from steppe.bench import DECODE, PATTERNS, PREFILL, TRAINING, Block, Setting, time_block

THREADS = (1, 4, 8, 16)


def run(context: Context) -> None:
    """Compare the kernels with dense, and time them."""
    folder = folder_of(context)
    if (folder / LIBRARY).exists():
        steppe.__path__.append(str(folder.parent))  # before anything asks for it
    found = steppe.kernels()
    cores = os.cpu_count() or 1
    context.keep(kernels=found.name, isa=found.isa, reason=found.reason, cores=cores)
    if found.name != "native":
        context.keep(left_out="the kernels' tests and times: there are no native kernels")
        return
    for threads in THREADS:
        if threads > cores:
            context.keep(**{f"threads_{threads}": f"left out: {cores} cores"})
            continue
        context.attempt(f"errors_{threads}", lambda threads=threads: errors(threads), needs=2.0)
        context.attempt(
            f"threads_{threads}", lambda threads=threads: times(context, threads), needs=6.0
        )


def errors(threads: int) -> dict[str, float]:
    """Of output and gradient, relative to the largest value of a float64 block; and of dense."""
    torch.set_num_threads(threads)
    found = {}
    for tokens in (1, 9, 200):
        torch.manual_seed(0)
        sparse = Block(96, 256)
        with torch.no_grad():
            sparse.up.bias.fill_(-1.0)
        exact, dense = Block(96, 256).double(), Block(96, 256)
        exact.load_state_dict(sparse.state_dict())
        dense.load_state_dict(sparse.state_dict())
        steppe.accelerate_(sparse, patterns=PATTERNS, max_density=1.0, max_candidates=1.0)
        x = torch.randn(tokens, 96)
        results = []
        for block in (exact, dense, sparse):
            leaf = x.to(block.up.weight.dtype, copy=True).requires_grad_()
            z = block(leaf)
            z.square().mean().backward()
            results.append((z.detach(), leaf.grad, block.up.weight.grad))
        for number, name in enumerate(("z", "grad_x", "grad_up")):
            wanted, by_dense, by_sparse = (result[number].double() for result in results)
            largest = wanted.abs().max()
            error, usual = (
                ((one - wanted).abs().max() / largest).item() for one in (by_sparse, by_dense)
            )
            found[f"{name}_{tokens}"] = error
            assert usual < 1e-5, f"{name}: dense is off by {usual:.1e}"
            assert error <= 4 * usual + 1e-6, f"{name}, {tokens} tokens: {error:.1e}, {usual:.1e}"
    return found


def times(context: Context, threads: int) -> dict[str, Any]:
    """Dense time / sparse time, by case and density, as ``steppe bench`` has it."""
    rows = {}
    densities = (0.05,) if context.is_dry else (0.05, 0.3)
    sizes = {"d_model": 16, "d_hidden": 64} if context.is_dry else {}
    for case in (TRAINING, PREFILL, DECODE):
        for density in densities:
            tokens = 1 if case is DECODE else (8 if context.is_dry else 1024)
            setting = Setting(case, density, tokens=tokens, threads=threads, **sizes)
            row = time_block(
                setting,
                seconds=0.02 if context.is_dry else 0.6,
                **({"cold_bytes": 2**14} if context.is_dry else {}),
            )
            names = ("ratio", "quartiles", "dense_ms", "sparse_ms", "rounds")
            rows[f"{case.name}_{density}"] = {name: row[name] for name in names}
    return rows
