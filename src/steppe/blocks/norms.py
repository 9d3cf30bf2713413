"""The scale of a norm: its weight, one plus its weight, or 1."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from steppe.blocks.bare import without_hooks
from steppe.sharding import full


@dataclass(frozen=True)
class NormScale:
    """The scale of a norm: the factor of each column.

    Attributes:
        norm: the norm.
        offset: added to its weight: 1 for Gemma's kind, and for one without weight.
    """

    norm: nn.Module
    offset: float

    @property
    def weight(self) -> nn.Parameter | None:
        """The norm's weight, whatever it is now; None if it has none."""
        weight = getattr(self.norm, "weight", None)
        return weight if isinstance(weight, nn.Parameter) else None

    def value(self, like: Tensor) -> Tensor:
        """The scale ``[D]``, or ``[]`` where the norm has no weight.

        Args:
            like: of the dtype and on the device that it is to be of.
        """
        weight = self.weight
        scale = like.new_zeros(()) if weight is None else full(weight.detach())
        return (scale + self.offset).to(like)


def scale_of(norm: nn.Module, width: int) -> NormScale | None:
    """The scale of a norm, found by evaluating a copy of it.

    Args:
        norm: LayerNorm, RMSNorm or their kind, with or without weight.
        width: D, of its input.

    Returns:
        The scale; None where the output is no multiple of the weight or of one plus the weight, and
        for a module without a weight that does not divide by the standard deviation or the root
        mean square.

    Example:
        >>> scale_of(nn.LayerNorm(4), 4).offset
        0.0
        >>> scale_of(nn.RMSNorm(4, elementwise_affine=False), 4).offset
        1.0
    """
    weight = getattr(norm, "weight", None)
    has_weight = isinstance(weight, nn.Parameter)
    if type(norm) in (nn.LayerNorm, nn.RMSNorm):
        return NormScale(norm, 0.0 if has_weight else 1.0)
    probe = _copy_of(norm)
    x = torch.linspace(-3.0, 6.0, width, dtype=torch.float64).unsqueeze(0)
    with torch.no_grad():
        if not has_weight:
            square = probe(x).double().square().mean()
            return NormScale(norm, 1.0) if bool((square - 1.0).abs() < 1e-3) else None
        outputs = []
        for value in (0.0, 1.0, 2.0):
            probe.weight.fill_(value)
            outputs.append(probe(x).double())
    step = outputs[1] - outputs[0]
    is_linear = torch.allclose(outputs[2] - outputs[1], step, rtol=1e-5, atol=1e-6)
    for offset in (0.0, 1.0):
        is_so = torch.allclose(outputs[0], offset * step, rtol=1e-5, atol=1e-6)
        if is_linear and is_so and bool(step.any()):
            return NormScale(norm, offset)
    return None


def _copy_of(norm: nn.Module) -> Any:
    """A norm in float64 on the CPU, all its parameters zero, without hooks."""
    memo: dict[int, Any] = {
        id(parameter): nn.Parameter(torch.zeros(parameter.shape, dtype=torch.float64))
        for parameter in norm.parameters()  # on the meta device or sharded, maybe
    }
    return copy.deepcopy(without_hooks(norm), memo).to(device="cpu", dtype=torch.float64)
