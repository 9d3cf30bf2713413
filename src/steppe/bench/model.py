"""Times the MLP blocks of a trained model, on the active sets that they have in it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from steppe.bench.cases import TRAINING, Block, Case
from steppe.bench.times import time_against_dense
from steppe.blocks.block import MLPBlock
from steppe.blocks.find import find_blocks
from steppe.blocks.linear import is_transposed, linear_weight
from steppe.blocks.patterns import BlockPattern
from steppe.blocks.wrappers import unwrap
from steppe.plugins.base import effective_bias
from steppe.timing import LEAST_TURNS


def time_model(
    model: nn.Module,
    batch: Mapping[str, Tensor],
    case: Case = TRAINING,
    seconds: float = 3.0,
    least_rounds: int = LEAST_TURNS,
    where: Callable[[MLPBlock], bool] | None = None,
    patterns: Sequence[BlockPattern] = (),
) -> dict[str, Any]:
    """Time a trained model's MLP blocks on the sparse kernels against the same blocks dense.

    The blocks are taken out of the model, one after the other, each on the input that it has in the
    model. Without dropout, and without the rest of the model.

    Args:
        model: the model, with or without plug-ins; it stays as it is.
        batch: its arguments, on the CPU.
        case: `TRAINING` or `PREFILL`.
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
    return time_against_dense(*_blocks_alone(model, blocks, batch), case, seconds, least_rounds)


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
