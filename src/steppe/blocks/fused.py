"""Gate and up in one weight, as two layers of a block.

A half is a linear layer whose weight is a part of the fused one. While a verb needs them, the
halves hang below the fused layer, and a call of that calls both: hooks and plug-ins act on them as
on any layer. Nothing is copied: the parameter, its name and its gradient stay where they are.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from steppe.blocks.beside import OneBeside
from steppe.blocks.linear import PartOfLinear, is_transposed, linear_shape, linear_weight
from steppe.per_thread import PerThread


class Half(PartOfLinear):
    """One of the two layers of a fused one.

    Args:
        halves: both halves.
        number: 0 for the first rows of the weight, 1 for the others.
        shape: D and F.
    """

    def __init__(self, halves: Halves, number: int, shape: tuple[int, int]) -> None:
        super().__init__(shape)
        self.halves = halves
        self.number = number

    @property
    def whole(self) -> nn.Module:
        """The fused layer."""
        return self.halves.layer

    @property
    def weight(self) -> Tensor:
        """W, ``[F, D]``, a view of the fused weight."""
        weight = linear_weight(self.whole)
        return self._part(weight if self.halves.is_transposed else weight.T, 1).T

    @property
    def bias(self) -> Tensor | None:
        """B, ``[F]``, a view of the fused bias, or None."""
        layer: Any = getattr(self.whole, "base_layer", self.whole)
        return None if layer.bias is None else self._part(layer.bias, 0)

    @property
    def held(self) -> list[tuple[dict[str, Any], str]]:
        """Where the fused weight and bias are."""
        parameters: dict[str, Any] = self.whole._parameters
        return [(parameters, "weight"), (parameters, "bias")]

    def forward(self, x: Tensor) -> Tensor:
        """``[*, F]`` of ``[*, D]``: a part of the output of the fused layer for the same input."""
        call = self.halves.call.get()
        if call is None or x is not call.x:
            return super().forward(x)
        if call.output is None:
            call.output = call.own(x)
        part = call.parts[self.number] = self._part(call.output, -1)
        return part

    def extra_repr(self) -> str:
        """Its widths, and which half it is."""
        return f"{self.in_features}, {self.out_features}, half={self.number}"

    def _part(self, tensor: Tensor, dim: int) -> Tensor:
        return tensor.narrow(dim, self.number * self.out_features, self.out_features)


class _Call:
    """A call of a fused layer.

    Args:
        x: its input.
        own: the layer's own forward.
    """

    def __init__(self, x: Tensor, own: Callable[[Tensor], Tensor]) -> None:
        self.x = x
        self.own = own
        self.output: Tensor | None = None  # of the layer itself
        self.parts: list[Tensor | None] = [None, None]


class Halves:
    """The two layers of a fused one, as `halves_of` finds them.

    Args:
        layer: the fused one, ``[D → 2F]``.
        shape: D and F.

    Attributes:
        layer: the fused layer.
        is_transposed: whether its weight is ``[in, out]``.
        both: the layers, that of the first rows first.
        call: that the layer is in.
        forward: runs them, in place of the layer's own forward.
    """

    def __init__(self, layer: nn.Module, shape: tuple[int, int]) -> None:
        self.layer = layer
        self.is_transposed = is_transposed(layer)
        self.both = Half(self, 0, shape), Half(self, 1, shape)
        self.call: PerThread[_Call | None] = PerThread(None)
        self.forward = HalvesForward(self)

    def run(self, x: Tensor, own: Callable[[Tensor], Tensor]) -> Tensor:
        """The output of the fused layer, by its halves.

        Args:
            x: ``[*, D]``.
            own: the layer's own forward.

        Returns:
            ``[*, 2F]``: the layer's own output, where nothing has changed a half of it.
        """
        if torch.compiler.is_compiling():
            return _joined(*(half(x) for half in self.both))
        outside, call = self.call.get(), _Call(x, own)
        self.call.set(call)
        try:
            first, second = (half(x) for half in self.both)
        finally:
            self.call.set(outside)
        if call.output is not None and first is call.parts[0] and second is call.parts[1]:
            return call.output
        return _joined(first, second)


def _joined(first: Tensor, second: Tensor) -> Tensor:
    """Both outputs in one; where a call is led around the halves one of them is a number."""
    if first.dim() != second.dim():
        like = first if first.dim() else second
        first, second = first.expand_as(like), second.expand_as(like)
    return torch.cat([first, second], -1)


class HalvesForward:
    """In place of the forward of a fused layer: calls its halves.

    Args:
        halves: of the layer.
    """

    def __init__(self, halves: Halves) -> None:
        self.halves = halves

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        """As before."""
        layer: Any = self.halves.layer
        own = partial(type(layer).forward, layer)
        if kwargs or len(args) != 1:
            output: Tensor = own(*args, **kwargs)
            return output
        return self.halves.run(args[0], own)


_known: OneBeside[Halves] = OneBeside()


def halves_of(layer: nn.Module) -> Halves | None:
    """The halves of a linear layer whose output has an even width, or None.

    They are the same objects for as long as anybody has one.

    Args:
        layer: any module.

    Example:
        >>> gate, up = halves_of(nn.Linear(8, 32)).both
        >>> gate.weight.shape
        torch.Size([16, 8])
    """
    forward = layer.__dict__.get("forward")
    if isinstance(forward, HalvesForward):
        return forward.halves
    shape = linear_shape(layer)
    if shape is None or shape[1] % 2:
        return None
    halved = shape[0], shape[1] // 2
    return _known.get(layer, lambda: Halves(layer, halved))
