"""Saved models come back as what they were, and what is none is refused in one line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers
from torch import nn
from transformers import GPT2LMHeadModel, PreTrainedModel

import models
import steppe
from steppe.checkpoints.load_by_config import empty_model, load_checkpoint
from steppe.errors import CheckpointError, MissingExtraError

PLUGINS = [steppe.ZerothBias(), steppe.RestrictedNorm(), steppe.JumpingSquaredReLU()]


def saved(model: PreTrainedModel, folder: Path) -> Path:
    """A checkpoint."""
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", [*models.LANGUAGE_MODELS, *models.VISION_MODELS])
def test_a_model_comes_back_as_the_class_it_was(tmp_path: Path, name: str) -> None:
    model = {**models.LANGUAGE_MODELS, **models.VISION_MODELS}[name]()
    loaded = load_checkpoint(saved(model, tmp_path))
    assert type(loaded) is type(model)
    assert not loaded.training
    expected = model.state_dict()
    assert all(torch.equal(tensor, expected[key]) for key, tensor in loaded.state_dict().items())


def test_plugins_come_back_with_their_tensors(tmp_path: Path) -> None:
    model = steppe.sparsify_(models.gpt2(), PLUGINS)
    for parameter in steppe.added_parameters(model).values():
        nn.init.normal_(parameter)
    loaded = load_checkpoint(saved(model, tmp_path))
    assert list(loaded.state_dict()) == list(model.state_dict())
    ids = models.token_ids()
    assert torch.equal(loaded(ids).logits, model.eval()(ids).logits)


def test_a_config_without_a_class_gets_one_with_a_loss(tmp_path: Path) -> None:
    for build in (models.gpt2, models.t5, models.vit, models.bert):
        folder = saved(build(), tmp_path / build.__name__)
        config = json.loads((folder / "config.json").read_text())
        config["architectures"] = None
        (folder / "config.json").write_text(json.dumps(config))
        assert type(load_checkpoint(folder)) is type(build())


def refused(folder: object, message: str) -> None:
    with pytest.raises(CheckpointError, match=message) as caught:
        load_checkpoint(str(folder))
    assert "\n" not in str(caught.value)


def test_what_is_no_checkpoint_is_refused_in_one_line(tmp_path: Path) -> None:
    refused(tmp_path / "nowhere", "there is no such folder")
    refused("nobody/nothing", r"nobody/nothing: expected the folder .* hub \(We couldn't connect")
    refused(tmp_path, r"found no config.json.*checkpoint-1000")
    (tmp_path / "adapter_config.json").write_text("{}")
    refused(tmp_path, r"an adapter of PEFT.*merge_and_unload")
    (tmp_path / "file.safetensors").write_bytes(b"")
    refused(tmp_path / "file.safetensors", "got a file. Name its folder")
    (tmp_path / "config.json").write_text('{"hidden_size": 3}')
    refused(tmp_path, r"expected the folder of a model of Transformers.*Unrecognized model")
    (tmp_path / "config.json").write_text("{")
    refused(tmp_path, "valid JSON")


def test_code_of_a_checkpoint_is_never_run(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass C: pass\n")
    remote = {"AutoConfig": "mine.C", "AutoModel": "mine.C"}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mine", "auto_map": remote}))
    refused(tmp_path, "needs code of its own, which steppe never runs")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("plugins", [[], PLUGINS])
def test_damaged_and_missing_weights_are_refused(tmp_path: Path, plugins: list) -> None:
    model = models.gpt2()
    if plugins:
        steppe.sparsify_(model, plugins)
    folder = saved(model, tmp_path)
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    refused(folder, r"damaged")
    weights.unlink()
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    refused(folder, r"safetensors only")


def test_weights_of_another_model_are_refused(tmp_path: Path) -> None:
    folder = saved(models.gpt2(), tmp_path / "a")
    other = saved(models.opt(), tmp_path / "b")
    (folder / "model.safetensors").write_bytes((other / "model.safetensors").read_bytes())
    refused(folder, r"the weights lack \S+ \(\d\d missing\).*GPT2LMHeadModel")


def test_a_package_that_a_model_needs_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: object, **options: object) -> None:
        raise ImportError("TimmWrapper requires the timm library")

    folder = saved(models.gpt2(), tmp_path)
    monkeypatch.setattr(GPT2LMHeadModel, "from_pretrained", fail)
    with pytest.raises(MissingExtraError, match="requires the timm library"):
        load_checkpoint(folder)


def test_layers_by_the_million_are_refused_before_they_are_made(tmp_path: Path) -> None:
    models.gpt2().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "n_layer": 200_000_000}))
    with pytest.raises(CheckpointError, match="200000000 layers, the weights 28 tensors"):
        load_checkpoint(tmp_path)


@pytest.mark.parametrize("model_type", ["clip", "detr"])
def test_a_config_that_names_no_class_is_of_the_whole_model(model_type: str, tmp_path) -> None:
    options = {"backbone_config": transformers.ResNetConfig()} if model_type == "detr" else {}
    transformers.AutoConfig.for_model(model_type, **options).save_pretrained(tmp_path)
    assert type(empty_model(tmp_path)).__name__ in ("CLIPModel", "DetrModel")
