"""Embedded data sets as batches, and the models that they do not fit."""

from __future__ import annotations

import pytest
import torch

import models
from data.data_makers import batches_of, named_vit
from steppe.data.batches import load_batches
from steppe.data.embedded import load_digits_split, load_pydoc_split
from steppe.data.sources import Source
from steppe.errors import DataError
from steppe.training.demo import language_model

ANIMALS = ("cat", "dog")


def test_digits_and_pydoc_are_the_held_out_parts_of_the_demo() -> None:
    digits = load_batches(Source("digits", batch_size=50), models.vit(), "")
    expected = load_digits_split().held_out
    pixels = torch.cat([batch["pixel_values"] for batch in digits])
    assert len(pixels) == len(expected) == 360
    assert torch.equal(pixels[123], expected[123]["pixel_values"])
    assert (digits.split, digits.total) == ("held_out", 8)
    pydoc = load_batches(Source("pydoc"), language_model(), "")
    ids = torch.cat([batch["input_ids"] for batch in pydoc])
    windows = load_pydoc_split(64).held_out
    assert ids.shape == (len(windows), 64)
    assert torch.equal(ids[5], windows[5]["input_ids"])


@pytest.mark.parametrize(
    ("data", "model", "message"),
    [
        ("pydoc", models.gpt2, "pydoc: its tokens are bytes.*256; that of GPT2LMHeadModel has 64"),
        ("pydoc", models.vit, "takes images, this is text.*data=digits"),
        ("digits", models.gpt2, "takes text, this is images.*data=pydoc"),
    ],
)
def test_an_embedded_set_that_does_not_fit_is_one_error(
    data: str, model: object, message: str
) -> None:
    with pytest.raises(DataError, match=message):
        batches_of(data, model())


def test_digits_for_larger_images_or_fewer_classes_are_errors() -> None:
    model = models.vit()
    model.config.image_size = 224
    with pytest.raises(DataError, match=r"takes images of 1 × 224 × 224 .*, got 1 × 8 × 8"):
        batches_of("digits", model)
    with pytest.raises(DataError, match="10 classes, ViTForImageClassification knows 2"):
        batches_of("digits", named_vit(*ANIMALS))
    with pytest.raises(DataError, match="leave it out"):
        batches_of("digits", models.vit(), split="train")
