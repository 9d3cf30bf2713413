"""BERT and its like."""

from __future__ import annotations

from typing import Any

from steppe.blocks.patterns.conditions import has, reads_a_norm
from steppe.blocks.patterns.pattern import BlockPattern


def _bert_alone(layer: Any) -> bool:
    return not has(layer, "crossattention") and reads_a_norm(layer)


ENCODERS: tuple[BlockPattern, ...] = (
    BlockPattern(
        family="BERT (cross-attention)",
        norm="crossattention.output.LayerNorm",
        norm_is_shared=True,
        up="intermediate.dense",
        act="intermediate.intermediate_act_fn",
        down="output.dense",
        when=reads_a_norm,
    ),
    BlockPattern(
        family="BERT (post-norm)",
        norm="attention.output.LayerNorm",
        norm_is_shared=True,
        up="intermediate.dense",
        act="intermediate.intermediate_act_fn",
        down="output.dense",
        when=_bert_alone,
    ),
    BlockPattern(
        family="FNet",
        norm="fourier.output.LayerNorm",
        norm_is_shared=True,
        up="intermediate.dense",
        act="intermediate.intermediate_act_fn",
        down="output.dense",
    ),
    BlockPattern(
        family="Megatron-BERT",
        norm="ln",
        up="intermediate.dense",
        act="intermediate.intermediate_act_fn",
        down="output.dense",
    ),
    BlockPattern(
        family="RoBERTa-PreLayerNorm",
        norm="intermediate.LayerNorm",
        up="intermediate.dense",
        act="intermediate.intermediate_act_fn",
        down="output.dense",
    ),
    BlockPattern(
        family="MPNet",
        norm="attention.LayerNorm",
        norm_is_shared=True,
        up="intermediate.dense",
        act="intermediate.intermediate_act_fn",
        down="output.dense",
    ),
    BlockPattern(
        family="LiLT (layout)",
        norm="attention.layout_output.LayerNorm",
        norm_is_shared=True,
        up="layout_intermediate.dense",
        act="layout_intermediate.intermediate_act_fn",
        down="layout_output.dense",
    ),
    BlockPattern(
        family="LXMERT (language)",
        norm="lang_self_att.output.LayerNorm",
        norm_is_shared=True,
        up="lang_inter.dense",
        act="lang_inter.intermediate_act_fn",
        down="lang_output.dense",
    ),
    BlockPattern(
        family="LXMERT (vision)",
        norm="visn_self_att.output.LayerNorm",
        norm_is_shared=True,
        up="visn_inter.dense",
        act="visn_inter.intermediate_act_fn",
        down="visn_output.dense",
    ),
    BlockPattern(
        family="DistilBERT",
        norm="sa_layer_norm",
        norm_is_shared=True,
        up="ffn.lin1",
        act="ffn.activation",
        down="ffn.lin2",
    ),
    BlockPattern(
        family="ALBERT",
        norm="attention.LayerNorm",
        norm_is_shared=True,
        up="ffn",
        act="activation",
        down="ffn_output",
    ),
    BlockPattern(
        family="ModernBERT (gate and up in one)",
        norm="mlp_norm",
        gate_up="mlp.Wi",
        act="mlp.act",
        down="mlp.Wo",
        dropout="mlp.drop",
    ),
    BlockPattern(
        family="BLIP-2 (Q-Former)",
        up="intermediate_query.dense",
        act="intermediate_query.intermediate_act_fn",
        down="output_query.dense",
    ),
    BlockPattern(
        family="BERT's like",
        up="intermediate.dense",
        act="intermediate.intermediate_act_fn",
        down="output.dense",
    ),
)
