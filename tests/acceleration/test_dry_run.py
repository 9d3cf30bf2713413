"""`accelerate_` refuses a block that differs from its pattern, and the check changes nothing."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import models
import steppe
from steppe.bench import PATTERNS, Block
from steppe.errors import AccelerationError
from steppe.ops.cpu import copies
from steppe.ops.cpu.library import kernels

pytestmark = pytest.mark.skipif(kernels().name != "native", reason=kernels().reason)
WIDTH, HIDDEN = 16, 64
PATTERN = [steppe.BlockPattern("mine", up="up", act="act", down="down")]


class Mlp(nn.Module):
    """A block with room for something that its pattern does not name."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.act, self.down = nn.Linear(WIDTH, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, WIDTH)
        self.norm = nn.LayerNorm(HIDDEN)
        nn.init.constant_(self.norm.weight, 1.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.act(self.up(x)))


def norm_between(self: Mlp, x: Tensor) -> Tensor:
    return self.down(self.norm(self.act(self.up(x))))


def norm_before_act(self: Mlp, x: Tensor) -> Tensor:
    return self.down(self.act(F.rms_norm(self.up(x), (HIDDEN,))))


def functional_dropout(self: Mlp, x: Tensor) -> Tensor:
    return self.down(F.dropout(self.act(self.up(x)), 0.1, self.training))


def topk(self: Mlp, x: Tensor) -> Tensor:
    a = self.act(self.up(x))
    return self.down(a * (a >= a.topk(5).values[..., -1:]))


def in_place(self: Mlp, x: Tensor) -> Tensor:
    return self.down(self.act(self.up(x)).mul_(2.0))


def detached(self: Mlp, x: Tensor) -> Tensor:
    return self.down(self.act(self.up(x)).detach())


def straight_through(self: Mlp, x: Tensor) -> Tensor:
    p = self.up(x)
    return self.down(self.act(p + 0.0 * p.detach() - p.detach() + p.detach()))


def act_twice(self: Mlp, x: Tensor) -> Tensor:
    return self.down(self.act(self.act(self.up(x)) - 0.1))


def rounded(self: Mlp, x: Tensor) -> Tensor:
    a = self.act(self.up(x))
    return self.down((a * 64).round() / 64)


def noise_in_training(self: Mlp, x: Tensor) -> Tensor:
    a = self.act(self.up(x))
    return self.down(a + 0.1 * torch.randn_like(a) if self.training else a)


WRONG = [
    norm_between,
    norm_before_act,
    functional_dropout,
    topk,
    in_place,
    detached,
    act_twice,
    rounded,
    noise_in_training,
]


def of_kind(forward: Callable[[Mlp, Tensor], Tensor]) -> Mlp:
    return type("Mlp", (Mlp,), {"forward": forward})()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("forward", WRONG)
def test_another_computation_is_refused_by_name(
    forward: Callable[[Mlp, Tensor], Tensor], dtype: torch.dtype
) -> None:
    model = nn.ModuleDict({"layer": of_kind(forward)}).to(dtype)
    with pytest.raises(AccelerationError, match=r"layer: is not the block.*'mine'.*where="):
        steppe.accelerate_(model, patterns=PATTERN)
    assert [type(module).__name__ for module in model.modules()] == [
        "ModuleDict",
        "Mlp",
        "Linear",
        "ReLU",
        "Linear",
        "LayerNorm",
    ]
    assert not hasattr(model["layer"].up, "_steppe_routes")


@pytest.mark.parametrize("forward", WRONG)
def test_unchecked_blocks_are_looked_at_in_their_first_call(
    forward: Callable[[Mlp, Tensor], Tensor],
) -> None:
    plain = of_kind(forward)
    fast = steppe.accelerate_(copy.deepcopy(plain), patterns=PATTERN, max_density=1.0, check=False)
    for training in (False, True, False):
        for model in (plain, fast):
            model.train(training)
        for _ in range(3):
            x = torch.randn(12, WIDTH)
            torch.manual_seed(0)
            expected = plain(x)
            torch.manual_seed(0)
            assert torch.allclose(fast(x), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("gated", [False, True])
def test_an_ordinary_block_is_routed_from_its_second_call_on(gated: bool) -> None:
    plain = Block(WIDTH, HIDDEN, gated=gated)
    fast = steppe.accelerate_(copy.deepcopy(plain), patterns=PATTERNS, max_density=1.0, check=False)
    x = torch.randn(12, WIDTH)
    assert torch.equal(fast(x), plain(x))
    fast(x)
    assert steppe.explain(fast).blocks[0].calls == {"own modules": 1, "sparse": 1}


class LoRALinear(nn.Linear):
    """An adapter in a subclass, which adds nothing at first but learns."""

    def __init__(self, fan_in: int, fan_out: int) -> None:
        super().__init__(fan_in, fan_out)
        self.a = nn.Parameter(torch.randn(4, fan_in))
        self.b = nn.Parameter(torch.zeros(fan_out, 4))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + x @ self.a.T @ self.b.T


class SameLinear(nn.Linear):
    """A subclass that computes the same, as far as its name tells."""


class Masked(nn.Dropout):
    """Another dropout under the name of the usual one."""

    def forward(self, x: Tensor) -> Tensor:
        return x * (torch.rand(x.shape[-1]) > 0.5)


@pytest.mark.parametrize("kind", [LoRALinear, SameLinear])
@pytest.mark.parametrize("part", ["linear1", "linear2"])
def test_a_subclass_of_linear_is_refused(part: str, kind: type[nn.Linear]) -> None:
    layer = nn.TransformerEncoderLayer(16, 2, 64, dropout=0.0, batch_first=True)
    setattr(layer, part, kind(*((16, 64) if part == "linear1" else (64, 16))))
    with pytest.raises(AccelerationError, match=f"got {kind.__name__}, a subclass of nn.Linear"):
        steppe.accelerate_(layer)


def test_a_subclass_of_dropout_is_refused() -> None:
    layer = nn.TransformerEncoderLayer(16, 2, 64, batch_first=True)
    layer.dropout = Masked()
    with pytest.raises(AccelerationError, match=r"got Masked, a subclass of nn.Dropout"):
        steppe.accelerate_(layer)


@pytest.mark.parametrize("part", ["up", "act", "down"])
def test_a_forward_that_was_replaced_is_refused(part: str) -> None:
    block = Block(WIDTH, HIDDEN)
    module = getattr(block, part)
    module.forward = module.forward
    with pytest.raises(AccelerationError, match=r"the forward of .* was replaced"):
        steppe.accelerate_(block, patterns=PATTERNS)


def state(model: nn.Module) -> dict[str, Any]:
    """All that a look at a model could change."""
    return {
        "modes": [module.training for module in model.modules()],
        "p": [module.p for module in model.modules() if isinstance(module, nn.Dropout)],
        "hooks": [list(module._forward_hooks.values()) for module in model.modules()],
        "grads": [parameter.grad for parameter in model.parameters()],
        "needs": [parameter.requires_grad for parameter in model.parameters()],
    }


def test_nothing_is_changed_by_looking() -> None:
    model = steppe.sparsify_(
        models.t5(dropout=0.3), [steppe.RisingThreshold(), steppe.ZerothBias(max_tokens=16)]
    )
    model(**models.inputs_for(model))  # its first pass
    model.encoder.block[0].layer[1].DenseReluDense.dropout.eval()
    next(model.parameters()).requires_grad_(False)
    calls: list[str] = []
    model.encoder.block[0].layer[1].register_forward_hook(lambda *_: calls.append("hook"))
    before, tensors = state(model), {k: v.clone() for k, v in model.state_dict().items()}
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    with steppe.watch(model) as monitor:
        steppe.accelerate_(model)
        counted = monitor.counts()
    assert torch.equal(torch.rand(3), expected)  # the generator is where it was
    assert state(model) == before
    assert all(torch.equal(tensor, tensors[k]) for k, tensor in model.state_dict().items())
    assert calls == []
    assert counted.sum() == 0
    assert not any(key[0] for key in copies._entries if key[1] == "screen")
    assert steppe.explain(model).blocks[0].calls == {}


def test_a_model_that_is_watched_while_it_is_accelerated_counts_all() -> None:
    model = models.gpt2().eval()
    inputs = models.inputs_for(model)
    with torch.no_grad(), steppe.watch(model) as monitor:
        model(**inputs)
        once = monitor.counts()
        steppe.accelerate_(model, max_density=1.0)
        model(**inputs)
        assert torch.equal(monitor.counts(), 2 * once)
        steppe.restore_(model)
        model(**inputs)
        assert torch.equal(monitor.counts(), 3 * once)


def test_a_model_made_under_inference_mode() -> None:
    with torch.inference_mode():
        plain = Block(WIDTH, HIDDEN)
        fast = copy.deepcopy(plain)
    steppe.accelerate_(fast, patterns=PATTERNS, max_density=1.0)
    for context in (torch.inference_mode, torch.no_grad):
        with context():
            for rows in (12, 1, 1, 12):
                x = torch.randn(rows, WIDTH)
                assert torch.allclose(fast(x), plain(x), rtol=1e-4, atol=1e-5)
                assert steppe.explain(fast).blocks[0].is_sparse


def test_an_error_leaves_an_older_acceleration_as_it_was() -> None:
    model = models.gpt2().eval()
    steppe.accelerate_(model, max_density=1.0)
    block = model.transformer.h[1].mlp
    forward = type(block).forward

    class Squared(steppe.surgery.swapping.plain_class(type(block))):  # type: ignore[misc]
        def forward(self, x: Tensor) -> Tensor:
            return self.c_proj(self.act(self.c_fc(x)).square())

    model.transformer.h[1].mlp.__class__ = Squared
    with pytest.raises(AccelerationError, match=r"h\.1"):
        steppe.accelerate_(model, max_density=1.0)
    assert forward is not Squared.forward
    model(**models.inputs_for(model))
    model(**models.inputs_for(model))
    first, second = steppe.explain(model).blocks
    assert first.is_sparse
    assert second.how == "own modules"


@pytest.mark.parametrize("name", ["relu2", "silu", "gelu"])
def test_an_activation_is_known_by_what_it_computes(name: str) -> None:
    """What the ramp has turned into J-SquaredReLU, and squared ReLU under any class."""
    model = models.llama() if name == "relu2" else models.llama(name)
    if name == "relu2":
        from transformers.activations import ACT2FN

        for layer in model.model.layers:
            layer.mlp.act_fn = ACT2FN["relu2"]
    else:
        with pytest.raises(AccelerationError, match=r"σ\("):
            steppe.accelerate_(model)
        steppe.sparsify_(model, [steppe.JumpingSquaredReLU(ramp=0.5)])
        steppe.advance_(model, 0.25)
        with pytest.raises(AccelerationError, match="ramp"):
            steppe.accelerate_(model)
        steppe.advance_(model, 1.0)
    plain = copy.deepcopy(model.eval())
    steppe.accelerate_(model, max_density=1.0)
    inputs = models.inputs_for(model)
    assert torch.allclose(model(**inputs).logits, plain(**inputs).logits, rtol=1e-4, atol=1e-5)
    assert all(block.is_sparse for block in steppe.explain(model).blocks)
    if name != "relu2":
        for each in (model, plain):
            steppe.advance_(each, 0.25)
        assert torch.equal(model(**inputs).logits, plain(**inputs).logits)
        assert "mixed" in steppe.explain(model).blocks[0].reason


class Shifted(nn.Module):
    """ReLU of p − ¾, squared in half."""

    def forward(self, p: Tensor) -> Tensor:
        r = F.relu(p - 0.75)
        return r + 0.5 * r * r


@pytest.mark.parametrize("with_bias", [False, True])
def test_a_shifted_rectifier_moves_the_bias(with_bias: bool) -> None:
    plain = Block(WIDTH, HIDDEN, Shifted())
    if not with_bias:
        plain.up.bias = None
    fast = copy.deepcopy(plain)
    steppe.accelerate_(fast, patterns=PATTERNS, max_density=1.0)
    for rows in (12, 1, 1, 1):
        x = 3.0 * torch.randn(rows, WIDTH)
        with torch.no_grad():
            assert torch.allclose(fast(x), plain(x), rtol=1e-4, atol=1e-5)
            assert steppe.explain(fast).blocks[0].is_sparse
            if with_bias:
                plain.up.bias += 0.1
                fast.up.bias.data += 0.1
    x = torch.randn(12, WIDTH)
    for model in (plain, fast):
        model(x).square().sum().backward()
    for one, two in zip(plain.parameters(), fast.parameters(), strict=True):
        assert torch.allclose(one.grad, two.grad, rtol=1e-4, atol=1e-5)


def test_an_activation_whose_settings_change_is_computed() -> None:
    plain = Block(WIDTH, HIDDEN, nn.Threshold(0.0, 0.0))
    fast = copy.deepcopy(plain)
    steppe.accelerate_(fast, patterns=PATTERNS, max_density=1.0)
    x = torch.randn(12, WIDTH)
    assert torch.allclose(fast(x), plain(x), rtol=1e-4, atol=1e-5)
    assert steppe.explain(fast).blocks[0].is_sparse
    for model in (plain, fast):
        model.act.threshold = 0.7
    assert torch.equal(fast(x), plain(x))
    assert "settings" in steppe.explain(fast).blocks[0].reason
