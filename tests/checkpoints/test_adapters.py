"""PEFT: plug-ins are saved beside the adapter, and come back with it."""

from __future__ import annotations

import copy
import json
import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModel, LoraConfig, PeftModel, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments

import models
import steppe
from steppe.errors import CheckpointError, SparsificationError, UnfitBlockError
from steppe.plugins.applied import changed_tensors, require_sparsification
from steppe.training import SteppeCallback

ATTENTION = {"gpt2": "c_attn", "llama": "q_proj", "t5": "q", "opt": "q_proj", "vit": "q_proj"}
ALL = [
    steppe.ZerothBias(max_tokens=16),
    steppe.RestrictedNorm(ramp=0.5),
    steppe.RisingThreshold(),
    steppe.JumpingSquaredReLU(ramp=0.5),
]


def base(name: str = "gpt2") -> nn.Module:
    torch.manual_seed(0)
    return {**models.LANGUAGE_MODELS, **models.VISION_MODELS}[name]().eval()


def lora(name: str = "gpt2", **settings: Any) -> LoraConfig:
    """An adapter of the attention whose values are not zero."""
    return LoraConfig(
        r=2,
        target_modules=[ATTENTION[name]],
        init_lora_weights=False,
        fan_in_fan_out=name == "gpt2",
        **settings,
    )


def trained(model: nn.Module) -> nn.Module:
    """The model with values in its plug-ins that make a difference."""
    for parameter in steppe.added_parameters(model).values():
        nn.init.normal_(parameter.detach(), generator=torch.Generator().manual_seed(1))
    for block in steppe.find_blocks(model):
        block.norm.weight.detach().copy_(torch.linspace(0.5, 2.0, block.d_model))
        threshold = getattr(block.activated, "threshold", None)
        if threshold is not None:
            threshold.multiple.fill_(2.0)
            threshold.deviation.fill_(0.5)
    return steppe.advance_(model, 0.25)


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    inner = model.get_base_model() if isinstance(model, PeftModel) else model
    return model.eval()(**models.inputs_for(inner)).logits


# ---- saved and loaded


@pytest.mark.parametrize("order", ["wrap first", "sparsify first"])
@pytest.mark.parametrize("name", ATTENTION)
def test_plug_ins_come_back_with_the_adapter(name: str, order: str, tmp_path: Path) -> None:
    if order == "wrap first":
        model = get_peft_model(base(name), lora(name))
        steppe.sparsify_(model, ALL)
    else:
        model = get_peft_model(steppe.sparsify_(base(name), ALL), lora(name))
    want = logits(trained(model))
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(base(name), tmp_path)
    assert torch.equal(logits(loaded), want)
    assert require_sparsification(loaded).record() == require_sparsification(model).record()
    have, wanted = changed_tensors(loaded), changed_tensors(model)
    assert have.keys() == wanted.keys()
    assert all(torch.equal(have[key], wanted[key]) for key in wanted)
    steppe.restore_(loaded)
    assert not torch.equal(logits(loaded), want), "the comparison can fail"


def test_a_sparsified_base_takes_the_values_of_the_adapter(tmp_path: Path) -> None:
    model = steppe.sparsify_(get_peft_model(base(), lora()), ALL)
    want = logits(trained(model))
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(steppe.sparsify_(base(), ALL), tmp_path)
    assert torch.equal(logits(loaded), want)
    with pytest.raises(CheckpointError, match="other plug-ins"):
        PeftModel.from_pretrained(steppe.sparsify_(base(), ALL[:2]), tmp_path)


def test_load_pretrained_takes_the_folder_of_an_adapter(tmp_path: Path) -> None:
    model = steppe.sparsify_(get_peft_model(base(), lora()), ALL)
    want = logits(trained(model))
    model.save_pretrained(tmp_path)
    loaded = steppe.load_pretrained(
        lambda folder: PeftModel.from_pretrained(base(), folder), tmp_path
    )
    assert torch.equal(logits(loaded), want)


def test_a_copy_of_the_model_saves_its_plug_ins(tmp_path: Path) -> None:
    model = copy.deepcopy(steppe.sparsify_(get_peft_model(base(), lora()), ALL))
    want = logits(trained(model))
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(base(), tmp_path)), want)


def test_an_adapter_on_the_folder_of_a_sparse_model(tmp_path: Path) -> None:
    trained(steppe.sparsify_(base(), ALL)).save_pretrained(tmp_path / "base")
    load = AutoModelForCausalLM.from_pretrained
    model = get_peft_model(load(tmp_path / "base"), lora())
    model.save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(load(tmp_path / "base"), tmp_path / "adapter")
    assert torch.equal(logits(loaded), logits(model))
    automatic = AutoPeftModel.from_pretrained(tmp_path / "adapter")
    assert len(require_sparsification(automatic).applied) == len(ALL)


def test_an_adapter_without_plug_ins_is_saved_as_ever(tmp_path: Path) -> None:
    get_peft_model(base(), lora()).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "LORA"
    assert not list(tmp_path.glob("steppe*"))


def test_without_steppe_peft_refuses_the_adapter(tmp_path: Path) -> None:
    base().save_pretrained(tmp_path / "base")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), lora())
    steppe.sparsify_(model, ALL).save_pretrained(tmp_path / "adapter")
    code = (
        "from peft import AutoPeftModel\n"
        f"try: AutoPeftModel.from_pretrained({str(tmp_path / 'adapter')!r})\n"
        "except KeyError as error: print(error)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "`import steppe`" in run.stdout


def test_what_peft_reads_of_a_marked_adapter_is_its_own_type(tmp_path: Path) -> None:
    steppe.sparsify_(get_peft_model(base(), lora()), ALL).save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(base(), tmp_path)
    assert loaded.peft_config["default"].peft_type == "LORA"
    loaded.save_pretrained(tmp_path)  # again: one mark, not two
    kind = json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"]
    assert kind in PEFT_TYPE_TO_CONFIG_MAPPING


@pytest.mark.parametrize("order", ["wrap first", "sparsify first"])
def test_adapters_of_transformers_own_keep_the_plug_ins(order: str, tmp_path: Path) -> None:
    base().save_pretrained(tmp_path / "base")
    load = AutoModelForCausalLM.from_pretrained
    model = load(tmp_path / "base")
    steps = [lambda: model.add_adapter(lora()), lambda: steppe.sparsify_(model, ALL)]
    for step in steps if order == "wrap first" else reversed(steps):
        step()
    want = logits(trained(model))
    model.save_pretrained(tmp_path / "adapter")
    assert not (tmp_path / "adapter" / "config.json").exists()
    plain = load(tmp_path / "base")
    plain.load_adapter(str(tmp_path / "adapter"))
    for loaded in (plain, load(tmp_path / "adapter")):
        assert torch.equal(logits(loaded), want)
        assert require_sparsification(loaded).record() == require_sparsification(model).record()


# ---- trained


class _Stop(TrainerCallback):
    """Ends a run early, as if it were killed after a checkpoint."""

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop = True


def run(out: Path, model: nn.Module, resume: bool = False, stop: bool = False) -> Trainer:
    ids = torch.randint(64, (24, 9), generator=torch.Generator().manual_seed(2))
    args = TrainingArguments(
        str(out),
        max_steps=6,
        per_device_train_batch_size=4,
        learning_rate=5e-2,
        save_steps=3,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
    )
    trainer = Trainer(
        model=model,
        args=args,
        train_dataset=[{"input_ids": one, "labels": one} for one in ids],
        callbacks=[SteppeCallback(every=2), *([_Stop()] if stop else [])],
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def test_a_resumed_run_ends_as_one_that_never_stopped(tmp_path: Path) -> None:
    def model() -> nn.Module:
        return steppe.sparsify_(get_peft_model(base(), lora()), ALL)

    whole = run(tmp_path / "whole", model())
    run(tmp_path / "parts", model(), stop=True)
    resumed = run(tmp_path / "parts", model(), resume=True)
    assert resumed.state.global_step == 6
    have, want = resumed.model.state_dict(), whole.model.state_dict()
    assert have.keys() == want.keys()
    assert [key for key in want if not torch.equal(have[key], want[key])] == []
    assert any(p.abs().max() > 0 for p in steppe.added_parameters(whole.model).values())
    resumed.save_model(str(tmp_path / "final"))
    assert torch.equal(
        logits(PeftModel.from_pretrained(base(), tmp_path / "final")), logits(resumed.model)
    )


def test_peft_says_what_it_has_frozen(caplog: pytest.LogCaptureFixture) -> None:
    model = steppe.sparsify_(base(), ALL)
    with caplog.at_level(logging.WARNING):
        get_peft_model(model, lora())
    assert "has frozen transformer.h.0.mlp.c_fc.zeroth_bias and 1 more" in caplog.text
    caplog.clear()
    steppe.sparsify_(get_peft_model(base(), lora()), ALL)
    assert not caplog.records


# ---- layers that both would change


@pytest.mark.parametrize("plugin", [ALL[0], ALL[2]])
@pytest.mark.parametrize("how", ["target_modules", "modules_to_save"])
def test_an_adapter_on_a_layer_with_a_plug_in_is_refused(plugin: steppe.Plugin, how: str) -> None:
    settings: dict[str, Any] = {"target_modules": ["c_attn"], "fan_in_fan_out": True, how: ["c_fc"]}
    with pytest.raises(UnfitBlockError, match="PEFT adapts the first layer"):
        steppe.sparsify_(get_peft_model(base(), LoraConfig(**settings)), [plugin])
    with pytest.raises(SparsificationError, match=r"mlp\.c_fc.*has a plug-in"):
        get_peft_model(steppe.sparsify_(base(), [plugin]), LoraConfig(**settings))


@pytest.mark.parametrize("target", ["c_fc", "c_proj"])
def test_adapters_on_other_layers_are_merged_right(target: str, tmp_path: Path) -> None:
    plugins = ALL if target == "c_proj" else ALL[1::2]
    config = lora()
    config.target_modules = {f"mlp.{target}"}
    model = steppe.sparsify_(get_peft_model(base(), config), plugins)
    want = logits(trained(model))
    model.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(base(), tmp_path / "adapter")
    assert torch.equal(logits(again), want)
    merged = model.merge_and_unload()
    torch.testing.assert_close(logits(merged), want, rtol=1e-5, atol=1e-5)
    merged.save_pretrained(tmp_path / "merged")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert torch.equal(logits(loaded), logits(merged))
    names = list(base().state_dict())
    assert list(steppe.restore_(merged).state_dict()) == names


# ---- several adapters


def test_several_adapters_share_the_plug_ins(tmp_path: Path) -> None:
    model = get_peft_model(base(), lora())
    model.add_adapter("other", lora())
    want = logits(trained(steppe.sparsify_(model, ALL)))
    model.set_adapter("other")
    other = logits(model)
    assert not torch.equal(other, want)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(base(), tmp_path)
    loaded.load_adapter(tmp_path / "other", "other")
    assert torch.equal(logits(loaded), want)
    loaded.set_adapter("other")
    assert torch.equal(logits(loaded), other)


def test_an_adapter_with_other_plug_ins_is_refused(tmp_path: Path) -> None:
    one = trained(steppe.sparsify_(get_peft_model(base(), lora()), ALL))
    one.save_pretrained(tmp_path / "one")
    two = steppe.sparsify_(get_peft_model(base(), lora()), ALL)
    two.save_pretrained(tmp_path / "two")
    want = logits(one)
    with pytest.raises(CheckpointError, match="other plug-ins than the model"):
        one.load_adapter(tmp_path / "two", "two")
    assert torch.equal(logits(one), want)
    assert list(one.peft_config) == ["default"]


# ---- damaged


@pytest.mark.parametrize("file", ["steppe_model.safetensors", "steppe_config.json"])
@pytest.mark.parametrize("content", [b"", b"\x10" * 100, b"[]", None], ids=repr)
def test_damaged_files_are_one_error(file: str, content: bytes | None, tmp_path: Path) -> None:
    steppe.sparsify_(get_peft_model(base(), lora()), ALL).save_pretrained(tmp_path)
    if content is not None:
        (tmp_path / file).write_bytes(content)
    elif file == "steppe_model.safetensors":
        (tmp_path / file).unlink()
    else:
        return
    with pytest.raises(CheckpointError, match=file):
        PeftModel.from_pretrained(base(), tmp_path)
