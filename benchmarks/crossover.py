"""Where the built-in thresholds come from: up to which density an accelerated block is faster.

Accelerated and dense block take turns, as modules, so that all that a call costs is counted. With
one thread it is the processor's time that is compared, which waiting for other programs does not
lengthen. ``missed`` is dense time / accelerated time of a block that is always too dense: what it
costs to find that out at every call. `steppe.ops.cpu.thresholds` has less than is measured here.

    python benchmarks/crossover.py --json benchmarks/results/crossover.json
    STEPPE_ISA=avx2 ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 python benchmarks/crossover.py
"""

from __future__ import annotations

import copy
import math
import os
import statistics
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor, nn

import steppe
from steppe.bench import COLD_BYTES, PATTERNS, Block, surroundings
from steppe.files import write_json
from steppe.ops.cpu.calls import DECODE_ROWS

DENSITIES = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.85)
SCREENED_DENSITIES = (0.02, 0.05, 0.1, 0.2, 0.3)
ROWS = (1, 8, 16, 32, 64, 128, 256, 512, 1024)
WIDTHS = (128, 256, 512)
CAPS = ("STEPPE_ISA", "ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "MKL_ENABLE_INSTRUCTIONS")
HOPELESS = 0.8  # denser ones are not measured


def blocks_of(width: int, rows: int, dtype: torch.dtype, trains: bool) -> nn.ModuleList:
    """One block; for few rows, where reading the weights is all, as many as no cache holds."""
    copies = 1
    if rows <= DECODE_ROWS and not trains:
        copies = math.ceil(COLD_BYTES / (8 * width * width * dtype.itemsize))
    torch.manual_seed(0)
    first = Block(width, 4 * width)
    with torch.no_grad():
        first.up.weight.normal_(std=width**-0.5)
        first.down.weight.normal_(std=(4 * width) ** -0.5)
    first.to(dtype)
    return nn.ModuleList([first, *(copy.deepcopy(first) for _ in range(copies - 1))])


def set_density(blocks: nn.ModuleList, density: float) -> None:
    """Of Gaussian pre-activations, by one constant bias."""
    bias = torch.distributions.Normal(0.0, 1.0).icdf(torch.tensor(density)).item()
    with torch.no_grad():
        for block in blocks:
            block.up.bias.fill_(bias)


def seconds(blocks: nn.ModuleList, x: Tensor, grad: Tensor, trains: bool, calls: int) -> float:
    """Time of some calls of each block."""
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    start = clock()
    with torch.set_grad_enabled(trains):
        for _ in range(calls):
            for block in blocks:
                if trains:
                    leaf = x.detach().requires_grad_()
                    torch.autograd.grad(block(leaf), [leaf, *block.parameters()], grad)
                else:
                    block(x)
    return clock() - start


def ratio(
    one: nn.ModuleList, other: nn.ModuleList, x: Tensor, grad: Tensor, trains: bool, rounds: int
) -> float:
    """The median of the rounds' quotients of the first's time over the second's."""
    seconds(other, x, grad, trains, 2)
    single = seconds(one, x, grad, trains, 1)
    calls = max(1, math.ceil(0.004 / max(single, 1e-6)))
    quotients = []
    for number in range(rounds):
        pair = [one, other] if number % 2 else [other, one]
        times = {id(blocks): seconds(blocks, x, grad, trains, calls) for blocks in pair}
        quotients.append(times[id(one)] / times[id(other)])
    return round(statistics.median(quotients), 3)


def row(width: int, rows: int, dtype: torch.dtype, trains: bool, rounds: int) -> dict[str, Any]:
    """All densities of one kind of call."""
    dense = blocks_of(width, rows, dtype, trains)
    plain, missing, screened = (copy.deepcopy(dense) for _ in range(3))
    steppe.accelerate_(plain, patterns=PATTERNS, max_density=1.0, max_candidates=0.0)
    steppe.accelerate_(missing, patterns=PATTERNS, max_density=0.01, max_candidates=0.0)
    steppe.accelerate_(screened, patterns=PATTERNS, max_density=1.0, max_candidates=1.0)
    x, grad = (torch.randn(rows, width).to(dtype) for _ in range(2))
    gains: dict[float, float] = {}
    for density in DENSITIES:
        for blocks in (dense, plain):
            set_density(blocks, density)
        gains[density] = ratio(dense, plain, x, grad, trains, rounds)
        if gains[density] < HOPELESS:
            break
    for blocks in (dense, missing):
        set_density(blocks, 0.9)
    missed = ratio(dense, missing, x, grad, trains, rounds)
    gains_screened: dict[float, float] = {}
    if not steppe.kernels().unscreened:
        for density in SCREENED_DENSITIES:
            for blocks in (plain, screened):
                set_density(blocks, density)
            gains_screened[density] = ratio(plain, screened, x, grad, trains, rounds)
            if gains_screened[density] < HOPELESS:
                break
    return {
        "width": width,
        "rows": rows,
        "dtype": str(dtype).removeprefix("torch."),
        "trains": trains,
        "gains": gains,
        "missed": missed,
        "screened": gains_screened,
    }


def main(
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the rows there.")] = None,
    rounds: Annotated[int, typer.Option(min=3, help="Of each ratio.")] = 7,
    threads: Annotated[int, typer.Option(min=1, help="Threads of torch.")] = 1,
    dtype: Annotated[list[str] | None, typer.Option(help="float32, bfloat16; both.")] = None,
) -> None:
    """Measure dense time / accelerated time by rows, width and density."""
    torch.set_num_threads(threads)
    rows_measured = []
    for name in dtype or ["float32", "bfloat16"]:
        for width in WIDTHS:
            for trains in (False, True):
                for rows in ROWS:
                    if rows <= DECODE_ROWS and trains:
                        continue
                    measured = row(width, rows, getattr(torch, name), trains, rounds)
                    rows_measured.append(measured)
                    typer.echo(
                        f"{name:8} d {width:4} {'training ' if trains else 'inference'} T {rows:4}"
                        f"  missed {measured['missed']:.2f}  {measured['gains']}"
                        f"  screened {measured['screened']}"
                    )
    if json_file is not None:
        caps = {name: os.environ[name] for name in CAPS if name in os.environ}
        write_json(
            json_file, {**surroundings(), "threads": threads, "caps": caps, "rows": rows_measured}
        )


if __name__ == "__main__":
    typer.run(main)
