"""Callbacks that accelerate: the same training, and a model that is as it was afterwards."""

from __future__ import annotations

import logging
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from peft.tuners.lora import LoraModel
from torch import Tensor, nn
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

import models
import steppe
from steppe import JumpingSquaredReLU, RisingThreshold, ZerothBias, sparsify_
from steppe.acceleration.accelerate import acceleration_of
from steppe.blocks.find import find_blocks
from steppe.errors import AccelerationError, ScheduleError
from steppe.plugins.applied import sparsification_of
from steppe.runs import read_run
from steppe.training import SteppeCallback, accelerated
from steppe.wiring.first_pass import stop_looking

pytestmark = [
    pytest.mark.filterwarnings("ignore:.gradient_checkpointing.* is deprecated:FutureWarning"),
]
STEPS = 6
WATCHED = "watch(gradients=True) measures the block's own modules"


@pytest.fixture(autouse=True)
def _at_any_density(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks this small run on the kernels only where they are forced to."""
    forced = partial(steppe.accelerate_, max_density=1.0)
    monkeypatch.setattr(accelerated, "accelerate_", forced)


def gpt2(with_plugins: bool = True) -> nn.Module:
    torch.manual_seed(0)
    model = models.gpt2()
    plugins = [RisingThreshold(), ZerothBias(), JumpingSquaredReLU()]
    return sparsify_(model, plugins) if with_plugins else model


def make_trainer(
    folder: Path, model: nn.Module, *callbacks: TrainerCallback, **options: Any
) -> Trainer:
    arguments: dict[str, Any] = {
        **{"output_dir": str(folder), "max_steps": STEPS, "per_device_train_batch_size": 4},
        **{"learning_rate": 1e-2, "adam_epsilon": 1e-3, "logging_steps": 1, "report_to": []},
        **{"save_strategy": "no", "disable_tqdm": True, "use_cpu": True},
        **{"dataloader_pin_memory": False},
    }
    data = [{"input_ids": ids, "labels": ids} for ids in models.token_ids(24, 8)]
    trainer = Trainer(
        model=model,
        args=TrainingArguments(**arguments | options),
        train_dataset=data,
        eval_dataset=data[:8],
        callbacks=list(callbacks),
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def losses(trainer: Trainer) -> list[float]:
    return [log["loss"] for log in trainer.state.log_history if "loss" in log]


def ways(callback: SteppeCallback) -> list[set[str]]:
    return [set(block["calls"]) for block in callback.acceleration.record["blocks"]]


def assert_restored(model: nn.Module, like: nn.Module) -> None:
    assert acceleration_of(model) is None
    for one in (model, like):
        stop_looking(one)  # what waits for a first pass is sparsify_'s
    for (name, module), (_, other) in zip(model.named_modules(), like.named_modules(), strict=True):
        assert type(module) is type(other), name
        kept, expected = ([k for k in vars(m) if "steppe" in k] for m in (module, other))
        assert kept == expected, name


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2},
        *(
            {
                "gradient_checkpointing": True,
                "gradient_checkpointing_kwargs": {"use_reentrant": is_reentrant},
            }
            for is_reentrant in (True, False)
        ),
    ],
    ids=["plain", "accumulation", "reentrant", "not reentrant"],
)
def test_a_run_has_the_losses_of_a_dense_one(tmp_path: Path, options: dict[str, Any]) -> None:
    runs: list[tuple[list[float], dict[str, Tensor], list[dict[str, Any]]]] = []
    for accelerate in (False, True):
        model = gpt2()
        callback = SteppeCallback(every=3, accelerate=accelerate)
        evaluation = {"eval_strategy": "steps", "eval_steps": 3}
        trainer = make_trainer(tmp_path, model, callback, **options, **evaluation)
        trainer.train()
        runs.append((losses(trainer), model.state_dict(), callback.history))
        assert_restored(model, gpt2())
        assert sparsification_of(model) is not None
    assert runs[1][0] == pytest.approx(runs[0][0], rel=1e-5)
    for name, tensor in runs[0][1].items():
        torch.testing.assert_close(runs[1][1][name], tensor, rtol=1e-4, atol=1e-6, msg=name)
    for dense, ours in zip(runs[0][2], runs[1][2], strict=True):
        assert ours["density"] == pytest.approx(dense["density"], abs=2e-3)
        assert ours["AF_up_per_block"] == pytest.approx(dense["AF_up_per_block"], rel=1e-3)
    written = read_run(tmp_path).acceleration
    assert written == callback.acceleration.record
    assert len(written["blocks"]) == 2
    for block in written["blocks"]:
        assert block["calls"]["sparse"] > 0
        assert block["reasons"][WATCHED] >= 2


def test_a_measured_step_is_sparse_too_without_the_flatness(tmp_path: Path) -> None:
    callback = SteppeCallback(every=1, flatness=False, accelerate=True)
    make_trainer(tmp_path, gpt2(False), callback).train()
    assert ways(callback) == [{"sparse"}, {"sparse"}]
    assert len(callback.history) == STEPS


def test_a_resumed_run_has_the_losses_of_an_uninterrupted_one(tmp_path: Path) -> None:
    saving = {"save_strategy": "steps", "save_steps": 3}
    whole = make_trainer(tmp_path / "a", gpt2(), SteppeCallback(every=4, accelerate=True), **saving)
    whole.train()
    callback = SteppeCallback(every=4, accelerate=True)
    again = make_trainer(tmp_path / "b", gpt2(), callback, **saving)
    again.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-3"))
    assert losses(again) == losses(whole)
    assert len(losses(again)) == STEPS
    calls = callback.acceleration.record["blocks"][0]["calls"]
    assert sum(calls.values()) == STEPS - 3, "of the part that this process has run"
    for (name, ours), theirs in zip(
        again.model.state_dict().items(), whole.model.state_dict().values(), strict=True
    ):
        assert torch.equal(ours, theirs), name


def test_a_model_that_was_accelerated_before_stays_so(tmp_path: Path) -> None:
    model = steppe.accelerate_(gpt2(), max_density=1.0)
    before = acceleration_of(model)
    callback = SteppeCallback(accelerate=True)
    make_trainer(tmp_path, model, callback).train()
    assert acceleration_of(model) is before
    assert len(ways(callback)) == 2
    assert all("sparse" in how for how in ways(callback))


def test_blocks_that_are_not_of_relu_type_stay_dense_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = gpt2(False)
    model.transformer.h[1].mlp.act = nn.GELU()
    callback = SteppeCallback(accelerate=True)
    with caplog.at_level(logging.WARNING, "steppe"):
        make_trainer(tmp_path, model, callback).train()
    assert "accelerated: 1 of 2 MLP blocks" in caplog.text
    assert "transformer.h.1" in caplog.text
    assert "GELU" in caplog.text
    assert [block["name"] for block in callback.acceleration.record["blocks"]] == [
        "transformer.h.0"
    ]
    model.transformer.h[0].mlp.act = nn.GELU()
    caplog.clear()
    trainer = make_trainer(tmp_path, model, callback)
    trainer.train()
    assert "accelerated: none of 2 MLP blocks" in caplog.text
    assert len(losses(trainer)) == STEPS
    record = read_run(tmp_path).acceleration
    assert list(record["not_accelerated"]) == ["transformer.h.0", "transformer.h.1"]


def test_a_block_that_does_not_fit_ends_the_run_before_its_first_step(tmp_path: Path) -> None:
    model = gpt2(False)
    LoraModel(model, LoraConfig(r=2, target_modules=["mlp.c_fc"], fan_in_fan_out=True), "default")
    trainer = make_trainer(tmp_path, model, SteppeCallback(accelerate=True))
    with pytest.raises(AccelerationError, match="merge the adapters first"):
        trainer.train()
    assert trainer.state.global_step == 0
    assert acceleration_of(model) is None


def test_added_to_a_trainer_later_it_says_where_it_belongs(tmp_path: Path) -> None:
    model = gpt2(False)
    trainer = make_trainer(tmp_path, model)
    trainer.add_callback(SteppeCallback(accelerate=True))
    with pytest.raises(ScheduleError, match=r"callbacks=\[SteppeCallback\(accelerate=True\)\]"):
        trainer.train()
    assert_restored(model, gpt2(False))


def test_checkpoints_of_an_accelerated_run_are_those_of_the_plain_model(tmp_path: Path) -> None:
    model = gpt2(False)
    callback = SteppeCallback(accelerate=True)
    make_trainer(tmp_path, model, callback, save_strategy="steps", save_steps=3).train()
    folder = tmp_path / "checkpoint-3"
    assert "steppe" not in (folder / "config.json").read_text()
    loaded = type(model).from_pretrained(folder)
    assert loaded.config.architectures == ["GPT2LMHeadModel"]
    assert len(find_blocks(loaded)) == 2


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of the compiler, within torch
def test_a_compiled_model_has_the_losses_of_a_dense_one(tmp_path: Path) -> None:
    found = []
    for accelerate in (False, True):
        model = gpt2(False)
        model.transformer.h = model.transformer.h[:1]
        callback = SteppeCallback(every=3, flatness=False, accelerate=accelerate)
        compiled = {"torch_compile": True, "torch_compile_backend": "aot_eager"}
        torch.compiler.reset()
        trainer = make_trainer(tmp_path, model, callback, max_steps=3, **compiled)
        trainer.train()
        torch.compiler.reset()
        found.append(losses(trainer))
    assert len(callback.acceleration.record["blocks"]) == 1  # its calls are not seen
    assert found[1] == pytest.approx(found[0], rel=1e-5)
