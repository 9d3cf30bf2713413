"""The Trainer's own options in a recipe: accumulation, checkpointing, precision, streams."""

from __future__ import annotations

import json
import pydoc_data.topics
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from steppe.training.recipe import Recipe, read_recipe
from steppe.training.run_recipe import run_recipe
from training.recipe_worker import TINY_GPT, tiny_text_recipe, write_text

TINY_T5 = (
    '{"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2,'
    ' "feed_forward_proj": "relu", "dropout_rate": 0.1}'
)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("options")
    write_text(folder / "data", topics=20)
    topics = [pydoc_data.topics.topics[name] for name in sorted(pydoc_data.topics.topics)]
    (folder / "shards").mkdir()
    for index, name in enumerate(("train-0", "train-1", "train-2", "validation-0")):
        rows = [json.dumps({"text": text}) for text in topics[index:40:4]]
        (folder / "shards" / f"{name}.jsonl").write_text("\n".join(rows), encoding="utf-8")
    return folder


SAMPLED = ("--rising_threshold", "true")
# How large a sample is depends on how a step is cut into passes.
OF_ALL_TOKENS = ("--plugins", '{"rising_threshold": {"sample": 1.0}}')


def trained(place: Path, out: Path, *flags: str, threshold: tuple[str, ...] = SAMPLED) -> dict:
    ours = (*threshold, "--activation_penalty", "1e-3")
    flags = (*ours, "--max_steps", "6", "--save_steps", "6", "--eval_steps", "6", *flags)
    summary = run_recipe(tiny_text_recipe(place / "data", place / "cache", out, *flags))
    return {**summary, "weights": load_file(Path(summary["model"]) / "model.safetensors")}


@pytest.fixture(scope="module")
def plain(place: Path) -> dict:
    """A run without any of the options."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    return trained(place, place / "plain")


def stream_recipe(place: Path, out: Path, *flags: str) -> Recipe:
    return read_recipe(
        "t5-base-c4",
        [
            *("--data_dir", str(place / "shards"), "--model_config", TINY_T5, "--tokenizer", ""),
            *("--length", "32", "--vocab_size", "600", "--output_dir", str(out)),
            *("--max_steps", "9", "--save_steps", "4", "--eval_steps", "9", "--warmup_steps", "2"),
            *("--per_device_train_batch_size", "4", "--held_out_samples", "8", "--bf16", "false"),
            *("--use_cpu", "true", "--report_to", "none", "--logging_steps", "3"),
            *("--measure_every", "2", "--cache_dir", str(place / "cache"), *flags),
        ],
    )


def difference(one: dict, other: dict) -> float:
    return max(float((one[name] - other[name]).abs().max()) for name in one)


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning")
def test_gradient_checkpointing_changes_nothing(place: Path, plain: dict, tmp_path: Path) -> None:
    saving = trained(place, tmp_path / "saving", "--gradient_checkpointing", "true")
    assert difference(plain["weights"], saving["weights"]) < 1e-6
    assert saving["training_density"] == pytest.approx(plain["training_density"], abs=1e-6)


def test_accumulated_batches_are_as_one(place: Path, tmp_path: Path) -> None:
    config = ("--model_config", TINY_GPT.replace("0.1", "0.0"), "--adam_epsilon", "1e-3")
    one = trained(
        *(place, tmp_path / "one", *config, "--gradient_accumulation_steps", "1"),
        *("--per_device_train_batch_size", "8"),
        threshold=OF_ALL_TOKENS,
    )
    four = trained(
        *(place, tmp_path / "four", *config, "--gradient_accumulation_steps", "4"),
        *("--per_device_train_batch_size", "2"),
        threshold=OF_ALL_TOKENS,
    )
    assert difference(one["weights"], four["weights"]) < 1e-6
    assert four["training_density"] == pytest.approx(one["training_density"], abs=1e-5)


def test_mixed_precision_is_near(place: Path, plain: dict, tmp_path: Path) -> None:
    mixed = trained(place, tmp_path / "mixed", "--bf16", "true")
    assert 0 < difference(plain["weights"], mixed["weights"]) < 0.02
    assert mixed["density"] == pytest.approx(plain["density"], abs=0.02)


@pytest.mark.parametrize("workers", ["0", "2"])
def test_a_stream_is_resumed_where_it_was(place: Path, tmp_path: Path, workers: str) -> None:
    flags = ("--dataloader_num_workers", workers)
    whole = run_recipe(stream_recipe(place, tmp_path / "whole", *flags))
    assert set(whole["quality"]) == {"loss", "accuracy", "perplexity"}
    assert len(whole["density_per_block"]) == 4

    def stop(step: int, total: int) -> None:
        if step == 6:
            raise KeyboardInterrupt

    out = tmp_path / "cut"
    with pytest.raises(KeyboardInterrupt):
        run_recipe(stream_recipe(place, out, *flags), on_step=stop)
    again = run_recipe(stream_recipe(place, out, *flags, "--resume"))
    assert again["resumed_from"] == "checkpoint-4"
    weights = [load_file(Path(run["model"]) / "model.safetensors") for run in (whole, again)]
    assert difference(*weights) == 0.0


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of the compiler, within torch
def test_a_compiled_model_is_the_same(place: Path, tmp_path: Path) -> None:
    config = ("--model_config", TINY_GPT.replace("0.1", "0.0"), "--adam_epsilon", "1e-3")
    plain = trained(place, tmp_path / "plain", *config)
    compiled = trained(place, tmp_path / "compiled", *config, "--torch_compile", "true")
    assert difference(plain["weights"], compiled["weights"]) < 1e-5
    assert compiled["density"] == pytest.approx(plain["density"], abs=1e-4)
