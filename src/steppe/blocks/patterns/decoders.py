"""Decoder-only language models."""

from __future__ import annotations

from typing import Any

from steppe.blocks.patterns.conditions import (
    has,
    has_nothing_between,
    is_parallel,
    reads_post_attention_norm,
)
from steppe.blocks.patterns.pattern import BlockPattern


def _norm_first(layer: Any) -> bool:
    return getattr(layer, "do_layer_norm_before", None) is True


def _norm_last(layer: Any) -> bool:
    return getattr(layer, "do_layer_norm_before", None) is False


def _openai(layer: Any) -> bool:
    return ".openai." in type(layer).__module__


def _gpt2(layer: Any) -> bool:
    return not _openai(layer)


def _bloom_norm_is_shared(layer: Any) -> bool:
    return bool(getattr(layer, "apply_residual_connection_post_layernorm", False))


def _bloom(layer: Any) -> bool:
    return not _bloom_norm_is_shared(layer)


def _reads_norms_around(layer: Any) -> bool:
    return not has(layer, "pre_feedforward_layernorm") and has(layer, "post_feedforward_layernorm")


def _is_ungated(layer: Any) -> bool:
    return reads_post_attention_norm(layer) and not has(layer.mlp, "gate_proj")


def _glm4(layer: Any) -> bool:
    return has(layer, "post_self_attn_layernorm") and has(layer, "post_mlp_layernorm")


def _has_no_multiplier(layer: Any) -> bool:
    """Falcon H1 scales the input of its activation."""
    return not has(layer.feed_forward, "gate_multiplier")


DECODERS: tuple[BlockPattern, ...] = (
    BlockPattern(
        family="OPT",
        norm="final_layer_norm",
        up="fc1",
        act="activation_fn",
        down="fc2",
        when=_norm_first,
    ),
    BlockPattern(
        family="OPT (post-norm)",
        norm="self_attn_layer_norm",
        norm_is_shared=True,
        up="fc1",
        act="activation_fn",
        down="fc2",
        when=_norm_last,
    ),
    BlockPattern(
        family="OpenAI GPT",
        norm="ln_1",
        norm_is_shared=True,
        up="mlp.c_fc",
        act="mlp.act",
        down="mlp.c_proj",
        when=_openai,
    ),
    BlockPattern(
        family="GPT-2",
        norm="ln_2",
        up="mlp.c_fc",
        act="mlp.act",
        down="mlp.c_proj",
        when=_gpt2,
    ),
    BlockPattern(
        family="nanoGPT",
        norm="ln_2",
        up="mlp.c_fc",
        act="mlp.gelu",
        down="mlp.c_proj",
    ),
    BlockPattern(
        family="StarCoder 2",
        norm="post_attention_layernorm",
        up="mlp.c_fc",
        act="mlp.act",
        down="mlp.c_proj",
    ),
    BlockPattern(
        family="GPT-J, CodeGen",
        norm="ln_1",
        norm_is_shared=True,
        up="mlp.fc_in",
        act="mlp.act",
        down="mlp.fc_out",
    ),
    BlockPattern(
        family="GPT-NeoX, Falcon (sequential), Persimmon",
        norm="post_attention_layernorm",
        up="mlp.dense_h_to_4h",
        act="mlp.act",
        down="mlp.dense_4h_to_h",
    ),
    BlockPattern(
        family="Falcon (two norms)",
        norm="ln_mlp",
        up="mlp.dense_h_to_4h",
        act="mlp.act",
        down="mlp.dense_4h_to_h",
    ),
    BlockPattern(
        family="Falcon (parallel)",
        norm="input_layernorm",
        norm_is_shared=True,
        up="mlp.dense_h_to_4h",
        act="mlp.act",
        down="mlp.dense_4h_to_h",
        when=is_parallel,
    ),
    BlockPattern(
        family="Bloom",
        norm="post_attention_layernorm",
        up="mlp.dense_h_to_4h",
        act="mlp.gelu_impl",
        down="mlp.dense_4h_to_h",
        when=_bloom,
    ),
    BlockPattern(
        family="Bloom (residual of the norm)",
        norm="post_attention_layernorm",
        norm_is_shared=True,
        up="mlp.dense_h_to_4h",
        act="mlp.gelu_impl",
        down="mlp.dense_4h_to_h",
        when=_bloom_norm_is_shared,
    ),
    BlockPattern(
        family="MPT",
        norm="norm_2",
        up="ffn.up_proj",
        act="ffn.act",
        down="ffn.down_proj",
    ),
    BlockPattern(
        family="Phi",
        norm="input_layernorm",
        norm_is_shared=True,
        up="mlp.fc1",
        act="mlp.activation_fn",
        down="mlp.fc2",
        when=is_parallel,
    ),
    BlockPattern(
        family="Llama, Qwen, Mistral (gated)",
        norm="post_attention_layernorm",
        gate="mlp.gate_proj",
        up="mlp.up_proj",
        act="mlp.act_fn",
        down="mlp.down_proj",
        when=reads_post_attention_norm,
    ),
    BlockPattern(
        family="Gemma 2, Gemma 3 (gated)",
        norm="pre_feedforward_layernorm",
        gate="mlp.gate_proj",
        up="mlp.up_proj",
        act="mlp.act_fn",
        down="mlp.down_proj",
        when=has_nothing_between,
    ),
    BlockPattern(
        family="OLMo 2 (gated)",
        gate="mlp.gate_proj",
        up="mlp.up_proj",
        act="mlp.act_fn",
        down="mlp.down_proj",
        when=_reads_norms_around,
    ),
    BlockPattern(
        family="Cohere, StableLM 2 (gated, parallel)",
        norm="input_layernorm",
        norm_is_shared=True,
        gate="mlp.gate_proj",
        up="mlp.up_proj",
        act="mlp.act_fn",
        down="mlp.down_proj",
        when=is_parallel,
    ),
    BlockPattern(
        family="Phi-3, GLM (gate and up in one)",
        norm="post_attention_layernorm",
        gate_up="mlp.gate_up_proj",
        act="mlp.activation_fn",
        down="mlp.down_proj",
        when=reads_post_attention_norm,
    ),
    BlockPattern(
        family="GLM-4 (gate and up in one)",
        norm="post_attention_layernorm",
        gate_up="mlp.gate_up_proj",
        act="mlp.activation_fn",
        down="mlp.down_proj",
        when=_glm4,
    ),
    BlockPattern(
        family="Nemotron, Arcee",
        norm="post_attention_layernorm",
        up="mlp.up_proj",
        act="mlp.act_fn",
        down="mlp.down_proj",
        when=_is_ungated,
    ),
    BlockPattern(
        family="Bamba, Jamba (gated)",
        norm="pre_ff_layernorm",
        gate="feed_forward.gate_proj",
        up="feed_forward.up_proj",
        act="feed_forward.act_fn",
        down="feed_forward.down_proj",
        when=_has_no_multiplier,
    ),
    BlockPattern(
        family="Llama 4 (gated)",
        norm="post_attention_layernorm",
        gate="feed_forward.gate_proj",
        up="feed_forward.up_proj",
        act="feed_forward.activation_fn",
        down="feed_forward.down_proj",
    ),
    BlockPattern(
        family="AFMoE (gated)",
        norm="pre_mlp_layernorm",
        gate="mlp.gate_proj",
        up="mlp.up_proj",
        act="mlp.act_fn",
        down="mlp.down_proj",
        when=has_nothing_between,
    ),
    BlockPattern(
        family="CTRL",
        norm="layernorm2",
        up="ffn.0",
        act="ffn.1",
        down="ffn.2",
    ),
    BlockPattern(
        family="XLNet",
        up="layer_1",
        act="activation_function",
        down="layer_2",
    ),
)
