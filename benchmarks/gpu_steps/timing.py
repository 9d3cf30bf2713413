"""Times of functions on a device, taken in turns."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

_FLUSH_BYTES = 256 * 2**20  # more than any L2 cache


def time_turns(
    runs: Mapping[str, Callable[[], object]],
    device: str,
    seconds: float,
    calls: int = 1,
    rounds: int = 25,
    flush: bool = False,
) -> dict[str, Any]:
    """Time functions in turns, in an order that rotates each round.

    On CUDA by events, with one wait for the device in a round. A ratio is the median over the
    rounds of the quotient of two times of the same round.

    Args:
        runs: by name; the first is what the others are compared with.
        device: ``cuda`` or ``cpu``.
        seconds: no round begins later; three are made in any case.
        calls: of a function in a row, whose mean time is taken.
        rounds: at most.
        flush: write over the L2 cache before each, outside the time taken.

    Returns:
        By name: ``us``, the median of a call, its ``quartiles``, and ``speedup`` over the first.
    """
    names = list(runs)
    taken: dict[str, list[float]] = {name: [] for name in names}
    sweep = torch.empty(_FLUSH_BYTES, dtype=torch.int8, device=device) if flush else None
    end = time.perf_counter() + seconds
    for name in names:
        for _ in range(3):
            runs[name]()
    for number in range(rounds):
        if number >= 3 and time.perf_counter() > end:
            break
        shift = number % len(names)
        clocks = {
            name: _clock(runs[name], device, calls, sweep) for name in names[shift:] + names[:shift]
        }
        if device == "cuda":
            torch.cuda.synchronize()
        for name, read in clocks.items():
            taken[name].append(read() / calls)
    first = taken[names[0]]
    return {
        name: {
            "us": statistics.median(times),
            "quartiles": statistics.quantiles(times, n=4, method="inclusive")[::2],
            "speedup": statistics.median(
                one / other for one, other in zip(first, times, strict=True)
            ),
            "rounds": len(times),
        }
        for name, times in taken.items()
    }


def time_one(run: Callable[[], object], device: str, seconds: float, calls: int = 1) -> float:
    """Median microseconds of a call."""
    return time_turns({"": run}, device, seconds, calls)[""]["us"]


def graph_of(run: Callable[[], object]) -> torch.cuda.CUDAGraph:
    """A function's kernels as a CUDA graph, after three calls on another stream."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph


def _clock(
    run: Callable[[], object], device: str, calls: int, sweep: Tensor | None
) -> Callable[[], float]:
    """Start a function; what is returned gives its microseconds, once the device has done it."""
    if sweep is not None:
        sweep.fill_(1)
    if device != "cuda":
        start = time.perf_counter()
        for _ in range(calls):
            run()
        taken = 1e6 * (time.perf_counter() - start)
        return lambda: taken
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(calls):
        run()
    end.record()
    return lambda: 1e3 * begin.elapsed_time(end)
