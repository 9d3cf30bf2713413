"""`BlockPattern`: where the parts of an MLP block hang below the module that owns them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class BlockPattern:
    """Where the parts of an MLP block hang, as dotted paths below the module that owns them.

    Attributes:
        family: the name that errors and listings show.
        up: path of the first linear layer (for gated blocks, of the one that is not activated).
        act: path of the activation, a module or a plain function; empty where the forward of the
            MLP calls a function, which steppe then finds by evaluating that forward.
        down: path of the second linear layer.
        norm: path of the norm whose output the block reads, or None.
        gate: path of the activated linear layer of a gated block, or None.
        gate_up: path of a linear layer that is gate and up in one, in place of both; or None.
        gate_first: whether the gate is its first half.
        dropout: path of the dropout between activation and second layer, a module or the number
            that is handed to a function, or None.
        norm_is_shared: others (the residual stream, attention) read the norm's output too.
        when: further condition on the owner, for families that differ by a flag only.
        sequence_first: true of an owner that has tokens in dimension 0 of its input, not 1.
        act_flags: attributes of the owner that describe `act`, each with the value that it must
            have after `act` has changed.
        is_expert: the owner is one of a list of modules to which tokens are routed.
    """

    family: str
    up: str = ""
    act: str = ""
    down: str = ""
    norm: str | None = None
    gate: str | None = None
    gate_up: str | None = None
    gate_first: bool = True
    dropout: str | None = None
    norm_is_shared: bool = False
    when: Callable[[Any], bool] | None = None
    sequence_first: Callable[[Any], bool] | None = None
    act_flags: tuple[tuple[str, object], ...] = ()
    is_expert: bool = False

    def __post_init__(self) -> None:
        """Refuse a pattern that names no block."""
        if self.gate_up and (self.gate or self.up):
            raise ValueError(
                f"BlockPattern {self.family!r}: gate_up={self.gate_up!r} is gate and up in one, so"
                " leave out gate and up"
            )
        if not self.down or not (self.gate_up or self.up):
            raise ValueError(
                f"BlockPattern {self.family!r}: expected the paths of two linear layers, e.g."
                " up='fc_in', act='act', down='fc_out', or gate_up='gate_up' in place of up"
            )

    def paths(self) -> list[str]:
        """Every path that must exist for the pattern to match."""
        return [
            path
            for path in (self.norm, self.gate, self.gate_up, self.up, self.act, self.down)
            if path
        ]
