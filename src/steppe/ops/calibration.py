"""Measures once on a machine when the kernels are faster, and the screen, and remembers it."""

from __future__ import annotations

import copy
import hashlib
import json
import os
import platform
import time
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from steppe.errors import OutputError
from steppe.files import prepare_folder, write_json
from steppe.ops import cpu as cpu  # registers the kernels that are measured
from steppe.ops import dispatch
from steppe.ops.calls import DECODE_ROWS, DTYPES
from steppe.ops.dispatch import Tables
from steppe.ops.native import ABI_VERSION, kernels
from steppe.ops.packing import kept_screen
from steppe.ops.registry import mlp
from steppe.ops.screened import find_candidates, screen_of

VERSION = 3
_WIDTH, _FACTOR = 512, 4
_ROWS = (1, 16, 64, 256)
# Narrower blocks, from such a width up to the next, are measured at it. Where they have fewer rows,
# there is too little to do.
_NARROW, _NARROW_ROWS, _NARROW_END = (64, 128), (256, 1024), 256
_DENSITIES = (0.05, 0.3, 0.6, 0.9)
_SCREENED_DENSITIES = (0.02, 0.1, 0.2, 0.35)
_SCREENED_ROWS = (*_ROWS, 1024)
_ROUNDS = 5
_COLD_BYTES = 2**27
_GAIN = 1.05  # what a sparse call must gain to be preferred: the measurement is no better
# How often a second a thread is made to wait for others. Measured: 3 to 25 times where nothing else
# runs, 85 times and more where programs share its core.
_MOST_SWITCHES = 50


def calibrate(dtype: torch.dtype) -> None:
    """Have the dispatch know this machine, for a dtype and the present number of threads.

    What was measured before is read from the user's cache folder (``XDG_CACHE_HOME``, else
    ``~/.cache``); else it is measured, which takes about fifteen seconds, and written there,
    unless other programs have taken the processor meanwhile.

    Args:
        dtype: of the blocks; for one that the native kernels do not take nothing is done.
    """
    threads = torch.get_num_threads()
    if kernels().name != "native" or dtype not in DTYPES or dispatch.is_measured(dtype, threads):
        return
    path = _path(dtype, threads)
    known = _read(path)
    if known is None:
        start, switches = time.perf_counter(), _forced_switches()
        densities = {
            width: measure_thresholds(dtype, _NARROW_ROWS, width, _FACTOR * width)
            for width in _NARROW
        }
        known = {**densities, _NARROW_END: measure_thresholds(dtype)}, measure_candidates(dtype)
        seconds = max(time.perf_counter() - start, 1.0)
        if _forced_switches() - switches <= _MOST_SWITCHES * threads * seconds:
            try:
                prepare_folder(path.parent)
                write_json(path, _as_json(*known))
            except OutputError as error:
                warnings.warn(f"calibration is not remembered: {error}", stacklevel=3)
    dispatch.use(dtype, threads, *known)


def _forced_switches() -> int:
    """How often this process had to wait for others so far; 0 where the system does not say."""
    try:
        import resource  # there is none on Windows
    except ImportError:
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw


def measure_thresholds(
    dtype: torch.dtype,
    rows: Sequence[int] = _ROWS,
    width: int = _WIDTH,
    hidden: int = _FACTOR * _WIDTH,
    rounds: int = _ROUNDS,
) -> Tables:
    """Measure up to which density the kernels are faster than dense torch.

    Args:
        dtype: of the block.
        rows: numbers of tokens to measure at.
        width: d_model of the block that is measured.
        hidden: its d_hidden.
        rounds: pairs of calls for each number.

    Returns:
        Thresholds for inference, under False, and for training, under True.
    """

    def gain(density: float, tokens: int, trains: bool) -> tuple[float, float]:
        blocks = _blocks(tokens, width, hidden, density, dtype)
        sparse = partial(_Block.sparse, trains=trains, max_candidates=0.0)
        return density, _ratio(blocks, _Block.dense, sparse, trains, rounds)

    return _for_each(rows, _DENSITIES, gain)


def measure_candidates(
    dtype: torch.dtype,
    rows: Sequence[int] = _SCREENED_ROWS,
    width: int = _WIDTH,
    hidden: int = _FACTOR * _WIDTH,
    rounds: int = _ROUNDS,
) -> Tables:
    """Measure up to which share of candidates a screened block is faster than an unscreened one.

    Args:
        dtype: of the block.
        rows: numbers of tokens to measure at.
        width: d_model of the block that is measured.
        hidden: its d_hidden.
        rounds: pairs of calls for each number.

    Returns:
        Thresholds as of `measure_thresholds`.
    """
    if kernels().unscreened:
        return {trains: dict.fromkeys(rows, 0.0) for trains in (False, True)}

    def gain(density: float, tokens: int, trains: bool) -> tuple[float, float]:
        blocks = _blocks(tokens, width, hidden, density, dtype)
        plain, screened = (
            partial(_Block.sparse, trains=trains, max_candidates=most) for most in (0.0, 1.0)
        )
        ratio = _ratio(blocks, plain, screened, trains, rounds)
        return blocks[0].candidates(few=tokens <= DECODE_ROWS and not trains), ratio

    return _for_each(rows, _SCREENED_DENSITIES, gain)


def _for_each(
    rows: Sequence[int],
    densities: Sequence[float],
    gain: Callable[[float, int, bool], tuple[float, float]],
) -> Tables:
    """The thresholds, from the share and the ratio that `gain` measures at a density."""

    def threshold(tokens: int, trains: bool) -> float:
        shares, ratios = [], []
        for density in densities:
            share, ratio = gain(density, tokens, trains)
            shares.append(share)
            ratios.append(ratio)
            if ratio < _GAIN:
                break  # denser ones gain less
        return crossover(shares, ratios)

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return {
            trains: {tokens: threshold(tokens, trains) for tokens in rows}
            for trains in (False, True)
        }


def crossover(densities: Sequence[float], ratios: Sequence[float]) -> float:
    """Up to which density, or share, a call gains, by straight lines between what was measured.

    Args:
        densities: ascending.
        ratios: time of the other call over that of a sparse one, at each.

    Returns:
        The density; 0 where the first gains nothing, the last where all gain.

    Example:
        >>> crossover([0.2, 0.4], [1.25, 0.85])
        0.3
    """
    if ratios[0] < _GAIN:
        return 0.0
    measured = list(zip(densities, ratios, strict=True))
    for (low, high_ratio), (high, low_ratio) in pairwise(measured):
        if low_ratio < _GAIN:
            share = (high_ratio - _GAIN) / (high_ratio - low_ratio)
            return round(low + share * (high - low), 3)
    return densities[-1]


class _Block:
    """A block whose hidden layer has a given density."""

    def __init__(
        self, rows: int, width: int, hidden: int, density: float, dtype: torch.dtype
    ) -> None:
        normal = torch.distributions.Normal(0.0, 1.0)
        shift = float(normal.icdf(torch.tensor(density)))
        self.x = torch.randn(rows, width).to(dtype)
        self.up = (torch.randn(hidden, width) / width**0.5).to(dtype)
        self.up_bias = torch.full((hidden,), shift, dtype=dtype)
        self.down = (torch.randn(width, hidden) / hidden**0.5).to(dtype)
        self.grad = torch.randn(rows, width).to(dtype)

    def dense(self) -> Tensor:
        """As torch computes it."""
        hidden = torch.relu(torch.addmm(self.up_bias, self.x, self.up.T))
        return hidden @ self.down.T

    def sparse(self, trains: bool, max_candidates: float) -> Tensor:
        """As the kernels compute it."""
        weights = (self.up, self.up_bias, None, None, self.down.T, None)
        z: Tensor = mlp(self.x, *weights, 1.0, 0.0, None, 0.0, trains, 1.0, max_candidates)[0]
        return z

    def candidates(self, few: bool) -> float:
        """The share of candidates; of few tokens it is what the last call has counted."""
        if few:
            return kept_screen(self.up).few.share
        with torch.no_grad():
            found = find_candidates(self.x, screen_of(self.up), self.up_bias)
        assert found is not None  # of any share
        return found.share


def _blocks(rows: int, width: int, hidden: int, density: float, dtype: torch.dtype) -> list[_Block]:
    """One block; for few rows, where reading the weights is all, as many as no cache holds."""
    count = 1
    if rows <= DECODE_ROWS:
        count += _COLD_BYTES // (2 * width * hidden * dtype.itemsize)
    first = _Block(rows, width, hidden, density, dtype)
    return [first, *(copy.deepcopy(first) for _ in range(count - 1))]


def _ratio(
    blocks: Sequence[_Block],
    one: Callable[[_Block], Tensor],
    other: Callable[[_Block], Tensor],
    trains: bool,
    rounds: int,
) -> float:
    """The least time of calls of one kind over that of another: other programs only add to both."""

    def seconds(call: Callable[[_Block], Tensor]) -> float:
        start = time.perf_counter()
        for block in blocks:
            leaves = [block.x, block.up, block.up_bias, block.down]
            for leaf in leaves:
                leaf.requires_grad_(trains)
            with torch.set_grad_enabled(trains):
                z = call(block)
            if trains:
                torch.autograd.grad(z, leaves, block.grad)
        return time.perf_counter() - start

    for call in (one, other, other):  # the first calls find their memory and lay weights out
        seconds(call)
    pairs = [(seconds(one), seconds(other)) for _ in range(rounds)]
    return min(pair[0] for pair in pairs) / min(pair[1] for pair in pairs)


def _path(dtype: torch.dtype, threads: int) -> Path:
    """Where thresholds are kept of all that they may depend on."""
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    machine = [VERSION, ABI_VERSION, kernels().isa, torch.__version__, _processor()]
    key = hashlib.sha256(json.dumps(machine).encode()).hexdigest()[:12]
    name = f"thresholds-{key}-{str(dtype).removeprefix('torch.')}-{threads}.json"
    return folder / "steppe" / name


def _processor() -> str:
    """What the processor calls itself."""
    information = Path("/proc/cpuinfo")
    if information.is_file():
        lines = information.read_text(encoding="utf-8", errors="replace").splitlines()
        names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
        if names:
            return names[0]
    return platform.processor()


def _as_json(densities: dict[int, Tables], candidates: Tables) -> dict[str, Any]:
    """As they stand in a file."""

    def named(tables: Tables) -> dict[str, Any]:
        return {"inference": tables[False], "training": tables[True]}

    return {
        "density": {width: named(tables) for width, tables in densities.items()},
        "candidates": named(candidates),
    }


def _read(path: Path) -> tuple[dict[int, Tables], Tables] | None:
    """Thresholds of a file; None if it is not there or no such file."""

    def tables(named: Any) -> Tables:
        return {
            trains: {int(rows): float(most) for rows, most in named[name].items()}
            for trains, name in ((False, "inference"), (True, "training"))
        }

    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        densities = {int(width): tables(named) for width, named in values["density"].items()}
        candidates = tables(values["candidates"])
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        return None
    return densities, candidates
