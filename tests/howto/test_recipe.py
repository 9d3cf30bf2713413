"""docs/howto/recipe.md in miniature: a recipe is one YAML file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from steppe.runs import read_run
from steppe.training.recipe import read_recipe
from steppe.training.recipe_file import RECIPES, list_recipes
from steppe.training.recipe_keys import keys_of
from steppe.training.run_recipe import run_recipe

TINY = Path(__file__).parent / "tiny.yaml"


def test_a_recipe_of_ones_own_is_one_file(tmp_path: Path) -> None:
    flags = ["--output_dir", str(tmp_path / "run"), "--use_cpu", "true", "--report_to", "none"]
    summary = run_recipe(read_recipe(TINY, flags))
    assert (summary["recipe"], summary["arm"], summary["steps"]) == ("tiny", "best", 2)
    assert json.loads((tmp_path / "run" / "summary.json").read_text(encoding="utf-8")) == summary
    run = read_run(tmp_path / "run")
    assert run.name == "tiny/best"
    assert run.steps == [1, 2]
    assert 0 < run.training_density < 1
    assert Path(summary["model"], "model.safetensors").is_file()


def test_the_help_of_a_recipe_begins_with_its_own_keys() -> None:
    first = next(iter(keys_of(TINY).values()))[:3]
    assert [key.name for key in first] == ["task", "model_type", "model_config"]


def test_a_file_in_the_folder_of_recipes_is_listed_and_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("steppe.training.recipe_file.RECIPES", tmp_path)
    (tmp_path / "tiny.yaml").write_bytes(TINY.read_bytes())
    assert list_recipes() == {"tiny": TINY.read_text(encoding="utf-8").splitlines()[0][2:]}
    assert read_recipe("tiny", ["--use_cpu", "true"]).training.output_dir == "runs/tiny/best"
    assert tmp_path != RECIPES
