"""Gate and up in one weight: each half is a layer of the block; nothing of the model changes."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    ModernBertConfig,
    ModernBertForMaskedLM,
    Phi3Config,
    Phi3ForCausalLM,
)
from transformers.pytorch_utils import Conv1D

import steppe
from steppe import BlockPattern
from steppe.blocks.fused import Half, halves_of
from steppe.errors import AccelerationError, UnfitBlockError
from steppe.ops.cpu.library import kernels

VOCABULARY, WIDTH, HIDDEN = 64, 16, 40
native = pytest.mark.skipif(kernels().name != "native", reason=kernels().reason)


def phi3() -> nn.Module:
    torch.manual_seed(0)
    config = Phi3Config(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=HIDDEN,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=32,
        hidden_act="relu",
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    return Phi3ForCausalLM(config).eval()


def modernbert() -> nn.Module:
    torch.manual_seed(0)
    config = ModernBertConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=HIDDEN,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=32,
        hidden_activation="relu",
        mlp_bias=True,
        global_attn_every_n_layers=1,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        cls_token_id=1,
        sep_token_id=2,
    )
    return ModernBertForMaskedLM(config).eval()


class GateLast(nn.Module):
    """down(a ⊙ σ(b)) with a and b the halves of one layer, of either kind."""

    def __init__(self, conv: bool = False) -> None:
        super().__init__()
        self.both = Conv1D(2 * HIDDEN, WIDTH) if conv else nn.Linear(WIDTH, 2 * HIDDEN)
        self.act = nn.ReLU()
        self.down = nn.Linear(HIDDEN, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        up, gate = self.both(x).chunk(2, dim=-1)
        return self.down(self.act(gate) * up)


GATE_LAST = [
    BlockPattern(family="mine", gate_up="both", gate_first=False, act="act", down="down"),
]
MODELS = pytest.mark.parametrize("build", [phi3, modernbert])
PLUGINS = {
    "zeroth bias": steppe.ZerothBias,
    "norm": steppe.RestrictedNorm,
    "activation": steppe.JumpingSquaredReLU,
    "threshold": steppe.RisingThreshold,
    "penalty": lambda: steppe.ActivationPenalty(0.1),
}


def ids(rows: int = 3, length: int = 7) -> Tensor:
    return torch.randint(3, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(1))


def fused_of(model: nn.Module) -> list[nn.Module]:
    return [block.up.whole for block in steppe.find_blocks(model)]


@MODELS
def test_finding_them_changes_nothing_and_gives_the_same_ones(build: type) -> None:
    model = build()
    keys, modules = list(model.state_dict()), [name for name, _ in model.named_modules()]
    first, again = steppe.find_blocks(model), steppe.find_blocks(model)
    assert [b.up for b in first] == [b.up for b in again]
    assert all(isinstance(b.gate, Half) and isinstance(b.up, Half) for b in first)
    assert list(model.state_dict()) == keys
    assert [name for name, _ in model.named_modules()] == modules
    assert (first[0].d_model, first[0].d_hidden) == (WIDTH, HIDDEN)


@pytest.mark.parametrize("conv", [False, True])
def test_weights_are_parts_of_the_fused_one_and_compute_what_it_does(conv: bool) -> None:
    mlp = GateLast(conv)
    (block,) = steppe.find_blocks(mlp, patterns=GATE_LAST)
    assert block.gate is not None
    x = torch.randn(5, WIDTH)
    whole = mlp.both(x)
    for half, expected in ((block.up, whole[:, :HIDDEN]), (block.gate, whole[:, HIDDEN:])):
        assert half.weight.shape == (HIDDEN, WIDTH)
        assert half.weight.untyped_storage().data_ptr() == mlp.both.weight.data_ptr()
        assert torch.allclose(half(x), expected, atol=1e-6)


@MODELS
def test_watching_changes_no_bit_and_tells_what_autograd_tells(build: type) -> None:
    model = build()
    tokens = ids()
    expected = model(input_ids=tokens).logits
    with steppe.watch(model, gradients=True) as monitor:
        output = model(input_ids=tokens, labels=tokens)
        assert torch.equal(output.logits, expected)
        output.loss.backward()
    report = monitor.report()
    for block, measured in zip(steppe.find_blocks(model), report.blocks, strict=True):
        squares = torch.zeros(2)
        for text in tokens:
            model.zero_grad()
            model(input_ids=text[None], labels=text[None]).loss.backward()
            parts = block.up.whole.weight.grad.chunk(2)
            squares += torch.stack([part.square().sum() for part in parts]) / len(tokens)
        wanted = measured.squared_gradient_norm_gate, measured.squared_gradient_norm_up
        assert squares.tolist() == pytest.approx(wanted, rel=1e-4)
        assert 0.0 < measured.density < 1.0
        assert measured.derivative_density_by_identity == pytest.approx(
            measured.derivative_density, rel=1e-4
        )


def test_the_density_is_what_a_hook_on_the_last_layer_counts() -> None:
    model = phi3()
    counted = []
    for block in steppe.find_blocks(model):
        block.down.register_forward_pre_hook(lambda layer, args: counted.append(args[0] != 0))
    with torch.no_grad(), steppe.watch(model) as monitor:
        model(input_ids=ids())
    found = [block.density for block in monitor.report().blocks]
    assert found == pytest.approx([active.double().mean().item() for active in counted])


@MODELS
@pytest.mark.parametrize("name", PLUGINS)
def test_a_plug_in_trains_saves_loads_and_comes_off(build: type, name: str, tmp_path: Path) -> None:
    model = build()
    keys, tokens = list(model.state_dict()), ids()
    before = model(input_ids=tokens).logits
    steppe.sparsify_(model, [PLUGINS[name]()])
    if name != "activation":  # which another function takes the place of
        assert torch.equal(model(input_ids=tokens).logits, before)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    steppe.constrain_(model, optimizer, total_steps=2)
    model.train()
    for _ in range(2):
        loss = model(input_ids=tokens, labels=tokens).loss
        if name == "penalty":
            loss = steppe.penalize(loss, model)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    trained = model(input_ids=tokens).logits
    assert not torch.equal(trained, before)
    for parameter in steppe.added_parameters(model).values():
        assert parameter.abs().max() > 0
    model.save_pretrained(tmp_path)
    loaded = steppe.load_pretrained(type(model).from_pretrained, tmp_path).eval()
    assert torch.equal(loaded(input_ids=tokens).logits, trained)
    assert torch.equal(copy.deepcopy(model)(input_ids=tokens).logits, trained)
    assert torch.equal(pickle.loads(pickle.dumps(model))(input_ids=tokens).logits, trained)
    steppe.restore_(model)
    assert list(model.state_dict()) == keys
    assert all("forward" not in vars(layer) for layer in fused_of(model))


@MODELS
def test_a_threshold_becomes_part_of_the_fused_bias(build: type) -> None:
    model, tokens = build(), ids()
    steppe.sparsify_(model, [steppe.RisingThreshold(ramp=0.5)])
    steppe.constrain_(model, torch.optim.SGD(model.parameters(), lr=0.0), total_steps=1)
    model.train()
    model(input_ids=tokens, labels=tokens).loss.backward()
    steppe.advance_(model, 1.0)
    steppe.project_(model)
    model.eval()
    expected = model(input_ids=tokens).logits
    zeros = torch.zeros(2 * HIDDEN)
    biases = [zeros if one.bias is None else one.bias.detach().clone() for one in fused_of(model)]
    steppe.fold_(model)
    assert torch.allclose(model(input_ids=tokens).logits, expected, atol=1e-6)
    for layer, old in zip(fused_of(model), biases, strict=True):
        assert isinstance(layer.bias, nn.Parameter)
        assert (layer.bias[:HIDDEN] != old[:HIDDEN]).any()
        assert torch.equal(layer.bias[HIDDEN:], old[HIDDEN:])


@native
@MODELS
def test_accelerated_is_the_same_forward_and_backward(build: type) -> None:
    model, tokens = build(), ids()
    fast = steppe.accelerate_(copy.deepcopy(model), max_density=1.0)
    for rows in (tokens[:1, :1], tokens[:1, :1], tokens[:1, :1], tokens[:1, :5], tokens):
        with torch.no_grad():
            expected = model(input_ids=rows).logits
            assert torch.allclose(fast(input_ids=rows).logits, expected, atol=1e-5)
    assert all(block.is_sparse for block in steppe.explain(fast).blocks)
    model.train()(input_ids=tokens, labels=tokens).loss.backward()
    fast.train()(input_ids=tokens, labels=tokens).loss.backward()
    assert all(block.is_sparse for block in steppe.explain(fast).blocks)
    for (name, one), (other_name, other) in zip(
        model.named_parameters(), fast.named_parameters(), strict=True
    ):
        assert name == other_name
        assert (one.grad - other.grad).norm() <= 1e-5 * one.grad.norm(), name


@native
def test_an_accelerated_model_may_be_watched_and_goes_on_sparse() -> None:
    model = phi3()
    with torch.no_grad(), steppe.watch(model) as monitor:
        model(input_ids=ids())
    expected = monitor.report().density
    steppe.accelerate_(model, max_density=1.0)
    with torch.no_grad(), steppe.watch(model) as monitor:
        model(input_ids=ids())
        assert all(block.is_sparse for block in steppe.explain(model).blocks)
    assert monitor.report().density == pytest.approx(expected)


@native
def test_whoever_has_a_hook_on_the_fused_layer_sees_what_it_gives() -> None:
    model = phi3()
    steppe.accelerate_(model, max_density=1.0)
    shapes = []
    fused_of(model)[0].register_forward_hook(lambda layer, args, out: shapes.append(out.shape))
    with torch.no_grad():
        model(input_ids=ids())
    assert shapes == [(3, 7, 2 * HIDDEN)]
    first, second = steppe.explain(model).blocks
    assert "gate_up_proj" in first.reason
    assert second.is_sparse


class Louder(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2.0 * super().forward(x)


def test_a_fused_layer_that_computes_something_else_is_not_accelerated() -> None:
    mlp = GateLast()
    mlp.both = Louder(WIDTH, 2 * HIDDEN)
    with pytest.raises(AccelerationError, match="Louder, a subclass of"):
        steppe.accelerate_(mlp, patterns=GATE_LAST)


def test_the_wrong_order_of_the_halves_is_noticed() -> None:
    wrong = [BlockPattern(family="wrong", gate_up="both", act="act", down="down")]
    with pytest.raises(AccelerationError, match="the activation does not get the output"):
        steppe.accelerate_(GateLast(), patterns=wrong, max_density=1.0)


def test_an_adapter_on_the_fused_layer_is_refused_where_it_would_be_lost() -> None:
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(phi3(), LoraConfig(target_modules=["gate_up_proj"]))
    with pytest.raises(UnfitBlockError, match="PEFT adapts the first layer"):
        steppe.sparsify_(model, [steppe.ZerothBias()])


def test_an_odd_width_has_no_halves() -> None:
    assert halves_of(nn.Linear(8, 31)) is None
    assert halves_of(nn.ReLU()) is None


@pytest.mark.parametrize(
    "paths",
    [
        {"gate_up": "both", "up": "up", "act": "act", "down": "down"},
        {"act": "act", "down": "down"},
        {"up": "up", "act": "act"},
    ],
)
def test_a_pattern_that_names_no_block_is_refused(paths: dict[str, str]) -> None:
    with pytest.raises(ValueError, match="BlockPattern 'mine'"):
        BlockPattern(family="mine", **paths)
