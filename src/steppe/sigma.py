"""Which rectifier a block's activation is now: what the kernels need to know of it."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor

from steppe.activations import Activation, Rectifier, is_relu, name_of
from steppe.blocks import MLPBlock
from steppe.errors import AccelerationError
from steppe.plugins.jumping_relu import JUMPING_SQUARED_RELU, MixedActivation
from steppe.recognition import Recognised, recognise


class Sigma(ABC):
    """An activation ``α r + β r²`` with ``r = max(p − shift, 0)``, as it is now.

    Attributes:
        shift: of the pre-activations.
    """

    shift: float = 0.0

    @abstractmethod
    def coefficients(self) -> tuple[float, float, Tensor | None]:
        """α, β, and what β is multiplied by, 0-dim, or None for 1."""

    def unfit(self) -> str:
        """Why it is none of these now; empty if it is."""
        return ""


def sigma_of(block: MLPBlock) -> Sigma:
    """The rectifier that a block's activation is.

    Args:
        block: the block.

    Raises:
        AccelerationError: it is none.
    """
    act: Activation = getattr(block.act_slot.module, block.act_slot.name)
    if isinstance(act, Rectifier):
        return _OfRectifier(act)
    if isinstance(act, MixedActivation) and is_relu(act.original):
        return _OfMixedReLU(act)
    if isinstance(act, MixedActivation):
        blend = _OfBlend(act)
        if not blend.unfit():
            return blend
    recognised = recognise(act)
    if isinstance(recognised, Recognised):
        return _Fixed(recognised)
    raise AccelerationError(
        f"{block.name}: accelerate_ needs an activation α r + β r² with r = max(p, 0), such as"
        f" ReLU; {name_of(act)} {recognised}. Train or finetune the model with ReLU, or to the end"
        " with steppe.sparsify_(model, [steppe.JumpingSquaredReLU(ramp=0.3)]); or leave this block"
        " out: accelerate_(model, where=...)"
    )


class _OfRectifier(Sigma):
    """A `Rectifier`, whose coefficients may be set anew."""

    def __init__(self, act: Rectifier) -> None:
        self._act = act

    def coefficients(self) -> tuple[float, float, Tensor | None]:
        return self._act.alpha, self._act.beta, None


class _OfMixedReLU(Sigma):
    """ReLU on its way to J-SquaredReLU."""

    def __init__(self, act: MixedActivation) -> None:
        self._act = act

    def coefficients(self) -> tuple[float, float, Tensor | None]:
        return *JUMPING_SQUARED_RELU, self._act.mix


class _OfBlend(Sigma):
    """Another activation that has become J-SquaredReLU to the end."""

    def __init__(self, act: MixedActivation) -> None:
        self._act = act

    def coefficients(self) -> tuple[float, float, Tensor | None]:
        return *JUMPING_SQUARED_RELU, None

    def unfit(self) -> str:
        mix = float(self._act.mix)
        return "" if mix == 1.0 else f"its activation is mixed, {mix:.2g} of J-SquaredReLU"


class _Fixed(Sigma):
    """An activation that was recognised by evaluating it."""

    def __init__(self, of: Recognised) -> None:
        self._of = of
        self.shift = of.shift

    def coefficients(self) -> tuple[float, float, Tensor | None]:
        return self._of.alpha, self._of.beta, None
