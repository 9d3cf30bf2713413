"""Times one MLP block of random weights, and counts what it saves for its backward pass.

The active sets are random and differ from token to token, which is the worst case for the kernels:
inputs and weights are Gaussian, and one constant bias sets the density. `steppe.bench.time_model`
times the blocks of a trained model instead, on its own active sets.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from steppe.acceleration.accelerate import accelerate_, restore_
from steppe.bench.cases import PATTERNS, Block, Setting
from steppe.bench.times import density_of, name_of, time_against_dense
from steppe.timing import LEAST_TURNS

COLD_BYTES = 128 * 2**20  # more weights than any cache that a pass could find them in


def time_block(
    setting: Setting,
    seconds: float = 3.0,
    least_rounds: int = LEAST_TURNS,
    cold_bytes: int = COLD_BYTES,
) -> dict[str, Any]:
    """Time one block on the sparse kernels against the same block dense.

    Args:
        setting: the block and the case to time.
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
        return time_against_dense(
            *_random_blocks(setting, copies), setting.case, seconds, least_rounds
        )


def time_blocks(
    settings: Sequence[Setting],
    seconds: float = 3.0,
    least_rounds: int = LEAST_TURNS,
    on_row: Callable[[dict[str, Any]], None] | None = None,
) -> list[dict[str, Any]]:
    """Time blocks, see `time_block`.

    Args:
        settings: the blocks and cases to time.
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


def saved_bytes(setting: Setting) -> dict[str, Any]:
    """Bytes that a block saves for its backward pass, on the sparse kernels and dense.

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
        density = density_of(dense, [x])
    return {
        "case": "saved for backward",
        "d": setting.d_model,
        "f": setting.d_hidden,
        "tokens": setting.tokens,
        "density": density,
        "dtype": name_of(setting.dtype),
        "dense_bytes": dense_bytes,
        "sparse_bytes": sparse_bytes,
        "share": sparse_bytes / dense_bytes,
        "dense_bytes_with_input": dense_whole,
        "sparse_bytes_with_input": sparse_whole,
        "share_with_input": sparse_whole / dense_whole,
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


@contextmanager
def _threads(number: int) -> Iterator[None]:
    """Let torch use a number of threads for a while."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)
