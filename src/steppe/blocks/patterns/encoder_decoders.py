"""Models of an encoder and a decoder, and decoders that attend to an encoder."""

from __future__ import annotations

from typing import Any

from steppe.blocks.patterns.conditions import has, has_nothing_between, is_named
from steppe.blocks.patterns.pattern import BlockPattern

# Layers with the same parts in two orders, which only their forward shows.
_BART_NORM_LAST = (
    *("Autoformer", "Bart", "BlenderbotSmall", "Informer", "LED", "Marian", "Mvp", "PLBart"),
    *("TimeSeriesTransformer", "TrOCR"),
)
_BART_NORM_FIRST = (
    *("AudioFlamingo3", "BigBirdPegasus", "BioGpt", "Blenderbot", "M2M100", "MBart", "Musicgen"),
    *("Pegasus", "PPFormulaNet", "Qwen2Audio", "Qwen2_5OmniAudio", "Qwen3ASRAudio"),
    *("Qwen3OmniMoeAudio", "Speech2Text", "TableTransformer", "Voxtral", "Whisper", "XGLM"),
)


def _attends_to_itself(layer: Any) -> bool:
    return not has(layer, "encoder_attn_layer_norm")


def _bart_norm_first(layer: Any) -> bool:
    return is_named(layer, *_BART_NORM_FIRST) and not is_named(layer, *_BART_NORM_LAST)


def _bart_encoder_norm_last(layer: Any) -> bool:
    return is_named(layer, *_BART_NORM_LAST) and _attends_to_itself(layer)


def _bart_decoder_norm_last(layer: Any) -> bool:
    return is_named(layer, *_BART_NORM_LAST)


def _has_attention(layer: Any) -> bool:
    return has(layer, "self_attn") and not has(layer, "ffn_layernorm")


ENCODER_DECODERS: tuple[BlockPattern, ...] = (
    BlockPattern(
        family="T5",
        norm="layer_norm",
        up="DenseReluDense.wi",
        act="DenseReluDense.act",
        down="DenseReluDense.wo",
        dropout="DenseReluDense.dropout",
    ),
    BlockPattern(
        family="T5 v1.1 (gated)",
        norm="layer_norm",
        gate="DenseReluDense.wi_0",
        up="DenseReluDense.wi_1",
        act="DenseReluDense.act",
        down="DenseReluDense.wo",
        dropout="DenseReluDense.dropout",
    ),
    BlockPattern(
        family="Switch Transformers (dense layers)",
        norm="layer_norm",
        up="mlp.wi",
        act="mlp.act",
        down="mlp.wo",
        dropout="mlp.dropout",
    ),
    BlockPattern(
        family="BART, Marian (encoder)",
        norm="self_attn_layer_norm",
        norm_is_shared=True,
        up="fc1",
        act="activation_fn",
        down="fc2",
        dropout="activation_dropout",
        when=_bart_encoder_norm_last,
    ),
    BlockPattern(
        family="BART, Marian (decoder)",
        norm="encoder_attn_layer_norm",
        norm_is_shared=True,
        up="fc1",
        act="activation_fn",
        down="fc2",
        dropout="activation_dropout",
        when=_bart_decoder_norm_last,
    ),
    BlockPattern(
        family="M2M100, mBART, Pegasus, Whisper",
        norm="final_layer_norm",
        up="fc1",
        act="activation_fn",
        down="fc2",
        dropout="activation_dropout",
        when=_bart_norm_first,
    ),
    BlockPattern(
        family="DETR (decoder)",
        norm="encoder_attn_layer_norm",
        norm_is_shared=True,
        up="mlp.fc1",
        act="mlp.activation_fn",
        down="mlp.fc2",
        when=has_nothing_between,
    ),
    BlockPattern(
        family="DETR (encoder)",
        norm="self_attn_layer_norm",
        norm_is_shared=True,
        up="mlp.fc1",
        act="mlp.activation_fn",
        down="mlp.fc2",
        when=_attends_to_itself,
    ),
    BlockPattern(
        family="Moonshine decoder (gate and up in one)",
        norm="final_layernorm",
        gate_up="mlp.fc1",
        gate_first=False,
        act="mlp.activation_fn",
        down="mlp.fc2",
    ),
    BlockPattern(
        family="Moonshine, Canary (decoder)",
        norm="final_layernorm",
        up="mlp.fc1",
        act="mlp.activation_fn",
        down="mlp.fc2",
        when=has_nothing_between,
    ),
    BlockPattern(
        family="FSMT, Deformable DETR",
        up="fc1",
        act="activation_fn",
        down="fc2",
        when=_has_attention,
    ),
)
