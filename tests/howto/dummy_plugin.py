"""A plug-in in one file: an activation, a bias, a schedule and a limit of its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from steppe.activations import KnownRectifier, is_relu
from steppe.blocks.find import MLPBlock
from steppe.blocks.linear import linear_weight
from steppe.errors import UnfitBlockError
from steppe.plugins import BiasShift, Constraint, Plugin, register
from steppe.plugins.base import ramp_progress, require_share
from steppe.surgery.journal import Journal


@register
@dataclass(frozen=True)
class BentReLU(Plugin):
    """``r + k r²`` with ``r = max(p − offset, 0)``; k rises from 0 to `bend`.

    Args:
        bend: k at the end of the ramp, ≥ 0.
        offset: subtracted from every pre-activation.
        ramp: share of the run over which k rises, in [0, 1].
        max_tokens: longest sequence.
    """

    key: ClassVar[str] = "bent_relu"

    bend: float = 0.25
    offset: float = 0.1
    ramp: float = 0.0
    max_tokens: int = 24

    def __post_init__(self) -> None:
        require_share("BentReLU.ramp", self.ramp)

    @property
    def has_schedule(self) -> bool:
        return self.ramp > 0

    @property
    def longest_sequence(self) -> int | None:
        return self.max_tokens

    def check(self, block: MLPBlock) -> None:
        if not is_relu(block.act):
            raise UnfitBlockError(f"{block.name}: BentReLU takes the place of ReLU alone")

    def apply(
        self, model: nn.Module, blocks: Sequence[MLPBlock], journal: Journal
    ) -> list[Constraint]:
        constraints: list[Constraint] = []
        for block in blocks:
            device = linear_weight(block.down).device
            bent = Bent(self.bend * ramp_progress(0.0, self.ramp)).to(device)
            journal.set_attribute(block.act_slot, bent.train(block.down.training))
            for slot, value in block.act_flags:
                journal.set_attribute(slot, value)
            Offset(block, self.offset).add_to(journal, "bent_relu")
            constraints.append(Bending(bent, self.bend, self.ramp))
        return constraints


class Bent(KnownRectifier, nn.Module):
    """The activation; it tells the kernels its coefficients, so that k may change."""

    bend: Tensor

    def __init__(self, bend: float) -> None:
        super().__init__()
        self.register_buffer("bend", torch.tensor(bend))

    def forward(self, p: Tensor) -> Tensor:
        r = torch.relu(p)
        return r + self.bend.to(p.dtype) * r * r

    def coefficients(self) -> tuple[float, float, Tensor | None]:
        return 1.0, 1.0, self.bend


class Offset(BiasShift):
    """The bias; a buffer, so that it is saved, and the kernels notice when it changes."""

    offset: Tensor

    def __init__(self, block: MLPBlock, offset: float) -> None:
        super().__init__(block)
        weight = linear_weight(block.activated)
        self.register_buffer("offset", weight.new_full((block.d_hidden,), offset))

    def shift(self, dtype: torch.dtype) -> Tensor:
        return self.offset.to(dtype)


class Bending(Constraint):
    """The schedule of k."""

    def __init__(self, bent: Bent, most: float, ramp: float) -> None:
        self._bent = bent
        self._most = most
        self._ramp = ramp

    def advance(self, progress: float) -> None:
        self._bent.bend.fill_(self._most * ramp_progress(progress, self._ramp))
