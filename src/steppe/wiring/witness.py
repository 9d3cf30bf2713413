"""Whether the tensors between a block's modules are those of its pattern: no name is believed.

A norm between the activation and `down` that a pattern does not name, a functional dropout, a
user's own pattern that is wrong: computed from its input alone the block would be another function.
"""

from __future__ import annotations

import torch
from torch import Tensor

from steppe.blocks.block import MLPBlock

_ROUNDING = 8  # of a dtype's steps: how far a factor may differ from entry to entry
_ROWS = 4096  # hashed at once


class Witness:
    """Looks at the tensors between a block's own modules, in one call.

    Args:
        block: the block.
        exactly: allow nothing between two modules, not even an operation that keeps the activations
            as sparse as they are: a cast, ``detach``, in training a dropout.

    Attributes:
        mismatch: a clause about the first tensor that is not as the pattern says; empty for none.
    """

    def __init__(self, block: MLPBlock, exactly: bool = True) -> None:
        self.mismatch = ""
        self._is_gated = block.gate is not None
        self._may_drop = not exactly and block.down.training
        self._exactly = exactly
        self._pattern = f"the pattern {block.family!r}"
        self._p: _Seen | None = None
        self._a: _Seen | None = None
        self._up: Tensor | None = None
        self._hidden: _Seen | None = None
        self._dropped: _Seen | None = None

    def see_input(self, x: Tensor, normed: Tensor | None, version: int) -> None:
        """The input of `up` or `gate`.

        Args:
            x: ``[*, D]``.
            normed: the last output of the block's norm ``[*, D]``; None if there was none.
            version: `version_of` it when it came.
        """
        if normed is None or version_of(normed) != version or not _are_rows_of(x, normed):
            self._tell("the first layer does not get the output of the norm")

    def see_activated(self, p: Tensor) -> None:
        """The output of the layer that the activation reads."""
        self._p = _Seen(p)

    def see_up(self, up: Tensor) -> None:
        """The output of a gated block's `up`."""
        self._up = up
        self._multiply()

    def see_activation_input(self, x: Tensor) -> None:
        """The input of the activation."""
        if self._p is None or not self._p.is_same(x, self._exactly):
            self._tell("the activation does not get the output of the layer before it")

    def see_activation(self, a: Tensor) -> None:
        """The output of the activation."""
        self._a = _Seen(a)
        self._multiply()

    def see_dropout_input(self, x: Tensor) -> None:
        """The input of the dropout."""
        if not self._is_hidden(x):
            self._tell("something stands between the activation and the dropout")

    def see_dropout(self, hidden: Tensor) -> None:
        """The output of the dropout."""
        self._dropped = _Seen(hidden)

    def see_down(self, x: Tensor) -> None:
        """The input of `down`."""
        dropped = self._dropped
        is_same = self._is_hidden(x) if dropped is None else dropped.is_same(x, self._exactly)
        if not is_same:
            self._tell("something stands between the activation and the last layer")

    def _multiply(self) -> None:
        """Have a gated block's product as soon as both factors are there."""
        if self._a is not None and self._up is not None:
            # Without a gradient: checkpointing counts the tensors that are saved for backward.
            self._hidden = _Seen(self._a.tensor.detach() * self._up.detach())
            self._hidden.requires_grad = self._a.requires_grad or self._up.requires_grad

    def _is_hidden(self, x: Tensor) -> bool:
        """Whether a tensor is the activation's output, in a gated block times `up`'s."""
        hidden = self._hidden if self._is_gated else self._a
        if hidden is None:
            return False
        return hidden.is_same(x, self._exactly) or (
            self._may_drop and _is_dropped(x.detach(), hidden.tensor.detach())
        )

    def _tell(self, mismatch: str) -> None:
        self.mismatch = self.mismatch or f"{mismatch} that {self._pattern} does not name"


class _Seen:
    """A tensor as it was when it was seen."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor
        self.requires_grad = tensor.requires_grad
        self._version = version_of(tensor)

    @torch.no_grad()
    def is_same(self, other: Tensor, exactly: bool) -> bool:
        """Whether another tensor has the same values, in any shape.

        Args:
            other: the other one.
            exactly: also in its own dtype, and gradients go through it.
        """
        tensor = self.tensor
        if self._version != version_of(tensor):
            return False
        if other is tensor:
            return True
        if other.numel() != tensor.numel():
            return False
        if exactly and other.requires_grad != self.requires_grad:
            return False
        if not exactly:
            tensor = tensor.to(other.dtype)
        one, another = tensor.reshape(-1), other.reshape(-1)
        return bool(((one == another) | (one.isnan() & another.isnan())).all())


def version_of(tensor: Tensor) -> int:
    """How often a tensor was written to; 0 where nobody counts."""
    return 0 if tensor.is_inference() else tensor._version


@torch.no_grad()
def _is_dropped(x: Tensor, hidden: Tensor) -> bool:
    """Whether a tensor is another one after a dropout: zero, or all multiplied by one factor."""
    if x.shape != hidden.shape:
        return False
    kept, active = x != 0, hidden != 0
    if bool((kept & ~active).any()) or not bool(kept.any()) or torch.equal(kept, active):
        return False
    factors = x[kept].double() / hidden[kept].double()
    least, most = factors.min(), factors.max()
    rounding = _ROUNDING * torch.finfo(x.dtype).eps
    return bool((least > 1) & (most <= least * (1 + rounding)))


@torch.no_grad()
def _are_rows_of(x: Tensor, other: Tensor) -> bool:
    """Whether every vector of a tensor is one of another, in any order: chunks, windows, experts.

    Args:
        x: ``[*, D]``.
        other: ``[*, D]``, in any dtype.
    """
    if x is other:
        return True
    if x.shape[-1] != other.shape[-1]:
        return False
    return bool(torch.isin(_hashes(x), _hashes(other.to(x.dtype))).all())


def _hashes(tensor: Tensor) -> Tensor:
    """Int64 ``[N]``: a number for each vector of ``[*, D]``, by its bits."""
    rows = tensor.reshape(-1, tensor.shape[-1])
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}[rows.dtype.itemsize]
    generator = torch.Generator().manual_seed(0)
    factors = torch.randint(2**62, (rows.shape[1],), generator=generator) * 2 + 1
    factors = factors.to(rows.device)
    # Plus zero: −0 and 0 are one number and other bits.
    parts = [(part + 0.0).view(integers) * factors for part in rows.split(_ROWS)]
    return torch.cat([part.sum(-1) for part in parts])
