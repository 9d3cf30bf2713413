"""Sigma: which rectifier a block's activation is, as the kernels need it."""

from __future__ import annotations

from torch import Tensor, nn

from steppe.activations import Activation, KnownRectifier, name_of
from steppe.blocks.find import MLPBlock
from steppe.blocks.recognition import Recognised, recognise
from steppe.errors import AccelerationError


def sigma_of(block: MLPBlock) -> KnownRectifier:
    """The rectifier that a block's activation is.

    Args:
        block: the block.

    Raises:
        AccelerationError: it is none.
    """
    act: Activation = getattr(block.act_slot.module, block.act_slot.name)
    if isinstance(act, KnownRectifier) and not act.unfit():
        return act
    recognised = recognise(act)
    if isinstance(recognised, Recognised):
        return _Fixed(act, recognised)
    raise AccelerationError(
        f"{block.name}: accelerate_ needs an activation α r + β r² with r = max(p, 0), such as"
        f" ReLU; {name_of(act)} {recognised}. Train or finetune the model with ReLU, or to the end"
        " with steppe.sparsify_(model, [steppe.JumpingSquaredReLU(ramp=0.3)]); or leave this block"
        " out: accelerate_(model, where=...)"
    )


class _Fixed(KnownRectifier):
    """An activation that was recognised by evaluating it, as long as its settings stay."""

    def __init__(self, act: Activation, found: Recognised) -> None:
        self._act = act
        self._coefficients = found.alpha, found.beta, None
        self._settings = _settings_of(act)
        self.shift = found.shift
        self.is_fixed = not self._settings

    def coefficients(self) -> tuple[float, float, Tensor | None]:
        return self._coefficients

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
