"""What a forward pass says of its tokens: their absolute positions, and which are padding.

A block sees hidden states only. The module above it that takes ``input_ids`` (its stack) is told
the attention mask, the position ids and the cache; a `TokenContext` listens there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from steppe.blocks.experts import Rows, current_rows
from steppe.blocks.find import MLPBlock, decoders, forward_parameters
from steppe.errors import TokenPositionError
from steppe.per_thread import PerThread
from steppe.surgery.journal import Journal

IGNORED_LABEL = -100  # what Hugging Face's losses skip
# Of stacks that pad their input on the right: Longformer and LED, BigBird, Reformer.
_PADDING_METHODS = ("_pad_to_window_size", "_pad_to_block_size", "_pad_to_mult_of_chunk_length")


class Tokens(NamedTuple):
    """What a call says of its tokens.

    Attributes:
        shape: ``(B, T)``, or None where nothing tells it.
        mask: bool ``[B, T]``, False for padding, or None where all tokens count.
        positions: int64 ``[B or 1, T]``, absolute, or None if they are ``offset + 0 … T − 1``.
        offset: number of tokens in the cache.
    """

    shape: tuple[int, int] | None = None
    mask: Tensor | None = None
    positions: Tensor | None = None
    offset: int | Tensor = 0


@dataclass
class Generation:
    """A call of ``generate``.

    Attributes:
        ended: bool ``[B]``, the rows that it goes on feeding though they have ended.
    """

    ended: Tensor | None = None


# The innermost one that each thread is in, of a model that is watched.
current_generation: PerThread[Generation | None] = PerThread(None)


class Layout(NamedTuple):
    """How a block's tokens are to be put together by samples.

    Attributes:
        samples: S.
        tokens_first: of three dimensions the first is that of the tokens.
        longest: of an expert, how many tokens it has of the sample that it has most of; else 0.
        slots: of an expert, int64 ``[n]``, where each of its tokens goes in ``[S · longest]``.
        mask: bool ``[S, T]``, False for what does not count; None if all tokens do. Of an expert T
            is `longest`.
    """

    samples: int
    tokens_first: bool
    longest: int = 0
    slots: Tensor | None = None
    mask: Tensor | None = None


class TokenContext:
    """A forward pre-hook on a stack that keeps what the current call says of its tokens.

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
        self._told = PerThread(Tokens(), inherits=True)
        self.decoder_labels: PerThread[Tensor | None] = PerThread(None)

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Read the arguments of the stack's forward."""
        told = arguments_by_name(self._parameters, args, kwargs)
        ids, embeds = told.get("input_ids"), told.get("inputs_embeds")
        shape: tuple[int, int] | None
        if ids is not None:
            shape = (ids.numel() // ids.shape[-1], ids.shape[-1])
        else:
            shape = None if embeds is None else (embeds.shape[0], embeds.shape[1])
        cache = told.get("past_key_values")
        offset = 0 if cache is None else cache.get_seq_length()
        # A static cache hands out its own counter and moves it on during the call.
        offset = offset.clone() if isinstance(offset, Tensor) else offset
        positions = None
        mask = _counted_tokens(told)
        if shape is not None:
            tokens = shape[1]
            position_ids = told.get("position_ids")
            if isinstance(position_ids, Tensor) and position_ids.dim() == 2:
                # OPT numbers left padding -1; padding may have any position.
                positions = position_ids.clamp(min=0)
            elif mask is not None:
                positions = (mask.long().cumsum(-1) - 1).clamp(min=0)[:, -tokens:]
            labels = self.decoder_labels.get()
            if mask is None and labels is not None and labels.shape == shape:  # one a token
                mask = labels != IGNORED_LABEL
            # With a cache the mask covers the cached tokens too.
            mask = None if mask is None else mask[:, -tokens:]
            generation = current_generation.get()
            ended = None if generation is None else generation.ended
            if ended is not None and len(ended) == shape[0]:
                goes_on = ~ended.unsqueeze(1)
                mask = goes_on.expand(shape) if mask is None else mask & goes_on
        self._told.enter(Tokens(shape, mask, positions, offset))
        self.decoder_labels.set(None)

    def leave(self, *arguments: Any) -> None:
        """Forward hook on the stack, called also where its forward has raised."""
        self._told.leave()

    @property
    def shape(self) -> tuple[int, int] | None:
        """As of `Tokens`."""
        return self._told.get().shape

    @property
    def mask(self) -> Tensor | None:
        """As of `Tokens`."""
        return self._told.get().mask

    @property
    def positions(self) -> Tensor | None:
        """As of `Tokens`."""
        return self._told.get().positions

    def positions_of(self, tokens: int) -> Tensor | None:
        """The positions of a number of tokens, those that the stack has appended at 0."""
        positions = self.positions
        if positions is None or not self._pads or positions.shape[1] >= tokens:
            return positions
        return F.pad(positions, (0, tokens - positions.shape[1]))

    @property
    def offset(self) -> int | Tensor:
        """As of `Tokens`."""
        return self._told.get().offset

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
            S. Of flattened tokens that nothing tells apart each is a sample; where they could have
            been told apart but were not, all are one.
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


class DecoderLabels:
    """A forward pre-hook on an encoder-decoder model: hands its labels to the decoder's context.

    Trainers pass no decoder mask; the decoder's padding is where the labels are ignored.
    """

    def __init__(self, parameters: Sequence[str], context: TokenContext) -> None:
        self._parameters = tuple(parameters)
        self._context = context

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Read the labels."""
        told = arguments_by_name(self._parameters, args, kwargs)
        self._context.decoder_labels.set(told.get("labels"))


PreHook = TokenContext | DecoderLabels


def listen(
    model: nn.Module, blocks: Sequence[MLPBlock]
) -> tuple[list[TokenContext], list[tuple[nn.Module, PreHook]]]:
    """Contexts for some blocks, and the hooks that keep them current.

    Args:
        model: the model that the blocks are of.
        blocks: the blocks.

    Returns:
        One context per block (shared by the blocks of a stack), and the hooks for `attach`.
    """
    by_stack: dict[int, TokenContext] = {}
    contexts: list[TokenContext] = []
    hooks: list[tuple[nn.Module, PreHook]] = []
    owners = {part: owner for owner, decoder in decoders(model) for part in decoder}
    for block in blocks:
        if block.stack is None:
            contexts.append(TokenContext(()))
            continue
        if id(block.stack) not in by_stack:
            pads = any(hasattr(block.stack, name) for name in _PADDING_METHODS)
            context = TokenContext(forward_parameters(block.stack), pads)
            by_stack[id(block.stack)] = context
            hooks.append((block.stack, context))
            owner = owners.get(block.stack)
            if owner is not None and owner is not block.stack:
                hooks.append((owner, DecoderLabels(forward_parameters(owner), context)))
        contexts.append(by_stack[id(block.stack)])
    return contexts, hooks


def attach(journal: Journal, hooks: Sequence[tuple[nn.Module, PreHook]]) -> None:
    """Register the hooks of `listen`."""
    for module, hook in hooks:
        journal.add_forward_pre_hook(module, hook, with_kwargs=True)
        if isinstance(hook, TokenContext):
            journal.add_forward_hook(module, hook.leave, always=True)


def arguments_by_name(
    parameters: Sequence[str], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> dict[str, Any]:
    """The arguments of a call by the names of the parameters.

    Args:
        parameters: in order, as far as they have names; the rest of `args` gets none.
        args: the positional arguments.
        kwargs: the others.

    Example:
        >>> arguments_by_name(("x", "mask", "scale"), (1, 2), {"scale": 3})
        {'x': 1, 'mask': 2, 'scale': 3}
    """
    # Not zip(strict=False): torch.compile of torch 2.8 refuses lengths that differ.
    named = min(len(parameters), len(args))
    return {**dict(zip(parameters[:named], args[:named], strict=True)), **kwargs}


def _counted_tokens(told: dict[str, Any]) -> Tensor | None:
    """Bool ``[B, S]``, True where a token counts, or None where nothing is said."""
    mask = told.get("attention_mask")
    if isinstance(mask, Tensor) and mask.dim() == 2:
        return mask != 0
    padding = told.get("src_key_padding_mask")
    if isinstance(padding, Tensor):
        # bool: True is padding. float: added to the attention scores, -inf is padding.
        counted = ~padding if padding.dtype == torch.bool else padding == 0
        return counted if counted.dim() == 2 else counted.unsqueeze(0)
    return None
