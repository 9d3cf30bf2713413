"""fold_: the same outputs from a plain model."""

from __future__ import annotations

import copy
import dataclasses
import functools
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForSeq2SeqLM,
)

import models
import odd
import steppe
from plugins.thresholds import threshold_of
from steppe import JumpingSquaredReLU, RestrictedNorm, RisingThreshold, ZerothBias
from steppe.errors import SparsificationError
from steppe.plugins.applied import sparsification_of

MODELS: dict[str, Callable[[], nn.Module]] = {
    **models.LANGUAGE_MODELS,
    **models.VISION_MODELS,
    "t5 gated": functools.partial(models.t5, gated=True),
    "torch encoder": models.torch_encoder,
}
NO_BIAS = ("t5", "t5 gated", "llama", "qwen2")
each_model = pytest.mark.parametrize("name", MODELS)


def run(model: nn.Module) -> Tensor:
    """The output for fixed inputs."""
    if isinstance(model, nn.TransformerEncoder):
        x = torch.randn(2, 7, models.D_MODEL, generator=torch.Generator().manual_seed(0))
        return model(x.to(model.layers[0].linear1.weight.dtype))
    inputs = models.inputs_for(model)
    if "pixel_values" in inputs:
        inputs["pixel_values"] = inputs["pixel_values"].to(model.dtype)
    return model(**inputs).logits


def trained(name: str, dtype: torch.dtype = torch.float32, *others: steppe.Plugin) -> nn.Module:
    """A model with known thresholds."""
    torch.manual_seed(0)
    model = MODELS[name]().to(dtype).train()
    with torch.no_grad():
        for block in steppe.find_blocks(model):
            if block.activated.bias is not None:
                block.activated.bias.normal_(std=0.1)
    steppe.sparsify_(model, [RisingThreshold(multiple=1.0), *others])
    run(model)
    steppe.project_(steppe.advance_(model, 0.45))
    return model.eval()


def active_sets(model: nn.Module) -> list[Tensor]:
    """Where the hidden layer of each block is active, and the logits."""
    found: list[Tensor] = []
    hooks = [
        block.down.register_forward_pre_hook(functools.partial(_keep, found))
        for block in steppe.find_blocks(model)
    ]
    with torch.no_grad():
        logits = run(model)
    for hook in hooks:
        hook.remove()
    return [*found, logits]


def _keep(found: list[Tensor], module: nn.Module, args: tuple[Any, ...]) -> None:
    found.append(args[0] != 0)


@each_model
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_outputs_and_the_active_sets_stay(name: str, dtype: torch.dtype) -> None:
    model = trained(name, dtype)
    *sets, logits = active_sets(model)
    parameters = dict(model.named_parameters())
    keys = [key for key in model.state_dict() if ".threshold." not in key]
    types = [type(module) for module in model.modules() if "Threshold" not in type(module).__name__]
    assert steppe.fold_(model) is model
    *folded, output = active_sets(model)
    tolerance = 1e-6 if dtype == torch.float32 else 1e-14
    assert (output - logits).abs().max() <= tolerance * logits.abs().max()
    if dtype == torch.float64:
        assert all(map(torch.equal, folded, sets))
    # Nothing is left but a bias.
    assert sparsification_of(model) is None
    assert not hasattr(getattr(model, "config", None), "steppe")
    assert [type(module) for module in model.modules()] == types
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    new = [key for key in model.state_dict() if key not in keys]
    assert all(key.endswith(".bias") for key in new)
    assert bool(new) == (name in NO_BIAS)
    assert all(dict(model.named_parameters())[n] is p for n, p in parameters.items())
    # The comparison can fail: without the threshold more is active.
    with torch.no_grad():
        for block in steppe.find_blocks(model):
            block.activated.bias.zero_()
    assert not all(map(torch.equal, active_sets(model)[:-1], sets))


@pytest.mark.parametrize(
    ("name", "load"),
    [
        ("gpt2", AutoModelForCausalLM.from_pretrained),
        ("opt", AutoModelForCausalLM.from_pretrained),
        ("llama", AutoModelForCausalLM.from_pretrained),  # by its config's mlp_bias
        ("vit", AutoModelForImageClassification.from_pretrained),
    ],
)
def test_the_stock_class_loads_it_without_steppe(
    name: str, load: Callable[..., nn.Module], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = steppe.fold_(trained(name))
    model.save_pretrained(tmp_path)
    assert "steppe" not in (tmp_path / "config.json").read_text()
    loaded = load(tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(run(loaded), run(model))
    assert list(loaded.state_dict()) == list(model.state_dict())
    assert not caplog.records


@pytest.mark.parametrize("name", ["t5", "qwen2"])
def test_a_stock_class_that_cannot_hold_the_bias_is_told(
    name: str, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    model = trained(name)
    with caplog.at_level(logging.WARNING, logger="steppe"):
        steppe.fold_(model)
    assert "from_pretrained would leave it out" in caplog.text
    if name == "t5":  # and it does
        model.save_pretrained(tmp_path)
        loaded = AutoModelForSeq2SeqLM.from_pretrained(tmp_path).eval()
        assert not torch.equal(run(loaded), run(model))


def test_a_new_bias_is_trained_where_its_weight_is() -> None:
    model = models.llama()
    model.model.layers[0].mlp.gate_proj.weight.requires_grad_(False)
    steppe.sparsify_(model, [RisingThreshold()])
    run(model)
    steppe.fold_(steppe.project_(steppe.advance_(model, 1.0)))
    first, second = (layer.mlp.gate_proj for layer in model.model.layers)
    assert not first.bias.requires_grad
    assert second.bias.requires_grad
    run(model).square().mean().backward()
    assert second.bias.grad.any()


def test_other_plugins_stay_and_can_be_taken_out_later() -> None:
    model = trained("gpt2", torch.float32, ZerothBias(), RestrictedNorm(), JumpingSquaredReLU())
    old = run(model)
    steppe.fold_(model)
    torch.testing.assert_close(run(model), old, rtol=1e-5, atol=1e-6)
    plugins = [entry["plugin"] for entry in model.config.steppe["plugins"]]
    assert plugins == ["zeroth_bias", "restricted_norm", "jumping_squared_relu"]
    assert len(steppe.added_parameters(model)) == 2
    steppe.project_(steppe.advance_(model, 1.0))
    steppe.sparsify_(model, [RisingThreshold()])  # it may come again
    steppe.restore_(model)
    assert sparsification_of(model) is None
    assert "zeroth_bias" not in "".join(model.state_dict())


def test_several_calls_of_sparsify_are_all_folded() -> None:
    torch.manual_seed(0)
    model = models.gpt2()
    steppe.sparsify_(model, [RisingThreshold(1.0)], where=lambda block: block.name.endswith("1"))
    steppe.sparsify_(model, [RisingThreshold(2.0)], where=lambda block: block.name.endswith("0"))
    run(model)
    steppe.project_(steppe.advance_(model, 1.0))
    old = run(model.eval())
    steppe.fold_(model)
    torch.testing.assert_close(run(model), old, rtol=1e-5, atol=1e-6)
    assert sparsification_of(model) is None


def test_folding_twice_is_one_clear_error() -> None:
    model = steppe.fold_(trained("gpt2"))
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(SparsificationError, match=r"GPT2LMHead.* folded already\. First: "):
        steppe.fold_(model)
    with pytest.raises(SparsificationError, match="carries no threshold"):
        steppe.fold_(steppe.sparsify_(model, [RestrictedNorm()]))
    assert all(torch.equal(model.state_dict()[key], value) for key, value in before.items())


def test_folding_before_any_batch_is_one_clear_error() -> None:
    model = steppe.advance_(steppe.sparsify_(models.gpt2(), [RisingThreshold()]), 1.0)
    with pytest.raises(SparsificationError, match=r"transformer\.h\.0 has seen no training batch"):
        steppe.fold_(model)
    assert threshold_of(steppe.find_blocks(model)[0]) is not None


class StubbornConfig(odd.OddConfig):
    """Ctrl-C comes where its layers are said to have biases."""

    def __setattr__(self, name: str, value: object) -> None:
        if name == "mlp_bias" and value:
            raise KeyboardInterrupt
        super().__setattr__(name, value)


def interrupted() -> nn.Module:
    """A model with a config that raises."""
    model = odd.odd()
    model.config.__class__ = StubbornConfig
    return model


def with_shared_memory() -> nn.Module:
    """A model with a bias that cannot be written."""
    model = odd.odd(mlp_bias=True)
    bias = torch.zeros(1).expand(odd.D_HIDDEN)
    model.body.stack[1].widen.bias = nn.Parameter(bias, requires_grad=False)
    return model


@pytest.mark.parametrize(
    ("make", "error"),
    [
        (interrupted, KeyboardInterrupt),
        (with_shared_memory, RuntimeError),
    ],
)
def test_it_is_done_whole_or_not_at_all(
    make: Callable[[], nn.Module], error: type[BaseException]
) -> None:
    model = make()
    steppe.sparsify_(model, [RisingThreshold()], patterns=[odd.PATTERN])
    model(odd.ids())
    steppe.project_(steppe.advance_(model, 1.0))
    parameters = dict(model.named_parameters())
    before = copy.deepcopy(model.state_dict())
    expected, config = model.eval()(odd.ids()).logits, model.config.to_dict()
    with pytest.raises(error):
        steppe.fold_(model)
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(model.state_dict()[name], one) for name, one in before.items())
    assert {name: id(one) for name, one in model.named_parameters()} == {
        name: id(one) for name, one in parameters.items()
    }
    assert model.config.to_dict() == config
    assert torch.equal(model(odd.ids()).logits, expected)
    assert all(threshold_of(block) is not None for block in steppe.find_blocks(model))


@pytest.mark.filterwarnings("ignore::steppe.IncompleteCoverageWarning")
def test_blocks_of_which_no_pattern_was_told_do_not_stop_it() -> None:
    model = odd.odd(layers=3)
    own = dataclasses.replace(odd.PATTERN, when=lambda layer: layer.is_even)
    steppe.sparsify_(model, [RisingThreshold()], patterns=[own])
    model(odd.ids())
    steppe.project_(steppe.advance_(model, 1.0))
    expected = model.eval()(odd.ids()).logits
    torch.testing.assert_close(steppe.fold_(model)(odd.ids()).logits, expected)


@pytest.mark.parametrize("name", ["gpt2", "t5 gated", "llama"])
def test_an_accelerated_model_is_the_same_before_and_after(name: str) -> None:
    model = trained(name, torch.float32, JumpingSquaredReLU())
    *_, logits = active_sets(model)
    steppe.accelerate_(model, max_density=1.0)
    with torch.no_grad():
        torch.testing.assert_close(run(model), logits, rtol=1e-5, atol=1e-6)
        steppe.fold_(model)
        torch.testing.assert_close(run(model), logits, rtol=1e-5, atol=1e-6)
        steppe.accelerate_(model, max_density=1.0)
        torch.testing.assert_close(run(model), logits, rtol=1e-5, atol=1e-6)
    steppe.restore_(model)
    assert sparsification_of(model) is None
