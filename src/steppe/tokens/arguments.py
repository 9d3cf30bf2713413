"""The arguments of a model's forward, and the tokens that they describe."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from steppe.tokens.generation import current_generation

IGNORED_LABEL = -100  # which Hugging Face's losses skip


class Tokens(NamedTuple):
    """The tokens of one call.

    Attributes:
        shape: ``(B, T)``, or None where it is unknown.
        mask: bool ``[B, T]``, False for padding, or None where all tokens count.
        positions: int64 ``[B or 1, T]``, absolute, or None if they are ``offset + 0 … T − 1``.
        offset: number of tokens in the cache.
    """

    shape: tuple[int, int] | None = None
    mask: Tensor | None = None
    positions: Tensor | None = None
    offset: int | Tensor = 0


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


def tokens_of(arguments: dict[str, Any], decoder_labels: Tensor | None) -> Tokens:
    """The tokens that the arguments of a stack's forward describe.

    Args:
        arguments: by name.
        decoder_labels: of the encoder-decoder model around the stack, or None.
    """
    ids, embeds = arguments.get("input_ids"), arguments.get("inputs_embeds")
    shape: tuple[int, int] | None
    if ids is not None:
        shape = (ids.numel() // ids.shape[-1], ids.shape[-1])
    else:
        shape = None if embeds is None else (embeds.shape[0], embeds.shape[1])
    cache = arguments.get("past_key_values")
    offset = 0 if cache is None else cache.get_seq_length()
    # A static cache hands out its own counter and moves it on during the call.
    offset = offset.clone() if isinstance(offset, Tensor) else offset
    mask = _counted_tokens(arguments)
    if shape is None:
        return Tokens(None, mask, None, offset)
    positions = _positions(arguments, mask, shape[1])
    if mask is None and decoder_labels is not None and decoder_labels.shape == shape:
        mask = decoder_labels != IGNORED_LABEL  # one a token
    # With a cache the mask covers the cached tokens too.
    mask = None if mask is None else mask[:, -shape[1] :]
    generation = current_generation.get()
    ended = None if generation is None else generation.ended
    if ended is not None and len(ended) == shape[0]:
        goes_on = ~ended.unsqueeze(1)
        mask = goes_on.expand(shape) if mask is None else mask & goes_on
    return Tokens(shape, mask, positions, offset)


def _positions(arguments: dict[str, Any], mask: Tensor | None, tokens: int) -> Tensor | None:
    """Int64 ``[B or 1, T]``, or None where the tokens simply follow those in the cache."""
    position_ids = arguments.get("position_ids")
    if isinstance(position_ids, Tensor) and position_ids.dim() == 2:
        # OPT numbers left padding -1; padding may have any position.
        return position_ids.clamp(min=0)
    return None if mask is None else (mask.long().cumsum(-1) - 1).clamp(min=0)[:, -tokens:]


def _counted_tokens(arguments: dict[str, Any]) -> Tensor | None:
    """Bool ``[B, S]``, True where a token counts, or None where nothing is said."""
    mask = arguments.get("attention_mask")
    if isinstance(mask, Tensor) and mask.dim() == 2:
        return mask != 0
    padding = arguments.get("src_key_padding_mask")
    if isinstance(padding, Tensor):
        # bool: True is padding. float: added to the attention scores, -inf is padding.
        counted = ~padding if padding.dtype == torch.bool else padding == 0
        return counted if counted.dim() == 2 else counted.unsqueeze(0)
    return None
