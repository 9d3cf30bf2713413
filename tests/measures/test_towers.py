"""Models of several towers: the tokens of each are its own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    InternVLConfig,
    InternVLForConditionalGeneration,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
)

import steppe
from steppe.errors import LossError

TEXT: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 64,
    "hidden_act": "relu",
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
Case = tuple[nn.Module, dict[str, Tensor]]


def text_batch() -> dict[str, Tensor]:
    """Two texts with an image each, the second one shorter."""
    ids = torch.randint(5, 60, (2, 9))
    ids[:, 1], ids[:, 2], ids[:, 3] = 61, 60, 62  # an image of one token
    mask = torch.ones_like(ids)
    mask[1, 7:] = 0
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "labels": ids.masked_fill(mask == 0, -100),
    }


def intern_vl() -> Case:
    vision = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "image_size": [8, 8],
        "patch_size": [4, 4],
        "num_channels": 3,
        "hidden_act": "relu",
    }
    config = InternVLConfig(
        vision_config=vision,
        text_config={"model_type": "qwen2", **TEXT},
        image_token_id=60,
        image_seq_length=1,
        downsample_ratio=0.5,
    )
    model = InternVLForConditionalGeneration(config).eval()
    return model, {**text_batch(), "pixel_values": torch.randn(2, 3, 8, 8)}


def qwen2_vl() -> Case:
    vision = {
        "depth": 2,
        "embed_dim": 16,
        "hidden_size": 16,
        "num_heads": 2,
        "in_channels": 1,
        "patch_size": 2,
        "spatial_merge_size": 2,
        "temporal_patch_size": 1,
        "mlp_ratio": 2,
    }
    rope = {"rope_type": "default", "mrope_section": [1, 0, 1], "rope_theta": 1e4}
    config = Qwen2VLConfig(
        text_config={**TEXT, "rope_parameters": rope},
        vision_config=vision,
        image_token_id=60,
        video_token_id=63,
        vision_start_token_id=61,
        vision_end_token_id=62,
    )
    batch = text_batch()
    grid = torch.tensor([[1, 2, 2], [1, 2, 2]])
    types = (batch["input_ids"] == 60).int()
    packed = {"pixel_values": torch.randn(8, 4), "image_grid_thw": grid, "mm_token_type_ids": types}
    return Qwen2VLForConditionalGeneration(config).eval(), {**batch, **packed}


@pytest.mark.parametrize(
    ("build", "towers", "vision_tokens"),
    [
        (intern_vl, ("model.vision_tower.encoder.layer", "model.language_model.layers"), 10),
        (qwen2_vl, ("model.visual.blocks", "model.language_model.layers"), 8),
    ],
)
def test_each_tower_counts_its_own_tokens(
    build: Any, towers: tuple[str, str], vision_tokens: int
) -> None:
    torch.manual_seed(0)
    model, batch = build()
    blocks = steppe.find_blocks(model)
    active = dict.fromkeys(towers, 0.0)
    entries = dict.fromkeys(towers, 0)
    mask = batch["attention_mask"].bool()
    handles = []
    for block in blocks:
        tower = next(name for name in towers if block.name.startswith(name))

        def count(module: nn.Module, args: tuple[Tensor], tower: str = tower) -> None:
            a = args[0][mask] if tower == towers[1] else args[0]
            active[tower] += float((a != 0).sum())
            entries[tower] += a.numel()

        handles.append(block.down.register_forward_pre_hook(count))
    with torch.no_grad():
        model(**batch)
    for handle in handles:
        handle.remove()
    report = steppe.measure(model, [batch], labels=None)
    assert report.density_by_tower == pytest.approx(
        {tower: active[tower] / entries[tower] for tower in towers}, rel=1e-12
    )
    assert [block.tokens for block in report.blocks] == [vision_tokens] * 2 + [16] * 2
    for plugin in (steppe.ZerothBias(max_tokens=64), steppe.JumpingSquaredReLU(ramp=0.5)):
        steppe.sparsify_(model, [plugin])
        with torch.no_grad():
            model(**batch)
        steppe.restore_(model)


def test_flatness_of_packed_images_is_refused_and_that_of_the_text_is_not() -> None:
    torch.manual_seed(0)
    model, batch = qwen2_vl()
    with pytest.raises(LossError, match=r"not block\.name\.startswith\('model\.visual\.blocks'\)"):
        steppe.measure(model, [batch])
    report = steppe.measure(
        model, [batch], where=lambda block: not block.name.startswith("model.visual.blocks")
    )
    for block in report.blocks:
        assert block.derivative_density_by_identity == pytest.approx(
            block.derivative_density, rel=1e-6
        )
    assert 0.0 < report.coverage < 1.0
