"""SShapedActivation: its definition, its two densities, and everything that a plug-in must do."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from itertools import product
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

import models
import oracles
import steppe
from steppe import JumpingSquaredReLU, RestrictedNorm, SShapedActivation, ZerothBias
from steppe.errors import AccelerationError, UnfitBlockError
from steppe.plugins.registry import plugin_from_settings
from steppe.training.accelerated import AccelerationOfRun
from steppe.training.recipe_plugins import named_plugins

P = torch.linspace(-6.0, 6.0, 1201, dtype=torch.float64)
SHIFTS = list(product((-1.6, 1.6), repeat=2))
each_shift = pytest.mark.parametrize(("shift_x", "shift_y"), SHIFTS)
MODELS: dict[str, Callable[[], nn.Module]] = {
    **models.LANGUAGE_MODELS,
    **models.VISION_MODELS,
    "gated": partial(models.llama, "relu"),
}


def acts(model: nn.Module) -> list[nn.Module]:
    """What stands at each block's activation."""
    return [block.current_act for block in steppe.find_blocks(model)]


def logits(model: nn.Module) -> torch.Tensor:
    return model(**models.inputs_for(model)).logits


def relu_models() -> dict[str, Callable[[], nn.Module]]:
    """The models that can take it."""
    return {
        name: make
        for name, make in MODELS.items()
        if all(steppe.activations.is_relu(block.act) for block in steppe.find_blocks(make()))
    }


@each_shift
@pytest.mark.parametrize("half_width", [1.5, 0.25])
def test_it_is_the_papers_function_with_its_exact_derivative(
    shift_x: float, shift_y: float, half_width: float
) -> None:
    plugin = SShapedActivation(shift_x, shift_y, half_width)
    for act in acts(steppe.sparsify_(models.gpt2().double(), [plugin])):
        values = [oracles.s_shaped(p, shift_x, shift_y, half_width) for p in P.tolist()]
        assert act(P).tolist() == pytest.approx(values, rel=1e-14, abs=1e-14)
        p = P.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(act(p).sum(), p)
        assert torch.equal(act.derivative(P), gradient)
        is_flat = (P - shift_x).abs() <= half_width
        assert 0 < is_flat.sum() < len(P)
        assert torch.equal(act.derivative(P) == 0, is_flat)


@each_shift
@pytest.mark.parametrize("make", [models.gpt2, partial(models.llama, "relu")], ids=["up", "gate"])
def test_the_derivative_density_is_that_of_autograd_while_the_density_is_one(
    make: Callable[[], nn.Module], shift_x: float, shift_y: float
) -> None:
    plugin = SShapedActivation(shift_x, shift_y)
    model = steppe.sparsify_(make().double().eval(), [plugin])
    blocks = steppe.find_blocks(model)
    with torch.no_grad():
        for block in blocks:
            block.activated.weight.mul_(40.0)  # so that pre-activations leave the flat part
    seen: dict[str, list[torch.Tensor]] = {block.name: [] for block in blocks}
    hooks = [
        block.activated.register_forward_hook(
            lambda _module, _args, p, name=block.name: seen[name].append(p.detach())
        )
        for block in blocks
    ]
    with steppe.watch(model) as monitor:
        logits(model)
    for hook in hooks:
        hook.remove()
    measured = steppe.measure(model, [models.inputs_for(model)], labels=None)
    for report in (monitor.report(), measured):
        assert report.density == 1.0
        for block, of_block in zip(blocks, report.blocks, strict=True):
            p = torch.cat(seen[block.name]).requires_grad_()
            (gradient,) = torch.autograd.grad(block.current_act(p).sum(), p)
            assert of_block.derivative_density == float((gradient != 0).double().mean())
            assert 0.1 < of_block.derivative_density < 0.9


def test_restore_is_exact_for_every_model() -> None:
    fitting = relu_models()
    assert {"gpt2", "opt", "gated"} <= set(fitting)
    for make in fitting.values():
        model = make().eval()
        keys, before, old = list(model.state_dict()), logits(model), acts(model)
        steppe.sparsify_(model, [SShapedActivation()])
        assert list(model.state_dict()) == keys
        assert not torch.equal(logits(model), before)
        steppe.restore_(model)
        assert torch.equal(logits(model), before)
        assert all(now is then for now, then in zip(acts(model), old, strict=True))


@pytest.mark.parametrize("make", [models.gpt2, partial(models.llama, "relu")], ids=["up", "gate"])
def test_it_is_saved_and_comes_back_beside_other_plugins(
    make: Callable[[], nn.Module], tmp_path: Path
) -> None:
    plugins = [SShapedActivation(-1.6, 1.6, 1.25), ZerothBias(max_tokens=16), RestrictedNorm()]
    model = steppe.sparsify_(make().eval(), plugins)
    model.save_pretrained(tmp_path)
    loaded = steppe.load_pretrained(AutoModelForCausalLM.from_pretrained, tmp_path)
    assert [repr(act) for act in acts(loaded)] == [repr(act) for act in acts(model)]
    assert "shift_x=-1.6, shift_y=1.6, half_width=1.25" in repr(acts(loaded)[0])
    assert torch.equal(logits(loaded.eval()), logits(model))


def test_a_recipe_names_it_by_its_key() -> None:
    (plugin,) = named_plugins('{"s_shaped_squared_relu": {"shift_x": -1.6, "half_width": 1.0}}')
    assert plugin == SShapedActivation(-1.6, 1.6, 1.0)
    assert plugin_from_settings(plugin.settings(), [SShapedActivation]) == plugin


@pytest.mark.parametrize("make", [partial(models.gpt2, "gelu"), partial(models.llama, "silu")])
def test_another_activation_than_relu_is_refused(make: Callable[[], nn.Module]) -> None:
    model = make().eval()
    before = logits(model)
    with pytest.raises(UnfitBlockError, match=r"takes the place of ReLU, got .*hidden_act='relu'"):
        steppe.sparsify_(model, [SShapedActivation()])
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize("ramp", [0.0, 0.3])
def test_two_plugins_for_one_activation_are_refused_and_change_nothing(ramp: float) -> None:
    for plugins in (
        [SShapedActivation(), JumpingSquaredReLU(ramp=ramp)],
        [JumpingSquaredReLU(ramp=ramp), SShapedActivation()],
    ):
        model = models.gpt2().eval()
        before = logits(model)
        with pytest.raises(UnfitBlockError, match="two plug-ins change the activation"):
            steppe.sparsify_(model, plugins)
        assert torch.equal(logits(model), before)


@pytest.mark.parametrize(
    "settings",
    [
        {"half_width": 0.0},
        {"half_width": math.inf},
        {"shift_x": math.nan},
        {"shift_y": -math.inf},
    ],
)
def test_settings_that_mean_nothing_are_refused(settings: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=r"expected (half_width > 0|finite shifts)"):
        SShapedActivation(**settings)


def test_it_trains_dense_and_the_record_says_why() -> None:
    model = steppe.sparsify_(models.gpt2(), [SShapedActivation()])
    before = logits(model.eval())
    with pytest.raises(AccelerationError, match=r"SShapedSquaredReLU\(.* is not zero"):
        steppe.accelerate_(model)
    run = AccelerationOfRun(True, ())
    run.begin(model)
    assert torch.equal(logits(model), before)
    run.end()
    assert "SShapedSquaredReLU" in str(run.record)
