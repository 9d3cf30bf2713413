from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub.errors import OfflineModeIsEnabled
from PIL import Image
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoTokenizer,
    Trainer,
    ViTConfig,
    ViTForImageClassification,
)

from steppe import load_pretrained, restore_, sparsify_
from steppe.blocks.find import find_blocks
from steppe.checkpoints.held_out import measure_checkpoints
from steppe.data.sources import Source
from steppe.errors import CheckpointError, DataError, OutOfMemoryError, RecipeError
from steppe.plugins import JumpingSquaredReLU
from steppe.training.recipe import read_recipe
from steppe.training.recipe_model import build_model, norm_parameter_names, plugins_of
from steppe.training.run_recipe import run_recipe
from training.recipe_worker import tiny_text_recipe, write_text

TINY_VIT = {
    **{"hidden_act": "relu", "image_size": 8, "patch_size": 4, "num_channels": 3},
    **{"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2},
    "num_attention_heads": 2,
}


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two classes that a glance tells apart."""
    folder = tmp_path_factory.mktemp("images")
    generator = np.random.default_rng(0)
    for split, number in (("train", 32), ("test", 8)):
        for label, level in (("dark", 60), ("light", 190)):
            place = folder / split / label
            place.mkdir(parents=True)
            for index in range(number):
                pixels = generator.integers(level - 50, level + 50, (10, 10, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(place / f"{index}.png")
    return folder


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("text")
    write_text(place / "data", topics=20)
    return place


def image_recipe(images: Path, out: Path, *flags: str, name: str = "vit-cifar10"):
    return read_recipe(
        name,
        [
            *("--data_dir", str(images), "--output_dir", str(out), "--use_cpu", "true"),
            *("--bf16", "false", "--max_steps", "12", "--per_device_train_batch_size", "8"),
            *("--eval_strategy", "steps", "--eval_steps", "6", "--save_strategy", "steps"),
            *("--save_steps", "5", "--logging_steps", "4", "--measure_every", "3"),
            *("--dataloader_num_workers", "0", "--report_to", "none", "--learning_rate", "1e-2"),
            *flags,
        ],
    )


def scratch(images: Path, out: Path, *flags: str):
    return image_recipe(images, out, "--model_config", json.dumps(TINY_VIT), *flags)


def test_images_are_learnt_and_everything_is_written(images: Path, tmp_path: Path) -> None:
    steps, lines = [], []
    summary = run_recipe(
        scratch(images, tmp_path / "run", "--mixup", "0", "--cutmix", "0"),
        on_step=lambda step, total: steps.append((step, total)),
        on_log=lines.append,
    )
    assert steps == [(step, 12) for step in range(13)]
    assert summary["quality"]["top1"] > 0.8
    assert summary["quality"]["top5"] == 1.0
    assert any("density" in line and "loss" in line for line in lines)
    assert json.loads((tmp_path / "run" / "summary.json").read_text()) == summary
    assert len(summary["plugins"]) == 3
    model = load_pretrained(AutoModelForImageClassification.from_pretrained, summary["model"])
    assert model.config.id2label == {0: "dark", 1: "light"}
    card = (tmp_path / "run" / "model" / "README.md").read_text()
    assert f"{100 * summary['density']:.2f} % on held-out data after step 12" in card
    # `steppe measure` sees the held-out images as the Trainer did.
    measured = measure_checkpoints([summary["model"]], Source(str(images)), labels=None)
    assert measured.held_out[-1].density == pytest.approx(summary["density"], abs=0.02)


def test_mixed_labels_are_learnt_from_and_measured(images: Path, tmp_path: Path) -> None:
    summary = run_recipe(scratch(images, tmp_path / "run"))
    assert summary["quality"]["top1"] > 0.5
    run = json.loads((tmp_path / "run" / "steppe.json").read_text())
    assert len(run["steps"]) == 4
    assert all(np.isfinite(run["training"][0]["AF_up_per_block"]))


@pytest.mark.parametrize("workers", ["0", "2"])
def test_a_resumed_run_draws_the_same_images(images: Path, tmp_path: Path, workers: str) -> None:
    flags = ("--flip", "false", "--crop_padding", "0", "--random_resized_crop", "true")
    more = ("--repeated_augmentation", "2", "--dataloader_num_workers", workers)
    run_recipe(scratch(images, tmp_path / "whole", *flags, *more))

    def stop(step: int, total: int) -> None:
        if step == 11:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_recipe(scratch(images, tmp_path / "cut", *flags, *more), on_step=stop)
    summary = run_recipe(scratch(images, tmp_path / "cut", *flags, *more, "--resume", "true"))
    assert summary["resumed_from"] == "checkpoint-10"
    one, two = (
        load_file(tmp_path / name / "model" / "model.safetensors") for name in ("whole", "cut")
    )
    for name, tensor in one.items():
        assert tensor.equal(two[name]), name


def test_arms_and_subsets_of_plugins(text: Path, tmp_path: Path) -> None:
    found = {}
    for name, flags in {
        "vanilla": ("--arm", "vanilla"),
        "control": ("--arm", "control"),
        "subset": ("--arm", "vanilla", "--restricted_norm", "true"),
        "without": ("--arm", "steppe", "--zeroth_bias", "false"),
        "threshold": ("--arm", "threshold", "--threshold_multiple", "1.5"),
        "named": ("--plugins", '{"rising_threshold": {"multiple": 1.5}}'),
        "both": ("--arm", "best", "--activation_penalty", "1e-4"),
        "penalty": ("--arm", "control", "--activation_penalty", "1e-4", "--penalty_ramp", "0.1"),
    }.items():
        recipe = tiny_text_recipe(
            text / "data", text / "cache", tmp_path / name, "--max_steps", "2", *flags
        )
        plugins = [plugin.settings() for plugin in plugins_of(recipe)]
        if name in ("both", "penalty"):  # the others differ by their lists alone
            assert run_recipe(recipe)["plugins"] == plugins
        found[name] = [plugin["plugin"] for plugin in plugins]
    assert found["vanilla"] == found["control"] == []
    assert found["subset"] == ["restricted_norm"]
    assert found["without"] == ["restricted_norm", "jumping_squared_relu"]
    assert found["threshold"] == ["rising_threshold"]
    assert found["named"] == found["both"][:4]
    assert found["both"] == [
        *("zeroth_bias", "restricted_norm", "jumping_squared_relu"),
        *("rising_threshold", "activation_penalty"),
    ]
    assert found["penalty"] == ["activation_penalty"]
    assert plugins[0] == {"plugin": "activation_penalty", "strength": 1e-4, "ramp": 0.1}


def test_all_parameters_decay_but_the_controls_norms(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    groups = {}

    def look(self, *args, **kwargs):
        self.create_optimizer()
        for group in self.optimizer.param_groups:
            for parameter in group["params"]:
                name = next(n for n, p in self.model.named_parameters() if p is parameter)
                groups[name] = group["weight_decay"]
        raise KeyboardInterrupt

    monkeypatch.setattr(Trainer, "train", look)
    for arm in ("vanilla", "control", "threshold", "best"):
        groups.clear()
        recipe = tiny_text_recipe(text / "data", text / "cache", tmp_path / arm, "--arm", arm)
        with pytest.raises(KeyboardInterrupt):
            run_recipe(recipe)
        spared = {name for name, decay in groups.items() if decay == 0}
        norms = {f"transformer.h.{i}.ln_2.{kind}" for i in (0, 1) for kind in ("weight", "bias")}
        assert spared == (set() if arm == "vanilla" else norms & set(groups))
        assert "transformer.h.0.ln_2.weight" in groups
        assert groups["transformer.ln_f.bias"] == 0.3


@pytest.fixture(scope="module")
def vanilla(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("vanilla")
    torch.manual_seed(0)
    ViTForImageClassification(ViTConfig(**TINY_VIT, num_labels=2)).save_pretrained(folder)
    return folder


def finetune(images: Path, out: Path, vanilla: Path, *flags: str):
    return image_recipe(
        *(images, out, "--checkpoint", str(vanilla), "--lora_rank", "4"),
        *("--random_resized_crop", "false", "--rand_augment", "0", *flags),
        name="vit-b16-imagenet1k-finetune",
    )


def test_finetuning_ends_with_the_floor_and_a_plain_model(
    images: Path, tmp_path: Path, vanilla: Path
) -> None:
    summary = run_recipe(finetune(images, tmp_path / "run", vanilla))
    names = load_file(Path(summary["model"]) / "model.safetensors").keys()
    assert not any("lora" in name or "base_layer" in name for name in names)
    model = load_pretrained(AutoModelForImageClassification.from_pretrained, summary["model"])
    before = ViTForImageClassification.from_pretrained(vanilla)
    for block in find_blocks(model):
        assert block.norm.weight.abs().min() >= 1.0 - 1e-6
    mixed = [m for m in model.modules() if hasattr(m, "mix")]
    assert [float(m.mix) for m in mixed] == [1.0, 1.0]
    attention = [n for n, _ in before.named_parameters() if "q_proj.weight" in n]
    assert attention
    ours = dict(model.named_parameters())
    # Of the attention's matrices no more than LoRA's rank has changed.
    for name in attention:
        change = ours[name].detach() - before.get_parameter(name).detach()
        assert torch.linalg.matrix_rank(change, rtol=1e-4) == 4
    assert not torch.equal(
        *(find_blocks(m)[0].up.weight for m in (model, before)),
    )


def test_a_finetuning_run_resumes(images: Path, tmp_path: Path, vanilla: Path) -> None:
    run_recipe(finetune(images, tmp_path / "whole", vanilla))
    out = tmp_path / "cut"

    def stop(step: int, total: int) -> None:
        if step == 7:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_recipe(finetune(images, out, vanilla), on_step=stop)
    run_recipe(finetune(images, out, vanilla, "--resume", "true"))
    one, two = (
        load_file(path / "model" / "model.safetensors") for path in (tmp_path / "whole", out)
    )
    for name, tensor in one.items():
        assert tensor.equal(two[name]), name


def test_a_checkpoint_with_plugins_is_no_vanilla_one(
    images: Path, tmp_path: Path, vanilla: Path
) -> None:
    model = ViTForImageClassification.from_pretrained(vanilla)
    sparsify_(model, [JumpingSquaredReLU()]).save_pretrained(tmp_path / "changed")
    with pytest.raises(CheckpointError, match="is no vanilla model"):
        run_recipe(finetune(images, tmp_path / "run", tmp_path / "changed"))
    restore_(model)


def test_a_checkpoint_of_another_kind_is_refused(
    text: Path, images: Path, tmp_path: Path, vanilla: Path
) -> None:
    recipe = tiny_text_recipe(text / "data", text / "cache", tmp_path / "gpt")
    build_model(recipe, vocab_size=300).save_pretrained(tmp_path / "language")
    with pytest.raises(CheckpointError, match="expected a model for image-classification, got GPT"):
        run_recipe(finetune(images, tmp_path / "run", tmp_path / "language"))
    with pytest.raises(CheckpointError, match="there is no such folder"):
        run_recipe(finetune(images, tmp_path / "run", tmp_path / "nowhere"))


def test_lora_without_a_target_is_refused(images: Path, tmp_path: Path, vanilla: Path) -> None:
    with pytest.raises(RecipeError, match="lora_targets"):
        run_recipe(finetune(images, tmp_path / "run", vanilla, "--lora_targets", "nothing"))


def test_a_step_that_does_not_fit_says_what_to_type(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fill(*args, **kwargs):
        torch.empty(2**55)

    monkeypatch.setattr(Trainer, "training_step", fill)
    recipe = tiny_text_recipe(text / "data", text / "cache", tmp_path / "run")
    with pytest.raises(
        OutOfMemoryError,
        match="per_device_train_batch_size=2, gradient_accumulation_steps=4",
    ):
        run_recipe(recipe)


def test_wrong_settings_of_a_model_are_told(text: Path, tmp_path: Path) -> None:
    recipe = tiny_text_recipe(
        *(text / "data", text / "cache", tmp_path / "run", "--model_type", "nothing")
    )
    with pytest.raises(RecipeError, match="model_type, model_config"):
        run_recipe(recipe)


def test_the_controls_norms_are_those_before_the_mlps() -> None:
    model = ViTForImageClassification(ViTConfig(**TINY_VIT))
    assert len(norm_parameter_names(model)) == 4


def test_language_models_can_be_loaded_by_others(text: Path, tmp_path: Path) -> None:
    recipe = tiny_text_recipe(
        text / "data", text / "cache", tmp_path / "run", "--arm", "vanilla", "--max_steps", "2"
    )
    summary = run_recipe(recipe)
    model = AutoModelForCausalLM.from_pretrained(summary["model"])
    assert (Path(summary["model"]) / "tokenizer.json").is_file()
    assert model.config.vocab_size == 300
    assert summary["quality"]["perplexity"] == pytest.approx(np.exp(summary["quality"]["loss"]))


def test_a_folder_that_is_not_there_is_no_hub_id(tmp_path: Path) -> None:
    recipe = read_recipe("text-gpt", ["--data_dir", str(tmp_path / "gone"), "--use_cpu", "true"])
    with pytest.raises(DataError, match="gone: there is no such file or folder"):
        run_recipe(recipe)


def test_a_t5_of_a_recipe_is_measured_on_running_text(text: Path, tmp_path: Path) -> None:
    small = {"d_model": 32, "d_ff": 64, "d_kv": 8, "num_heads": 2, "num_layers": 1}
    recipe = read_recipe(
        "text-t5",
        [
            *("--data_dir", str(text / "data"), "--output_dir", str(tmp_path), "--max_steps", "2"),
            *("--cache_dir", str(text / "cache"), "--vocab_size", "700", "--length", "32"),
            *("--use_cpu", "true", "--report_to", "none", "--eval_strategy", "no"),
            *("--save_strategy", "no", "--model_config", json.dumps(small)),
        ],
    )
    run_recipe(recipe)
    source = Source(str(text / "data"), max_length=32, batch_size=4)
    folder = tmp_path / "model"
    runs = [measure_checkpoints([folder], source, max_batches=3) for _ in range(2)]
    assert str(runs[0].held_out) == str(runs[1].held_out)
    assert any("spans of the text are taken out" in note for note in runs[0].settings["notes"])
    encoder, decoder = runs[0].held_out[0].blocks
    assert encoder.tokens == 3 * 4 * 32  # every input is full, nothing is padded
    assert 0 < decoder.tokens < encoder.tokens
    assert 4 < runs[0].quality["loss"] < 8  # ln 700 is 6.6


def test_a_hub_that_cannot_be_reached_is_one_error(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unreachable(*args: object, **kwargs: object) -> None:
        raise OfflineModeIsEnabled("Cannot reach the hub: offline mode is enabled.\nMore.")

    monkeypatch.setattr(Trainer, "init_hf_repo", unreachable)
    flags = ("--push_to_hub", "true")
    recipe = tiny_text_recipe(text / "data", text / "cache", tmp_path / "run", *flags)
    with pytest.raises(RecipeError, match=r"offline mode is enabled\).*push_to_hub=False"):
        run_recipe(recipe)


def test_finetuning_on_other_text_keeps_the_checkpoints_tokenizer(
    text: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    other.mkdir()
    (other / "words.txt").write_text("quite different words, many times over\n" * 2000)
    plain = run_recipe(
        tiny_text_recipe(
            *(text / "data", text / "cache", tmp_path / "plain", "--max_steps", "1"),
            *("--arm", "vanilla"),
        )
    )
    flags = [
        *("--data_dir", str(other), "--cache_dir", str(text / "cache"), "--length", "32"),
        *("--output_dir", str(tmp_path / "tuned"), "--max_steps", "1", "--use_cpu", "true"),
        *("--checkpoint", plain["model"], "--arm", "vanilla", "--save_strategy", "no"),
        *("--eval_strategy", "no", "--held_out_samples", "4"),
    ]
    tuned = run_recipe(read_recipe("text-gpt", flags))
    one, two = (
        AutoTokenizer.from_pretrained(summary["model"]).get_vocab() for summary in (plain, tuned)
    )
    assert one == two
