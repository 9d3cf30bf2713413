"""Times an MLP block on the sparse kernels against the same block dense, in one process.

Dense, sparse and sparse without screening take turns, in an order that changes each round, so that
what slows the machine down for a while slows all; a ratio is the median over the rounds of the
quotients of two times. The active sets
are random and differ from token to token, which is the worst case for the kernels: inputs and
weights are Gaussian, and one constant bias sets the density. `time_model` times the blocks of a
trained model instead, on its own active sets. The sparse block is routed by `accelerate_` as it is
for a user, so where sparse does not pay it runs dense.
"""

from __future__ import annotations

import copy
import math
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from steppe.acceleration.accelerate import accelerate_, restore_
from steppe.blocks.block import MLPBlock
from steppe.blocks.find import find_blocks
from steppe.blocks.linear import is_transposed, linear_weight
from steppe.blocks.patterns import BlockPattern
from steppe.blocks.wrappers import unwrap
from steppe.ops.cpu.calls import DECODE_ROWS
from steppe.ops.cpu.library import kernels
from steppe.ops.screening import candidates, quantise
from steppe.plugins.base import effective_bias
from steppe.runs import versions

COLD_BYTES = 128 * 2**20  # more weights than any cache that a pass could find them in
DENSITIES = (0.9, 0.5, 0.1, 0.05, 0.03, 0.01)
_LEAST_ROUNDS = 5


@dataclass(frozen=True)
class Case:
    """What a block is used for.

    Attributes:
        name: as in tables.
        trains: whether a call is a forward and a backward pass.
        is_cold: whether the weights come from memory and not from a cache.
        products: number of matrix products, of which all but the first get sparse.
    """

    name: str
    trains: bool
    is_cold: bool
    products: int

    def bound(self, density: float) -> float:
        """By how much sparse arithmetic can be faster: n / (1 + (n − 1) ρ) for n products.

        Args:
            density: ρ, in [0, 1].

        Returns:
            Dense time / sparse time, if a product took a time in proportion to its density and
            nothing else took any. It holds against a dense block with the same first product.

        Example:
            >>> [case.bound(0.5) for case in (TRAINING, PREFILL)]
            [1.7142857142857142, 1.3333333333333333]
        """
        return self.products / (1.0 + (self.products - 1) * density)


TRAINING = Case("training", trains=True, is_cold=False, products=6)
PREFILL = Case("prefill", trains=False, is_cold=False, products=2)
DECODE = Case("decode", trains=False, is_cold=True, products=2)


@dataclass(frozen=True)
class Setting:
    """What is timed.

    Attributes:
        case: what for.
        density: share of the hidden entries that are active, in [0, 1].
        d_model: D.
        d_hidden: F, other than D.
        tokens: T, in one call.
        dtype: of weights and inputs.
        threads: of torch and of the kernels.
        outliers: how many features of the input are 15 times as large as the others.
    """

    case: Case
    density: float
    d_model: int = 768
    d_hidden: int = 3072
    tokens: int = 1024
    dtype: torch.dtype = torch.float32
    threads: int = 1
    outliers: int = 0

    def __post_init__(self) -> None:
        if not 0.0 <= self.density <= 1.0:
            raise ValueError(f"Setting: expected a density in 0 … 1, got {self.density}")
        for name in ("d_model", "d_hidden", "tokens", "threads"):
            if getattr(self, name) < 1:
                raise ValueError(f"Setting: expected {name} ≥ 1, got {getattr(self, name)}")


class Block(nn.Module):
    """An MLP block with biases, alone.

    Args:
        d_model: D.
        d_hidden: F.
        act: the activation; ReLU by default.
        gated: whether the activated layer is a third one, `gate`.
    """

    def __init__(
        self, d_model: int, d_hidden: int, act: nn.Module | None = None, gated: bool = False
    ) -> None:
        super().__init__()
        self.gate = nn.Linear(d_model, d_hidden) if gated else None
        self.up = nn.Linear(d_model, d_hidden)
        self.act = nn.ReLU() if act is None else act
        self.down = nn.Linear(d_hidden, d_model)

    def hidden(self, x: Tensor) -> Tensor:
        """a, ``[T, F]``."""
        return self.act(self.up(x)) if self.gate is None else self.act(self.gate(x)) * self.up(x)

    def forward(self, x: Tensor) -> Tensor:
        """``[T, D]`` to ``[T, D]``."""
        return self.down(self.hidden(x))


PATTERNS = tuple(
    BlockPattern(
        family="steppe.bench",
        up="up",
        act="act",
        down="down",
        gate="gate" if gated else None,
        when=lambda owner, gated=gated: (  # type: ignore[misc]  # the default binds it now
            isinstance(owner, Block) and (owner.gate is not None) is gated
        ),
    )
    for gated in (False, True)
)


@dataclass(frozen=True)
class PairedTimes:
    """Times of rounds in which two took turns.

    Attributes:
        dense: seconds of each round.
        sparse: seconds of what is compared with it, in the same rounds.
    """

    dense: list[float]
    sparse: list[float]

    def summary(self) -> dict[str, Any]:
        """The medians.

        Returns:
            ``ratio``, the median of dense time / sparse time; its ``quartiles``; the median
            ``dense_ms`` and ``sparse_ms``; the number of ``rounds``.

        Example:
            >>> PairedTimes([0.1, 0.3, 0.4], [0.1, 0.1, 0.2]).summary()["ratio"]
            2.0
        """
        ratio, quartiles = median_ratio(self.dense, self.sparse)
        return {
            "ratio": ratio,
            "quartiles": quartiles,
            "dense_ms": 1e3 * statistics.median(self.dense),
            "sparse_ms": 1e3 * statistics.median(self.sparse),
            "rounds": len(self.dense),
        }


def median_ratio(numerators: Sequence[float], denominators: Sequence[float]) -> tuple[float, Any]:
    """The median of the quotients of each round, and their quartiles.

    Args:
        numerators: seconds of each round.
        denominators: likewise.

    Returns:
        The median, and a list of the two quartiles.

    Example:
        >>> median_ratio([1.0, 4.0, 9.0], [1.0, 2.0, 3.0])
        (2.0, [1.5, 2.5])
    """
    ratios = [one / other for one, other in zip(numerators, denominators, strict=True)]
    return statistics.median(ratios), statistics.quantiles(ratios, n=4, method="inclusive")[::2]


def time_pair(
    dense: Callable[[], float],
    sparse: Callable[[], float],
    seconds: float,
    least_rounds: int = _LEAST_ROUNDS,
) -> PairedTimes:
    """Let two functions take turns, after a call of each that does not count.

    Args:
        dense: runs once and returns its time in seconds.
        sparse: the same, of what is compared with it.
        seconds: how long to go on.
        least_rounds: rounds to make also when that takes longer, at least two.

    Returns:
        The times of each round.
    """
    return PairedTimes(*time_turns([dense, sparse], seconds, least_rounds))


def time_turns(
    runs: Sequence[Callable[[], float]], seconds: float, least_rounds: int = _LEAST_ROUNDS
) -> list[list[float]]:
    """Let functions take turns, after a call of each that does not count.

    Args:
        runs: each runs once and returns its time in seconds.
        seconds: how long to go on.
        least_rounds: rounds to make also when that takes longer, at least two.

    Returns:
        The times of each in each round.
    """
    for run in runs:
        run()
    taken: list[list[float]] = [[] for _ in runs]
    turns = list(zip(runs, taken, strict=True))
    end = time.perf_counter() + seconds
    while len(taken[0]) < max(least_rounds, 2) or time.perf_counter() < end:
        for run, times in turns:
            times.append(run())
        turns.reverse()
    return taken


def time_block(
    setting: Setting,
    seconds: float = 3.0,
    least_rounds: int = _LEAST_ROUNDS,
    cold_bytes: int = COLD_BYTES,
) -> dict[str, Any]:
    """Time one block on the sparse kernels against the same block dense.

    Args:
        setting: what is timed.
        seconds: how long.
        least_rounds: rounds to make also when that takes longer.
        cold_bytes: how many bytes of weights the blocks that take turns in a cold case have.

    Returns:
        A row of JSON values: ``case``, ``d``, ``f``, ``tokens``, ``density`` as it was measured,
        ``dtype``, ``threads``, ``ratio`` of dense time / sparse time, its ``quartiles``,
        ``bound``, ``dense_ms`` and ``sparse_ms`` of one call, ``rounds``; ``candidates``, the share
        of entries that the screen cannot tell to be zero; ``unscreened_ratio`` of dense time / time
        without screening; ``gain`` of that time / sparse time, and its ``gain_quartiles``.

    Raises:
        AccelerationError: `d_model` and `d_hidden` are the same.
        KernelError: the native library is there and cannot be loaded.
    """
    with _threads(setting.threads):
        copies = 1
        if setting.case.is_cold:
            weight_bytes = 2 * setting.d_model * setting.d_hidden * setting.dtype.itemsize
            copies = math.ceil(cold_bytes / weight_bytes)
        return _time(*_random_blocks(setting, copies), setting.case, seconds, least_rounds)


def time_model(
    model: nn.Module,
    batch: Mapping[str, Tensor],
    case: Case = TRAINING,
    seconds: float = 3.0,
    least_rounds: int = _LEAST_ROUNDS,
    where: Callable[[MLPBlock], bool] | None = None,
    patterns: Sequence[BlockPattern] = (),
) -> dict[str, Any]:
    """Time a trained model's MLP blocks on the sparse kernels against the same blocks dense.

    The blocks are taken out of the model, one after the other, each on the input that it has in the
    model. Without dropout, and without the rest of the model.

    Args:
        model: the model, with or without plug-ins; it stays as it is.
        batch: what it is called with, on the CPU.
        case: what is timed, `TRAINING` or `PREFILL`.
        seconds: how long.
        least_rounds: rounds to make also when that takes longer.
        where: which blocks; all by default.
        patterns: patterns of your own for `find_blocks`.

    Returns:
        A row as of `time_block`, times and density being means over the blocks.

    Raises:
        BlocksNotFoundError: there is no MLP block.
        AccelerationError: a block does not fit `accelerate_`.
        KernelError: the native library is there and cannot be loaded.
    """
    blocks = find_blocks(unwrap(model), where, patterns)
    return _time(*_blocks_alone(model, blocks, batch), case, seconds, least_rounds)


def _time(
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
        )
    finally:
        restore_(sparse)
        restore_(unscreened)
    density = _density(dense, inputs)
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
        "dtype": _name_of(linear.weight.dtype),
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


def time_blocks(
    settings: Sequence[Setting],
    seconds: float = 3.0,
    least_rounds: int = _LEAST_ROUNDS,
    on_row: Callable[[dict[str, Any]], None] | None = None,
) -> list[dict[str, Any]]:
    """Time blocks, see `time_block`.

    Args:
        settings: what is timed.
        seconds: how long each.
        least_rounds: rounds to make also when that takes longer.
        on_row: called with each row when it is there.

    Returns:
        A row a setting.

    Raises:
        AccelerationError: `d_model` and `d_hidden` of a setting are the same.
        KernelError: the native library is there and cannot be loaded.
    """
    rows = []
    for setting in settings:
        rows.append(time_block(setting, seconds, least_rounds))
        if on_row is not None:
            on_row(rows[-1])
    return rows


def usual_settings(threads: int, quick: bool = False) -> list[Setting]:
    """What `steppe bench` times: a block of width 768, as in BERT-base, OPT-125m or ViT-B.

    Args:
        threads: of torch and of the kernels.
        quick: fewer densities and tokens, float32 only.

    Returns:
        By case, densities falling.
    """
    kinds = [
        (TRAINING, 256 if quick else 1024, torch.float32),
        (PREFILL, 256 if quick else 1024, torch.float32),
        (DECODE, 1, torch.float32),
    ]
    if not quick:
        kinds.append((PREFILL, 1024, torch.bfloat16))
    return [
        Setting(case, density, tokens=tokens, dtype=dtype, threads=threads)
        for case, tokens, dtype in kinds
        for density in ((0.9, 0.3, 0.05) if quick else DENSITIES)
    ]


def saved_bytes(setting: Setting) -> dict[str, Any]:
    """What a block keeps for its backward pass, on the sparse kernels and dense.

    Args:
        setting: of the block; its case says nothing here.

    Returns:
        A row of JSON values: ``case``, ``d``, ``f``, ``tokens``, ``density`` as it was measured,
        ``dtype``; ``dense_bytes`` and ``sparse_bytes``, neither the weights nor the block's input
        counted; ``share``, the second over the first; the same three ``_with_input``.

    Raises:
        AccelerationError: `d_model` and `d_hidden` are the same.
        KernelError: the native library is there and cannot be loaded.
    """
    with _threads(setting.threads):
        dense, (x,) = _random_blocks(setting, 1)
        sparse = copy.deepcopy(dense)
        accelerate_(sparse, patterns=PATTERNS)
        try:
            dense_bytes, dense_whole = _saved_bytes(dense, x)
            sparse_bytes, sparse_whole = _saved_bytes(sparse, x)
        finally:
            restore_(sparse)
        density = _density(dense, [x])
    return {
        "case": "saved for backward",
        "d": setting.d_model,
        "f": setting.d_hidden,
        "tokens": setting.tokens,
        "density": density,
        "dtype": _name_of(setting.dtype),
        "dense_bytes": dense_bytes,
        "sparse_bytes": sparse_bytes,
        "share": sparse_bytes / dense_bytes,
        "dense_bytes_with_input": dense_whole,
        "sparse_bytes_with_input": sparse_whole,
        "share_with_input": sparse_whole / dense_whole,
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


def surroundings() -> dict[str, Any]:
    """What times depend on besides the settings.

    Returns:
        JSON values: ``versions``, ``kernels``, ``cpu``, the model's name, and ``cores``.
    """
    return {
        "versions": versions(),
        "kernels": asdict(kernels()),
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
    }


def _random_blocks(setting: Setting, copies: int) -> tuple[nn.ModuleList, list[Tensor]]:
    """Blocks of the same weights and an input ``[T, D]`` for each, at the wanted density."""
    generator = torch.Generator().manual_seed(0)
    width, hidden, tokens = setting.d_model, setting.d_hidden, setting.tokens
    block = Block(width, hidden)
    x = torch.randn(copies * tokens, width, generator=generator)
    x[:, : setting.outliers] *= 15.0
    with torch.no_grad():
        for linear in (block.up, block.down):
            linear.weight.normal_(std=linear.in_features**-0.5, generator=generator)
            linear.bias.zero_()
        p = block.up(x).flatten()
        inactive = p.numel() - round(setting.density * p.numel())
        threshold = p.kthvalue(max(inactive, 1)).values.item()
        # A margin, so that at the ends no rounding makes an entry active, or inactive.
        margin = {0: -1.0, p.numel(): 1.0}.get(inactive, 0.0)
        block.up.bias.fill_(-threshold - margin)
    block.to(setting.dtype)
    blocks = nn.ModuleList([copy.deepcopy(block) for _ in range(copies)])
    return blocks, list(x.to(setting.dtype).split(tokens))


def _blocks_alone(
    model: nn.Module, blocks: Sequence[MLPBlock], batch: Mapping[str, Tensor]
) -> tuple[nn.ModuleList, list[Tensor]]:
    """Copies of a model's blocks, in evaluation mode, and the input ``[T, D]`` of each."""
    inputs: dict[str, Tensor] = {}
    hooks = [
        block.activated.register_forward_pre_hook(
            lambda _, arguments, name=block.name: inputs.update({name: arguments[0]})
        )
        for block in blocks
    ]
    was_training = model.training
    try:
        with torch.no_grad():
            model.eval()(**batch)
    finally:
        model.train(was_training)
        for hook in hooks:
            hook.remove()
    called = [block for block in blocks if block.name in inputs]
    return (
        nn.ModuleList([_block_alone(block) for block in called]),
        [inputs[block.name].flatten(0, -2) for block in called],
    )


def _block_alone(block: MLPBlock) -> Block:
    """A copy of a block, in evaluation mode."""
    act = block.current_act
    own_act = copy.deepcopy(act) if isinstance(act, nn.Module) else nn.ReLU()
    alone = Block(block.d_model, block.d_hidden, own_act, gated=block.gate is not None)
    for name in ("gate", "up", "down"):
        layer, copied = getattr(block, name), getattr(alone, name)
        if layer is None:
            continue
        weight = linear_weight(layer).detach()
        copied.weight = nn.Parameter((weight.T if is_transposed(layer) else weight).clone())
        bias = effective_bias(block) if layer is block.activated else layer.bias
        copied.bias = None if bias is None else nn.Parameter(bias.detach().clone())
    return alone.eval()


def _saved_bytes(blocks: nn.ModuleList, x: Tensor) -> tuple[int, int]:
    """Bytes that blocks save of a call, without their weights: without its input, and with it."""
    storages: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    leaf = x.detach().requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        z = blocks[0](leaf)
    weights = {weight.untyped_storage().data_ptr() for weight in blocks.parameters()}
    with_input = sum(size for address, size in storages.items() if address not in weights)
    del z  # until here it held what was saved, so that no address came twice
    return with_input - storages.get(x.untyped_storage().data_ptr(), 0), with_input


def _density(blocks: Iterable[Any], inputs: Iterable[Tensor]) -> float:
    """Share of the hidden entries that are active."""
    with torch.no_grad():
        active = [block.hidden(x) != 0 for block, x in zip(blocks, inputs, strict=True)]
    return statistics.fmean(entries.double().mean().item() for entries in active)


def _candidates(blocks: nn.ModuleList, inputs: Sequence[Tensor], case: Case) -> float:
    """Share of the hidden entries that are candidates."""
    bits = 16 if len(inputs[0]) <= DECODE_ROWS and not case.trains else 8
    pairs: list[tuple[Any, Tensor]] = list(zip(blocks, inputs, strict=True))
    if case.is_cold:
        pairs = [(blocks[0], torch.cat(list(inputs)))]  # blocks of the same weights
    shares = []
    for block, x in pairs:
        layer = block.up if block.gate is None else block.gate
        with torch.no_grad():
            found = candidates(quantise(x, bits), quantise(layer.weight), layer.bias)
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


@contextmanager
def _threads(number: int) -> Iterator[None]:
    """Let torch use a number of threads for a while."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _cpu_name() -> str:
    """Model of the processor, as far as the system tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or platform.machine()
