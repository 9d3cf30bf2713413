"""Vision Transformers, and convolutional networks with MLPs."""

from __future__ import annotations

from typing import Any

from steppe.blocks.patterns.conditions import (
    CLAMPS,
    has,
    has_no_norm,
    has_nothing_between,
    reads_a_norm,
    reads_post_attention_norm,
)
from steppe.blocks.patterns.pattern import BlockPattern


def _is_ungated(layer: Any) -> bool:
    return not has(layer.mlp, "gate_proj")


def _timm_norm_first(layer: Any) -> bool:
    return has_nothing_between(layer) and reads_a_norm(layer)


def _timm_norm_last(layer: Any) -> bool:
    return has_nothing_between(layer) and has_no_norm(layer)


def _timm_gate_first(layer: Any) -> bool:
    return _timm_norm_first(layer) and getattr(layer.mlp, "gate_last", None) is False


def _timm_gate_last(layer: Any) -> bool:
    return _timm_norm_first(layer) and getattr(layer.mlp, "gate_last", None) is True


def _has_no_response_norm(layer: Any) -> bool:
    return not has(layer, "grn")


def _is_merger(module: Any) -> bool:
    return has(module, "post_projection_norm") and not any(has(module, name) for name in CLAMPS)


VISION: tuple[BlockPattern, ...] = (
    BlockPattern(
        family="ViT, I-JEPA",
        norm="layernorm_after",
        up="mlp.fc1",
        act="mlp.activation_fn",
        down="mlp.fc2",
        when=has_nothing_between,
    ),
    BlockPattern(
        family="CLIP, SigLIP, Idefics 3",
        norm="layer_norm2",
        up="mlp.fc1",
        act="mlp.activation_fn",
        down="mlp.fc2",
        when=has_nothing_between,
    ),
    BlockPattern(
        family="DINOv2",
        norm="norm2",
        up="mlp.fc1",
        act="mlp.activation_fn",
        down="mlp.fc2",
        when=has_nothing_between,
    ),
    BlockPattern(
        family="SigLIP (pooling head)",
        norm="layernorm",
        up="mlp.fc1",
        act="mlp.activation_fn",
        down="mlp.fc2",
        when=has_nothing_between,
    ),
    BlockPattern(
        family="ViT (Transformers 4)",
        norm="layernorm_after",
        up="intermediate.dense",
        act="intermediate.intermediate_act_fn",
        down="output.dense",
        when=reads_a_norm,
    ),
    BlockPattern(
        family="Swin v2, MobileBERT",
        up="intermediate.dense",
        act="intermediate.intermediate_act_fn",
        down="output.dense",
        when=has_no_norm,
    ),
    BlockPattern(
        family="DINOv3 (gated)",
        norm="norm2",
        gate="mlp.gate_proj",
        up="mlp.up_proj",
        act="mlp.act_fn",
        down="mlp.down_proj",
        when=has_nothing_between,
    ),
    BlockPattern(
        family="DINOv3",
        norm="norm2",
        up="mlp.up_proj",
        act="mlp.act_fn",
        down="mlp.down_proj",
        when=_is_ungated,
    ),
    BlockPattern(
        family="timm SwiGLU, GluMlp (gate and up in one)",
        norm="norm2",
        gate_up="mlp.fc1",
        act="mlp.act",
        down="mlp.fc2",
        dropout="mlp.drop1",
        when=_timm_gate_first,
    ),
    BlockPattern(
        family="timm GluMlp (gate last)",
        norm="norm2",
        gate_up="mlp.fc1",
        gate_first=False,
        act="mlp.act",
        down="mlp.fc2",
        dropout="mlp.drop1",
        when=_timm_gate_last,
    ),
    BlockPattern(
        family="timm ViT",
        norm="norm2",
        up="mlp.fc1",
        act="mlp.act",
        down="mlp.fc2",
        dropout="mlp.drop1",
        when=_timm_norm_first,
    ),
    BlockPattern(
        family="timm Swin v2, ResPostBlock",
        up="mlp.fc1",
        act="mlp.act",
        down="mlp.fc2",
        dropout="mlp.drop1",
        when=_timm_norm_last,
    ),
    BlockPattern(
        family="torchvision ViT",
        norm="ln_2",
        up="mlp.0",
        act="mlp.1",
        down="mlp.3",
        dropout="mlp.2",
    ),
    BlockPattern(
        family="AIMv2 (gated)",
        norm="rms_norm2",
        gate="ffn.gate_proj",
        up="ffn.up_proj",
        act="ffn.act_fn",
        down="ffn.down_proj",
    ),
    BlockPattern(
        family="Pixtral (gated)",
        norm="ffn_norm",
        gate="feed_forward.gate_proj",
        up="feed_forward.up_proj",
        act="feed_forward.act_fn",
        down="feed_forward.down_proj",
    ),
    BlockPattern(
        family="Mimi, Moonshine, Llama 4 (vision)",
        norm="post_attention_layernorm",
        up="mlp.fc1",
        act="mlp.activation_fn",
        down="mlp.fc2",
        when=reads_post_attention_norm,
    ),
    BlockPattern(
        family="Qwen 3 VL (vision)",
        norm="norm2",
        up="mlp.linear_fc1",
        act="mlp.act_fn",
        down="mlp.linear_fc2",
    ),
    BlockPattern(
        family="CvT",
        norm="layernorm_after",
        up="intermediate.dense",
        act="intermediate.activation",
        down="output.dense",
    ),
    # Without the norm that they read: their tokens are a grid, and ZerothBias is for sequences.
    BlockPattern(
        family="ConvNeXT",
        up="pwconv1",
        act="act",
        down="pwconv2",
        when=_has_no_response_norm,
    ),
    BlockPattern(
        family="DINOv3 (ConvNeXT)",
        up="pointwise_conv1",
        act="activation_fn",
        down="pointwise_conv2",
    ),
    BlockPattern(
        family="SAM 2, EdgeTAM (memory fuser)",
        up="pointwise_conv1",
        act="activation",
        down="pointwise_conv2",
    ),
    BlockPattern(
        family="GLM-4V (merger)",
        gate="gate_proj",
        up="up_proj",
        act="act_fn",
        down="down_proj",
        when=_is_merger,
    ),
)
