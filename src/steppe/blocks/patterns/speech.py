"""Speech models."""

from __future__ import annotations

from typing import Any

from steppe.blocks.patterns.pattern import BlockPattern


def _is_stable(layer: Any) -> bool:
    return type(layer).__name__.endswith("StableLayerNorm")


def _is_not_stable(layer: Any) -> bool:
    return not _is_stable(layer)


SPEECH: tuple[BlockPattern, ...] = (
    BlockPattern(
        family="Wav2Vec 2.0, HuBERT (pre-norm)",
        norm="final_layer_norm",
        up="feed_forward.intermediate_dense",
        act="feed_forward.intermediate_act_fn",
        down="feed_forward.output_dense",
        dropout="feed_forward.intermediate_dropout",
        when=_is_stable,
    ),
    BlockPattern(
        family="Wav2Vec 2.0, HuBERT",
        norm="layer_norm",
        norm_is_shared=True,
        up="feed_forward.intermediate_dense",
        act="feed_forward.intermediate_act_fn",
        down="feed_forward.output_dense",
        dropout="feed_forward.intermediate_dropout",
        when=_is_not_stable,
    ),
    BlockPattern(
        family="Phi-4 audio (gate and up in one)",
        norm="layer_norm",
        gate_up="gate_up_proj",
        gate_first=False,
        act="act_fn",
        down="down_proj",
        dropout="dropout",
    ),
)
