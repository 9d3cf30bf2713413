"""Restricted norm: a lower bound on the scale of the norm before the MLP."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from steppe.blocks.find import MLPBlock
from steppe.blocks.norms import NormScale, scale_of
from steppe.errors import UnfitBlockError
from steppe.plugins.base import Constraint, Plugin, ramp_progress, require_share
from steppe.sharding import local_rows
from steppe.surgery.journal import Journal


@dataclass(frozen=True)
class RestrictedNorm(Plugin):
    """A floor under the norm's scale: a larger input to the MLP, so fewer active units.

    From scratch (``ramp=0``): the norm's bias, which must be zero, is frozen there, and the scale
    is clamped to ≥ `floor` after every optimizer step. In finetuning (``ramp > 0``) the bias is
    frozen as it is, and |scale| is raised to the floor linearly over the first `ramp` of the run,
    signs kept. It fits LayerNorm and RMSNorm; the scale of Gemma's norms is 1 + weight.

    Args:
        floor: lower bound of the scale, > 0.
        ramp: share of the run over which the floor rises, in [0, 1].
        allow_shared: restrict the norm also where others (the residual stream behind a post-norm,
            parallel attention) read its output.

    Raises:
        ValueError: a setting is out of range.

    Source: arXiv 2605.25612, restricted LayerNorm.
    """

    key: ClassVar[str] = "restricted_norm"
    uses_norm: ClassVar[bool] = True

    floor: float = 1.0
    ramp: float = 0.0
    allow_shared: bool = False

    def __post_init__(self) -> None:
        """Refuse settings that mean nothing."""
        if self.floor <= 0:
            raise ValueError(f"RestrictedNorm: expected floor > 0, got {self.floor}")
        require_share("RestrictedNorm.ramp", self.ramp)

    @property
    def has_schedule(self) -> bool:
        """Whether the floor rises."""
        return self.ramp > 0

    def check(self, block: MLPBlock) -> None:
        """Refuse a norm without a plain scale, a shared one, or one that the floor would change."""
        norm = block.norm
        scale = getattr(norm, "weight", None)
        if norm is None or not isinstance(scale, nn.Parameter):
            raise UnfitBlockError(
                f"{block.name}: RestrictedNorm needs a norm with a scale, got"
                f" {type(norm).__name__}. Leave the block out: sparsify_(..., where=...)"
            )
        if block.norm_is_shared and not self.allow_shared:
            raise UnfitBlockError(
                f"{block.name}: the norm is read by others than the MLP ({block.family}); a floor"
                " changes them too. If you mean it: RestrictedNorm(allow_shared=True)"
            )
        known = scale_of(norm, block.d_model)
        if known is None:
            raise UnfitBlockError(
                f"{block.name}: the output of {type(norm).__name__} is not proportional to its"
                " weight, nor to 1 + weight, so a floor under the weight means nothing. Leave the"
                " block out: sparsify_(..., where=...)"
            )
        if self.ramp > 0 or scale.is_meta:
            return
        bias = getattr(norm, "bias", None)
        if isinstance(bias, Tensor) and bool(bias.detach().any()):
            raise UnfitBlockError(
                f"{block.name}: the norm's bias is not zero; taking it away would change the"
                " outputs. For a trained model: RestrictedNorm(ramp=0.3)"
            )
        smallest = float(scale.detach().min()) + known.offset
        if smallest < self.floor:
            raise UnfitBlockError(
                f"{block.name}: the norm's scale ({smallest:.3g} at least) is below the floor"
                f" {self.floor}; a jump would change the outputs. For a trained model:"
                " RestrictedNorm(ramp=0.3)"
            )

    def apply(
        self, model: nn.Module, blocks: Sequence[MLPBlock], journal: Journal
    ) -> list[Constraint]:
        """Freeze the biases."""
        constraints: list[Constraint] = []
        # The experts of a layer share their norm.
        for norm, width in {block.norm: block.d_model for block in blocks}.items():
            assert norm is not None
            bias = getattr(norm, "bias", None)
            if isinstance(bias, nn.Parameter):
                journal.freeze(bias)
            scale = scale_of(norm, width)
            assert scale is not None
            constraints.append(_Floor(scale, self.floor, self.ramp))
        return constraints


class _Floor(Constraint):
    """Scale ≥ floor from scratch; |scale| ≥ a rising floor, signs kept, when finetuning."""

    def __init__(self, scale: NormScale, floor: float, ramp: float) -> None:
        self._scale = scale
        self._floor = floor
        self._ramp = ramp
        self._current = floor * ramp_progress(0.0, ramp)

    def changed(self) -> list[nn.Parameter]:
        """The scale."""
        weight = self._scale.weight
        assert weight is not None
        return [weight]

    def advance(self, progress: float) -> None:
        """Raise the floor."""
        self._current = self._floor * ramp_progress(progress, self._ramp)

    @torch.no_grad()
    def project(self) -> None:
        """Clamp in place."""
        weight, offset = self._scale.weight, self._scale.offset
        assert weight is not None
        local = local_rows(weight)
        if self._ramp == 0:
            local.clamp_(min=self._floor - offset)
        else:
            scale = local + offset if offset else local  # −0 + 0 has lost its sign
            floored = torch.copysign(scale.abs().clamp_(min=self._current), scale)
            # A scale above the floor keeps its bits.
            local.copy_(torch.where(scale.abs() < self._current, floored - offset, local))
