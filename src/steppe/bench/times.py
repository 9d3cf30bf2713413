"""Times MLP blocks on the sparse kernels against the same blocks dense, in one process.

Dense, sparse and sparse without screening take turns, see `steppe.timing`, so that what slows the
machine down for a while slows all; a ratio is the median over the rounds of the quotients of two
times. The sparse blocks are routed by `accelerate_` as they are for a user: where sparse does not
pay they run dense.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from steppe.acceleration.accelerate import accelerate_, restore_
from steppe.bench.cases import PATTERNS, Case
from steppe.ops.cpu.calls import DECODE_ROWS
from steppe.ops.cpu.library import kernels
from steppe.ops.cpu.screen import token_most
from steppe.ops.screening import candidates, quantise
from steppe.timing import PairedTimes, median_ratio, time_turns


def time_against_dense(
    dense: nn.ModuleList, inputs: Sequence[Tensor], case: Case, seconds: float, least_rounds: int
) -> dict[str, Any]:
    """A row of `time_block`, per block."""
    sparse, unscreened = copy.deepcopy(dense), copy.deepcopy(dense)
    accelerate_(sparse, patterns=PATTERNS)
    accelerate_(unscreened, patterns=PATTERNS, max_candidates=0.0)
    run = _train if case.trains else _infer
    try:
        times = time_turns(
            [
                lambda blocks=blocks: run(blocks, inputs) / len(dense)  # type: ignore[misc]
                for blocks in (dense, unscreened, sparse)
            ],
            seconds,
            least_rounds,
            torch.get_num_threads(),
        )
    finally:
        restore_(sparse)
        restore_(unscreened)
    density = density_of(dense, inputs)
    of_dense, of_unscreened, of_sparse = times
    summary = PairedTimes(of_dense, of_sparse).summary()
    gain, gain_quartiles = median_ratio(of_unscreened, of_sparse)
    linear: Any = dense[0].up
    return {
        "case": case.name,
        "d": linear.in_features,
        "f": linear.out_features,
        "tokens": len(inputs[0]),
        "density": density,
        "candidates": _candidates(dense, inputs, case),
        "dtype": name_of(linear.weight.dtype),
        "threads": torch.get_num_threads(),
        "ratio": summary["ratio"],
        "quartiles": summary["quartiles"],
        "unscreened_ratio": median_ratio(of_dense, of_unscreened)[0],
        "gain": gain,
        "gain_quartiles": gain_quartiles,
        "bound": case.bound(density),
        "dense_ms": summary["dense_ms"],
        "sparse_ms": summary["sparse_ms"],
        "rounds": summary["rounds"],
    }


def break_even(rows: Sequence[dict[str, Any]]) -> float | None:
    """The density from which on sparse is no longer faster.

    Args:
        rows: of `time_block`, alike but for the density.

    Returns:
        Where the ratio falls to 1, linearly between two rows; None where it does not.

    Example:
        >>> break_even([{"density": 0.4, "ratio": 1.5}, {"density": 0.8, "ratio": 0.5}])
        0.6...
    """
    points = sorted((row["density"], row["ratio"]) for row in rows)
    for (left, above), (right, below) in pairwise(points):
        if above > 1.0 >= below:
            return left + (right - left) * (above - 1.0) / (above - below)
    return None


def density_of(blocks: Iterable[Any], inputs: Iterable[Tensor]) -> float:
    """Share of the hidden entries that are active."""
    with torch.no_grad():
        active = [block.hidden(x) != 0 for block, x in zip(blocks, inputs, strict=True)]
    return statistics.fmean(entries.double().mean().item() for entries in active)


def _candidates(blocks: nn.ModuleList, inputs: Sequence[Tensor], case: Case) -> float:
    """Share of the hidden entries that are candidates."""
    rows = len(inputs[0]) if not case.trains else DECODE_ROWS + 1
    most = token_most(inputs[0].shape[1], rows) if kernels().name == "native" else 127
    pairs: list[tuple[Any, Tensor]] = list(zip(blocks, inputs, strict=True))
    if case.is_cold:
        pairs = [(blocks[0], torch.cat(list(inputs)))]  # blocks of the same weights
    shares = []
    for block, x in pairs:
        layer = block.up if block.gate is None else block.gate
        with torch.no_grad():
            found = candidates(quantise(x, most=most), quantise(layer.weight), layer.bias)
        shares.append(found.double().mean().item())
    return statistics.fmean(shares)


def _infer(blocks: nn.ModuleList, inputs: Sequence[Tensor]) -> float:
    """Seconds of a forward pass of each block."""
    with torch.no_grad():
        start = time.perf_counter()
        for block, x in zip(blocks, inputs, strict=True):
            block(x)
        return time.perf_counter() - start


def _train(blocks: nn.ModuleList, inputs: Sequence[Tensor]) -> float:
    """Seconds of a forward and a backward pass of each block, also to its input."""
    taken = 0.0
    for block, x in zip(blocks, inputs, strict=True):
        block.zero_grad()
        leaf = x.detach().requires_grad_()
        grad_z = x.detach()  # any values do
        start = time.perf_counter()
        block(leaf).backward(grad_z)
        taken += time.perf_counter() - start
    return taken


def name_of(dtype: torch.dtype) -> str:
    """A dtype's name, as in tables."""
    return str(dtype).removeprefix("torch.")
