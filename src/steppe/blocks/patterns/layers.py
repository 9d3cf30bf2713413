"""The layers of torch.nn, and those of libraries without models of their own."""

from __future__ import annotations

from typing import Any

from steppe.blocks.patterns.conditions import has
from steppe.blocks.patterns.pattern import BlockPattern

# nn.TransformerEncoderLayer decides by this attribute whether it may run its fused kernel.
_FUSED_FLAG = "activation_relu_or_gelu"
_ENCODER_LAYER_FLAGS = ((_FUSED_FLAG, 0),)


def _norm_first(layer: Any) -> bool:
    return hasattr(layer, _FUSED_FLAG) and layer.norm_first


def _norm_last(layer: Any) -> bool:
    return hasattr(layer, _FUSED_FLAG) and not layer.norm_first


def _decoder_norm_first(layer: Any) -> bool:
    return has(layer, "multihead_attn") and getattr(layer, "norm_first", None) is True


def _decoder_norm_last(layer: Any) -> bool:
    return has(layer, "multihead_attn") and getattr(layer, "norm_first", None) is False


def _sequence_first(layer: Any) -> bool:
    return not layer.self_attn.batch_first


def _x_transformers(layer: Any) -> bool:
    return type(layer.ff[1]).__name__ == "Dropout"


LAYERS: tuple[BlockPattern, ...] = (
    BlockPattern(
        family="nn.TransformerEncoderLayer (norm first)",
        norm="norm2",
        up="linear1",
        act="activation",
        down="linear2",
        dropout="dropout",
        when=_norm_first,
        sequence_first=_sequence_first,
        act_flags=_ENCODER_LAYER_FLAGS,
    ),
    BlockPattern(
        family="nn.TransformerEncoderLayer (post-norm)",
        norm="norm1",
        norm_is_shared=True,
        up="linear1",
        act="activation",
        down="linear2",
        dropout="dropout",
        when=_norm_last,
        sequence_first=_sequence_first,
        act_flags=_ENCODER_LAYER_FLAGS,
    ),
    BlockPattern(
        family="nn.TransformerDecoderLayer (norm first)",
        norm="norm3",
        up="linear1",
        act="activation",
        down="linear2",
        dropout="dropout",
        when=_decoder_norm_first,
        sequence_first=_sequence_first,
    ),
    BlockPattern(
        family="nn.TransformerDecoderLayer (post-norm)",
        norm="norm2",
        norm_is_shared=True,
        up="linear1",
        act="activation",
        down="linear2",
        dropout="dropout",
        when=_decoder_norm_last,
        sequence_first=_sequence_first,
    ),
    BlockPattern(
        family="x-transformers",
        up="ff.0.0",
        act="ff.0.1",
        down="ff.2",
        dropout="ff.1",
        when=_x_transformers,
    ),
    BlockPattern(
        family="PatchTST",
        up="ff.0",
        act="ff.1",
        down="ff.3",
        dropout="ff.2",
    ),
)
