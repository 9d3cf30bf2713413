"""The first pass: what flows through a block is what its pattern says, or the block is refused."""

from __future__ import annotations

import copy
import threading
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import steppe
from architectures import ARCHITECTURES, HIDDEN, VOCABULARY, WIDTH, Architecture, ids
from architectures import config_of as tiny
from steppe import BlockPattern, IncompleteCoverageWarning, MLPBlock, WiringError
from steppe.blocks.block import Slot
from steppe.surgery.journal import Journal
from steppe.wiring.first_pass import Look, is_to_be_seen, looking, names_of

D, F_ = 8, 24
COVERED = [one for one in ARCHITECTURES if one.covered]
PATTERN = BlockPattern(family="mine", norm="norm", up="up", act="act", down="down")
GATED = replace(PATTERN, gate="gate")


def by_name(one: Architecture) -> str:
    return one.name


def found(model: nn.Module) -> list[MLPBlock]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", IncompleteCoverageWarning)
        return steppe.find_blocks(model)


def norms_beside(model: nn.Module, block: MLPBlock) -> Iterator[nn.Module]:
    """The norms of the layer that holds a block, but the block's own."""
    layer = dict(model.named_modules()).get(block.name, model)
    for module in layer.modules():
        weight = getattr(module, "weight", None)
        is_norm = "norm" in type(module).__name__.lower() and isinstance(weight, Tensor)
        if is_norm and weight.shape == (block.d_model,) and module is not block.norm:
            yield module


class Between(nn.Module):
    """An activation with something before or after it."""

    def __init__(self, act: nn.Module, other: nn.Module, comes_first: bool) -> None:
        super().__init__()
        self.act, self.other, self.comes_first = act, other, comes_first

    def forward(self, p: Tensor) -> Tensor:
        a: Tensor = self.act(self.other(p)) if self.comes_first else self.other(self.act(p))
        return a


class Half(nn.Module):
    """Half of what comes."""

    def forward(self, x: Tensor) -> Tensor:
        return x / 2


# Their rows leave out the norm that they read, as their tokens are a grid.
UNNAMED = ("ConvNeXT", "DINOv3 ConvNeXT")


def looked_at(model: nn.Module) -> list[MLPBlock]:
    """The blocks whose first pass is looked at, their parts called; of experts others see to it."""
    blocks = [block for block in found(model) if is_to_be_seen(block) and not block.is_routed]
    Journal(transient=True).hold_parts(blocks)
    return blocks


@pytest.mark.parametrize("one", COVERED, ids=by_name)
def test_another_norm_of_the_layer_is_refused(one: Architecture) -> None:
    model = one.build().eval()
    blocks = looked_at(model)
    if not blocks:
        pytest.skip("it has experts alone")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name.lower() or "ln_" in name:
                parameter.copy_(torch.rand_like(parameter) + 0.5)
    for block in {blocks[0].name: blocks[0], blocks[-1].name: blocks[-1]}.values():
        for norm in () if one.name in UNNAMED else norms_beside(model, block):
            wrong = Look(model, names_of(model), replace(block, norm=norm), "sparsify_", True)
            refused = pytest.raises(WiringError, match="does not get the output of the norm")
            with looking([wrong]), torch.no_grad(), refused:
                model(**one.batch(0))
        if block.norm is not None:
            right = Look(model, names_of(model), block, "sparsify_", with_norm=True)
            with looking([right]), torch.no_grad():
                model(**one.batch(0))
            assert right.is_over


@pytest.mark.parametrize("comes_first", [False, True])
@pytest.mark.parametrize("one", COVERED, ids=by_name)
def test_what_stands_around_the_activation_is_refused(one: Architecture, comes_first: bool) -> None:
    model = one.build().eval()
    blocks = looked_at(model)
    if not blocks:
        pytest.skip("it has experts alone")
    block = blocks[0]
    slot = block.act_slot
    act = getattr(slot.module, slot.name)
    if not isinstance(act, nn.Module):
        pytest.skip("its activation is a function")
    setattr(slot.module, slot.name, Between(act, Half(), comes_first))
    wrong = replace(block, act_slot=Slot(getattr(slot.module, slot.name), "act"))
    refused = pytest.raises(WiringError, match=r"where=lambda block: block.name != '")
    with looking([Look(model, names_of(model), wrong, "watch")]), torch.no_grad(), refused:
        model(**one.batch(0))


class MLP(nn.Module):
    """A block whose forward its subclasses may change."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.other_norm = nn.LayerNorm(D), nn.LayerNorm(D)
        self.up, self.gate, self.down = nn.Linear(D, F_), nn.Linear(D, F_), nn.Linear(F_, D)
        self.act = nn.ReLU()
        self.dropout = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        z: Tensor = self.down(self.act(self.up(self.norm(x))))
        return z + x


class OtherNorm(MLP):
    def forward(self, x: Tensor) -> Tensor:
        z: Tensor = self.down(self.act(self.up(self.other_norm(self.norm(x)))))
        return z


class ChangedInPlace(MLP):
    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        x += 1.0
        z: Tensor = self.down(self.act(self.up(x)))
        return z


class Biased(MLP):
    def forward(self, x: Tensor) -> Tensor:
        p = self.up(self.norm(x))
        p += 1.0
        z: Tensor = self.down(self.act(p))
        return z


class Scaled(MLP):
    def forward(self, x: Tensor) -> Tensor:
        z: Tensor = self.down(2.0 * self.act(self.up(self.norm(x))))
        return z


class Dropped(MLP):
    def forward(self, x: Tensor) -> Tensor:
        a = self.act(self.up(self.norm(x)))
        z: Tensor = self.down(F.dropout(a, 0.3, self.training))
        return z


class Cast(MLP):
    def forward(self, x: Tensor) -> Tensor:
        a = self.act(self.up(self.norm(x).double().float()))
        z: Tensor = self.down(a.double().float())
        return z


class Chunked(MLP):
    def forward(self, x: Tensor) -> Tensor:
        chunks = self.norm(x).chunk(3, dim=1)
        return torch.cat([self.down(self.act(self.up(chunk))) for chunk in chunks], dim=1)


class Gated(MLP):
    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        z: Tensor = self.down(self.act(self.gate(x)) * self.up(x))
        return z


class GatedInPlace(MLP):
    def __init__(self) -> None:
        super().__init__()
        self.act = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        up = self.up(x)
        z: Tensor = self.down(self.act(self.gate(x)).mul_(up))
        return z


class GatedTwice(MLP):
    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        up = self.up(x)
        z: Tensor = self.down(self.act(self.gate(x)) * up * up)
        return z


class ByFunction(MLP):
    def __init__(self) -> None:
        super().__init__()
        del self.act
        self.act = F.gelu

    def forward(self, x: Tensor) -> Tensor:
        z: Tensor = self.down(self.act(self.up(self.norm(x))))
        return z


class ByOtherFunction(ByFunction):
    def forward(self, x: Tensor) -> Tensor:
        z: Tensor = self.down(F.relu(self.up(self.norm(x))))
        return z


def batch() -> Tensor:
    return torch.randn(2, 6, D)


RIGHT = [
    (MLP, PATTERN),
    (Cast, PATTERN),
    (Chunked, PATTERN),
    (Dropped, PATTERN),
    (ByFunction, PATTERN),
    (Gated, GATED),
    (GatedInPlace, GATED),
]
WRONG_INSIDE = [
    (Biased, PATTERN, "the activation does not get"),
    (Scaled, PATTERN, "between the activation and the last layer"),
    (ByOtherFunction, PATTERN, "between the activation and the last layer"),
    (GatedTwice, GATED, "between the activation and the last layer"),
]
WRONG_NORM = [(OtherNorm, PATTERN), (ChangedInPlace, PATTERN)]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("kind", "pattern"), RIGHT)
def test_a_block_as_its_pattern_says_is_seen_once(
    kind: type[MLP], pattern: BlockPattern, training: bool
) -> None:
    model = kind().train(training)
    steppe.sparsify_(model, [steppe.ZerothBias(max_tokens=16)], patterns=[pattern])
    before = hooks_of(model)
    model(batch())
    assert hooks_of(model) < before
    left = hooks_of(model)
    model(batch())
    assert hooks_of(model) == left
    # Torch itself has no gradient of what is written over.
    gradients = kind is not GatedInPlace
    with steppe.watch(model, patterns=[pattern], gradients=gradients) as monitor:
        z = model(batch())
        if gradients:
            z.square().mean().backward()
    assert monitor.report().blocks[0].tokens == 12
    steppe.restore_(model)
    assert not hooks_of(model)
    assert type(model.up) is nn.Linear


def hooks_of(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


@pytest.mark.parametrize(("kind", "pattern", "what"), WRONG_INSIDE)
def test_a_block_that_computes_something_else_is_refused_by_all(
    kind: type[MLP], pattern: BlockPattern, what: str
) -> None:
    model = kind()
    for _ in range(2):
        with steppe.watch(model, patterns=[pattern]), pytest.raises(WiringError, match=what):
            model(batch())
    with pytest.raises(WiringError, match=r"MLP|Biased|Scaled|ByOtherFunction|GatedTwice"):
        steppe.measure(model, [batch()], labels=None, patterns=[pattern])
    assert not hooks_of(model)
    steppe.sparsify_(model, [steppe.RisingThreshold()], patterns=[pattern])
    for _ in range(40):  # a refusal that somebody catches does not wear off
        with pytest.raises(WiringError, match=r"First steppe\.restore_\(model\)"):
            model(batch())
    steppe.restore_(model)
    assert not hooks_of(model)
    model(batch())


@pytest.mark.parametrize(("kind", "pattern"), WRONG_NORM)
def test_a_wrong_norm_is_refused_where_it_is_used_and_only_there(
    kind: type[MLP], pattern: BlockPattern
) -> None:
    model = kind()
    with steppe.watch(model, patterns=[pattern]) as monitor:
        model(batch())
    assert 0.0 < monitor.report().density < 1.0
    steppe.sparsify_(model, [steppe.JumpingSquaredReLU()], patterns=[pattern])
    model(batch())
    steppe.restore_(model)
    for plugin in (steppe.ZerothBias(max_tokens=16), steppe.RestrictedNorm()):
        steppe.sparsify_(model, [plugin], patterns=[pattern])
        with pytest.raises(WiringError, match=r"output of the norm .* \(it is norm\)"):
            model(batch())
        steppe.restore_(model)


def test_a_second_plug_in_before_the_first_pass_is_seen_too() -> None:
    model = OtherNorm()
    steppe.sparsify_(model, [steppe.RestrictedNorm()], patterns=[PATTERN])
    steppe.sparsify_(model, [steppe.RisingThreshold()], patterns=[PATTERN])
    with pytest.raises(WiringError, match="output of the norm"):
        model(batch())
    right = MLP()
    steppe.sparsify_(right, [steppe.RestrictedNorm()], patterns=[PATTERN])
    steppe.sparsify_(right, [steppe.RisingThreshold()], patterns=[PATTERN])
    right.up.threshold.shift = lambda dtype: torch.ones(F_, dtype=dtype)  # type: ignore[assignment]
    right(batch())


def test_casts_are_no_mismatch() -> None:
    model = MLP()
    steppe.sparsify_(model, [steppe.ZerothBias(max_tokens=16)], patterns=[PATTERN])
    with torch.autocast("cpu", torch.bfloat16), steppe.watch(model, patterns=[PATTERN]):
        model(batch())


def test_hooks_of_others_end_the_judgement() -> None:
    model = MLP()
    steppe.sparsify_(model, [steppe.RisingThreshold()], patterns=[PATTERN])
    handle = model.up.register_forward_hook(lambda module, args, p: p.clamp(max=0.5))
    model(batch())
    handle.remove()
    model(batch())


def test_a_layer_that_is_called_by_itself_is_no_pass() -> None:
    model = Gated()
    steppe.sparsify_(model, [steppe.RestrictedNorm()], patterns=[GATED])
    model.up(batch())
    model.down(torch.randn(2, F_))
    before = hooks_of(model)
    model(batch())
    model(batch())
    assert hooks_of(model) < before


def test_checkpointing_counts_the_same_tensors_twice() -> None:
    model = Gated()
    steppe.sparsify_(model, [steppe.JumpingSquaredReLU()], patterns=[GATED])
    for reentrant in (False, True):
        x = batch().requires_grad_()
        checkpoint(model, x, use_reentrant=reentrant).square().mean().backward()
    assert model.up.weight.grad is not None


def test_compiled_first_then_eager() -> None:
    model = MLP()
    x = batch()
    expected = model(x)
    steppe.sparsify_(model, [steppe.RestrictedNorm()], patterns=[PATTERN])
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    before = hooks_of(model)
    torch.testing.assert_close(compiled(x), expected)
    assert hooks_of(model) == before  # nothing was looked at
    model(x)
    assert hooks_of(model) < before
    torch.testing.assert_close(compiled(x), expected)


def test_copies_are_plain() -> None:
    model = OtherNorm()
    steppe.sparsify_(model, [steppe.RestrictedNorm()], patterns=[PATTERN])
    replica = copy.deepcopy(model)
    assert type(replica.up) is nn.Linear
    assert not hooks_of(replica)
    replica(batch())


def test_threads_have_calls_of_their_own() -> None:
    model = Gated().eval()
    steppe.sparsify_(model, [steppe.ZerothBias(max_tokens=16)], patterns=[GATED])
    errors: list[BaseException] = []

    def run() -> None:
        try:
            for _ in range(5):
                model(batch())
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors


def test_accelerated_blocks_are_looked_at_for_their_norm() -> None:
    for kind in (MLP, OtherNorm):
        model = kind().eval()
        steppe.sparsify_(model, [steppe.RestrictedNorm()], patterns=[PATTERN])
        steppe.accelerate_(model, patterns=[PATTERN], max_density=1.0)
        if kind is MLP:
            model(batch())
        else:
            with pytest.raises(WiringError, match="output of the norm"):
                model(batch())


def test_functions_and_meta_tensors_are_not_looked_at() -> None:
    model = Scaled()
    steppe.sparsify_(model, [steppe.JumpingSquaredReLU()], patterns=[PATTERN])
    torch.func.vmap(model)(batch())
    with pytest.raises(WiringError):
        model(batch())
    meta = Scaled().to("meta")
    steppe.sparsify_(meta, [steppe.JumpingSquaredReLU()], patterns=[PATTERN])
    meta(batch().to("meta"))


def built(name: str) -> tuple[nn.Module, dict[str, Tensor]]:
    one = next(one for one in ARCHITECTURES if one.name == name)
    return one.build().eval(), one.batch(0)


def bert_decoder() -> tuple[nn.Module, dict[str, Tensor]]:
    config = tiny("BertConfig", is_decoder=True, add_cross_attention=True)
    return transformers.BertLMHeadModel(config).eval(), {
        "input_ids": ids(0),
        "encoder_hidden_states": torch.randn(2, 3, WIDTH),
    }


def mobile_bert() -> tuple[nn.Module, dict[str, Tensor]]:
    config = tiny("MobileBertConfig", true_hidden_size=8, intra_bottleneck_size=8)
    return transformers.MobileBertModel(config).eval(), {"input_ids": ids(0)}


def segformer() -> tuple[nn.Module, dict[str, Tensor]]:
    config = transformers.SegformerConfig(
        num_channels=1,
        depths=[1, 1],
        hidden_sizes=[8, 16],
        num_encoder_blocks=2,
        sr_ratios=[2, 1],
        patch_sizes=[3, 3],
        strides=[2, 2],
        num_attention_heads=[1, 2],
        mlp_ratios=[2, 2],
        hidden_act="relu",
    )
    model = transformers.SegformerForImageClassification(config)
    return model.eval(), {"pixel_values": torch.randn(2, 1, 16, 16)}


def gemma_3n() -> tuple[nn.Module, dict[str, Tensor]]:
    config = tiny(
        "Gemma3nTextConfig",
        act="hidden_activation",
        activation_sparsity_pattern=[0.5, 0.5],
        laurel_rank=4,
        hidden_size_per_layer_input=4,
        vocab_size_per_layer_input=VOCABULARY,
        num_kv_shared_layers=0,
        altup_num_inputs=2,
        layer_types=["full_attention", "full_attention"],
        intermediate_size=[HIDDEN, HIDDEN],
    )
    return transformers.Gemma3nForCausalLM(config).eval(), {"input_ids": ids(0)}


BERTS = {"up": "intermediate.dense", "act": "intermediate.intermediate_act_fn"}
BERTS["down"] = "output.dense"
LLAMAS = {"gate": "mlp.gate_proj", "up": "mlp.up_proj", "act": "mlp.act_fn"}
LLAMAS["down"] = "mlp.down_proj"
GPTS = {"up": "mlp.c_fc", "act": "mlp.act", "down": "mlp.c_proj"}
KNOWN_TRAPS: dict[str, tuple[Callable[[], Any], dict[str, str], str]] = {
    "OpenAI GPT": (lambda: built("OpenAI GPT"), {"norm": "ln_2", **GPTS}, "of the norm"),
    "Swin v2": (lambda: built("Swin v2"), {"norm": "layernorm_after", **BERTS}, "of the norm"),
    "BERT": (bert_decoder, {"norm": "attention.output.LayerNorm", **BERTS}, "of the norm"),
    "MobileBERT": (mobile_bert, {"norm": "attention.output.LayerNorm", **BERTS}, "of the norm"),
    "OLMo 2": (lambda: built("OLMo 2"), {"norm": "post_attention_layernorm", **LLAMAS}, "norm"),
    "BitNet": (
        lambda: built("BitNet"),
        {"norm": "post_attention_layernorm", **LLAMAS},
        "between the activation and the last layer",
    ),
    "Gemma 3n": (
        gemma_3n,
        {"norm": "pre_feedforward_layernorm", **LLAMAS},
        "does not get the output of the layer before it",
    ),
    "SegFormer": (
        segformer,
        {"norm": "layernorm_after", "up": "mlp.fc1", "act": "mlp.activation_fn"}
        | {"down": "mlp.fc2"},
        "does not get the output of the layer before it",
    ),
}


@pytest.mark.parametrize("name", KNOWN_TRAPS)
@pytest.mark.filterwarnings("ignore::steppe.IncompleteCoverageWarning")
def test_a_row_that_was_wrong_once_would_be_refused(name: str) -> None:
    build, paths, what = KNOWN_TRAPS[name]
    model, inputs = build()
    pattern = BlockPattern(family="wrong", **paths)
    with torch.no_grad():
        for one, parameter in model.named_parameters():
            if "norm" in one.lower() or "ln_" in one:
                parameter.copy_(torch.rand_like(parameter) + 0.5)
    steppe.sparsify_(
        model,
        [steppe.ZerothBias(max_tokens=64)],
        where=lambda block: block.family == "wrong",
        patterns=[pattern],
    )
    with torch.no_grad(), pytest.raises(WiringError, match=what):
        model(**inputs)
    steppe.restore_(model)
    model(**inputs)
