"""A dropout that the forward calls as a function, between activation and last layer."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    PegasusConfig,
    PegasusForConditionalGeneration,
)

import steppe
from steppe.ops.cpu.library import kernels

pytestmark = pytest.mark.skipif(kernels().name != "native", reason=kernels().reason)
BOTH = pytest.mark.parametrize(
    ("config", "kind"),
    [(BartConfig, BartForConditionalGeneration), (PegasusConfig, PegasusForConditionalGeneration)],
)


def built(config: type, kind: type, p: float) -> nn.Module:
    torch.manual_seed(0)
    return kind(
        config(
            vocab_size=64,
            d_model=16,
            encoder_layers=1,
            decoder_layers=1,
            encoder_attention_heads=2,
            decoder_attention_heads=2,
            encoder_ffn_dim=48,
            decoder_ffn_dim=48,
            activation_function="relu",
            activation_dropout=p,
            dropout=0.0,
            attention_dropout=0.0,
            max_position_embeddings=32,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
            decoder_start_token_id=2,
            forced_eos_token_id=2,
        )
    )


def run(model: nn.Module, seed: int) -> Tensor:
    ids = torch.randint(3, 64, (2, 9), generator=torch.Generator().manual_seed(1))
    torch.manual_seed(seed)
    return model(input_ids=ids, labels=ids).logits


@BOTH
def test_run_by_its_own_modules_a_block_drops_the_same_entries(config: type, kind: type) -> None:
    model = built(config, kind, 0.5)
    expected = run(model, 5)
    state = torch.get_rng_state()
    fast = steppe.accelerate_(copy.deepcopy(model))  # too small to gain
    for _ in range(2):
        assert torch.equal(run(fast, 5), expected)
        assert torch.equal(torch.get_rng_state(), state)
    assert {block.how for block in steppe.explain(fast).blocks} == {"own modules"}


@BOTH
@torch.no_grad()
def test_on_the_kernels_the_mean_is_that_of_dense(config: type, kind: type) -> None:
    model = built(config, kind, 0.5)
    fast = steppe.accelerate_(copy.deepcopy(model), max_density=1.0)
    run(fast, 0)  # looked at
    dense, sparse = (torch.stack([run(one, seed) for seed in range(200)]) for one in (model, fast))
    assert all(block.is_sparse for block in steppe.explain(fast).blocks)
    distance = (dense.mean(0) - sparse.mean(0)).abs()
    error = ((dense.var(0) + sparse.var(0)) / 200).sqrt()
    moved = error > 1e-6
    assert moved.float().mean() > 0.9
    assert (distance[moved] / error[moved]).mean() < 1.2  # of a normal variable: .8
    assert sparse.std(0).mean().item() == pytest.approx(dense.std(0).mean().item(), rel=0.05)
    assert torch.allclose(run(fast.eval(), 0), run(model.eval(), 0), atol=1e-5)


def test_the_probability_comes_back_and_one_that_is_set_anew_holds() -> None:
    model = built(BartConfig, BartForConditionalGeneration, 0.5)
    layer = model.model.encoder.layers[0]
    steppe.accelerate_(model, max_density=1.0)
    assert layer.activation_dropout == 0.0
    assert copy.deepcopy(model).model.encoder.layers[0].activation_dropout == 0.0  # routed anew
    layer.activation_dropout = 0.25
    run(model, 0)
    assert "activation_dropout was changed" in steppe.explain(model).blocks[0].reason
    plain = built(BartConfig, BartForConditionalGeneration, 0.5)
    plain.model.encoder.layers[0].activation_dropout = 0.25
    plain.model.decoder.layers[0].activation_dropout = model.model.decoder.layers[
        0
    ].activation_dropout = 0.125
    assert torch.equal(run(model, 3), run(plain, 3))
    steppe.restore_(model)
    assert layer.activation_dropout == 0.5
