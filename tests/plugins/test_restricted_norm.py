"""RestrictedNorm: the floor under the scale, at once or rising, and the frozen bias."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import models
import steppe
from steppe import RestrictedNorm


def _rms_encoder() -> nn.Module:
    encoder = models.torch_encoder()
    for layer in encoder.layers:
        layer.norm2 = nn.RMSNorm(models.D_MODEL)
    return encoder


# nn.LayerNorm, LlamaRMSNorm, T5LayerNorm, nn.RMSNorm
NORMS: dict[str, Callable[[], nn.Module]] = {
    "layer norm": models.gpt2,
    "llama": models.llama,
    "t5": models.t5,
    "rms norm": _rms_encoder,
}
each_norm = pytest.mark.parametrize("make", NORMS.values(), ids=NORMS.keys())
SCALES = [-2.0, -1.0, -0.4, -1e-3, -0.0, 0.0, 1e-3, 0.3, 0.5, 0.9, 1.0, 1.25, 3.0, 7.0, -0.7, 0.7]


def scales(model: nn.Module) -> list[Tensor]:
    """The scale of each block's norm."""
    return [block.norm.weight for block in steppe.find_blocks(model)]


def set_scales_(model: nn.Module) -> None:
    """What an optimizer step might make of them."""
    with torch.no_grad():
        for scale in scales(model):
            scale.copy_(torch.tensor(SCALES, dtype=torch.float64))


def raised(scale: float, floor: float) -> float:
    """|scale| at least floor, the sign kept."""
    return math.copysign(max(abs(scale), floor), scale)


@each_norm
@pytest.mark.parametrize("floor", [1.0, 0.5])
def test_from_scratch_the_scale_is_clamped_to_the_floor(
    make: Callable[[], nn.Module], floor: float
) -> None:
    model = make().double()
    steppe.sparsify_(model, [RestrictedNorm(floor=floor)])
    set_scales_(model)
    assert steppe.project_(model) is model
    for scale in scales(model):
        assert scale.tolist() == [max(value, floor) for value in SCALES]


@each_norm
@pytest.mark.parametrize("floor", [1.0, 2.0])
@pytest.mark.parametrize(
    ("progress", "share"), [(0.0, 0.0), (0.075, 0.25), (0.15, 0.5), (0.3, 1.0), (0.7, 1.0), (1, 1)]
)
def test_when_finetuning_the_floor_rises_linearly_and_signs_are_kept(
    make: Callable[[], nn.Module], floor: float, progress: float, share: float
) -> None:
    model = make().double()
    set_scales_(model)
    steppe.sparsify_(model, [RestrictedNorm(floor=floor, ramp=0.3)])
    steppe.project_(model)
    for scale in scales(model):
        assert scale.tolist() == SCALES  # nothing before the run begins
    assert steppe.advance_(model, progress) is model
    steppe.project_(model)
    for scale in scales(model):
        expected = [raised(value, floor * share) for value in SCALES]
        assert scale.tolist() == pytest.approx(expected, rel=1e-15, abs=0)
        assert torch.equal(scale.signbit(), torch.tensor(SCALES).signbit())


def test_only_the_norms_of_the_chosen_blocks_are_restricted() -> None:
    model = models.gpt2()
    steppe.sparsify_(model, [RestrictedNorm()], where=lambda block: block.name.endswith("1"))
    with torch.no_grad():
        for norm in model.modules():
            if isinstance(norm, nn.LayerNorm):
                norm.weight.fill_(0.5)
    steppe.project_(model)
    restricted = [
        name
        for name, norm in model.named_modules()
        if isinstance(norm, nn.LayerNorm) and norm.weight[0] == 1.0
    ]
    assert restricted == ["transformer.h.1.ln_2"]


@pytest.mark.parametrize("ramp", [0.0, 0.3])
def test_the_bias_is_frozen_where_it_is(ramp: float) -> None:
    model = models.gpt2()
    biases = [block.norm.bias for block in steppe.find_blocks(model)]
    if ramp > 0:
        with torch.no_grad():
            for bias in biases:
                bias.normal_()
    old = [bias.clone() for bias in biases]
    steppe.sparsify_(model, [RestrictedNorm(ramp=ramp)])
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.5)
    ids = models.token_ids()
    model(input_ids=ids, labels=ids).loss.backward()
    assert all(bias.grad is None and not bias.requires_grad for bias in biases)
    assert all(scale.grad is not None for scale in scales(model))
    optimizer.step()
    steppe.project_(model)
    assert all(map(torch.equal, biases, old))
    assert model.transformer.h[0].ln_1.bias.grad is not None
    steppe.restore_(model)
    assert all(bias.requires_grad for bias in biases)


@each_norm
def test_a_norm_without_a_bias_needs_none(make: Callable[[], nn.Module]) -> None:
    model = make()
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    steppe.sparsify_(model, [RestrictedNorm()])
    now = {name for name, p in model.named_parameters() if not p.requires_grad}
    assert now - frozen == (
        {f"transformer.h.{i}.ln_2.bias" for i in (0, 1)} if make is models.gpt2 else set()
    )


@pytest.mark.parametrize("make", [models.bert, lambda: models.torch_encoder(norm_first=False)])
def test_a_shared_norm_is_restricted_if_the_user_says_so(make: Callable[[], nn.Module]) -> None:
    model = make()
    steppe.sparsify_(model, [RestrictedNorm(allow_shared=True)])
    set_scales_(model)
    steppe.project_(model)
    for scale in scales(model):
        assert scale.min() == 1.0


@pytest.mark.parametrize("ramp", [0.1, 1.0])
def test_a_trained_norm_below_the_floor_needs_a_ramp(ramp: float) -> None:
    model = models.gpt2()
    set_scales_(model)
    with pytest.raises(ValueError, match=r"below the floor 1\.0; .*RestrictedNorm\(ramp=0\.3\)"):
        steppe.sparsify_(model, [RestrictedNorm()])
    steppe.sparsify_(model, [RestrictedNorm(ramp=ramp)])


@pytest.mark.parametrize("progress", [-0.1, 1.1, math.nan])
def test_progress_outside_the_run_is_refused(progress: float) -> None:
    model = steppe.sparsify_(models.gpt2(), [RestrictedNorm(ramp=0.3)])
    with pytest.raises(ValueError, match="expected a share of the run"):
        steppe.advance_(model, progress)


@pytest.mark.parametrize(
    "settings", [{"floor": 0.0}, {"floor": -1.0}, {"ramp": -0.1}, {"ramp": 1.1}]
)
def test_settings_that_mean_nothing_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"RestrictedNorm.*expected"):
        RestrictedNorm(**settings)
