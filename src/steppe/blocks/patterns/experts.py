"""Experts that are modules, and the expert of all tokens beside routed ones."""

from __future__ import annotations

from typing import Any

from steppe.blocks.patterns.conditions import is_bent, reads_post_attention_norm
from steppe.blocks.patterns.pattern import BlockPattern


def _has_shared_expert(layer: Any) -> bool:
    """Whether the expert of all tokens reads the norm of the others, with nothing between."""
    mlp = layer.mlp
    expert = getattr(mlp, "shared_expert", None) or getattr(mlp, "shared_experts", None)
    return reads_post_attention_norm(layer) and not is_bent(expert)


EXPERTS: tuple[BlockPattern, ...] = (
    BlockPattern(
        family="Granite-MoE (shared expert)",
        norm="post_attention_layernorm",
        norm_is_shared=True,
        gate_up="shared_mlp.input_linear",
        act="shared_mlp.activation",
        down="shared_mlp.output_linear",
    ),
    BlockPattern(
        family="Qwen-MoE (shared expert)",
        norm="post_attention_layernorm",
        norm_is_shared=True,
        gate="mlp.shared_expert.gate_proj",
        up="mlp.shared_expert.up_proj",
        act="mlp.shared_expert.act_fn",
        down="mlp.shared_expert.down_proj",
        when=_has_shared_expert,
    ),
    BlockPattern(
        family="DeepSeek, GLM-MoE (shared expert)",
        norm="post_attention_layernorm",
        norm_is_shared=True,
        gate="mlp.shared_experts.gate_proj",
        up="mlp.shared_experts.up_proj",
        act="mlp.shared_experts.act_fn",
        down="mlp.shared_experts.down_proj",
        when=_has_shared_expert,
    ),
    BlockPattern(
        family="Switch Transformers (experts)",
        up="wi",
        act="act",
        down="wo",
        dropout="dropout",
        is_expert=True,
    ),
    BlockPattern(
        family="NLLB-MoE (experts)",
        up="fc1",
        act="act",
        down="fc2",
        dropout="dropout",
        is_expert=True,
    ),
    BlockPattern(
        family="Mixtral (Transformers 4, experts)",
        gate="w1",
        up="w3",
        act="act_fn",
        down="w2",
        is_expert=True,
    ),
    BlockPattern(
        family="Qwen-MoE, DeepSeek (Transformers 4, experts)",
        gate="gate_proj",
        up="up_proj",
        act="act_fn",
        down="down_proj",
        is_expert=True,
    ),
)
