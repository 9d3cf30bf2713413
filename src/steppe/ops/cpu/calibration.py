"""Measures, on purpose, when the kernels, and the screen, are faster on this machine than without.

Nothing is measured unless `calibrate` is called: `accelerate_` goes by what an earlier calibration
has kept, else by the built-in thresholds. A calibration changes a built-in threshold only where the
measurements are clear, see `steppe.timing`. On a busy machine it changes none.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from steppe.errors import KernelError, OutputError
from steppe.ops.cpu import dispatch, remembered
from steppe.ops.cpu import native_ops as native_ops  # registers the kernels that are measured
from steppe.ops.cpu.calls import DECODE_ROWS, DTYPES
from steppe.ops.cpu.copies import cached_screen, declare_final
from steppe.ops.cpu.decode import DecodeBlock
from steppe.ops.cpu.library import kernels
from steppe.ops.cpu.memory import scratch
from steppe.ops.cpu.screen import find_candidates, screen_of
from steppe.ops.cpu.thresholds import NEVER, Tables, overlaid, reached, tables_at
from steppe.ops.mlp import mlp
from steppe.ops.reference import Rule, Weights, mlp_from
from steppe.timing import Point, Round, Verdict, decide, measure_point, time_round

DENSITY, CANDIDATES = "density", "candidates"
_WIDTHS = (512, 256, 128)  # d_model from which on, and at which, thresholds are measured
_ROWS = (1, 32, 128, 512)  # measured besides the steps of the built-in tables
_MOST_ROWS = 512  # larger steps stand as they are: a round of theirs takes long
_ALL_ACTIVE = 4.0  # a bias with which 1 of 30 000 Gaussian pre-activations is below zero
_ALWAYS_DENSE, _TRIED = 0.9, 0.01  # density, and threshold, of a call that tries in vain
_LEAST_MISSED = 0.95  # dense time / time of such a call that is still allowed in training
_PATIENCE = 4  # times as long as on a quiet machine
_LEAST_SECONDS = 0.002  # of one side of a round, as the clock and the first call are inexact
_read: set[tuple[torch.dtype, int]] = set()

Timed = Callable[[Callable[[], object], Callable[[], object], int], Round]


@dataclass(frozen=True)
class Effort:
    """How much is measured.

    Attributes:
        seconds: of the processor, after which no threshold is begun any more; nor is one after
            four times as many by the clock.
        point_seconds: of the processor, after which no round of a point begins any more.
        densities: at which the kernels are timed against dense torch.
        few_densities: the same for decoding.
        screened_densities: at which a screened block is timed against an unscreened one.
        shrink: by which d_model and the rows are divided; for tests.
        cold_bytes: bytes of weights that decoding reads, more than any cache holds.
    """

    seconds: float = 25.0
    point_seconds: float = 0.3
    densities: tuple[float, ...] = (0.05, 0.2, 0.4, 0.6, 0.85)
    few_densities: tuple[float, ...] = (0.05, 0.5, 1.0)
    screened_densities: tuple[float, ...] = (0.02, 0.1, 0.2, 0.35)
    shrink: int = 1
    cold_bytes: int = 2**27


@dataclass(frozen=True)
class Threshold:
    """One threshold as it was measured.

    Attributes:
        kind: ``density`` or ``candidates``.
        width: d_model from which on it holds; 0 for any, of candidates.
        rows: tokens of a call from which on it holds.
        trains: whether a backward pass follows.
        built_in: the threshold without a calibration.
        used: the threshold with it.
        points: the measurements, at ascending densities, or shares of candidates.
    """

    kind: str
    width: int
    rows: int
    trains: bool
    built_in: float
    used: float
    points: tuple[Point, ...]

    @property
    def is_measured(self) -> bool:
        """Whether the measurements have changed it; else it is the built-in one."""
        return self.used != self.built_in


@dataclass(frozen=True)
class Calibration:
    """The thresholds of a dtype and a number of threads.

    Attributes:
        dtype: of the blocks.
        threads: that torch used.
        thresholds: all that were looked at.
        path: the file that was written; None where no threshold was measured.
        missing: how many of the thresholds the time was too short for.
    """

    dtype: torch.dtype
    threads: int
    thresholds: tuple[Threshold, ...]
    path: Path | None
    missing: int

    @property
    def rounds(self) -> tuple[int, int]:
        """Number of rounds that count, and of those left out as other programs disturbed them."""
        points = [point for threshold in self.thresholds for point in threshold.points]
        return sum(len(point.ratios) for point in points), sum(point.left_out for point in points)


def use_remembered(dtype: torch.dtype) -> None:
    """Dispatch by what `calibrate` has kept for the present number of threads, if it has.

    The file is looked for once per process, dtype and number of threads. Nothing is measured.

    Args:
        dtype: of the blocks; for one that the native kernels do not take nothing is done.
    """
    threads = torch.get_num_threads()
    if kernels().name != "native" or dtype not in DTYPES or (dtype, threads) in _read:
        return
    _read.add((dtype, threads))
    try:
        path = remembered.path_of(dtype, threads)
    except OutputError:  # no home folder, so nothing is kept
        return
    known = remembered.read(path)
    if known is not None:
        _use(dtype, threads, *known, path)


def calibrate(
    dtype: torch.dtype,
    on_threshold: Callable[[int, int], None] | None = None,
    effort: Effort | None = None,
    timed: Timed = time_round,
    path: Path | None = None,
) -> Calibration:
    """Measure the thresholds of this machine for the present number of threads, and keep them.

    From then on they are used, in this process and by `accelerate_` in others. Only those are kept
    that measurements have changed. If there is none, the file is left as it was, and so it is if
    the measuring is interrupted.

    Args:
        dtype: of the blocks, float32 or bfloat16.
        on_threshold: called with the number of thresholds that are done, and of all.
        effort: how much is measured.
        timed: makes a round of two calls.
        path: the file to keep them in; by default that which `use_remembered` reads.

    Returns:
        The thresholds, and where they are kept.

    Raises:
        KernelError: there are no kernels to measure, or none for the dtype.
        OutputError: the file cannot be written, which is found out before measuring.
    """
    if kernels().name != "native":
        raise KernelError(f"calibrate: {kernels().reason}")
    if dtype not in DTYPES:
        raise KernelError(f"calibrate: expected float32 or bfloat16, got {dtype}")
    effort = effort or Effort()
    threads = torch.get_num_threads()
    path = path or remembered.path_of(dtype, threads)
    remembered.prepare(path)
    asked = list(_asked(dtype, threads))
    thresholds: list[Threshold] = []
    missing = 0
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        _warm_up(dtype)
        own, end = time.thread_time(), time.perf_counter() + _PATIENCE * effort.seconds
        for threshold in asked:
            if time.thread_time() - own < effort.seconds and time.perf_counter() < end:
                thresholds.append(_measured(threshold, dtype, effort, timed))
            else:
                thresholds.append(threshold)
                missing += 1
            if on_threshold is not None:
                on_threshold(len(thresholds), len(asked))
    densities, candidates = _steps(thresholds)
    changed = any(threshold.is_measured for threshold in thresholds)
    if changed:
        remembered.write(path, densities, candidates)
        _use(dtype, threads, densities, candidates, path)
    return Calibration(dtype, threads, tuple(thresholds), path if changed else None, missing)


def _warm_up(dtype: torch.dtype) -> None:
    """Call the op: the first call makes torch load a part of itself, which takes seconds."""
    for trains in (False, True):
        call = partial(_Block.sparse, trains=trains, max_density=1.0, max_candidates=0.0)
        _Block(2 * DECODE_ROWS, 64, 256, dtype).run(call, trains)


def _asked(dtype: torch.dtype, threads: int) -> Iterator[Threshold]:
    """The thresholds that are to be measured, those of the widest blocks first.

    They are at the steps of one thread, though the built-in ones of more threads lie higher: it is
    for lack of measurements that they do.
    """
    steps, built_in = dispatch.defaults_for(dtype, 1), dispatch.defaults_for(dtype, threads)
    for width in _WIDTHS:
        for trains in (False, True):
            for rows in sorted({*tables_at(steps, width)[trains], *_ROWS}):
                is_few = rows <= DECODE_ROWS
                if rows > _MOST_ROWS or (is_few and (trains or width < _WIDTHS[0])):
                    continue
                if is_few or dispatch.pays(rows, width, 4 * width):
                    default = reached(tables_at(built_in, width)[trains], rows)
                    yield Threshold(DENSITY, width, rows, trains, default, default, ())
    if kernels().unscreened:
        return
    screened = dispatch.screened_defaults_for(dtype, 1)
    own_screened = dispatch.screened_defaults_for(dtype, threads)
    for trains in (False, True):
        for rows in sorted({*screened[trains], *_ROWS}):
            if rows <= _MOST_ROWS and not (trains and rows <= DECODE_ROWS):
                default = reached(own_screened[trains], rows)
                yield Threshold(CANDIDATES, 0, rows, trains, default, default, ())


def _measured(threshold: Threshold, dtype: torch.dtype, effort: Effort, timed: Timed) -> Threshold:
    """A threshold with what measurements make of it."""
    is_of_density, trains = threshold.kind == DENSITY, threshold.trains
    blocks = _Blocks(threshold, dtype, effort)

    def point(one: Call, other: Call, density: float) -> Point:
        return _point(blocks, one, other, density, effort, timed)

    def misses_cheaply() -> bool:
        """Whether calls that are always too dense cost little more than dense ones."""
        tried = partial(_Block.sparse, trains=trains, max_density=_TRIED, max_candidates=0.0)
        return point(_Block.dense, tried, _ALWAYS_DENSE).bounds[0] >= _LEAST_MISSED

    # In training and in decoding each call is tried, also where all are too dense.
    is_few = is_of_density and threshold.rows <= DECODE_ROWS
    if is_of_density and trains and not threshold.built_in and not misses_cheaply():
        return threshold
    plain = partial(_Block.sparse, trains=trains, max_density=1.0, max_candidates=0.0)
    screened = partial(_Block.sparse, trains=trains, max_density=1.0, max_candidates=1.0)
    points: list[Point] = []
    densities = effort.few_densities if is_few else effort.densities
    for density in densities if is_of_density else effort.screened_densities:
        if is_of_density:
            points.append(point(_Block.dense, plain, density))
        else:
            timed_point = point(plain, screened, density)
            points.append(replace(timed_point, share=blocks.candidates()))
        if points[-1].verdict is Verdict.SLOWER:
            break  # denser ones gain less
    used = decide(threshold.built_in, points)
    if is_few and used not in (0.0, 1.0, threshold.built_in) and not misses_cheaply():
        used = threshold.built_in
    return replace(threshold, used=used, points=tuple(points))


class _Block:
    """An MLP block with ReLU whose hidden layer has a given density."""

    def __init__(
        self, rows: int, width: int, hidden: int, dtype: torch.dtype, is_few: bool = False
    ) -> None:
        self.is_few = is_few
        self.x = torch.randn(rows, width).to(dtype)
        self.up = (torch.randn(hidden, width) / width**0.5).to(dtype)
        self.up_bias = torch.zeros(hidden, dtype=dtype)
        self.down = (torch.randn(width, hidden) / hidden**0.5).to(dtype)
        self.grad = torch.randn(rows, width).to(dtype)
        self._few: DecodeBlock | None = None

    def set_density(self, density: float) -> None:
        """Set the density of Gaussian pre-activations by one constant bias."""
        shift = torch.distributions.Normal(0.0, 1.0).icdf(torch.tensor(density))
        with torch.no_grad():
            self.up_bias.fill_(min(float(shift), _ALL_ACTIVE))

    def dense(self) -> Tensor:
        """As torch computes it."""
        hidden = torch.relu(torch.addmm(self.up_bias, self.x, self.up.T))
        return hidden @ self.down.T

    def sparse(self, trains: bool, max_density: float, max_candidates: float) -> Tensor:
        """As the kernels compute it."""
        if self.is_few and not trains:
            return self._decode(max_density, max_candidates)
        weights = (self.up, self.up_bias, None, None, self.down.T, None)
        rule = (1.0, 0.0, None, 0.0)
        z: Tensor = mlp(self.x, *weights, *rule, trains, max_density, max_candidates)[0]
        return z

    def _decode(self, max_density: float, max_candidates: float) -> Tensor:
        """The output as an accelerated block decodes: the weights are laid out once."""
        if self._few is None:
            rows = self.down.T.contiguous()
            weights = Weights(self.up, self.up_bias, None, None, rows, None)
            self._few = DecodeBlock(weights, screens=not kernels().unscreened, stays=True)
        z, r = torch.empty_like(self.x), scratch("r", (len(self.x), len(self.up)), self.x)
        outputs = z, r, r
        if self._few.run(self.x, (1.0, 0.0), max_density, max_candidates, outputs):
            return z
        return mlp_from(r, self.x, self._few.weights, Rule(1.0, 0.0, 0.0))[0]

    def run(self, call: Call, trains: bool) -> None:
        """A call, and its backward pass if it trains."""
        leaves = [self.x, self.up, self.up_bias, self.down]
        for leaf in leaves:
            leaf.requires_grad_(trains)
        with torch.set_grad_enabled(trains):
            z = call(self)
        if trains:
            torch.autograd.grad(z, leaves, self.grad)


Call = Callable[[_Block], Tensor]


class _Blocks:
    """One block; for decoding, which is bound by reading weights, more than any cache holds."""

    def __init__(self, threshold: Threshold, dtype: torch.dtype, effort: Effort) -> None:
        self.trains = threshold.trains
        self.is_few = threshold.rows <= DECODE_ROWS
        width = threshold.width or _WIDTHS[0]
        if self.is_few:  # the narrowest block for which one token is worth a call
            while not dispatch.pays(1, width, 4 * width):
                width *= 2
        width //= effort.shrink
        rows = math.ceil(threshold.rows / effort.shrink)
        first = _Block(rows, width, 4 * width, dtype, self.is_few)
        copies = effort.cold_bytes // (8 * width * width * dtype.itemsize) if self.is_few else 0
        self.blocks = [first, *(copy.deepcopy(first) for _ in range(copies))]
        for block in self.blocks:  # nobody else has them
            declare_final(block.up)
            declare_final(block.down)

    def run(self, call: Call, times: int) -> None:
        """Call all blocks some times."""
        for _ in range(times):
            for block in self.blocks:
                block.run(call, self.trains)

    def candidates(self) -> float:
        """The share of candidates; in decoding, as the last call has counted them."""
        first = self.blocks[0]
        kept = cached_screen(first.up) if self.is_few else None
        if kept is not None:
            return kept.few.share
        with torch.no_grad():
            found = find_candidates(first.x, screen_of(first.up), first.up_bias)
        assert found is not None  # of any share
        return found.share


def _point(
    blocks: _Blocks, one: Call, other: Call, density: float, effort: Effort, timed: Timed
) -> Point:
    """Time one call against the other at a density."""
    for block in blocks.blocks:
        block.set_density(density)
    for call in (one, other, other):  # the first calls find their memory and lay weights out
        blocks.run(call, 1)
    start = time.perf_counter()
    blocks.run(one, 1)
    seconds = max(time.perf_counter() - start, 1e-6)
    times = math.ceil(_LEAST_SECONDS / seconds)
    threads = torch.get_num_threads()
    runs = partial(blocks.run, one, times), partial(blocks.run, other, times)
    return measure_point(
        density, lambda: timed(*runs, threads), threads, effort.point_seconds, time.thread_time
    )


def _steps(thresholds: Sequence[Threshold]) -> tuple[dict[int, Tables], Tables]:
    """The thresholds that measurements have changed, by width and rows."""
    densities: dict[int, Tables] = {}
    candidates: Tables = {False: {}, True: {}}
    for threshold in thresholds:
        if threshold.is_measured:
            tables = candidates
            if threshold.kind == DENSITY:
                tables = densities.setdefault(threshold.width, {False: {}, True: {}})
            tables[threshold.trains][threshold.rows] = threshold.used
    return densities, candidates


def _use(
    dtype: torch.dtype,
    threads: int,
    densities: dict[int, Tables],
    candidates: Tables,
    path: Path,
) -> None:
    """Dispatch by the built-in thresholds with the measured steps in their places."""
    built_in = dispatch.defaults_for(dtype, threads)
    tables = {
        width: overlaid(tables_at(built_in, width), _measured_at(densities, width))
        for width in sorted({*built_in, *densities})
    }
    screened = overlaid(dispatch.screened_defaults_for(dtype, threads), candidates)
    dispatch.use(dtype, threads, tables, screened, path)


def _measured_at(densities: dict[int, Tables], width: int) -> Tables:
    """The measured tables of a width, at the width from which on they hold."""
    base = max((least for least in _WIDTHS if least <= width), default=0)
    return densities.get(base, NEVER)
