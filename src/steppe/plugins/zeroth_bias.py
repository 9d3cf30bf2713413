"""Zeroth bias: a learnable bias per token position, added to the input of the MLP."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from steppe.blocks.find import MLPBlock, Slot, max_tokens_of
from steppe.blocks.linear import is_adapted, linear_weight
from steppe.blocks.norms import scale_of
from steppe.errors import TokenPositionError, UnfitBlockError
from steppe.plugins.base import Constraint, Plugin
from steppe.sharding import is_sharded, local_rows
from steppe.surgery.journal import Journal
from steppe.tokens import TokenContext, attach, listen

PARAMETER_NAME = "zeroth_bias"


@dataclass(frozen=True)
class ZerothBias(Plugin):
    """Different biases for different input tokens of the MLP: more gradient noise, flatter minima.

    A parameter ``zeroth_bias [max_tokens, d_model]``, zero at start, stands beside the weight of
    `up` and is added to the input of `up` and `gate` at the token's absolute position; nothing else
    sees it. After every optimizer step it is clipped to ± `limit` · |norm scale|. The norm is that
    before the MLP; the scale of Gemma's norms is 1 + weight, and that of a norm without weight 1.

    Args:
        max_tokens: longest sequence, in tokens; by default the limit in the model's config.
        limit: bound of the bias relative to the scale of the block's norm, > 0.

    Raises:
        ValueError: a setting is not positive.

    Source: arXiv 2605.25612, zeroth biases. (The authors' scripts add it to the block's output; the
    paper, and steppe, to the input.)
    """

    key: ClassVar[str] = "zeroth_bias"
    uses_norm: ClassVar[bool] = True

    max_tokens: int | None = None
    limit: float = 0.1

    def __post_init__(self) -> None:
        """Refuse settings that mean nothing."""
        tokens = self.max_tokens
        if tokens is not None and (not isinstance(tokens, int) or tokens < 1):
            raise ValueError(f"ZerothBias: expected max_tokens ≥ 1, a whole number, got {tokens}")
        if self.limit <= 0:
            raise ValueError(f"ZerothBias: expected limit > 0, got {self.limit}")

    @property
    def longest_sequence(self) -> int | None:
        """The number of positions; None while it is not decided."""
        return self.max_tokens

    def resolve(self, model: nn.Module, blocks: Sequence[MLPBlock]) -> ZerothBias:
        """The same with `max_tokens` decided."""
        if self.max_tokens is not None:
            return self
        max_tokens = max_tokens_of(model)
        if max_tokens is None:
            raise UnfitBlockError(
                f"ZerothBias: {type(model).__name__} does not say how long its sequences can be."
                " Say it: ZerothBias(max_tokens=512)"
            )
        return replace(self, max_tokens=max_tokens)

    def check(self, block: MLPBlock) -> None:
        """Refuse an expert, a block without a norm scale, or one that is sharded already."""
        if block.is_routed:
            raise UnfitBlockError(
                f"{block.name}: is an expert; a zeroth bias for each position and each expert would"
                " be larger than the experts. Leave them out: sparsify_(..., where=lambda block:"
                " not block.is_routed)"
            )
        if block.norm is None or scale_of(block.norm, block.d_model) is None:
            raise UnfitBlockError(
                f"{block.name}: ZerothBias is bounded by the scale of the block's norm, and"
                f" {_kind(block.norm)} has none. Leave the block out: sparsify_(..., where=...)"
            )
        if is_adapted(block.up) or is_adapted(block.gate):
            raise UnfitBlockError(
                f"{block.name}: PEFT adapts the first layer of the MLP, and merging would throw the"
                " zeroth bias away. Name the attention alone in target_modules, or leave the block"
                " out: sparsify_(..., where=...)"
            )
        if is_sharded(linear_weight(block.up)):
            raise UnfitBlockError(
                f"{block.name}: the model is sharded already; call sparsify_ before fully_shard"
            )
        if hasattr(block.up, PARAMETER_NAME):
            raise UnfitBlockError(
                f"{block.name}: {_kind(block.up)} has an attribute {PARAMETER_NAME!r} of its own"
            )

    def apply(
        self, model: nn.Module, blocks: Sequence[MLPBlock], journal: Journal
    ) -> list[Constraint]:
        """Add the parameter and the hooks that add it to the input."""
        assert self.max_tokens is not None
        contexts, hooks = listen(model, blocks)
        attach(journal, hooks)
        constraints: list[Constraint] = []
        for block, context in zip(blocks, contexts, strict=True):
            weight = linear_weight(block.up)
            bias = nn.Parameter(
                torch.zeros(
                    self.max_tokens, block.d_model, dtype=weight.dtype, device=weight.device
                )
            )
            journal.add_parameter(Slot(block.up, PARAMETER_NAME), bias)
            add = _AddZerothBias(block, context)
            journal.add_forward_pre_hook(block.up, add)
            if block.gate is not None:
                journal.add_forward_pre_hook(block.gate, add)
            constraints.append(_Clipped(block, self.limit))
        return constraints

    def added_lengths(self, model: nn.Module) -> dict[str, int]:
        """The number of positions."""
        length = self.resolve(model, ()).max_tokens
        assert length is not None
        return {PARAMETER_NAME: length}


class _AddZerothBias:
    """The forward pre-hook on `up` and `gate`."""

    def __init__(self, block: MLPBlock, context: TokenContext) -> None:
        self._block = block
        self._context = context

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """Add to x the bias at each position; x is [B, T, D], [T, B, D] or [B·T, D]."""
        x, *rest = args
        if x.dim() > 3:
            raise UnfitBlockError(
                f"{self._block.name}: ZerothBias is for the positions of a sequence, and the block"
                f" gets {list(x.shape)}. Take it off with restore_, and leave the block out:"
                " sparsify_(..., where=...)"
            )
        bias: Tensor = getattr(self._block.up, PARAMETER_NAME)
        tokens = self._context.tokens_per_sequence(x, self._block)
        by_token = self._at_positions(bias.to(x.dtype), tokens)  # [T, D] or [B, T, D]
        if x.dim() == 3:
            if self._block.token_dim == 0:
                by_token = by_token.unsqueeze(1) if by_token.dim() == 2 else by_token.mT
            return (x + by_token, *rest)
        return ((x.unflatten(0, (-1, tokens)) + by_token).flatten(0, 1), *rest)

    def _at_positions(self, bias: Tensor, tokens: int) -> Tensor:
        """Rows of the table for the current call."""
        positions, offset = self._context.positions_of(tokens), self._context.offset
        if isinstance(offset, Tensor):
            if positions is None:
                positions = (torch.arange(tokens, device=bias.device) + offset).unsqueeze(0)
        elif offset + tokens > bias.shape[0]:
            raise self._too_long(offset + tokens, bias.shape[0])
        if positions is None:
            assert isinstance(offset, int)
            return bias[offset : offset + tokens]
        # Reading the largest position on an accelerator would wait for it; the lookup fails there.
        if positions.device.type == "cpu" and not torch.compiler.is_compiling():
            largest = int(positions.max())
            if largest >= bias.shape[0]:
                raise self._too_long(largest + 1, bias.shape[0])
        return F.embedding(positions, bias)

    def _too_long(self, length: int, max_tokens: int) -> TokenPositionError:
        return TokenPositionError(
            f"{self._block.name}: a sequence of {length} tokens, but the zeroth bias has"
            f" {max_tokens} positions. Truncate the input, or train with"
            f" ZerothBias(max_tokens={length})."
        )


class _Clipped(Constraint):
    """|bias| ≤ limit · |norm scale|, per column."""

    reads_norm = True

    def __init__(self, block: MLPBlock, limit: float) -> None:
        assert block.norm is not None
        scale = scale_of(block.norm, block.d_model)
        assert scale is not None
        self._block = block
        self._limit = limit
        self._scale = scale

    @torch.no_grad()
    def project(self) -> None:
        """Clip in place."""
        rows = local_rows(getattr(self._block.up, PARAMETER_NAME))
        bound = self._limit * self._scale.value(rows).abs()
        rows.clamp_(min=-bound, max=bound)


def _kind(module: object) -> str:
    return type(module).__name__
