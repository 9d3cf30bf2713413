"""`MLPBlock`: the parts of one MLP block, and where they hang."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import nn

from steppe.activations import Activation


@dataclass(frozen=True)
class Slot:
    """An attribute of a module that holds a part of a block and can be given another value."""

    module: nn.Module
    name: str

    @property
    def value(self) -> Any:
        """The part that the attribute holds now."""
        return getattr(self.module, self.name)


@dataclass(frozen=True)
class MLPBlock:
    """One MLP block: ``x → p = up(x) → a = act(p) → z = down(a)``, or ``a = act(gate(x)) ⊙ up(x)``.

    Attributes:
        name: dotted name of the owner below the unwrapped model (its class, if it is the model);
            unique, stable under wrapping.
        norm: the norm whose output the block reads, or None.
        up: first linear layer ``[d_model → d_hidden]``.
        gate: the activated linear layer of a gated block, or None.
        act: the activation when the block was found, a module or a plain function.
        down: second linear layer ``[d_hidden → d_model]``.
        dropout: the dropout between activation and `down`, or None.
        dropout_slot: the attribute with its probability, where a function drops; or None.
        d_model: width of the input.
        d_hidden: width of the hidden layer.
        family: name of the pattern that matched.
        norm_is_shared: whether others read the norm's output too.
        token_dim: dimension of the tokens in a batched input: 1 in ``[B, T, D]``, 0 in
            ``[T, B, D]``.
        act_slot: the attribute that holds `act`.
        act_flags: attributes of the owner to override when `act` changes.
        stack: the module whose arguments have the token positions and the padding, or None.
        routed_in: of an expert, the module that routes its tokens to it and others; else None.
    """

    name: str
    norm: nn.Module | None
    up: nn.Module
    gate: nn.Module | None
    act: Activation
    down: nn.Module
    dropout: nn.Module | None
    d_model: int
    d_hidden: int
    family: str = field(repr=False)
    norm_is_shared: bool = field(repr=False)
    token_dim: int = field(repr=False)
    act_slot: Slot = field(repr=False)
    act_flags: tuple[tuple[Slot, object], ...] = field(repr=False)
    stack: nn.Module | None = field(repr=False)
    routed_in: nn.Module | None = field(repr=False, default=None)
    dropout_slot: Slot | None = field(repr=False, default=None)

    @property
    def is_routed(self) -> bool:
        """Whether the block is an expert: its tokens are those that are routed to it."""
        return self.routed_in is not None

    @property
    def current_act(self) -> Activation:
        """The activation that the block has now; `act` is the one that it was found with."""
        act: Activation = self.act_slot.value
        return act

    @property
    def layers(self) -> list[nn.Module]:
        """The linear layers: `gate` if there is one, `up`, `down`."""
        return [layer for layer in (self.gate, self.up, self.down) if layer is not None]

    @property
    def activated(self) -> nn.Module:
        """The linear layer whose output the activation reads: `gate`, or `up` if there is none."""
        return self.up if self.gate is None else self.gate
