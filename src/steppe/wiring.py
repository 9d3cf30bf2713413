"""Whether what flows between a block's modules is what its pattern says: no name is believed.

A norm between the activation and `down` that a pattern does not name, a functional dropout, a
user's own pattern that is wrong: computed from its input alone the block would be another function.
"""

from __future__ import annotations

import torch
from torch import Tensor

from steppe.blocks import MLPBlock


class Witness:
    """Looks at what a block's own modules hand on to each other, in one call.

    Args:
        block: the block.

    Attributes:
        mismatch: what is not as the pattern says, a clause; empty if all is.
    """

    def __init__(self, block: MLPBlock) -> None:
        self.mismatch = ""
        self._is_gated = block.gate is not None
        self._pattern = f"the pattern {block.family!r}"
        self._p: _Seen | None = None
        self._a: _Seen | None = None
        self._up: Tensor | None = None
        self._dropped: _Seen | None = None

    def see_activated(self, p: Tensor) -> None:
        """The output of the layer that the activation reads."""
        self._p = _Seen(p)

    def see_up(self, up: Tensor) -> None:
        """The output of a gated block's `up`."""
        self._up = up

    def see_activation_input(self, x: Tensor) -> None:
        """The input of the activation."""
        if self._p is None or not self._p.is_same(x):
            self._tell("the activation does not get the output of the layer before it")

    def see_activation(self, a: Tensor) -> None:
        """The output of the activation."""
        self._a = _Seen(a)

    def see_dropout_input(self, x: Tensor) -> None:
        """The input of the dropout."""
        if not self._is_hidden(x):
            self._tell("something stands between the activation and the dropout")

    def see_dropout(self, hidden: Tensor) -> None:
        """The output of the dropout."""
        self._dropped = _Seen(hidden)

    def see_down(self, x: Tensor) -> None:
        """The input of `down`."""
        is_same = self._is_hidden(x) if self._dropped is None else self._dropped.is_same(x)
        if not is_same:
            self._tell("something stands between the activation and the last layer")

    def _is_hidden(self, x: Tensor) -> bool:
        """Whether a tensor is the activation's output, in a gated block times `up`'s."""
        if self._a is None:
            return False
        if not self._is_gated:
            return self._a.is_same(x)
        return self._up is not None and _Seen(self._a.tensor * self._up).is_same(x)

    def _tell(self, what: str) -> None:
        self.mismatch = self.mismatch or f"{what} that {self._pattern} does not name"


class _Seen:
    """A tensor as it was when it was seen."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor
        self._version = _version(tensor)

    def is_same(self, other: Tensor) -> bool:
        """Whether another tensor has the same values, in any shape, and gradients go through it."""
        tensor = self.tensor
        if other is tensor:
            return self._version == _version(other)
        if other.numel() != tensor.numel() or other.requires_grad != tensor.requires_grad:
            return False
        with torch.no_grad():
            one, another = tensor.reshape(-1), other.reshape(-1)
            return bool(((one == another) | (one.isnan() & another.isnan())).all())


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version
