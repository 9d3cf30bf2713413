"""The file of a study: what it may say, and one clear error for what it may not."""

from __future__ import annotations

from pathlib import Path

import pytest

from steppe.errors import StudyError
from steppe.study.plan import check_runs, plan_runs, words_of
from steppe.study.study_file import list_studies, read_study
from steppe.training.recipe import read_recipe
from steppe.training.recipe_arguments import NORMS_NOT_DECAYED
from steppe.training.recipe_model import plugins_of
from steppe.training.recipe_parser import as_flag

GOOD = """# Two arms
recipes:
  digits: {vary: {learning_rate: [0.001, 0.01]}}
arms:
  vanilla: {arm: vanilla}
  high: {arm: threshold, vary: {threshold_multiple: [2.0, 3.0]}}
seeds: [0, 4]
set: {max_steps: 7, model_config.intermediate_size: 96}
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "mine.yaml"
    path.write_text(GOOD)
    return path


def ids_of(file: Path, **options) -> list[str]:
    return [run.id for run in plan_runs(read_study(file), **options)]


def test_the_runs_are_all_combinations_with_names_that_stay(file: Path) -> None:
    assert ids_of(file)[:4] == [
        "digits/vanilla/learning_rate=0.001/seed-0",
        "digits/high,threshold_multiple=2.0/learning_rate=0.001/seed-0",
        "digits/high,threshold_multiple=3.0/learning_rate=0.001/seed-0",
        "digits/vanilla/learning_rate=0.01/seed-0",
    ]
    assert len(set(ids_of(file))) == 2 * 3 * 2
    assert [run.hash for run in plan_runs(read_study(file))] == [
        run.hash for run in plan_runs(read_study(file))
    ]


def test_the_hash_is_of_the_settings_and_not_of_places(file: Path) -> None:
    study = read_study(file)
    first, moved = (plan_runs(study, data=data)[0] for data in ({}, {"digits": "/somewhere/else"}))
    assert moved.flags["data_dir"] == "/somewhere/else"
    assert (first.id, first.hash) == (moved.id, moved.hash)
    assert len({run.hash for run in plan_runs(study)}) == 12
    file.write_text(GOOD.replace("max_steps: 7", "max_steps: 8"))
    changed = plan_runs(read_study(file))[0]
    assert changed.id == first.id
    assert changed.hash != first.hash


def test_a_dot_reaches_into_a_mapping_of_the_recipe(file: Path, tmp_path: Path) -> None:
    run = plan_runs(read_study(file))[0]
    assert run.flags["model_config"]["intermediate_size"] == 96
    assert run.flags["model_config"]["hidden_size"] == 48
    assert "--max_steps=7" in words_of(run, tmp_path)
    assert "--seed=0" in words_of(run, tmp_path)


def test_only_and_quick_leave_runs_out(file: Path) -> None:
    assert ids_of(file, only=["vanilla", "digits"], quick=True) == [
        "digits/vanilla/learning_rate=0.001/seed-0",
        "digits/vanilla/learning_rate=0.001/seed-4",
    ]
    with pytest.raises(StudyError, match=r"no arm or recipe 'vanila'. Did you mean vanilla\?"):
        ids_of(file, only=["vanila"])
    with pytest.raises(StudyError, match=r"data: 'digit' is no recipe .* expected one of digits"):
        ids_of(file, data={"digit": "there"})


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ("seeds: [0, 4]", "seeds: zero", "seeds: expected a number of seeds, .*, got 'zero'"),
        ("seeds: [0, 4]", "seeds: [1, 1]", "seeds: expected"),
        ("seeds: [0, 4]", "seeds: true", "seeds: expected"),
        ("seeds:", "sceds:", r"unknown key 'sceds'. Did you mean seeds\?"),
        ("arm: vanilla}", "arm: vanilla, learning_rte: 1}", "arms: vanilla: unknown key"),
        ("vanilla: {arm: vanilla}", "vanilla: [arm]", "arms: vanilla: expected keys"),
        ("vanilla: {arm", "van/illa: {arm", "arms: expected names of letters"),
        ("[2.0, 3.0]", "2.0", "arms: high: vary: threshold_multiple: expected a list"),
        ("[2.0, 3.0]", "[2.0, 2.0]", "vary: threshold_multiple: expected each value once"),
        ("[2.0, 3.0]", "{low: 2.0}", "threshold_multiple: expected settings by name"),
        ("[2.0, 3.0]", "{}", "threshold_multiple: expected a list"),
        ("[2.0, 3.0]", "[2.0], learning_rate: [1, 2]", "high: learning_rate varies in two places"),
        ("set: {", "factors: [lr]\nset: {", "factors: expected a list of keys that `vary` has"),
        ("{learning_rate: [0.001", "{1: [0.001", "recipes: digits: unknown key '1'"),
        ("max_steps: 7", "seed: 7", "set: seed is set by the study; leave it out"),
        ("max_steps: 7", "task.x: 7", "task is no mapping"),
        ("set: {", "baseline: hi\nset: {", "baseline: expected one of the arms vanilla, high"),
        ("set: {", "baseline: high\nset: {", "baseline: expected an arm without `vary`"),
        ("digits:", "digit:", "recipes: .*there is no such file or recipe"),
        ("recipes:", "recipes: [", "not valid YAML"),
        (GOOD, "arms: {a: }", "recipes: expected names .*e.g. .*got nothing"),
    ],
)
def test_a_wrong_file_is_one_error_that_names_the_place(
    file: Path, old: str, new: str, told: str
) -> None:
    assert old in GOOD
    file.write_text(GOOD.replace(old, new, 1))
    with pytest.raises(StudyError, match=told) as raised:
        plan_runs(read_study(file))
    assert str(file) in str(raised.value)


def test_every_recipe_is_read_before_the_first_run(file: Path, tmp_path: Path) -> None:
    file.write_text(GOOD.replace("[2.0, 3.0]", "[2.0, -3.0]"))
    study = read_study(file)
    with pytest.raises(StudyError, match=r"multiple=-3.0.* expected at least 0, got -3.0"):
        check_runs(study, plan_runs(study), tmp_path)


def test_a_recipe_without_data_says_how_to_name_it(tmp_path: Path) -> None:
    file = tmp_path / "text.yaml"
    file.write_text("recipes: {text-gpt: }\narms: {vanilla: {arm: vanilla}}\n")
    study = read_study(file)
    with pytest.raises(StudyError, match=r"no data.*: data=text-gpt=FOLDER"):
        check_runs(study, plan_runs(study), tmp_path)


def test_a_folder_of_data_that_is_not_there_is_found_before_the_first_run(
    file: Path, tmp_path: Path
) -> None:
    study = read_study(file)
    with pytest.raises(StudyError, match=r"digits: nowhere: .*: data=digits=FOLDER"):
        check_runs(study, plan_runs(study, data={"digits": "nowhere"}), tmp_path)


def test_a_recipe_may_lie_beside_the_study(tmp_path: Path) -> None:
    (tmp_path / "own.yaml").write_text("task: image-classification\ndataset: digits\n")
    file = tmp_path / "study.yaml"
    file.write_text("recipes: {own.yaml: }\narms: {vanilla: {arm: vanilla}}\nseeds: 1\n")
    (run,) = plan_runs(read_study(file))
    assert (run.id, run.recipe) == ("own/vanilla/seed-0", str(tmp_path / "own.yaml"))


def test_a_study_that_is_not_there_is_told_with_the_nearest() -> None:
    with pytest.raises(StudyError, match=r"Did you mean: steppe study digits"):
        read_study("digit")


def test_settings_of_several_keys_have_names(file: Path) -> None:
    size = """
    size:
      small: {model_config.hidden_size: 24, max_steps: 3}
      usual: {model_config.hidden_size: 48}"""
    file.write_text(GOOD.replace("{vary: {learning_rate: [0.001, 0.01]}}", f"\n   vary:{size}"))
    small, _, _, usual, *_ = plan_runs(read_study(file))
    assert [small.id, usual.id] == [f"digits/vanilla/size={n}/seed-0" for n in ("small", "usual")]
    assert small.setting == {"size": "small"}
    assert small.flags["model_config"]["hidden_size"] == 24
    assert small.flags["model_config"]["intermediate_size"] == 96
    assert [run.flags["max_steps"] for run in (small, usual)] == [3, 7]
    file.write_text(file.read_text().replace("max_steps: 3", "max_stps: 3"))
    with pytest.raises(StudyError, match="recipes: digits: unknown key 'max_stps'"):
        plan_runs(read_study(file))


@pytest.mark.parametrize("name", list_studies())
def test_the_studies_that_come_with_steppe_can_be_run(name: str, tmp_path: Path) -> None:
    study = read_study(name)
    assert len(study.seeds) >= (1 if name == "scale-gpu" else 5)
    assert len(list_studies()[name]) > 20
    folders = ("fashion-mnist-vit", "text-gpt", "text-t5", "english-gpt", "english-t5")
    data = {recipe: str(tmp_path) for recipe in study.recipes if recipe in folders}
    runs = plan_runs(study, data=data)
    assert len({run.id for run in runs}) == len(runs)
    quick = plan_runs(study, data=data, quick=True)
    per_recipe = {run.recipe: run for run in quick}
    check_runs(study, list(per_recipe.values()), tmp_path)
    arms = [run for run in runs if run.recipe_name == "digits" and run.seed == 0]
    check_runs(study, list({run.arm: run for run in arms}.values()), tmp_path)


def test_the_default_arm_is_the_one_that_the_study_compares() -> None:
    study = read_study("effect")
    flags = [
        word
        for key, value in study.arms["threshold+three"].values.items()
        for word in as_flag(key, value)
    ]
    cpu = ("--use_cpu", "true")
    named, composed, usual = (
        read_recipe("digits", [*cpu, *words]) for words in (("--arm", "best"), flags, ())
    )
    assert plugins_of(named) == plugins_of(composed) == plugins_of(usual)
    assert len(plugins_of(named)) == 4
    assert {named.arm.arm, composed.arm.arm} <= set(NORMS_NOT_DECAYED)
