"""The embedded sets as a recipe's data, and weights drawn by Xavier's rule."""

from __future__ import annotations

import json
import math

import pytest
import torch
from torch import nn

from steppe.data.embedded import load_digits_split
from steppe.errors import RecipeError
from steppe.training.recipe import Recipe, read_recipe, settings_of
from steppe.training.recipe_arguments import model_settings
from steppe.training.recipe_data import load_job
from steppe.training.recipe_model import build_model


def recipe(name: str, *flags: str, **settings: object) -> Recipe:
    """A recipe with some settings of its model changed."""
    made = read_recipe(name, ["--use_cpu", "true", *flags])
    config = {**model_settings(made.model), **settings}
    return read_recipe(name, ["--use_cpu", "true", "--model_config", json.dumps(config), *flags])


def test_the_embedded_digits_are_data_of_a_recipe() -> None:
    job = load_job(recipe("digits", "--held_out_samples", "7"))
    split = load_digits_split()
    assert (len(job.train), len(job.held_out)) == (len(split.train), 7)
    assert torch.equal(job.held_out[6]["pixel_values"], split.held_out[6]["pixel_values"])
    assert job.model.config.num_labels == 10
    assert not job.takes_draws
    assert len(load_job(recipe("digits", "--held_out_samples", "9999")).held_out) == 360


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (("digits", "--flip", "true"), "digits is fixed tensors, and has no use for flip"),
        (("pydoc", "--streaming", "true"), "pydoc is fixed tensors, and has no use for streaming"),
        (("pydoc", "--dataset", "digits"), "digits is for the task image-classification, not cau"),
    ],
)
def test_settings_that_an_embedded_set_cannot_take_are_refused(
    made: tuple[str, ...], message: str
) -> None:
    with pytest.raises(RecipeError, match=message):
        load_job(recipe(*made))


def test_a_model_that_does_not_fit_an_embedded_set_is_refused() -> None:
    with pytest.raises(RecipeError, match="of 1 × 8 × 8 pixels; the model takes 10 of 1 × 16 × 16"):
        load_job(recipe("digits", image_size=16))
    with pytest.raises(RecipeError, match=r"256 bytes; the model's vocabulary has 100"):
        load_job(recipe("pydoc", vocab_size=100))


def test_xavier_draws_the_weights_of_linear_layers_within_its_bounds() -> None:
    torch.manual_seed(0)
    model = build_model(recipe("digits"))
    layers = [m for m in model.modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    assert len(layers) == 14
    for layer in layers:
        weight = layer.weight.flatten(1)
        bound = math.sqrt(6 / sum(weight.shape))
        assert 0.9 * bound < weight.abs().max() <= bound
    plain = build_model(recipe("digits", "--xavier", "false"))
    assert (
        max(block.weight.std() for block in plain.modules() if isinstance(block, nn.Linear)) < 0.1
    )


def test_xavier_with_a_checkpoint_is_refused() -> None:
    flags = ["--xavier", "true", "--checkpoint", "there", "--data_dir", "there", "--bf16", "false"]
    with pytest.raises(RecipeError, match="a checkpoint has its weights: xavier=False"):
        read_recipe("t5-base-c4-finetune", [*flags, "--use_cpu", "true"])


def test_settings_of_older_runs_are_the_same() -> None:
    """Keys that they do not know are left out at their defaults, so that runs can be resumed."""
    later = {"patterns", "xavier", "held_out_flatness", "time_blocks"}
    assert later.isdisjoint(settings_of(recipe("text-gpt", "--data_dir", "there")))
    assert settings_of(recipe("digits")).keys() & later == {"xavier", "held_out_flatness"}
    assert settings_of(recipe("pydoc-wide")).keys() & later == {"time_blocks"}
