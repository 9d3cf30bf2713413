"""Linear layers, whoever made them."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F


class PartOfLinear(nn.Module):
    """A linear layer ``x Wᵀ + b`` whose W and b are parts of larger parameters.

    Args:
        shape: input and output width.
    """

    def __init__(self, shape: tuple[int, int]) -> None:
        super().__init__()
        self.in_features, self.out_features = shape

    @property
    @abstractmethod
    def whole(self) -> nn.Module:
        """The module that has them."""

    @property
    @abstractmethod
    def weight(self) -> Tensor:
        """W, ``[out, in]``, a view of the larger parameter."""

    @property
    @abstractmethod
    def bias(self) -> Tensor | None:
        """B, ``[out]``, a view of the larger parameter, or None."""

    @property
    @abstractmethod
    def held(self) -> list[tuple[dict[str, Any], str]]:
        """Where the parameters are that W and b are parts of: a dict, and the name there."""

    def forward(self, x: Tensor) -> Tensor:
        """``[*, out]`` of ``[*, in]``."""
        return F.linear(x, self.weight, self.bias)


def linear_shape(module: nn.Module) -> tuple[int, int] | None:
    """Input and output width of a linear layer.

    Args:
        module: ``nn.Linear``, Transformers' ``Conv1D``, or a PEFT layer around one of them.

    Returns:
        ``(in, out)``, or None if the module is no linear layer.
    """
    base: Any = getattr(module, "base_layer", module)
    if hasattr(base, "in_features") and hasattr(base, "out_features"):
        return int(base.in_features), int(base.out_features)
    return (int(base.nx), int(base.nf)) if is_transposed(base) else None


def is_transposed(module: nn.Module) -> bool:
    """Whether a linear layer keeps its weight as ``[in, out]``: Transformers' ``Conv1D``.

    Args:
        module: a layer, or a PEFT layer around one.
    """
    base = getattr(module, "base_layer", module)
    return not hasattr(base, "in_features") and hasattr(base, "nx") and hasattr(base, "nf")


def is_linear(kind: type[nn.Module]) -> bool:
    """Whether a class computes x Wᵀ + b and nothing else: ``nn.Linear``, not a subclass of it.

    So does a `PartOfLinear`, with W and b that are parts of larger ones.
    Transformers' ``FalconLinear`` adds the bias after the product, with a forward of its own.

    Args:
        kind: the class.
    """
    return (
        kind is nn.Linear
        or issubclass(kind, PartOfLinear)
        or (kind.__name__ == "FalconLinear" and kind.__module__.startswith("transformers."))
    )


def linear_weight(module: nn.Module) -> Tensor:
    """The weight of a linear layer, below a PEFT layer if there is one."""
    weight = getattr(module, "base_layer", module).weight
    assert isinstance(weight, Tensor)
    return weight


def held_by(layer: nn.Module) -> list[tuple[dict[str, Any], str]]:
    """Where the parameters are that a linear layer computes with, its own or larger ones.

    Args:
        layer: the layer.

    Returns:
        The dict of parameters and the name in it, of the weight and of the bias; there need not be
        one under a name.
    """
    if isinstance(layer, PartOfLinear):
        return layer.held
    return [(layer._parameters, name) for name in ("weight", "bias")]


def is_adapted(module: object) -> bool:
    """Whether PEFT has wrapped a layer, to adapt it or to train a copy (``modules_to_save``)."""
    module = getattr(module, "whole", module)
    return hasattr(module, "base_layer") or hasattr(module, "original_module")
