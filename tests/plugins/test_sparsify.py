"""sparsify_ and restore_: neutral at the start, exact inverses, all or nothing."""

from __future__ import annotations

import copy
import functools
import json
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.nn import functional as F

import models
import steppe
from plugins.thresholds import threshold_of
from steppe import (
    ActivationPenalty,
    JumpingSquaredReLU,
    Plugin,
    RestrictedNorm,
    RisingThreshold,
    ZerothBias,
)
from steppe.blocks.block import MLPBlock
from steppe.errors import SparsificationError, UnfitBlockError
from steppe.plugins.applied import Sparsification, sparsification_of
from steppe.plugins.base import Constraint
from steppe.surgery.journal import Journal

MODELS: dict[str, Callable[[], nn.Module]] = {
    **models.LANGUAGE_MODELS,
    **models.VISION_MODELS,
    "t5 gated": functools.partial(models.t5, "gelu_new", gated=True),
    "opt post-norm": functools.partial(models.opt, norm_first=False),
    "gpt_neox sequential": functools.partial(models.gpt_neox, "gelu", parallel=False),
    "llama silu": functools.partial(models.llama, "silu"),
    "torch encoder": models.torch_encoder,
    "torch encoder, sequence first": functools.partial(models.torch_encoder, batch_first=False),
    "torch encoder, post-norm": functools.partial(models.torch_encoder, norm_first=False),
}
ZEROTH = ZerothBias(max_tokens=16)
NORM = RestrictedNorm(allow_shared=True)
MIXED = JumpingSquaredReLU(ramp=0.3)
THRESHOLD = RisingThreshold()
PENALTY = ActivationPenalty(1e-3)
EVERY = (ZEROTH, NORM, MIXED, THRESHOLD, PENALTY)
NEUTRAL: dict[str, tuple[Plugin, ...]] = {
    "zeroth bias": (ZEROTH,),
    "restricted norm": (NORM,),
    "jumping relu": (MIXED,),
    "threshold": (THRESHOLD,),
    "penalty": (PENALTY,),
    "all": EVERY,
}
each_model = pytest.mark.parametrize("make", MODELS.values(), ids=MODELS.keys())
each_neutral = pytest.mark.parametrize("plugins", NEUTRAL.values(), ids=NEUTRAL.keys())


def logits(model: nn.Module, grad: bool = True) -> Tensor:
    """The output for fixed inputs."""
    with torch.set_grad_enabled(grad):
        if isinstance(model, nn.TransformerEncoder):
            x = torch.randn(2, 7, models.D_MODEL, generator=torch.Generator().manual_seed(0))
            return model(x)
        return model(**models.inputs_for(model)).logits


def randomise_(model: nn.Module, seed: int = 0) -> None:
    """Give the zeroth biases values that matter."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("zeroth_bias"):
                parameter.normal_(generator=generator)


@dataclass(frozen=True)
class Snapshot:
    """All that sparsify_ could change of a model."""

    keys: list[str]
    tensors: dict[str, Tensor]
    parameters: dict[str, tuple[int, bool]]
    classes: dict[str, type]
    attributes: dict[str, dict[str, Any]]
    hooks: dict[str, list[int]]
    config: str | None

    @classmethod
    def of(cls, model: nn.Module) -> Snapshot:
        """The model as it is now."""
        config = getattr(model, "config", None)
        return cls(
            keys=list(model.state_dict()),
            tensors={name: tensor.clone() for name, tensor in model.state_dict().items()},
            parameters={n: (id(p), p.requires_grad) for n, p in model.named_parameters()},
            classes={name: type(module) for name, module in model.named_modules()},
            attributes={name: _plain(module) for name, module in model.named_modules()},
            hooks={name: _hooks(module) for name, module in model.named_modules()},
            config=None if config is None else json.dumps(config.to_dict(), sort_keys=True),
        )

    def assert_same(self, model: nn.Module) -> None:
        """Fails where the model differs."""
        now = Snapshot.of(model)
        assert now.keys == self.keys
        for key, tensor in self.tensors.items():
            torch.testing.assert_close(now.tensors[key], tensor, rtol=0, atol=0, msg=key)
        assert now.parameters == self.parameters
        assert now.classes == self.classes
        assert now.attributes == self.attributes
        assert now.hooks == self.hooks
        assert now.config == self.config


def _plain(module: nn.Module) -> dict[str, Any]:
    """The names of all attributes of a module, and the values that compare."""
    return {
        name: value if isinstance(value, bool | int | float | str) or callable(value) else None
        for name, value in vars(module).items()
    }


def _hooks(module: nn.Module) -> list[int]:
    hooks = (value for name, value in vars(module).items() if name.endswith(("hooks", "kwargs")))
    return [len(value) for value in hooks]


@each_model
def test_at_their_neutral_setting_the_logits_are_bit_identical(
    make: Callable[[], nn.Module],
) -> None:
    model = make()
    for train in (True, False):
        model.train(train)
        before = [logits(model, grad) for grad in (True, False)]
        for name, plugins in NEUTRAL.items():
            steppe.sparsify_(model, plugins)
            after = [logits(model, grad) for grad in (True, False)]
            assert all(map(torch.equal, before, after)), name
            steppe.restore_(model)


@each_model
@each_neutral
def test_restore_is_the_exact_inverse(
    make: Callable[[], nn.Module], plugins: tuple[Plugin, ...]
) -> None:
    model = make()
    before, old = Snapshot.of(model), logits(model)
    assert steppe.sparsify_(model, plugins) is model
    steppe.advance_(model, 1.0)
    randomise_(model)
    if plugins not in ((NORM,), (THRESHOLD,), (PENALTY,)):
        assert not torch.equal(logits(model), old)
    assert steppe.restore_(model) is model
    before.assert_same(model)
    assert not any(map(sum, before.hooks.values()))
    assert torch.equal(logits(model), old)
    with pytest.raises(SparsificationError, match="carries no plug-in"):
        steppe.restore_(model)


@each_model
def test_existing_keys_stay_and_new_ones_come_beside(make: Callable[[], nn.Module]) -> None:
    model = make()
    before = Snapshot.of(model)
    steppe.sparsify_(model, EVERY)
    after = Snapshot.of(model)
    old = set(before.keys)
    assert [key for key in after.keys if key in old] == before.keys
    new = [key for key in after.keys if key not in old]
    assert {key.rpartition(".")[2] for key in new} == {
        *("zeroth_bias", "mix", "multiple", "deviation")
    }
    assert len(new) == 4 * len(steppe.find_blocks(model))
    assert {key for key in new if key.endswith("bias")} == set(steppe.added_parameters(model))
    identities = {name: identity for name, (identity, _) in after.parameters.items()}
    assert {name: identities[name] for name in before.parameters} == {
        name: identity for name, (identity, _) in before.parameters.items()
    }


def test_an_existing_optimizer_goes_on_and_takes_the_new_parameters() -> None:
    model = models.gpt2()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    ids = models.token_ids()

    def step() -> None:
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    weight = model.transformer.h[1].mlp.c_fc.weight
    steppe.sparsify_(model, [ZEROTH, JumpingSquaredReLU()])
    added = steppe.added_parameters(model)
    optimizer.add_param_group({"params": list(added.values())})
    old = weight.detach().clone()
    step()
    assert optimizer.state[weight]["step"] == 2
    assert not torch.equal(weight, old)
    assert len(added) == 2
    for bias in added.values():
        assert optimizer.state[bias]["step"] == 1
        assert (bias[: ids.shape[1] - 1] != 0).all()  # the last token predicts nothing


def test_a_frozen_bias_stays_although_the_optimizer_has_momentum_for_it() -> None:
    # A gradient of zeros is enough for AdamW to go on with its momentum.
    model = models.gpt2()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    ids = models.token_ids()
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=False)
    steppe.sparsify_(model, [RestrictedNorm(ramp=0.3)])
    bias = model.transformer.h[0].ln_2.bias
    old = bias.detach().clone()
    assert old.any()
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    assert torch.equal(bias, old)


@pytest.mark.parametrize("plugin", EVERY, ids=lambda plugin: plugin.key)
def test_applied_twice_is_refused_and_changes_nothing(plugin: Plugin) -> None:
    model = models.gpt2()
    steppe.sparsify_(model, [plugin])
    before = Snapshot.of(model)
    others = [other for other in EVERY if other is not plugin]
    with pytest.raises(SparsificationError, match=r"transformer\.h\.0: has .* already"):
        steppe.sparsify_(model, [*others, plugin])
    before.assert_same(model)
    with pytest.raises(SparsificationError, match="2 times"):
        steppe.sparsify_(model, [others[0], others[0]])
    before.assert_same(model)
    steppe.restore_(model)


def test_partly_overlapping_blocks_are_refused_and_disjoint_ones_are_not() -> None:
    model = models.gpt2()
    original = Snapshot.of(model)
    steppe.sparsify_(model, [ZEROTH, MIXED], where=lambda block: block.name.endswith("1"))
    before = Snapshot.of(model)
    with pytest.raises(SparsificationError, match=r"transformer\.h\.1: has ZerothBias already"):
        steppe.sparsify_(model, [ZEROTH])
    before.assert_same(model)
    steppe.sparsify_(model, [ZEROTH, MIXED], where=lambda block: block.name.endswith("0"))
    assert len(steppe.added_parameters(model)) == 2
    steppe.restore_(model)
    original.assert_same(model)


def test_different_plugins_in_two_calls_are_the_same_as_in_one() -> None:
    one, two = models.t5(), models.t5()
    two.load_state_dict(one.state_dict())
    original = Snapshot.of(two)
    steppe.sparsify_(one, [ZEROTH, NORM, MIXED])
    steppe.sparsify_(two, [ZEROTH])
    steppe.sparsify_(two, [NORM, MIXED])
    for model in (one, two):
        randomise_(model)
        steppe.advance_(model, 0.2)
        steppe.project_(model)
    assert torch.equal(logits(one), logits(two))
    assert list(one.state_dict()) == list(two.state_dict())
    assert list(steppe.added_parameters(one)) == list(steppe.added_parameters(two))
    assert one.config.steppe == two.config.steppe
    steppe.restore_(two)
    original.assert_same(two)


def test_the_config_says_what_was_done() -> None:
    model = models.gpt2()
    steppe.sparsify_(model, [ZerothBias(), RestrictedNorm(floor=0.5)], where=lambda b: b.up.nf > 0)
    steppe.advance_(model, 0.25)
    blocks = ["transformer.h.0", "transformer.h.1"]
    assert json.loads(json.dumps(model.config.to_dict()))["steppe"] == {
        "version": 1,
        "progress": 0.25,
        "plugins": [
            {"plugin": "zeroth_bias", "max_tokens": 32, "limit": 0.1, "blocks": blocks},
            {
                "plugin": "restricted_norm",
                "floor": 0.5,
                "ramp": 0.0,
                "allow_shared": False,
                "blocks": blocks,
            },
        ],
    }


def test_a_second_model_of_the_same_config_object_is_left_alone() -> None:
    # A record on a shared config would make the vanilla model's save_pretrained claim it too.
    sparse = models.gpt2()
    vanilla = type(sparse)(sparse.config)
    before = Snapshot.of(vanilla)
    steppe.sparsify_(sparse, [ZEROTH])
    before.assert_same(vanilla)


def test_no_plugin_is_refused() -> None:
    with pytest.raises(ValueError, match="no plug-in given"):
        steppe.sparsify_(models.gpt2(), [])


class ExponentialNorm(nn.Module):
    """x / rms(x) · exp(w)."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((models.D_MODEL,), 1.5))

    def forward(self, x: Tensor) -> Tensor:
        """The norm of x."""
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * self.weight.exp()


def _set(path: str, part: object) -> Callable[[], nn.Module]:
    """GPT-2 with another part in its last block."""
    return functools.partial(_gpt2_with, path, part)


def _gpt2_with(path: str, part: object) -> nn.Module:
    model = models.gpt2()
    parent, _, name = path.rpartition(".")
    setattr(model.transformer.h[1].get_submodule(parent), name, copy.deepcopy(part))
    return model


def _gpt2_with_norm(weight: float, bias: float) -> nn.Module:
    model = models.gpt2()
    with torch.no_grad():
        model.transformer.h[1].ln_2.weight[3] = weight
        model.transformer.h[1].ln_2.bias[3] = bias
    return model


def _mixed_encoder() -> nn.Module:
    layers = [nn.TransformerEncoderLayer(16, 4, 32, norm_first=first) for first in (True, False)]
    return nn.Sequential(*layers)


LAST = r"transformer\.h\.1: "
MISFITS: dict[str, tuple[Callable[[], nn.Module], Plugin, str]] = {
    "gelu at once": (
        functools.partial(models.gpt2, "gelu_new"),
        JumpingSquaredReLU(),
        r"transformer\.h\.0: .* takes the place of ReLU, got .*ramp=0\.3",
    ),
    "gelu at once in the last block": (
        _set("mlp.act", nn.GELU()),
        JumpingSquaredReLU(),
        LAST + ".* takes the place of ReLU, got GELU",
    ),
    "activation with weights": (
        _set("mlp.act", nn.PReLU()),
        MIXED,
        LAST + "PReLU has weights of its own",
    ),
    "activation with weights, at once": (_set("mlp.act", nn.PReLU()), JumpingSquaredReLU(), LAST),
    "softmax": (_set("mlp.act", nn.Softmax(-1)), MIXED, LAST + "Softmax is not elementwise"),
    # These two cannot even be called on a vector.
    "softmax over dimension 2": (
        _set("mlp.act", nn.Softmax(2)),
        MIXED,
        LAST + "Softmax is not elementwise",
    ),
    "normalising activation": (
        _set("mlp.act", nn.LayerNorm(models.D_HIDDEN, elementwise_affine=False)),
        MIXED,
        LAST + "LayerNorm is not elementwise",
    ),
    "post-norm": (models.bert, RestrictedNorm(), r"layer\.0: .*allow_shared=True"),
    "post-norm when finetuning": (models.bert, RestrictedNorm(ramp=0.3), "allow_shared=True"),
    "opt-350m": (
        functools.partial(models.opt, norm_first=False),
        RestrictedNorm(),
        r"model\.decoder\.layers\.0: .*allow_shared=True",
    ),
    "post-norm in the last block": (_mixed_encoder, RestrictedNorm(), "1: .*allow_shared=True"),
    "gemma's norm": (
        _set("ln_2", ExponentialNorm()),
        RestrictedNorm(),
        LAST + "the output of ExponentialNorm is not proportional",
    ),
    "gemma's norm when finetuning": (
        _set("ln_2", ExponentialNorm()),
        RestrictedNorm(ramp=0.3),
        LAST + "the output of ExponentialNorm is not proportional",
    ),
    "norm bias": (
        functools.partial(_gpt2_with_norm, 1.0, -0.1),
        RestrictedNorm(),
        LAST + "the norm's bias is not zero",
    ),
    "norm scale below the floor": (
        functools.partial(_gpt2_with_norm, 0.75, 0.0),
        RestrictedNorm(),
        LAST + r"the norm's scale \(0\.75 at least\) is below the floor 1\.0",
    ),
    "norm scale below another floor": (
        models.gpt2,
        RestrictedNorm(floor=1.5),
        r"transformer\.h\.0: the norm's scale \(1 at least\) is below the floor 1\.5",
    ),
    "no norm scale": (
        _set("ln_2", nn.LayerNorm(models.D_MODEL, elementwise_affine=False)),
        RestrictedNorm(),
        LAST + "RestrictedNorm needs a norm with a scale",
    ),
    "no norm scale to bound the zeroth bias": (
        _set("ln_2", nn.Identity()),
        ZEROTH,
        LAST + "ZerothBias is bounded by the scale",
    ),
    "a zeroth_bias of its own": (
        _set("mlp.c_fc.zeroth_bias", nn.Parameter(torch.ones(3))),
        ZEROTH,
        LAST + "Conv1D has an attribute 'zeroth_bias' of its own",
    ),
    "t5 of unknown length": (models.t5, ZerothBias(), r"T5ForCond.*ZerothBias\(max_tokens=512\)"),
    "torch encoder of unknown length": (
        models.torch_encoder,
        ZerothBias(),
        r"TransformerEncoder does not say how long .*ZerothBias\(max_tokens=512\)",
    ),
}


@pytest.mark.parametrize(("make", "misfit", "message"), MISFITS.values(), ids=MISFITS.keys())
@pytest.mark.parametrize("others", ["none", "before", "after"])
def test_a_misfit_is_refused_by_name_and_changes_nothing(
    make: Callable[[], nn.Module], misfit: Plugin, message: str, others: str
) -> None:
    model = make()
    before = Snapshot.of(model)
    fitting = [p for p in (ZerothBias(max_tokens=8), MIXED) if p.key != misfit.key]
    plugins: list[Plugin] = {
        "none": [misfit],
        "before": [*fitting, misfit],
        "after": [misfit, *fitting],
    }[others]
    with pytest.raises(UnfitBlockError, match=message if others == "none" else None):
        steppe.sparsify_(model, plugins)
    before.assert_same(model)


def test_a_misfit_can_be_left_out() -> None:
    model = _gpt2_with("mlp.act", nn.GELU())
    steppe.sparsify_(model, [JumpingSquaredReLU()], where=lambda block: block.name.endswith("0"))
    assert isinstance(model.transformer.h[0].mlp.act, steppe.Rectifier)
    assert isinstance(model.transformer.h[1].mlp.act, nn.GELU)


@pytest.mark.parametrize("kind", [type(plugin) for plugin in EVERY])
@pytest.mark.parametrize("has_some_already", [False, True])
def test_an_interruption_in_the_middle_leaves_the_model_untouched(
    kind: type[Plugin], has_some_already: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    apply = kind.apply

    def interrupted(
        self: Plugin, model: nn.Module, blocks: Sequence[MLPBlock], journal: Journal
    ) -> list[Constraint]:
        apply(self, model, blocks[:1], journal)
        with pytest.raises(AssertionError):  # there is something to take back
            before.assert_same(model)
        raise KeyboardInterrupt

    model = models.torch_encoder(norm_first=False)
    if has_some_already:
        steppe.sparsify_(model, [MIXED if kind is not JumpingSquaredReLU else ZEROTH])
        randomise_(model)
    old = logits(model)
    before = Snapshot.of(model)
    monkeypatch.setattr(kind, "apply", interrupted)
    have = {applied.plugin.key for applied in getattr(sparsification_of(model), "applied", [])}
    with pytest.raises(KeyboardInterrupt):
        steppe.sparsify_(model, [p for p in EVERY if p.key not in have])
    before.assert_same(model)
    assert torch.equal(logits(model), old)
    monkeypatch.undo()
    steppe.sparsify_(model, [p for p in EVERY if p.key not in have])
    steppe.restore_(model)


def test_an_interruption_at_the_very_end_leaves_the_model_untouched(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def interrupted(self: Sparsification) -> dict[str, Any]:
        raise KeyboardInterrupt

    model = models.gpt2()
    before = Snapshot.of(model)
    monkeypatch.setattr(Sparsification, "record", interrupted)
    with pytest.raises(KeyboardInterrupt):
        steppe.sparsify_(model, [ZEROTH, NORM, MIXED])
    monkeypatch.undo()
    before.assert_same(model)
    steppe.sparsify_(model, [ZEROTH, NORM, MIXED])


def test_a_config_that_is_not_hugging_faces_is_none_of_our_business() -> None:
    model = models.torch_encoder()
    model.config = config = {"lock": threading.Lock()}
    steppe.sparsify_(model, EVERY)
    assert model.config is config
    steppe.restore_(model)
    assert model.config is config


@pytest.mark.parametrize("name", ["gpt2", "t5", "torch encoder, post-norm"])
def test_a_deep_copy_is_independent_and_can_be_restored(name: str) -> None:
    model = MODELS[name]()
    original = logits(model)
    steppe.sparsify_(model, EVERY)
    randomise_(model)
    old = logits(model)
    clone = copy.deepcopy(model)
    assert torch.equal(logits(clone), old)

    randomise_(clone, seed=1)
    steppe.advance_(clone, 1.0)
    assert not torch.equal(logits(clone), old)
    assert torch.equal(logits(model), old)
    assert sparsification_of(model).progress == 0.0
    with torch.no_grad():
        for block in steppe.find_blocks(clone):
            block.norm.weight.fill_(0.0)
    steppe.penalize(torch.zeros(()), clone)
    steppe.project_(clone)
    for block, copied in zip(steppe.find_blocks(model), steppe.find_blocks(clone), strict=True):
        assert not threshold_of(block).deviation.any()
        assert threshold_of(copied).deviation.all()
    assert all((block.norm.weight == 1.0).all() for block in steppe.find_blocks(clone))

    steppe.restore_(clone)
    assert torch.equal(logits(clone), original)
    assert torch.equal(logits(model), old)
    assert sparsification_of(model) is not None
    steppe.restore_(model)
    assert torch.equal(logits(model), original)


def test_a_state_dict_survives_torch_save_with_weights_only(tmp_path: Path) -> None:
    model = models.t5()
    steppe.sparsify_(model, [ZEROTH, NORM, MIXED])
    randomise_(model)
    steppe.advance_(model, 0.1)
    torch.save(model.state_dict(), tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    other = models.t5()
    steppe.sparsify_(other, [ZEROTH, NORM, MIXED])
    assert not torch.equal(logits(other), logits(model))
    other.load_state_dict(state)
    assert torch.equal(logits(other), logits(model))


# torch.compile makes an instance of a custom autograd function and then warns of it.
@pytest.mark.filterwarnings("ignore:.* should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize(
    ("name", "in_place", "plugins"),
    [
        ("gpt2", False, (ZEROTH,)),  # hooks only, which torch.compile does not look for again
        ("gpt2", True, (ZEROTH, RestrictedNorm(), JumpingSquaredReLU())),
        ("torch encoder", False, (ZEROTH,)),
        ("torch encoder", False, (JumpingSquaredReLU(),)),
    ],
)
def test_a_compiled_model_that_ran_sees_sparsify_and_restore(
    name: str, in_place: bool, plugins: tuple[Plugin, ...]
) -> None:
    torch.compiler.reset()
    model = MODELS[name]()
    twin = copy.deepcopy(model)
    if in_place:
        model.compile(backend="eager", fullgraph=True)
        compiled = model
    else:
        compiled = torch.compile(model, backend="eager", fullgraph=True)

    def run() -> Tensor:
        if isinstance(model, nn.TransformerEncoder):
            generator = torch.Generator().manual_seed(0)
            return compiled(torch.randn(2, 7, models.D_MODEL, generator=generator))
        return compiled(**models.inputs_for(model)).logits

    original = logits(twin)
    torch.testing.assert_close(run(), original)
    for sparsified in (compiled, twin):
        steppe.sparsify_(sparsified, plugins)
    randomise_(model)
    randomise_(twin)
    sparse = logits(twin)
    assert (sparse - original).abs().max() > 0.01
    torch.testing.assert_close(run(), sparse)
    steppe.restore_(compiled)
    torch.testing.assert_close(run(), original)


def _lora(model: nn.Module, *targets: str) -> nn.Module:
    """With adapters that do something from the start."""
    config = LoraConfig(
        r=2, target_modules=list(targets), fan_in_fan_out=True, init_lora_weights=False
    )
    return get_peft_model(model, config)


def test_with_lora_on_attention_the_new_parameters_train_beside_the_adapters() -> None:
    model = models.gpt2()
    peft_model = _lora(model, "c_attn")
    old = logits(peft_model)
    steppe.sparsify_(peft_model, [ZEROTH, NORM, MIXED])
    assert torch.equal(logits(peft_model), old)
    added = steppe.added_parameters(peft_model)
    assert len(added) == 2
    trainable = [name for name, p in peft_model.named_parameters() if p.requires_grad]
    assert {name.rpartition(".")[2] for name in trainable if "lora" not in name} == {"zeroth_bias"}
    optimizer = torch.optim.AdamW([p for p in peft_model.parameters() if p.requires_grad], lr=0.1)
    link = steppe.constrain_(peft_model, optimizer, total_steps=2)
    frozen = model.transformer.h[0].mlp.c_fc.weight.clone()
    ids = models.token_ids()
    for _ in range(2):
        peft_model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    link.remove()
    for bias in added.values():
        assert bias[: ids.shape[1] - 1].abs().min() > 0
        assert bias.abs().max().item() == pytest.approx(0.1)  # lr 0.1 goes further: it was clipped
    assert torch.equal(model.transformer.h[0].mlp.c_fc.weight, frozen)


def test_merging_lora_on_attention_keeps_the_function() -> None:
    peft_model = _lora(models.gpt2(), "c_attn").eval()
    steppe.sparsify_(peft_model, [ZEROTH, NORM, MIXED])
    randomise_(peft_model)
    steppe.advance_(peft_model, 0.2)
    old = logits(peft_model)
    merged = peft_model.merge_and_unload()
    torch.testing.assert_close(logits(merged), old)
    assert not any("lora" in name for name in merged.state_dict())
    steppe.restore_(merged)
    assert list(merged.state_dict()) == list(models.gpt2().state_dict())


def test_the_added_parameters_of_a_merged_model_are_the_zeroth_biases() -> None:
    # PEFT has renamed `c_attn.base_layer.weight` since.
    peft_model = _lora(models.gpt2(), "c_attn")
    steppe.sparsify_(peft_model, [ZEROTH])
    merged = peft_model.merge_and_unload()
    blocks = ("transformer.h.0", "transformer.h.1")
    assert list(steppe.added_parameters(merged)) == [f"{b}.mlp.c_fc.zeroth_bias" for b in blocks]


def test_the_added_parameters_below_a_later_lora_are_the_zeroth_biases() -> None:
    # And here to `c_attn.base_layer.weight`.
    model = models.gpt2()
    steppe.sparsify_(model, [ZEROTH])
    added = set(map(id, steppe.added_parameters(model).values()))
    peft_model = _lora(model, "c_attn")
    assert set(map(id, steppe.added_parameters(peft_model).values())) == added


def test_lora_on_the_mlp_is_refused_since_merging_would_drop_the_biases() -> None:
    peft_model = _lora(models.gpt2(), "c_attn", "c_fc").eval()
    with pytest.raises(UnfitBlockError, match=r"transformer\.h\.0: PEFT adapts"):
        steppe.sparsify_(peft_model, [ZEROTH])


@pytest.mark.parametrize(
    "plugins",
    [
        *[(ZEROTH,), (NORM,), (JumpingSquaredReLU(),), (THRESHOLD,)],
        (ZEROTH, NORM, JumpingSquaredReLU(), THRESHOLD),
    ],
    ids=["zeroth bias", "restricted norm", "jumping relu", "threshold", "all"],
)
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_torch_encoder_in_evaluation_drops_no_plugin_for_its_fused_kernel(
    plugins: tuple[Plugin, ...],
) -> None:
    model = models.torch_encoder(norm_first=False)
    x = torch.randn(2, 7, models.D_MODEL)
    real = torch.arange(7) < torch.tensor([[7], [4]])

    def run(train: bool) -> Tensor:
        with torch.no_grad():
            return model.train(train)(x, src_key_padding_mask=~real)

    assert (run(train=False)[~real] == 0).all()  # it was nested: padding comes back as zeros
    vanilla = run(train=True)
    steppe.sparsify_(model, plugins)
    randomise_(model)
    if plugins == (NORM,):
        with torch.no_grad():
            model.layers[0].norm1.weight.mul_(2.0)
    if THRESHOLD in plugins:
        run(train=True)
        steppe.project_(steppe.advance_(model, 1.0))
    trained = run(train=True)
    assert (trained - vanilla)[real].abs().max() > 0.01
    torch.testing.assert_close(run(train=False)[real], trained[real])
    steppe.restore_(model)
    assert (run(train=False)[~real] == 0).all()


def test_a_plain_function_comes_back_as_the_same_object() -> None:
    model = models.torch_encoder()
    steppe.sparsify_(model, [JumpingSquaredReLU()])
    assert isinstance(model.layers[0].activation, steppe.Rectifier)
    steppe.restore_(model)
    assert model.layers[0].activation is F.relu
    assert model.layers[0].activation_relu_or_gelu == 1


def saved_storages(model: nn.Module, x: Tensor) -> list[int]:
    """Bytes that a forward pass keeps for backward, the parameters not counted."""
    storages: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        z = model(x)
    for parameter in model.parameters():
        storages.pop(parameter.untyped_storage().data_ptr(), None)
    del z
    return sorted(size for size in storages.values() if size >= x.nbytes)


@pytest.mark.parametrize("plugins", [(THRESHOLD,), (PENALTY,), (THRESHOLD, PENALTY)])
def test_ours_keep_no_hidden_tensor_for_the_backward_pass(plugins: tuple[Plugin, ...]) -> None:
    model = models.torch_encoder().layers[0]
    model.norm_first = False
    x = torch.randn(4, 7, models.D_MODEL)
    before = saved_storages(model, x)
    assert 4 * 7 * models.D_HIDDEN * 4 in before
    steppe.sparsify_(model, plugins)
    assert saved_storages(model, x) == before
