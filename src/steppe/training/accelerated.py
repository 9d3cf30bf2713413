"""Acceleration for the length of a training run, and the record of how the blocks ran in it."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from torch import nn

from steppe.acceleration.accelerate import Acceleration, _decelerate, accelerate_, acceleration_of
from steppe.acceleration.explanation import explain
from steppe.acceleration.sigma import sigma_of
from steppe.blocks.block import MLPBlock
from steppe.blocks.find import find_blocks
from steppe.blocks.patterns import BlockPattern
from steppe.blocks.wrappers import unwrap
from steppe.errors import AccelerationError
from steppe.routing.route import route_of

_logger = logging.getLogger(__name__)


class AccelerationOfRun:
    """Accelerates a model while it trains, and takes that back afterwards.

    A model that is accelerated already stays as it is, then and afterwards.

    Args:
        wanted: whether to accelerate.
        patterns: patterns of the user's for `find_blocks`.

    Attributes:
        sentence: how many blocks are routed, to which kernels; empty for a model that is not
            accelerated.
        record: how the blocks have run, see `record_of_acceleration`; empty for such a model too.
    """

    def __init__(self, wanted: bool, patterns: Sequence[BlockPattern]) -> None:
        self._wanted = wanted
        self._patterns = patterns
        self._ours: Acceleration | None = None
        self._model: nn.Module | None = None
        self._left_out: dict[str, str] = {}
        self.sentence = ""
        self.record: dict[str, Any] = {}

    def begin(self, model: nn.Module) -> None:
        """Accelerate the blocks of ReLU type; the others stay dense, with a warning.

        The kernels change no number, so a run in which they can do nothing is slower than hoped,
        and right: a warning, where `accelerate_` by hand raises.

        Args:
            model: the model that trains.

        Raises:
            AccelerationError: a block of ReLU type does not fit; the model is as it was.
            KernelError: the native library is there and cannot be loaded.
        """
        self.end()  # of a run that the Trainer starts over within the same call
        self._model, self._left_out, self.record = unwrap(model), {}, {}
        if self._wanted and acceleration_of(model) is None:
            blocks = find_blocks(model, patterns=self._patterns)
            self._left_out = {block.name: why for block in blocks if (why := _why_not(block))}
            if len(self._left_out) < len(blocks):
                accelerate_(model, self._is_of_relu_type, self._patterns)
                self._ours = acceleration_of(model)
        self.take_record()
        self.sentence = _sentence(self.record)
        if self._left_out:
            name, why = next(iter(self._left_out.items()))
            more = f", and {len(self._left_out) - 1} more" if len(self._left_out) > 1 else ""
            _logger.warning("%s. Not accelerated: %s%s. %s", self.sentence, name, more, why)

    def take_record(self) -> None:
        """Note how the blocks have run so far."""
        if self._model is not None and (self._wanted or acceleration_of(self._model) is not None):
            self.record = record_of_acceleration(self._model, self._left_out)

    def end(self) -> None:
        """Take the acceleration back, if it is this object's; a second call does nothing."""
        ours, model = self._ours, self._model
        if model is not None:
            self.take_record()
            self._ours = self._model = None
            if ours is not None and acceleration_of(model) is ours:
                _decelerate(ours)

    def _is_of_relu_type(self, block: MLPBlock) -> bool:
        return block.name not in self._left_out


def record_of_acceleration(model: nn.Module, left_out: dict[str, str]) -> dict[str, Any]:
    """How the blocks of a model have run since it was accelerated.

    Args:
        model: accelerated, or with no block that can be.
        left_out: by name of a block that is not accelerated, why.

    Returns:
        JSON values: ``kernels``, the instruction set, or why there is none; ``blocks``, of each its
        ``name``, number of ``calls`` by how they ran (see `BlockExplanation.how`) and number of
        calls that were not sparse by the ``reasons``; ``not_accelerated``, by name of a block, why.
    """
    if acceleration_of(model) is None:
        return {"kernels": "", "blocks": [], "not_accelerated": left_out}
    explained = explain(model)
    reasons = {block.name: _reasons_of(block) for block in find_blocks(model)}
    return {
        "kernels": explained.kernels.isa or explained.kernels.reason,
        "blocks": [
            {"name": one.name, "calls": one.calls, "reasons": reasons.get(one.name, {})}
            for one in explained.blocks
        ],
        "not_accelerated": left_out,
    }


def _reasons_of(block: MLPBlock) -> dict[str, int]:
    """The number of a block's calls that were not sparse, by the reason."""
    route = route_of(block.down)
    return {} if route is None else dict(route.reasons)


def _why_not(block: MLPBlock) -> str:
    """Why the activation of a block is not of ReLU type; empty if it is."""
    try:
        sigma_of(block)
    except AccelerationError as error:
        return error.message.partition(": ")[2]
    return ""


def _sentence(record: dict[str, Any]) -> str:
    """The number of blocks that are routed, and to which kernels."""
    if not record:
        return ""
    routed = len(record["blocks"])
    whole = routed + len(record["not_accelerated"])
    if not routed:
        return f"accelerated: none of {whole} MLP blocks"
    return f"accelerated: {routed} of {whole} MLP blocks, kernels: {record['kernels']}"
