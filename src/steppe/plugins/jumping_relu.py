"""J-SquaredReLU: an activation whose derivative jumps at zero and then grows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from steppe.activations import (
    Activation,
    KnownRectifier,
    Rectifier,
    derivative,
    evaluate,
    is_relu,
)
from steppe.blocks.block import MLPBlock
from steppe.errors import UnfitBlockError
from steppe.ops.rectifier import rectifier, rectifier_derivative
from steppe.plugins.activation_place import put_activation
from steppe.plugins.base import Constraint, Plugin, ramp_progress, require_share
from steppe.surgery.journal import Journal

JUMPING_SQUARED_RELU = (1.0, 0.5)  # α, β of ((p+1)² − 1)/2


@dataclass(frozen=True)
class JumpingSquaredReLU(Plugin):
    """``((p+1)² − 1)/2`` for p > 0, else 0: a larger activation gradient, so fewer active units.

    From scratch (``ramp=0``) it takes the place of ReLU at once. In finetuning (``ramp > 0``) it is
    mixed in linearly over the first `ramp` of the run: one coefficient if the model has ReLU, a
    blend of the two functions for GELU, SiLU or any other elementwise activation.

    Args:
        ramp: share of the run over which the activation changes, in [0, 1].

    Raises:
        ValueError: `ramp` is out of range.

    Source: arXiv 2605.25612, J-SquaredReLU.
    """

    key: ClassVar[str] = "jumping_squared_relu"

    ramp: float = 0.0

    def __post_init__(self) -> None:
        """Refuse settings that mean nothing."""
        require_share("JumpingSquaredReLU.ramp", self.ramp)

    @property
    def has_schedule(self) -> bool:
        """Whether the activation is mixed in."""
        return self.ramp > 0

    def check(self, block: MLPBlock) -> None:
        """Refuse an activation that cannot be replaced, or not at once."""
        act = block.act
        name = getattr(act, "__name__", type(act).__name__)
        if self.ramp == 0 and not is_relu(act):
            raise UnfitBlockError(
                f"{block.name}: JumpingSquaredReLU takes the place of ReLU, got {name}. For a"
                " trained model: JumpingSquaredReLU(ramp=0.3). From scratch: build the model with"
                " ReLU (hidden_act='relu' in most configs)"
            )
        if isinstance(act, nn.Module) and act.state_dict():
            raise UnfitBlockError(
                f"{block.name}: {name} has weights of its own and cannot be blended without"
                " changing their names in the state dict"
            )
        if not _is_elementwise(act):
            raise UnfitBlockError(
                f"{block.name}: {name} is not elementwise; expected ReLU, GELU, SiLU or their kind"
            )

    def apply(
        self, model: nn.Module, blocks: Sequence[MLPBlock], journal: Journal
    ) -> list[Constraint]:
        """Put the new activation in place of the old one."""
        constraints: list[Constraint] = []
        for block in blocks:
            constraint = Constraint()
            if self.ramp == 0:
                activation: nn.Module = Rectifier(*JUMPING_SQUARED_RELU)
            else:
                activation = MixedActivation(block.act)
                constraint = _Mixing(activation, self.ramp)
            put_activation(block, activation, journal)
            constraints.append(constraint)
        return constraints


class MixedActivation(KnownRectifier, nn.Module):
    """``(1 − k) · original(p) + k · J-SquaredReLU(p)``; for ReLU that is ``r + k/2 · r²``.

    k is the buffer `mix`, a 0-dim tensor: it changes without recompiling and is saved with the
    model.

    Args:
        original: elementwise activation to start from.
    """

    mix: Tensor

    def __init__(self, original: Activation) -> None:
        super().__init__()
        self.original = original
        self._from_relu = is_relu(original)
        self.register_buffer("mix", torch.zeros(()))

    def forward(self, p: Tensor) -> Tensor:
        """σ(p), shape and dtype of p."""
        alpha, beta = JUMPING_SQUARED_RELU
        if self._from_relu:
            return rectifier(p, alpha, beta * self.mix)
        mix = self.mix.to(p.dtype)
        return (1.0 - mix) * evaluate(self.original, p) + mix * rectifier(p, alpha, beta)

    def derivative(self, p: Tensor) -> Tensor:
        """σ′(p), shape and dtype of p."""
        alpha, beta = JUMPING_SQUARED_RELU
        if self._from_relu:
            return rectifier_derivative(p, alpha, beta * self.mix)
        mix = self.mix.to(p.dtype)
        return (1.0 - mix) * derivative(self.original, p) + mix * rectifier_derivative(
            p, alpha, beta
        )

    def coefficients(self) -> tuple[float, float, Tensor | None]:
        """α, β and the mix; from another activation than ReLU those of the end of the ramp."""
        return *JUMPING_SQUARED_RELU, self.mix if self._from_relu else None

    def unfit(self) -> str:
        """Why it is no rectifier now: another activation than ReLU is still mixed in."""
        mix = 1.0 if self._from_relu else float(self.mix)
        return "" if mix == 1.0 else f"its activation is mixed, {mix:.2g} of J-SquaredReLU"


class _Mixing(Constraint):
    """The schedule of a `MixedActivation`."""

    def __init__(self, activation: MixedActivation, ramp: float) -> None:
        self._activation = activation
        self._ramp = ramp

    def advance(self, progress: float) -> None:
        """Set the mix."""
        self._activation.mix.fill_(ramp_progress(progress, self._ramp))


def _is_elementwise(act: Activation) -> bool:
    """Whether the activation of a vector is the vector of activations."""
    p = torch.tensor([-2.0, -0.5, 0.0, 0.5, 2.0])
    try:
        with torch.no_grad():
            together = evaluate(act, p)
            alone = torch.cat([evaluate(act, q) for q in p.split(1)])
    except (IndexError, RuntimeError, ValueError):
        return False  # it asks for dimensions that an elementwise function does not need
    return together.shape == p.shape and torch.allclose(together, alone)
