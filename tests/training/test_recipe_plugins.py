"""A recipe may name any registered plug-in by its key."""

from __future__ import annotations

import pytest

from howto.dummy_plugin import BentReLU
from steppe.errors import RecipeError
from steppe.plugins import RisingThreshold
from steppe.training.recipe import read_recipe, settings_of
from steppe.training.recipe_model import plugins_of

FLAGS = ("--data_dir", "texts", "--arm", "control")


def test_a_registered_plugin_is_named_by_its_key() -> None:
    named = '{"bent_relu": {"bend": 0.5}, "rising_threshold": {}}'
    recipe = read_recipe("text-gpt", [*FLAGS, "--plugins", named])
    assert plugins_of(recipe) == [BentReLU(bend=0.5), RisingThreshold()]
    assert settings_of(recipe)["plugins"] == named


def test_a_run_without_is_recorded_as_before() -> None:
    recipe = read_recipe("text-gpt", FLAGS)
    assert plugins_of(recipe) == []
    assert "plugins" not in settings_of(recipe)


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        ("{", "plugins: not valid JSON"),
        ("[]", "plugins: expected a mapping"),
        ('{"bent_relu": 1}', "plugins: expected a mapping"),
        ('{"bend": {}}', "plugins: unknown 'bend'; known are activation_penalty, bent_relu"),
        ('{"bent_relu": {"bends": 1.0}}', "plugins: the settings of 'bent_relu' are wrong"),
        ('{"bent_relu": {"ramp": 7.0}}', "BentReLU.ramp is a share of the run"),
    ],
)
def test_other_values_are_refused(value: str, shown: str) -> None:
    with pytest.raises(RecipeError, match=shown):
        read_recipe("text-gpt", [*FLAGS, "--plugins", value])
