"""Measures once on a machine up to which density the kernels are faster, and remembers it."""

from __future__ import annotations

import copy
import hashlib
import json
import os
import platform
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

from steppe.errors import OutputError
from steppe.files import prepare_folder, write_json
from steppe.ops import cpu as cpu  # registers the kernels that are measured
from steppe.ops import dispatch
from steppe.ops.calls import DECODE_ROWS, DTYPES
from steppe.ops.dispatch import Thresholds
from steppe.ops.native import ABI_VERSION, kernels
from steppe.ops.packing import forget
from steppe.ops.registry import mlp

VERSION = 1
_WIDTH, _HIDDEN = 512, 2048
_ROWS = (1, 16, 64, 256)
_DENSITIES = (0.05, 0.3, 0.6, 0.9)
_ROUNDS = 5
_COLD_BYTES = 2**27
_GAIN = 1.05  # what a sparse call must gain to be preferred: the measurement is no better


def calibrate(dtype: torch.dtype) -> None:
    """Have the dispatch know this machine, for a dtype and the present number of threads.

    What was measured before is read from the user's cache folder (``XDG_CACHE_HOME``, else
    ``~/.cache``); else it is measured, which takes some seconds, and written there.

    Args:
        dtype: of the blocks; for one that the native kernels do not take nothing is done.
    """
    threads = torch.get_num_threads()
    if kernels().name != "native" or dtype not in DTYPES or dispatch.is_measured(dtype, threads):
        return
    path = _path(dtype, threads)
    thresholds = _read(path)
    if thresholds is None:
        thresholds = measure_thresholds(dtype)
        try:
            prepare_folder(path.parent)
            write_json(path, {_name(trains): table for trains, table in thresholds.items()})
        except OutputError as error:
            warnings.warn(f"calibration is not remembered: {error}", stacklevel=3)
    dispatch.use(dtype, threads, thresholds)


def measure_thresholds(
    dtype: torch.dtype,
    rows: Sequence[int] = _ROWS,
    width: int = _WIDTH,
    hidden: int = _HIDDEN,
    rounds: int = _ROUNDS,
) -> dict[bool, Thresholds]:
    """Measure them.

    Args:
        dtype: of the block.
        rows: numbers of tokens to measure at.
        width: d_model of the block that is measured.
        hidden: its d_hidden.
        rounds: pairs of a dense and a sparse call for each number.

    Returns:
        Thresholds for inference, under False, and for training, under True.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return {
            trains: {
                tokens: crossover(
                    _DENSITIES,
                    [
                        _ratio(_blocks(tokens, width, hidden, density, dtype), trains, rounds)
                        for density in _DENSITIES
                    ],
                )
                for tokens in rows
            }
            for trains in (False, True)
        }


def crossover(densities: Sequence[float], ratios: Sequence[float]) -> float:
    """Up to which density a sparse call gains, by straight lines between what was measured.

    Args:
        densities: ascending.
        ratios: time of a dense call over that of a sparse one, at each.

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

    def sparse(self, trains: bool) -> Tensor:
        """As the kernels compute it."""
        weights = (self.up, self.up_bias, None, None, self.down.T, None)
        z: Tensor = mlp(self.x, *weights, 1.0, 0.0, None, 0.0, trains, 1.0)[0]
        return z


def _blocks(rows: int, width: int, hidden: int, density: float, dtype: torch.dtype) -> list[_Block]:
    """One block; for few rows, where reading the weights is all, as many as no cache holds."""
    count = 1
    if rows <= DECODE_ROWS:
        count += _COLD_BYTES // (2 * width * hidden * dtype.itemsize)
    first = _Block(rows, width, hidden, density, dtype)
    return [first, *(copy.deepcopy(first) for _ in range(count - 1))]


def _ratio(blocks: Sequence[_Block], trains: bool, rounds: int) -> float:
    """Median over pairs of the time of dense calls over that of sparse ones."""

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

    def sparse(block: _Block) -> Tensor:
        return block.sparse(trains)

    seconds(_Block.dense), seconds(sparse)  # the first call of each finds its memory
    ratios = [seconds(_Block.dense) / seconds(sparse) for _ in range(rounds)]
    for block in blocks:
        forget(block.up)
        forget(block.down)
    return statistics.median(ratios)


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


def _name(trains: bool) -> str:
    return "training" if trains else "inference"


def _read(path: Path) -> dict[bool, Thresholds] | None:
    """Thresholds of a file; None if it is not there or no such file."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        return {
            trains: {int(rows): float(density) for rows, density in values[_name(trains)].items()}
            for trains in (False, True)
        }
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        return None
