"""A plug-in is one file and one registration: `dummy_plugin` does all that steppe's own do."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

import models
import steppe
from howto.dummy_plugin import BentReLU, Offset
from steppe.data.text_limits import tokens_per_window
from steppe.errors import DataError
from steppe.ops.cpu.library import kernels
from steppe.plugins import PLUGINS, register
from steppe.plugins.base import Plugin
from test_architecture import SOURCES, imports_of, is_below

TOKENS = torch.arange(1, 13).view(2, 6)
needs_kernels = pytest.mark.skipif(kernels().name != "native", reason=kernels().reason)


@pytest.fixture
def plain() -> PreTrainedModel:
    """A small GPT-2 with ReLU."""
    return models.gpt2("relu").eval()


@pytest.fixture
def bent(plain: PreTrainedModel) -> PreTrainedModel:
    """The same with the plug-in."""
    steppe.sparsify_(plain, [BentReLU()])
    return plain


def logits(model: nn.Module, tokens: Tensor = TOKENS) -> Tensor:
    return model(input_ids=tokens).logits


def offset_of(model: nn.Module) -> Tensor:
    """The buffer of the first block."""
    offset = steppe.find_blocks(model)[0].activated.get_submodule("bent_relu")
    assert isinstance(offset, Offset)
    return offset.offset


def accelerate(model: nn.Module) -> nn.Module:
    return steppe.accelerate_(model, max_density=1.0)


def test_restore_is_the_exact_inverse(plain: PreTrainedModel) -> None:
    keys, before = list(plain.state_dict()), logits(plain)
    steppe.sparsify_(plain, [BentReLU()])
    assert not torch.equal(logits(plain), before)
    steppe.restore_(plain)
    assert torch.equal(logits(plain), before)
    assert list(plain.state_dict()) == keys


@needs_kernels
@torch.no_grad()
@pytest.mark.parametrize("tokens", [TOKENS, TOKENS[:1, :1]], ids=["many", "decode"])
def test_it_runs_on_the_kernels(bent: PreTrainedModel, tokens: Tensor) -> None:
    fast = accelerate(copy.deepcopy(bent))
    for _ in range(3):
        torch.testing.assert_close(logits(fast, tokens), logits(bent, tokens))
    assert all(block.is_sparse for block in steppe.explain(fast).blocks)


@needs_kernels
@torch.no_grad()
@pytest.mark.parametrize("tokens", [TOKENS, TOKENS[:1, :1]], ids=["many", "decode"])
def test_the_kernels_notice_that_its_bias_and_its_activation_change(
    bent: PreTrainedModel, tokens: Tensor
) -> None:
    fast = accelerate(copy.deepcopy(bent))
    before = logits(fast, tokens)
    for model in (bent, fast):
        offset_of(model).fill_(-0.3)
    after = logits(bent, tokens)
    assert not torch.allclose(after, before, atol=1e-3)
    torch.testing.assert_close(logits(fast, tokens), after)
    for model in (bent, fast):
        for block in steppe.find_blocks(model):
            block.act.bend.fill_(2.0)
    torch.testing.assert_close(logits(fast, tokens), logits(bent, tokens))
    assert not torch.allclose(logits(bent, tokens), after, atol=1e-3)


@needs_kernels
def test_it_trains_on_the_kernels_with_its_schedule(plain: PreTrainedModel) -> None:
    steppe.sparsify_(plain, [BentReLU(ramp=0.5)])
    fast = accelerate(copy.deepcopy(plain))
    for progress in (0.0, 0.25, 1.0):
        for model in (plain, fast):
            model.zero_grad()
            steppe.advance_(model, progress)
            model.train()(input_ids=TOKENS, labels=TOKENS).loss.backward()
        for (name, p), q in zip(plain.named_parameters(), fast.parameters(), strict=True):
            torch.testing.assert_close(q.grad, p.grad, rtol=1e-3, atol=1e-5, msg=name)
    assert all(block.is_sparse for block in steppe.explain(fast).blocks)
    assert float(steppe.find_blocks(plain)[0].act.bend) == 0.25


@needs_kernels
@torch.no_grad()
def test_it_is_measured_the_same_on_the_kernels(bent: PreTrainedModel) -> None:
    fast = accelerate(copy.deepcopy(bent))
    reports = []
    for model in (bent, fast):
        offset_of(model).fill_(0.5)
        logits(model)
        with steppe.watch(model) as monitor:
            logits(model)
        reports.append(monitor.report())
    own, routed = reports
    assert own.density == routed.density
    assert own.derivative_density == routed.derivative_density
    assert own.blocks[0].density < own.blocks[1].density


def test_it_is_saved_and_loaded(bent: PreTrainedModel, tmp_path: Path) -> None:
    with torch.no_grad():
        offset_of(bent).uniform_(-0.2, 0.2)
        expected = logits(bent)
    bent.save_pretrained(tmp_path)
    for load in (
        AutoModelForCausalLM.from_pretrained,
        lambda folder: steppe.load_pretrained(AutoModelForCausalLM.from_pretrained, folder),
    ):
        loaded = load(tmp_path).eval()
        assert torch.equal(logits(loaded), expected)
        assert torch.equal(offset_of(loaded), offset_of(bent))


def test_it_tells_the_data_its_longest_sequence(bent: PreTrainedModel) -> None:
    assert tokens_per_window(bent, None) == BentReLU.max_tokens
    with pytest.raises(DataError, match="at most 24 tokens"):
        tokens_per_window(bent, 25)


def test_registered_keys_are_of_one_plugin_each() -> None:
    assert PLUGINS["bent_relu"] is BentReLU
    assert register(BentReLU) is BentReLU

    class Other(BentReLU):
        """Another one with the same key."""

    with pytest.raises(ValueError, match="another plug-in, BentReLU, has the key 'bent_relu'"):
        register(Other)
    assert PLUGINS["bent_relu"] is BentReLU


def test_acceleration_knows_no_plugin_by_class() -> None:
    """It asks `Plugin` and its kin, and what was applied; each plug-in may come and go."""
    known = {"steppe.plugins.base", "steppe.plugins.applied"}
    for name, source in SOURCES.items():
        if is_below(name, "steppe.acceleration") or is_below(name, "steppe.routing"):
            assert {i for i in imports_of(source) if is_below(i, "steppe.plugins")} <= known, name


def test_no_other_part_of_steppe_names_this_plugin() -> None:
    assert issubclass(BentReLU, Plugin)
    assert not [name for name, source in SOURCES.items() if "bent_relu" in source.lower()]
