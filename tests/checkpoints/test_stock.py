"""A folder with plug-ins, loaded by anybody: the same model, or an error; never another one."""

from __future__ import annotations

import copy
import json
import pickle
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForSeq2SeqLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPT2Model,
    Trainer,
    TrainingArguments,
    VisionEncoderDecoderConfig,
    VisionEncoderDecoderModel,
    ViTConfig,
    pipeline,
)
from transformers.quantizers import auto

import models
import steppe
from data.data_makers import words_tokenizer
from steppe.errors import CheckpointError, SparsificationError
from steppe.plugins.applied import require_sparsification
from steppe.record import METHOD, METHOD_MARK, RECORD_KEY, WEIGHTS_MARK

PLUGINS: dict[str, list[steppe.Plugin]] = {
    "activation": [steppe.JumpingSquaredReLU()],
    "norm": [steppe.RestrictedNorm()],
    "bias": [steppe.ZerothBias(max_tokens=16)],
    "threshold": [steppe.RisingThreshold()],
}
LOADERS = {
    "t5": AutoModelForSeq2SeqLM,
    "opt": AutoModelForCausalLM,
    "gpt2": AutoModelForCausalLM,
    "llama": AutoModelForCausalLM,
    "vit": AutoModelForImageClassification,
    "ijepa": AutoModelForImageClassification,
}


def trained(name: str = "gpt2", plugins: str = "bias") -> nn.Module:
    """A model whose plug-ins make a difference."""
    torch.manual_seed(0)
    model = {**models.LANGUAGE_MODELS, **models.VISION_MODELS}[name]().eval()
    steppe.sparsify_(model, PLUGINS[plugins])
    for parameter in steppe.added_parameters(model).values():
        nn.init.normal_(parameter.detach())
    for block in steppe.find_blocks(model):
        if plugins == "norm":
            nn.init.constant_(block.norm.weight, 1.5)
        if plugins == "threshold":
            block.activated.threshold.multiple.fill_(2.0)
            block.activated.threshold.deviation.fill_(0.5)
    return model


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return model(**models.inputs_for(model)).logits


@pytest.fixture
def without_steppe(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Transformers as it is where nobody has imported steppe."""
    monkeypatch.delitem(auto.AUTO_QUANTIZATION_CONFIG_MAPPING, METHOD)
    monkeypatch.delitem(auto.AUTO_QUANTIZER_MAPPING, METHOD)
    return


# ---- with steppe imported


@pytest.mark.parametrize("plugins", PLUGINS)
@pytest.mark.parametrize("name", LOADERS)
def test_the_stock_loader_brings_back_the_same_model(
    name: str, plugins: str, tmp_path: Path
) -> None:
    model = trained(name, plugins)
    model.save_pretrained(tmp_path)
    loaded = LOADERS[name].from_pretrained(tmp_path)
    assert torch.equal(logits(loaded), logits(model))
    assert require_sparsification(loaded).record() == require_sparsification(model).record()
    if plugins != "norm":  # whose bounds act in training
        assert not torch.equal(logits(steppe.restore_(loaded)), logits(model)), "can it fail?"


def test_what_the_stock_loader_brings_back_is_no_quantized_model(tmp_path: Path) -> None:
    trained().save_pretrained(tmp_path / "one")
    loaded = GPT2LMHeadModel.from_pretrained(tmp_path / "one")
    assert not loaded.is_quantized
    assert METHOD_MARK not in loaded.config.__dict__
    assert WEIGHTS_MARK not in loaded.config.__dict__
    loaded.save_pretrained(tmp_path / "two")
    for file in ("config.json", "model.safetensors"):
        one, two = (tmp_path / folder / file for folder in ("one", "two"))
        assert one.read_bytes() == two.read_bytes()
    Trainer(model=loaded, args=TrainingArguments(str(tmp_path), report_to="none", use_cpu=True))
    assert next(loaded.half().parameters()).dtype == torch.float16


def test_other_options_of_the_stock_loader_go_on_working(tmp_path: Path) -> None:
    model = trained()
    model.save_pretrained(tmp_path, max_shard_size="10KB")
    assert torch.equal(
        logits(AutoModelForCausalLM.from_pretrained(tmp_path, device_map="cpu")), logits(model)
    )
    half = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    _, told = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not told["missing_keys"]
    assert not told["unexpected_keys"]
    words_tokenizer(tmp_path)
    texts = pipeline("text-generation", model=str(tmp_path))
    assert require_sparsification(texts.model)


@pytest.mark.parametrize("first", ["steppe", "transformers"])
def test_the_order_of_imports_does_not_matter(first: str, tmp_path: Path) -> None:
    trained().save_pretrained(tmp_path)
    load = f"transformers.AutoModelForCausalLM.from_pretrained({str(tmp_path)!r})"
    refused = f"try: {load}\nexcept ValueError as error: print('refused:', error)\n"
    code = (
        f"import {first}, transformers\n"
        f"{refused if first == 'transformers' else ''}"
        f"import steppe\nprint(len({load}._steppe_sparsification.applied), 'plug-in')"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    lines = run.stdout.splitlines()
    assert lines[-1] == "1 plug-in"
    assert ["refused" in line for line in lines[:-1]] == [True] * (first == "transformers")
    assert all("steppe.load_pretrained" in line for line in lines[:-1])


# ---- without steppe


@pytest.mark.parametrize("plugins", PLUGINS)
@pytest.mark.parametrize("name", LOADERS)
def test_without_steppe_the_stock_loader_refuses(
    name: str, plugins: str, tmp_path: Path, without_steppe: None
) -> None:
    trained(name, plugins).save_pretrained(tmp_path)
    for kind in (LOADERS[name], AutoModel, type(models_of(name))):
        with pytest.raises(ValueError, match="import steppe"):
            kind.from_pretrained(tmp_path)
        with pytest.raises(ValueError, match="import steppe"):
            kind.from_pretrained(
                tmp_path, dtype=torch.float32, config=AutoConfig.from_pretrained(tmp_path)
            )


def models_of(name: str) -> nn.Module:
    return {**models.LANGUAGE_MODELS, **models.VISION_MODELS}[name]()


def test_a_model_without_plug_ins_is_saved_as_ever(tmp_path: Path) -> None:
    model = trained()
    steppe.restore_(model).save_pretrained(tmp_path / "restored")
    folded = trained(plugins="threshold")
    steppe.fold_(folded).save_pretrained(tmp_path / "folded")
    for folder in ("restored", "folded"):
        content = json.loads((tmp_path / folder / "config.json").read_text())
        assert not {RECORD_KEY, METHOD_MARK, WEIGHTS_MARK} & set(content)


def test_a_config_with_a_record_can_be_copied(tmp_path: Path) -> None:
    config = trained().config
    for other in (copy.deepcopy(config), pickle.loads(pickle.dumps(config))):
        assert other.to_dict() == config.to_dict()
    model = copy.deepcopy(trained())
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(GPT2LMHeadModel.from_pretrained(tmp_path)), logits(model))


# ---- a model within a model


def test_a_base_model_saved_alone_comes_back(tmp_path: Path, without_steppe: None) -> None:
    model = trained()
    model.transformer.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="import steppe"):
        GPT2Model.from_pretrained(tmp_path)
    loaded = steppe.load_pretrained(lambda folder: models.gpt2().transformer, tmp_path)
    want = model.transformer.h[0].mlp.c_fc.zeroth_bias
    assert torch.equal(loaded.h[0].mlp.c_fc.zeroth_bias, want)


class Task(nn.Module):
    """What a training framework makes of a model."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model


def test_a_model_changed_through_its_wrapper_is_saved_whole(tmp_path: Path) -> None:
    inner = models.gpt2().eval()
    task = steppe.sparsify_(Task(inner), PLUGINS["bias"])
    nn.init.normal_(inner.transformer.h[0].mlp.c_fc.zeroth_bias.detach())
    inner.save_pretrained(tmp_path)
    assert torch.equal(logits(GPT2LMHeadModel.from_pretrained(tmp_path)), logits(inner))
    assert steppe.find_blocks(inner)
    steppe.restore_(task)
    assert RECORD_KEY not in inner.config.__dict__
    assert steppe.sparsify_(inner, PLUGINS["bias"])


def encoder_decoder() -> nn.Module:
    """A model of two towers, each with a config of its own within the whole's."""
    decoder = {"add_cross_attention": True, "is_decoder": True, "activation_function": "relu"}
    config = VisionEncoderDecoderConfig.from_encoder_decoder_configs(
        ViTConfig(**models.IMAGES, hidden_act="relu"),
        GPT2Config(vocab_size=64, n_embd=16, n_layer=1, n_head=2, n_positions=32, **decoder),
    )
    return VisionEncoderDecoderModel(config).eval()


def test_a_tower_saved_alone_has_the_record_of_its_blocks(tmp_path: Path) -> None:
    model = encoder_decoder()
    steppe.sparsify_(model, PLUGINS["activation"])
    model.decoder.save_pretrained(tmp_path / "decoder")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "decoder")
    names = {block.name for block in steppe.find_blocks(loaded)}
    assert {name for one in require_sparsification(loaded).applied for name in one.names} == names
    model.save_pretrained(tmp_path / "whole")
    whole = type(model).from_pretrained(tmp_path / "whole")
    assert require_sparsification(whole).record() == require_sparsification(model).record()


# ---- a record that is not applied


@pytest.fixture
def plain(tmp_path: Path) -> GPT2LMHeadModel:
    """What a loader without steppe made of a folder from before there were marks."""
    trained().save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    content = json.loads(path.read_text())
    del content[WEIGHTS_MARK], content[METHOD_MARK]
    path.write_text(json.dumps(content))
    return GPT2LMHeadModel.from_pretrained(tmp_path)


def test_a_record_that_is_not_applied_is_refused(plain: GPT2LMHeadModel) -> None:
    record = copy.deepcopy(plain.config.steppe)
    batches = [{"input_ids": torch.zeros(1, 4, dtype=torch.long)}]
    for model in (plain, Task(plain), plain.transformer):
        for verb in (
            steppe.find_blocks,
            lambda model: steppe.sparsify_(model, [steppe.RestrictedNorm()]),
            lambda model: steppe.measure(model, batches),
            steppe.accelerate_,
            lambda model: steppe.watch(model).__enter__(),
        ):
            with pytest.raises(SparsificationError, match="load_pretrained"):
                verb(model)
    assert plain.config.steppe == record, "nothing overwrites it"


def test_what_the_error_says_to_type_works(plain: GPT2LMHeadModel, tmp_path: Path) -> None:
    steppe.restore_(plain)
    assert steppe.find_blocks(plain)
    loaded = steppe.load_pretrained(AutoModelForCausalLM.from_pretrained, tmp_path)
    assert steppe.find_blocks(loaded)


def test_a_model_made_of_the_config_of_another_is_refused() -> None:
    model = GPT2LMHeadModel(trained().config)
    with pytest.raises(SparsificationError, match="made of the config"):
        steppe.find_blocks(model)
    assert steppe.find_blocks(steppe.restore_(model))


def test_an_empty_model_of_a_marked_config_can_be_freed_of_it(tmp_path: Path) -> None:
    trained().save_pretrained(tmp_path / "one")
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path / "one"))
    steppe.restore_(model).save_pretrained(tmp_path / "two")
    content = json.loads((tmp_path / "two" / "config.json").read_text())
    assert not {RECORD_KEY, METHOD_MARK, WEIGHTS_MARK} & set(content)


# ---- plug-ins of the user's own


class Doubled(nn.Module):
    """An activation times two."""

    def __init__(self, act: Any, factor: float) -> None:
        super().__init__()
        self.act, self.factor = act, factor

    def forward(self, p: Tensor) -> Tensor:
        return self.factor * self.act(p)


@dataclass(frozen=True)
class Louder(steppe.Plugin):
    """A plug-in that multiplies the activation."""

    key: ClassVar[str] = "louder"
    factor: float = 2.0

    def check(self, block: steppe.MLPBlock) -> None:
        pass

    def apply(self, model: nn.Module, blocks: Any, journal: Any) -> list[Any]:
        for block in blocks:
            journal.set_attribute(block.act_slot, Doubled(block.act, self.factor))
        return []


def test_a_plug_in_of_the_users_own_comes_back(tmp_path: Path) -> None:
    model = steppe.sparsify_(models.gpt2().eval(), [Louder(3.0), steppe.RestrictedNorm()])
    model.save_pretrained(tmp_path)
    load = AutoModelForCausalLM.from_pretrained
    loaded = steppe.load_pretrained(load, tmp_path, plugins=[Louder])
    assert torch.equal(logits(loaded), logits(model))
    assert require_sparsification(loaded).applied[0].plugin == Louder(3.0)
    for attempt in (load, lambda folder: steppe.load_pretrained(load, folder)):
        with pytest.raises(CheckpointError, match=r"'louder'.*plugins=\[ItsClass\]"):
            attempt(tmp_path)


def test_two_plug_ins_of_one_key_are_refused(tmp_path: Path) -> None:
    @dataclass(frozen=True)
    class Other(Louder):
        key: ClassVar[str] = "restricted_norm"

    trained().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="Other: another plug-in has the key 'restricted_norm'"):
        steppe.load_pretrained(AutoModelForCausalLM.from_pretrained, tmp_path, plugins=[Other])
