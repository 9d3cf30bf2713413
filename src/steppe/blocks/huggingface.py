"""Facts about Hugging Face models: their configs, their decoders, their labels, their inputs."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

from torch import nn

from steppe.blocks.wrappers import ancestors, unwrap
from steppe.record import config_of

# Parameters of a forward that gets tokens, and of a tower's that makes its own.
_TOKENS = {"input_ids", "inputs_embeds", "src_key_padding_mask"}
_OTHER_INPUTS = {"pixel_values", "input_features", "input_values"}


def max_tokens_of(model: nn.Module) -> int | None:
    """The longest sequence a Hugging Face model can see, by its config.

    Args:
        model: any module.

    Returns:
        Number of tokens, or None where the config sets no limit (T5's relative positions) or there
        is no config.
    """
    config = config_of(stock_model(model))
    for key in ("max_position_embeddings", "n_positions"):
        limit = getattr(config, key, None)
        # T5 keeps `n_positions` from its tokenizer; its attention has no such limit.
        if isinstance(limit, int) and not hasattr(config, "relative_attention_num_buckets"):
            return limit
    image_size, patch_size = (getattr(config, key, None) for key in ("image_size", "patch_size"))
    if image_size is None or patch_size is None:
        return None
    height, width = _pair(image_size)
    patch_height, patch_width = _pair(patch_size)
    # One more than the patches: ViT's class token. Too many by one costs one row of zeros.
    return (height // patch_height) * (width // patch_width) + 1


def stock_model(model: nn.Module) -> nn.Module:
    """The Hugging Face model whose config says how long sequences are and what labels mean.

    Args:
        model: any module.

    Returns:
        The module below known wrappers, if it has a config or holds no Hugging Face model or
        several; else the one that it holds (a LightningModule, an ``AveragedModel``).
    """
    root = unwrap(model)
    if config_of(root) is not None:
        return root
    found = list(_outermost_models(root))
    return found[0] if len(found) == 1 else root


def _outermost_models(root: nn.Module) -> Iterator[nn.Module]:
    """The Hugging Face models within a module that are in no other one."""
    for child in root.children():
        if is_whole_model(child):
            yield child
        else:
            yield from _outermost_models(child)


def is_whole_model(module: nn.Module) -> bool:
    """Whether a module is a whole Hugging Face model."""
    return config_of(module) is not None and hasattr(type(module), "save_pretrained")


def decoders(model: nn.Module) -> Iterator[tuple[nn.Module, set[nn.Module]]]:
    """Encoder-decoder models within a model, the innermost last, each with its decoder's modules.

    A decoder's padding is known from the labels of the model alone. The module that some models
    call their decoder holds the encoder too, or is it.
    """
    for module in unwrap(model).modules():
        get_decoder: Any = getattr(module, "get_decoder", None)
        if get_decoder is not None and getattr(config_of(module), "is_encoder_decoder", False):
            parts = [getattr(module, name, None) for name in ("get_decoder", "get_encoder")]
            decoder, encoder = (part() if callable(part) else None for part in parts)
            if isinstance(decoder, nn.Module) and decoder is not module:
                inside = set(encoder.modules()) if isinstance(encoder, nn.Module) else set()
                yield module, set(decoder.modules()) - inside


def shifts_labels(model: nn.Module) -> bool:
    """Whether a Hugging Face model, or the one in a wrapper, predicts a label from those before."""
    root = stock_model(model)
    if getattr(config_of(root), "is_encoder_decoder", False):
        return False
    names = [kind.__name__ for kind in type(root).__mro__]
    if any("ForCausalLM" in name or "LMHeadModel" in name for name in names):
        return True
    # LLaVA and its kin are of a text decoder; Pix2Struct, whose config does not say so, is of two.
    conditional = any("ForConditionalGeneration" in name for name in names)
    return conditional and "decoder_input_ids" not in forward_parameters(root)


def forward_parameters(module: nn.Module) -> list[str]:
    """Names of the parameters of a module's ``forward``, in order."""
    return list(inspect.signature(module.forward).parameters)


def stack_of(root: nn.Module, name: str) -> nn.Module | None:
    """The deepest ancestor of a block that gets the text or its padding; None in other towers."""
    for ancestor in ancestors(root, name):
        inputs = set(forward_parameters(ancestor))
        if _TOKENS & inputs:
            return ancestor
        # A tower of images or sound: the text and the padding of the modules above are not its own.
        if _OTHER_INPUTS & inputs or (ancestor is not root and is_whole_model(ancestor)):
            return None
    return None


def _pair(size: Any) -> tuple[int, int]:
    """Height and width from a number or a pair."""
    if isinstance(size, int):
        return size, size
    height, width = size
    return int(height), int(width)
