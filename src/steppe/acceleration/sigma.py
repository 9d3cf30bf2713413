"""Which rectifier a block's activation is now: what the kernels need to know of it."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor, nn

from steppe.activations import Activation, Rectifier, is_relu, name_of
from steppe.blocks.block import MLPBlock
from steppe.blocks.recognition import Recognised, recognise
from steppe.errors import AccelerationError
from steppe.plugins.jumping_relu import JUMPING_SQUARED_RELU, MixedActivation


class Sigma(ABC):
    """An activation ``α r + β r²`` with ``r = max(p − shift, 0)``, as it is now.

    Attributes:
        shift: of the pre-activations.
        is_fixed: whether it stays as it is.
    """

    shift: float = 0.0
    is_fixed: bool = False

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
    act = block.current_act
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
        return _Fixed(act, recognised)
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
    """An activation that was recognised by evaluating it, and that nobody has set anew since."""

    def __init__(self, act: Activation, of: Recognised) -> None:
        self._act = act
        self._of = of
        self._settings = _settings_of(act)
        self.shift = of.shift
        self.is_fixed = not self._settings

    def coefficients(self) -> tuple[float, float, Tensor | None]:
        return self._of.alpha, self._of.beta, None

    def unfit(self) -> str:
        changed = self._settings and _settings_of(self._act) != self._settings
        return "the settings of its activation were changed" if changed else ""


def _settings_of(act: Activation) -> dict[str, object]:
    """The numbers that an activation has as attributes, which it may compute with."""
    if not isinstance(act, nn.Module):
        return {}
    return {
        name: value
        for name, value in vars(act).items()
        if isinstance(value, int | float) and name not in ("training", "inplace", "call_super_init")
    }
