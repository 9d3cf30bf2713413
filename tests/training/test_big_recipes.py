"""The paper's recipes at their true shapes: three steps on made-up images and text."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from steppe.data.tokenizer import train_tokenizer
from steppe.training.recipe import read_recipe
from steppe.training.run_recipe import run_recipe

COMMON = (
    *("--bf16", "false", "--use_cpu", "true", "--report_to", "none", "--max_steps", "3"),
    *("--save_strategy", "no", "--eval_strategy", "no", "--logging_steps", "1"),
    *("--measure_every", "1", "--dataloader_num_workers", "0", "--warmup_steps", "0"),
)


def write_images(folder: Path, classes: int, each: int) -> Path:
    """An image folder of noise, each image of another size."""
    generator = np.random.default_rng(0)
    for split, number in (("train", each), ("validation", 1)):
        for label in range(classes):
            place = folder / split / f"n{label:04d}"
            place.mkdir(parents=True)
            for index in range(number):
                shape = (*generator.integers(230, 400, 2), 3)
                pixels = generator.integers(0, 256, shape, dtype=np.uint8)
                Image.fromarray(pixels).save(place / f"{index}.png")
    return folder


def write_shards(folder: Path, shards: int, texts: int) -> Path:
    """JSON lines of made-up words, and a T5 tokenizer of them."""
    generator = random.Random(0)
    letters = "abcdefghijklmnopqrstuvwxyz"
    words = ["".join(generator.choices(letters, k=generator.randint(2, 9))) for _ in range(5000)]
    made = [" ".join(generator.choices(words, k=1500)) for _ in range(shards * texts)]
    data = folder / "data"
    data.mkdir(parents=True)
    for shard in range(shards):
        name = "validation-0" if shard == 0 else f"train-{shard}"
        rows = [json.dumps({"text": text}) for text in made[shard::shards]]
        (data / f"{name}.jsonl").write_text("\n".join(rows), encoding="utf-8")
    train_tokenizer(made, 4096, with_sentinels=True).save_pretrained(folder / "tokenizer")
    return folder


@pytest.mark.slow
def test_vit_b16_takes_three_steps(tmp_path: Path) -> None:
    data = write_images(tmp_path / "images", classes=4, each=8)
    summary = run_recipe(
        read_recipe(
            "vit-b16-imagenet1k",
            [
                *("--data_dir", str(data), "--output_dir", str(tmp_path / "run"), *COMMON),
                *("--per_device_train_batch_size", "8", "--per_device_eval_batch_size", "4"),
            ],
        )
    )
    assert summary["steps"] == 3
    assert len(summary["density_per_block"]) == 12
    assert 80e6 < summary["parameters"] < 90e6
    assert 0.0 < summary["training_density"] < 1.0


@pytest.mark.slow
def test_t5_base_takes_three_steps(tmp_path: Path) -> None:
    place = write_shards(tmp_path / "text", shards=3, texts=12)
    summary = run_recipe(
        read_recipe(
            "t5-base-c4",
            [
                *("--data_dir", str(place / "data"), "--output_dir", str(tmp_path / "run")),
                *("--tokenizer", str(place / "tokenizer"), "--held_out_samples", "4", *COMMON),
                *("--per_device_train_batch_size", "4", "--per_device_eval_batch_size", "2"),
            ],
        )
    )
    assert summary["steps"] == 3
    assert len(summary["density_per_block"]) == 24
    assert 220e6 < summary["parameters"] < 240e6
    assert 0.0 < summary["training_density"] < 1.0
