"""Hooks that keep the token contexts of a model's blocks current."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from steppe.blocks.block import MLPBlock
from steppe.blocks.huggingface import decoders, forward_parameters
from steppe.surgery.journal import Journal
from steppe.tokens.arguments import arguments_by_name
from steppe.tokens.context import TokenContext

# Of stacks that pad their input on the right: Longformer and LED, BigBird, Reformer.
_PADDING_METHODS = ("_pad_to_window_size", "_pad_to_block_size", "_pad_to_mult_of_chunk_length")


class DecoderLabels:
    """A forward pre-hook on an encoder-decoder model: hands its labels to the decoder's context.

    Trainers pass no decoder mask; the decoder's padding is where the labels are ignored.
    """

    def __init__(self, parameters: Sequence[str], context: TokenContext) -> None:
        self._parameters = tuple(parameters)
        self._context = context

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Read the labels."""
        arguments = arguments_by_name(self._parameters, args, kwargs)
        self._context.decoder_labels.set(arguments.get("labels"))


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
