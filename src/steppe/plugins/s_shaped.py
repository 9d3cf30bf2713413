"""S-shaped squared ReLU: an activation that is flat where it is not zero."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from steppe.activations import SShapedSquaredReLU, is_relu, name_of
from steppe.blocks.block import MLPBlock
from steppe.errors import UnfitBlockError
from steppe.plugins.activation_place import put_activation
from steppe.plugins.base import Constraint, Plugin
from steppe.surgery.journal import Journal


@dataclass(frozen=True)
class SShapedActivation(Plugin):
    """``s(p − shift_x) + shift_y`` with ``s(q) = relu(q − h)² − relu(−q − h)²``, in place of ReLU.

    For the stability study: where the activation is flat its derivative is 0 and its value is
    `shift_y`. So the derivative density can fall in training, while the density stays at 1. In a
    gated block it takes the place of the gate's activation. It is no rectifier: the kernels do not
    run it.

    Args:
        shift_x: middle of the flat part; the paper uses −1.6 and 1.6. At 1.6 the flat part begins
            just above p = 0, so about half of the derivatives of a new model are not 0.
        shift_y: value on the flat part; the paper uses −1.6 and 1.6, and at 0 the activation would
            be as sparse as its derivative.
        half_width: h, half the width of the flat part, > 0.

    Raises:
        ValueError: a shift is not finite, or `half_width` is not finite and positive.

    Source: arXiv 2605.25612, stability study.

    Example:
        >>> import steppe
        >>> layer = nn.TransformerEncoderLayer(8, 2, 32)
        >>> steppe.sparsify_(layer, [SShapedActivation(shift_y=-1.6)]).activation
        SShapedSquaredReLU(shift_x=1.6, shift_y=-1.6, half_width=1.5)
    """

    key: ClassVar[str] = "s_shaped_squared_relu"

    shift_x: float = 1.6
    shift_y: float = 1.6
    half_width: float = 1.5

    def __post_init__(self) -> None:
        """Refuse settings that mean nothing."""
        self._activation()

    def check(self, block: MLPBlock) -> None:
        """Refuse an activation other than ReLU."""
        if not is_relu(block.act):
            raise UnfitBlockError(
                f"{block.name}: SShapedActivation takes the place of ReLU, got"
                f" {name_of(block.act)}. Build the model with ReLU (hidden_act='relu' in most"
                " configs)"
            )

    def apply(
        self, model: nn.Module, blocks: Sequence[MLPBlock], journal: Journal
    ) -> Sequence[Constraint]:
        """Put the activation in place of ReLU."""
        for block in blocks:
            put_activation(block, self._activation(), journal)
        return ()

    def _activation(self) -> SShapedSquaredReLU:
        """The activation of these settings."""
        return SShapedSquaredReLU(self.shift_x, self.shift_y, self.half_width)
