"""`TokenContext`: the tokens of the call that a stack is in, for the blocks below it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from steppe.blocks.block import MLPBlock
from steppe.blocks.routed import Rows, current_rows
from steppe.errors import TokenPositionError
from steppe.per_thread import PerThread
from steppe.tokens.arguments import Tokens, arguments_by_name, tokens_of
from steppe.tokens.layout import Layout


class TokenContext:
    """A forward pre-hook on a stack that keeps the tokens of the current call.

    Each thread has its own current call, and a call inside another one does not disturb it. It is
    kept after the call, since gradient checkpointing runs the blocks again in the backward pass.
    With two forward passes before one checkpointed backward, both must have equal masks.

    Args:
        parameters: of the stack's forward.
        pads: whether the stack may append padding that its caller does not see.

    Attributes:
        decoder_labels: of the call of an encoder-decoder model that this thread is in.
    """

    def __init__(self, parameters: Sequence[str], pads: bool = False) -> None:
        self._parameters = tuple(parameters)
        self._pads = pads
        self._current = PerThread(Tokens(), inherits=True)
        self.decoder_labels: PerThread[Tensor | None] = PerThread(None)

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Read the arguments of the stack's forward."""
        arguments = arguments_by_name(self._parameters, args, kwargs)
        self._current.enter(tokens_of(arguments, self.decoder_labels.get()))
        self.decoder_labels.set(None)

    def leave(self, *arguments: Any) -> None:
        """Forward hook on the stack, called also where its forward has raised."""
        self._current.leave()

    @property
    def shape(self) -> tuple[int, int] | None:
        """As of `Tokens`."""
        return self._current.get().shape

    @property
    def mask(self) -> Tensor | None:
        """As of `Tokens`."""
        return self._current.get().mask

    @property
    def positions(self) -> Tensor | None:
        """As of `Tokens`."""
        return self._current.get().positions

    def positions_of(self, tokens: int) -> Tensor | None:
        """The positions of a number of tokens, those that the stack has appended at 0."""
        positions = self.positions
        if positions is None or not self._pads or positions.shape[1] >= tokens:
            return positions
        return F.pad(positions, (0, tokens - positions.shape[1]))

    @property
    def offset(self) -> int | Tensor:
        """As of `Tokens`."""
        return self._current.get().offset

    def tokens_per_sequence(self, x: Tensor, block: MLPBlock) -> int:
        """T of a block's input.

        Args:
            x: ``[B, T, D]``, ``[T, B, D]``, or flattened ``[B·T, D]``.
            block: the block that x is the input of.

        Raises:
            TokenPositionError: x is not the stack's tokens, so their positions are unknown.
        """
        if x.dim() == 3:
            tokens = x.shape[block.token_dim]
        elif block.stack is not None and "input_ids" in self._parameters:
            if self.shape is None:
                raise TokenPositionError(
                    f"{block.name}: got flattened tokens {list(x.shape)} and nothing says how many"
                    f" belong to one sequence. Call {type(block.stack).__name__} (or the model),"
                    " not the layer by itself."
                )
            tokens = self.shape[1]
        else:
            tokens = x.shape[0]
        if (
            self.shape is not None
            and self.shape[0] * self.shape[1] != x.numel() // x.shape[-1]
            and not self._is_padded(x)
        ):
            raise TokenPositionError(
                f"{block.name}: the model was called with {self.shape[0]} × {self.shape[1]} tokens,"
                f" the MLP got {list(x.shape)}. Chunked feed-forward layers are not supported: set"
                " config.chunk_size_feed_forward = 0."
            )
        return tokens

    def samples(self, hidden: Tensor, block: MLPBlock) -> int:
        """Number of samples in a tensor of a block.

        Args:
            hidden: an input, output or hidden tensor of the block, ``[S, T, *]``, ``[T, S, *]``,
                ``[S, H, W, *]``, or ``[S·T, *]``.
            block: the block.

        Returns:
            S. For flattened tokens of an unknown shape: their number in a tower without a stack,
            else 1.
        """
        if hidden.dim() >= 3:
            return hidden.shape[1 - block.token_dim]
        if self.shape is not None:
            return self.shape[0]
        return hidden.shape[0] if block.stack is None else 1

    def mask_by_sample(self, hidden: Tensor, block: MLPBlock) -> Tensor | None:
        """Which tokens of a block count.

        Args:
            hidden: as in `samples`.
            block: the block.

        Returns:
            bool ``[S, T]``, or None if all count.

        Raises:
            TokenPositionError: the mask has another number of tokens than the tensor.
        """
        mask = self.mask
        if self._is_padded(hidden):
            assert self.shape is not None
            mask = hidden.new_ones(self.shape, dtype=torch.bool) if mask is None else mask
            return F.pad(mask, (0, hidden.shape[1] - self.shape[1]), value=False)
        if mask is not None and mask.numel() * hidden.shape[-1] != hidden.numel():
            raise TokenPositionError(
                f"{block.name}: the padding mask has {list(mask.shape)} tokens, the hidden"
                f" tensor is {list(hidden.shape)}"
            )
        return mask

    def layout(self, hidden: Tensor, block: MLPBlock) -> Layout:
        """How to put the tokens of a block together by samples.

        Args:
            hidden: as in `samples`; of an expert ``[n, *]``, the tokens that are routed to it.
            block: the block.

        Raises:
            TokenPositionError: the tokens are not those that the model was called with.
        """
        tokens_first = block.token_dim == 0
        if not block.is_routed:
            mask = self.mask_by_sample(hidden, block)
            return Layout(self.samples(hidden, block), tokens_first, mask=mask)
        rows = self._rows(hidden, block)
        tokens = rows.tokens
        samples = self.shape[0] if self.shape else (tokens if block.stack is None else 1)
        slots, longest = rows.padded(samples)
        mask = slots.new_zeros(samples * longest, dtype=torch.bool)
        counted = self._counted_rows(rows)
        mask[slots] = True if counted is None else counted.to(mask.device)
        return Layout(samples, False, longest, slots, mask.view(samples, longest))

    def counted(self, hidden: Tensor, block: MLPBlock) -> Tensor | None:
        """Which tokens of a block count, one by one.

        Args:
            hidden: as in `layout`.
            block: the block.

        Returns:
            bool, the shape of `hidden` without its last dimension, or None if all count.

        Raises:
            TokenPositionError: as in `layout`.
        """
        if block.is_routed:
            counted = self._counted_rows(self._rows(hidden, block))
            return None if counted is None else counted.to(hidden.device)
        mask = self.mask_by_sample(hidden, block)
        if mask is None:
            return None
        tokens_first = block.token_dim == 0 and hidden.dim() == 3
        return (mask.T if tokens_first else mask).reshape(hidden.shape[:-1]).to(hidden.device)

    def _rows(self, hidden: Tensor, block: MLPBlock) -> Rows:
        """The tokens of an expert in the current call."""
        rows = current_rows.get()
        if rows is None or len(rows.index) * hidden.shape[-1] != hidden.numel():
            router = type(block.routed_in).__name__
            raise TokenPositionError(
                f"{block.name}: got {list(hidden.shape)}, and which of the tokens of {router} these"
                " are is unknown: they are not as they were. Call the model, not an expert by"
                " itself; if it changes tokens before it routes them (jitter), switch that off or"
                " leave the experts out: where=lambda block: not block.is_routed"
            )
        if self.shape is not None and self.shape[0] * self.shape[1] != rows.tokens:
            raise TokenPositionError(
                f"{block.name}: the model was called with {self.shape[0]} × {self.shape[1]} tokens,"
                f" its experts got {rows.tokens}. Leave them out: where=lambda block: not"
                " block.is_routed"
            )
        return rows

    def _counted_rows(self, rows: Rows) -> Tensor | None:
        """Which of an expert's tokens count, bool ``[n]``, or None if all do."""
        mask = self.mask
        return None if mask is None else mask.reshape(-1)[rows.index.to(mask.device)]

    def _is_padded(self, tensor: Tensor) -> bool:
        """Whether the stack has appended tokens to those that it was called with."""
        shape = self.shape
        return (
            self._pads
            and shape is not None
            and tensor.dim() == 3
            and tensor.shape[0] == shape[0]
            and tensor.shape[1] > shape[1]
        )
