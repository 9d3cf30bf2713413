"""`steppe train RECIPE --accelerate`: the run of the recipe without it, on the kernels."""

from __future__ import annotations

import json
import logging
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, GPT2LMHeadModel

import steppe
from steppe.errors import AccelerationError, RecipeError
from steppe.runs import read_run
from steppe.training import accelerated
from steppe.training.recipe import read_recipe, settings_of
from steppe.training.recipe_keys import keys_of
from steppe.training.run_recipe import run_recipe
from training.recipe_worker import TINY_GPT, tiny_text_recipe, write_text

CONFIG = TINY_GPT.replace("0.1", "0.0")
T5 = (
    '{"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2,'
    ' "feed_forward_proj": "relu", "dropout_rate": 0.0}'
)


@pytest.fixture(autouse=True)
def _at_any_density(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks this small run on the kernels only where they are forced to."""
    torch.set_num_threads(1)
    forced = partial(steppe.accelerate_, max_density=1.0)
    monkeypatch.setattr(accelerated, "accelerate_", forced)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("accelerated")
    write_text(folder / "data", topics=20)
    return folder


def trained(place: Path, out: Path, *flags: str, lines: list[str] | None = None) -> dict:
    """The summary of a short run, and its losses."""
    recipe = tiny_text_recipe(
        *(place / "data", place / "cache", out, "--model_config", CONFIG, "--arm", "threshold"),
        *("--max_steps", "8", "--save_steps", "4", "--eval_steps", "8", "--logging_steps", "1"),
        *("--adam_epsilon", "1e-3", *flags),
    )
    summary = run_recipe(recipe, on_log=None if lines is None else lines.append)
    return {**summary, "losses": [one["loss"] for one in read_run(out).logs if "loss" in one]}


def sparse_calls(summary: dict) -> list[int]:
    return [block["calls"].get("sparse", 0) for block in summary["acceleration"]["blocks"]]


@pytest.fixture(scope="module")
def dense(place: Path) -> dict:
    return trained(place, place / "dense")


def test_the_flag_is_a_key_like_others(tmp_path: Path) -> None:
    common = ("--data_dir", "there", "--use_cpu", "true")
    for flags, wanted in (
        ((), False),
        (("--accelerate",), True),
        (("--accelerate", "true"), True),
        (("--accelerate", "false"), False),
    ):
        recipe = read_recipe("text-gpt", [*common, *flags])
        assert recipe.arm.accelerate is wanted
        # Older runs do not have the key.
        assert settings_of(recipe).get("accelerate", False) is wanted
        assert ("accelerate" in settings_of(recipe)) is wanted
    path = tmp_path / "mine.yaml"
    path.write_text("task: causal-lm\nmodel_type: gpt2\naccelerate: true\nlength: 32\n")
    assert read_recipe(path, common).arm.accelerate is True
    assert read_recipe(path, [*common, "--accelerate", "false"]).arm.accelerate is False
    with pytest.raises(RecipeError, match=r"unknown flag --accelerat\. Did you mean --accelerate"):
        read_recipe("text-gpt", [*common, "--accelerat"])
    with pytest.raises(RecipeError, match="accelerate"):
        read_recipe("text-gpt", [*common, "--accelerate", "perhaps"])
    (key,) = [k for k in keys_of("text-gpt")["the part of steppe"] if k.name == "accelerate"]
    assert (key.value, key.help.startswith("Train on the sparse kernels")) == ("false", True)


def test_it_is_the_same_run_and_says_how_it_ran(place: Path, tmp_path: Path, dense: dict) -> None:
    lines: list[str] = []
    ours = trained(place, tmp_path / "run", "--accelerate", lines=lines)
    assert ours["losses"] == pytest.approx(dense["losses"], rel=1e-5)
    assert ours["quality"]["loss"] == pytest.approx(dense["quality"]["loss"], rel=1e-5)
    assert ours["density"] == pytest.approx(dense["density"], abs=1e-3)
    assert (ours["accelerate"], "accelerate" in dense) == (True, False)
    assert "acceleration" not in dense
    first = next(line for line in lines if not line.startswith(str(place)))
    assert first == f"accelerated: 2 of 2 MLP blocks, kernels: {steppe.kernels().isa}"
    assert min(sparse_calls(ours)) > 8
    assert read_run(tmp_path / "run").acceleration == ours["acceleration"]
    assert read_run(place / "dense").acceleration == {}


def test_the_saved_model_is_that_of_a_dense_run(place: Path, tmp_path: Path) -> None:
    flags = ("--arm", "control", "--max_steps", "2")
    ours = trained(place, tmp_path / "run", "--accelerate", *flags)
    assert type(AutoModelForCausalLM.from_pretrained(ours["model"])) is GPT2LMHeadModel
    assert AutoConfig.from_pretrained(ours["model"]).architectures == ["GPT2LMHeadModel"]
    assert "steppe" not in (Path(ours["model"]) / "config.json").read_text()


def test_a_resumed_run_ends_with_the_same_weights(place: Path, tmp_path: Path) -> None:
    def stop(step: int, total: int) -> None:
        if step == 6:
            raise KeyboardInterrupt

    whole = trained(place, tmp_path / "whole", "--accelerate")
    recipe = partial(tiny_text_recipe, place / "data", place / "cache", tmp_path / "cut")
    flags = (
        *("--model_config", CONFIG, "--arm", "threshold", "--max_steps", "8", "--save_steps", "4"),
        *("--eval_steps", "8", "--logging_steps", "1", "--adam_epsilon", "1e-3", "--accelerate"),
    )
    with pytest.raises(KeyboardInterrupt):
        run_recipe(recipe(*flags), on_step=stop)
    again = run_recipe(recipe(*flags, "--resume"))
    assert again["resumed_from"] == "checkpoint-4"
    weights = [load_file(Path(run["model"]) / "model.safetensors") for run in (whole, again)]
    for name, tensor in weights[0].items():
        assert tensor.equal(weights[1][name]), name
    logs = [one["loss"] for one in read_run(tmp_path / "cut").logs if "loss" in one]
    assert logs == whole["losses"]


def test_a_dense_run_goes_on_accelerated(place: Path, tmp_path: Path, dense: dict) -> None:
    def stop(step: int, total: int) -> None:
        if step == 6:
            raise KeyboardInterrupt

    recipe = partial(tiny_text_recipe, place / "data", place / "cache", tmp_path / "cut")
    flags = (
        *("--model_config", CONFIG, "--arm", "threshold", "--max_steps", "8", "--save_steps", "4"),
        *("--eval_steps", "8", "--logging_steps", "1", "--adam_epsilon", "1e-3"),
    )
    with pytest.raises(KeyboardInterrupt):
        run_recipe(recipe(*flags), on_step=stop)
    again = run_recipe(recipe(*flags, "--resume", "--accelerate"))
    assert again["resumed_from"] == "checkpoint-4"
    assert again["quality"]["loss"] == pytest.approx(dense["quality"]["loss"], rel=1e-5)
    assert min(sparse_calls(again)) >= 2


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize(
    ("flags", "tolerance"),
    [
        (("--gradient_checkpointing", "true"), 1e-5),
        (("--gradient_accumulation_steps", "4", "--per_device_train_batch_size", "2"), 1e-5),
        (("--bf16", "true"), 5e-3),
    ],
    ids=["checkpointing", "accumulation", "bf16"],
)
def test_the_trainers_options_change_nothing(
    place: Path, tmp_path: Path, flags: tuple[str, ...], tolerance: float
) -> None:
    dense = trained(place, tmp_path / "dense", *flags)
    ours = trained(place, tmp_path / "run", "--accelerate", *flags)
    assert ours["losses"] == pytest.approx(dense["losses"], rel=tolerance)
    assert min(sparse_calls(ours)) > 8


def test_an_arm_of_gelu_trains_dense_with_a_warning(
    place: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    lines: list[str] = []
    gelu = ("--model_config", CONFIG.replace("relu", "gelu"), "--arm", "vanilla")
    with caplog.at_level(logging.WARNING, "steppe"):
        summary = trained(place, tmp_path, "--accelerate", "--max_steps", "2", *gelu, lines=lines)
    assert "accelerated: none of 2 MLP blocks" in lines
    assert "needs an activation" in caplog.text
    assert list(summary["acceleration"]["not_accelerated"]) == [
        "transformer.h.0",
        "transformer.h.1",
    ]


@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False:UserWarning")  # of PEFT
def test_with_lora_on_the_attention_the_blocks_run_sparse(place: Path, tmp_path: Path) -> None:
    lora = ("--lora_rank", "2", "--lora_targets", "c_attn", "--max_steps", "4")
    runs = [
        trained(place, tmp_path / accelerate, "--accelerate", accelerate, *lora)
        for accelerate in ("false", "true")
    ]
    assert runs[1]["losses"] == pytest.approx(runs[0]["losses"], rel=1e-5)
    assert min(sparse_calls(runs[1])) > 2


@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False:UserWarning")  # of PEFT
def test_a_block_that_does_not_fit_says_what_to_type(place: Path, tmp_path: Path) -> None:
    lora = ("--lora_rank", "2", "--lora_targets", "c_fc")
    with pytest.raises(AccelerationError, match=r"merge the adapters.*: accelerate=False"):
        trained(place, tmp_path, "--accelerate", *lora)


def test_a_t5_has_the_losses_of_a_dense_one(place: Path, tmp_path: Path) -> None:
    runs = []
    for flags in ((), ("--accelerate",)):
        recipe = read_recipe(
            "text-t5",
            [
                *("--data_dir", str(place / "data"), "--output_dir", str(tmp_path)),
                *("--cache_dir", str(place / "cache"), "--vocab_size", "700", "--length", "32"),
                *("--use_cpu", "true", "--report_to", "none", "--eval_strategy", "no"),
                *("--save_strategy", "no", "--model_config", T5, "--max_steps", "4"),
                *("--held_out_samples", "8", *flags),
            ],
        )
        runs.append(run_recipe(recipe))
    assert runs[1]["quality"]["loss"] == pytest.approx(runs[0]["quality"]["loss"], rel=1e-4)
    assert min(sparse_calls(runs[1])) > 0


def test_a_vit_has_the_losses_of_a_dense_one(tmp_path: Path) -> None:
    vit = {"hidden_size": 16, "intermediate_size": 64, "num_hidden_layers": 1, "hidden_act": "relu"}
    more = {"image_size": 8, "patch_size": 4, "num_channels": 1, "num_attention_heads": 2}
    runs = []
    for accelerate in ("false", "true"):
        flags = (
            *("--model_config", json.dumps(vit | more), "--max_steps", "4", "--use_cpu", "true"),
            *("--output_dir", str(tmp_path / accelerate), "--report_to", "none"),
            *("--held_out_samples", "32", "--accelerate", accelerate),
        )
        runs.append(run_recipe(read_recipe("digits", flags)))
    assert runs[1]["quality"]["loss"] == pytest.approx(runs[0]["quality"]["loss"], rel=1e-4)
    assert min(sparse_calls(runs[1])) > 0
