"""MLPs that call their activation as a function: it is told by evaluating them."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import steppe
from steppe import BlockPattern
from steppe.errors import BlocksNotFoundError
from steppe.ops.cpu.library import kernels

WIDTH, HIDDEN = 16, 40
native = pytest.mark.skipif(kernels().name != "native", reason=kernels().reason)


class Plain(nn.Module):
    """As of nanochat and the modded nanoGPT."""

    def __init__(self, function: Callable[[Tensor], Tensor], dropout: float | None = None) -> None:
        super().__init__()
        self.c_fc = nn.Linear(WIDTH, HIDDEN, bias=False)
        self.c_proj = nn.Linear(HIDDEN, WIDTH, bias=False)
        self.function = function
        self.resid = None if dropout is None else nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        z = self.c_proj(self.function(self.c_fc(x)))
        return z if self.resid is None else self.resid(z)


class Gated(nn.Module):
    """As of Meta's Llama."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.w1 = nn.Linear(WIDTH, HIDDEN)
        self.w2 = nn.Linear(HIDDEN, WIDTH)
        self.w3 = nn.Linear(WIDTH, HIDDEN)
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(self.function(self.w1(x)) * self.w3(x))


class Fused(nn.Module):
    """As of DINOv2's giant."""

    def __init__(self, function: Callable[[Tensor], Tensor], last: bool = False) -> None:
        super().__init__()
        self.weights_in = nn.Linear(WIDTH, 2 * HIDDEN)
        self.weights_out = nn.Linear(HIDDEN, WIDTH)
        self.function = function
        self.last = last

    def forward(self, x: Tensor) -> Tensor:
        one, other = self.weights_in(x).chunk(2, dim=-1)
        if self.last:
            one, other = other, one
        return self.weights_out(self.function(one) * other)


class Layer(nn.Module):
    def __init__(self, make: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.ln_2 = nn.LayerNorm(WIDTH)
        self.mlp = make()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mlp(self.ln_2(x))


class Model(nn.Module):
    def __init__(self, make: Callable[[], nn.Module]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(Layer(make) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def relu_squared(p: Tensor) -> Tensor:
    return F.relu(p).square()


MLPS: dict[str, Callable[[], nn.Module]] = {
    "plain": lambda: Plain(relu_squared),
    "gated": lambda: Gated(F.relu),
    "fused": lambda: Fused(F.relu),
    "fused, last": lambda: Fused(relu_squared, last=True),
    "dropout after": lambda: Plain(F.relu, dropout=0.25),
}
EACH = pytest.mark.parametrize("name", MLPS)


def x_of(seed: int = 0) -> Tensor:
    return torch.randn(3, 7, WIDTH, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    ("function", "told"),
    [
        (F.relu, "ReLU()"),
        (lambda p: p * (p > 0), "ReLU()"),
        (relu_squared, "Rectifier(alpha=0.0, beta=1.0)"),
        (lambda p: F.relu(p) * (1 + 0.5 * F.relu(p)), "Rectifier(alpha=1.0, beta=0.5)"),
        (F.silu, "SiLU()"),
        (lambda p: p * torch.sigmoid(p), "SiLU()"),
        (F.gelu, "GELU(approximate='none')"),
        (lambda p: F.gelu(p, approximate="tanh"), "GELU(approximate='tanh')"),
    ],
)
def test_the_function_is_told_by_its_values(
    function: Callable[[Tensor], Tensor], told: str
) -> None:
    for mlp in (Plain(function), Gated(function), Fused(function), Fused(function, last=True)):
        (block,) = steppe.find_blocks(mlp)
        assert repr(block.act) == told
        assert (block.d_model, block.d_hidden) == (WIDTH, HIDDEN)


class Between(Plain):
    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.c_fc(x))
        return self.c_proj(h / h.norm(dim=-1, keepdim=True).clamp(min=1.0))


class Residual(Plain):
    def forward(self, x: Tensor) -> Tensor:
        return x + self.c_proj(F.relu(self.c_fc(x)))


class Random(Plain):
    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(F.dropout(F.relu(self.c_fc(x)), 0.5, self.training))


class Normed(Plain):
    def __init__(self, function: Any) -> None:
        super().__init__(function)
        self.batch = nn.BatchNorm1d(HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        h = self.batch(F.relu(self.c_fc(x)).flatten(0, -2))
        return self.c_proj(h.view(*x.shape[:-1], HIDDEN))


@pytest.mark.parametrize("kind", [Between, Residual, Random, Normed])
def test_what_computes_something_else_is_no_block_and_is_left_as_it_is(kind: type) -> None:
    mlp = kind(F.relu)
    before, state = torch.get_rng_state(), copy.deepcopy(mlp.state_dict())
    with pytest.raises(BlocksNotFoundError, match="These look like MLPs"):
        steppe.find_blocks(mlp)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(value, state[key]) for key, value in mlp.state_dict().items())


def test_a_gate_that_is_taken_for_the_other_layer_is_no_block() -> None:
    wrong = BlockPattern(family="wrong", gate="w3", up="w1", down="w2")
    mlp = Gated(F.silu)
    mlp.w1.register_forward_hook(lambda *args: pytest.fail("the model is run"))
    (block,) = steppe.find_blocks(mlp, patterns=[wrong])
    assert block.gate is mlp.w1  # by the built-in row


@EACH
def test_finding_changes_nothing_and_watching_no_bit(name: str) -> None:
    model = Model(MLPS[name]).eval()
    keys, modules = list(model.state_dict()), [one for one, _ in model.named_modules()]
    first, again = steppe.find_blocks(model), steppe.find_blocks(model)
    assert len(first) == 2
    assert [one.act_slot.module for one in first] == [one.act_slot.module for one in again]
    assert [one for one, _ in model.named_modules()] == modules
    assert all(isinstance(block.norm, nn.LayerNorm) for block in first) or "fused" in name
    x = x_of()
    expected = model(x)
    counted: list[Tensor] = []
    handles = [
        block.down.register_forward_pre_hook(lambda layer, args: counted.append(args[0] != 0))
        for block in first
    ]
    with steppe.watch(model, gradients=True) as monitor:
        output = model(x)
        assert torch.equal(output, expected)
        output.square().mean().backward()
    for handle in handles:
        handle.remove()
    report = monitor.report()
    assert report.coverage == 1.0
    for block, active in zip(report.blocks, counted, strict=True):
        assert block.density == pytest.approx(active.double().mean().item())
        assert 0.0 < block.density < 1.0
        assert block.derivative_density_by_identity == pytest.approx(
            block.derivative_density, rel=1e-4
        )
    assert list(model.state_dict()) == keys
    assert all("forward" not in vars(layer.mlp) for layer in model.layers)


@EACH
def test_plug_ins_act_are_copied_and_come_off(name: str) -> None:
    model = Model(MLPS[name]).eval()
    x, keys = x_of(), list(model.state_dict())
    before = model(x)
    plugins = [steppe.JumpingSquaredReLU(ramp=0.5), steppe.RisingThreshold(ramp=0.5)]
    steppe.sparsify_(model, plugins)
    assert torch.equal(model(x), before)
    steppe.constrain_(model, torch.optim.SGD(model.parameters(), lr=0.1), total_steps=2)
    model.train()(x).square().mean().backward()
    steppe.advance_(model, 1.0)
    steppe.project_(model)
    model.eval()
    changed = model(x)
    assert (changed - before).abs().max() > 1e-3
    for block in steppe.find_blocks(model):
        p = block.activated(model.layers[0].ln_2(x))
        assert 0.0 < (p > 0).float().mean() < 0.4  # below the threshold most are not active
    assert torch.equal(copy.deepcopy(model)(x), changed)
    steppe.restore_(model)
    assert torch.equal(model(x), before)
    assert list(model.state_dict()) == keys


def test_a_sparsified_model_is_pickled() -> None:
    model = Model(MLPS["plain"]).eval()
    steppe.sparsify_(model, [steppe.JumpingSquaredReLU(ramp=0.5)])
    steppe.advance_(model, 0.25)
    x = x_of()
    assert torch.equal(pickle.loads(pickle.dumps(model))(x), model(x))


@native
@EACH
def test_accelerated_is_the_same_forward_and_backward(name: str) -> None:
    model = Model(MLPS[name]).eval()
    fast = steppe.accelerate_(copy.deepcopy(model), max_density=1.0)
    for x in (x_of()[:1, :1], x_of()[:1, :1], x_of()[:1, :1], x_of()):
        with torch.no_grad():
            assert torch.allclose(fast(x), model(x), atol=1e-5)
    assert all(block.is_sparse for block in steppe.explain(fast).blocks)
    for one in (model, fast):
        torch.manual_seed(1)
        one.train()(x_of()).square().mean().backward()
    assert all(block.is_sparse for block in steppe.explain(fast).blocks)
    for (key, one), (other_key, other) in zip(
        model.named_parameters(), fast.named_parameters(), strict=True
    ):
        assert key == other_key
        assert (one.grad - other.grad).norm() <= 1e-5 * one.grad.norm(), key


def test_a_model_without_weights_is_told_too() -> None:
    with torch.device("meta"):
        model = Model(MLPS["plain"])
    assert [repr(block.act) for block in steppe.find_blocks(model)] == [
        "Rectifier(alpha=0.0, beta=1.0)"
    ] * 2
