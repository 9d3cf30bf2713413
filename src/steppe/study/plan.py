"""The plan of a study: all of its runs, each read as a recipe before the first one begins."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from steppe.errors import RecipeError, StudyError
from steppe.files import expanded
from steppe.study.planned import PlannedRun, described
from steppe.study.study_file import Part, Study
from steppe.training.recipe import read_recipe
from steppe.training.recipe_file import read_values
from steppe.training.recipe_parser import RecipeParser, as_flag, nearest

QUICK: Mapping[str, Any] = {
    "max_steps": 4,
    "warmup_steps": 1,
    "measure_every": 2,
    "held_out_samples": 16,
    "per_device_train_batch_size": 4,
    "per_device_eval_batch_size": 16,
    "vocab_size": 512,  # with room for the sentinels of T5
    "eval_strategy": "no",
    "save_strategy": "no",
    "time_blocks": 0,
}
"""The settings of a quick look, which shows that a study runs and nothing else."""
_QUICK_SEEDS = 2
_OURS = ("seed", "output_dir", "run_name", "resume", "use_cpu")  # a study gives these to its runs


def plan_runs(
    study: Study,
    quick: bool = False,
    only: Sequence[str] = (),
    data: Mapping[str, str] | None = None,
) -> list[PlannedRun]:
    """All runs of a study, seed by seed, so that every arm has some early.

    Args:
        study: as `read_study` gives it.
        quick: take a few steps, two seeds and the first of the values that vary.
        only: names of recipes and arms; others of that kind are left out.
        data: folders of data in place of the recipe's, by the recipe's name.

    Raises:
        StudyError: a key or a value is wrong, or a name is unknown.
    """
    data = data or {}
    recipes = {_recipe_name(name): name for name in study.recipes}
    if len(recipes) < len(study.recipes):
        raise StudyError(f"{study.path}: recipes: expected different file names")
    for word in data:
        if word not in recipes:
            raise StudyError(
                f"data: {word!r} is no recipe of {study.name}; expected one of"
                f" {', '.join(recipes)}",
                {"data": f"{next(iter(recipes))}=FOLDER"},
            )
    wanted_recipes, wanted_arms = _chosen(study, list(recipes), only)
    _check_keys(study)
    seeds = study.seeds[:_QUICK_SEEDS] if quick else study.seeds
    return [
        run
        for seed in seeds
        for recipe in wanted_recipes
        for run in _runs_of(study, recipes[recipe], wanted_arms, seed, quick, data.get(recipe))
    ]


def check_runs(study: Study, runs: Sequence[PlannedRun], folder: Path) -> None:
    """Read the recipe of every run; runs that differ in their seed alone are read once.

    Args:
        study: of the runs.
        runs: of `plan_runs`.
        folder: where the runs will be written.

    Raises:
        StudyError: a value cannot be; names the run.
    """
    seen: set[tuple[str, str, str]] = set()
    for run in runs:
        place = run.flags.get("data_dir")
        if place is not None and not expanded(place).exists():
            raise StudyError(
                f"{study.path}: {run.recipe_name}: {place}: there is no such file or folder",
                {"data": f"{run.recipe_name}=FOLDER"},
            )
        which = (run.recipe, run.arm, described(run.setting))
        if which in seen:
            continue
        seen.add(which)
        try:
            read_recipe(run.recipe, words_of(run, folder))
        except RecipeError as error:
            message = f"{study.path}: {run.id.rpartition('/')[0]}: {error.message}"
            if any("data_dir" in way for way in error.instead):
                raise StudyError(message, {"data": f"{run.recipe_name}=FOLDER"}) from None
            raise StudyError(message) from None


def words_of(run: PlannedRun, folder: Path) -> list[str]:
    """The flags of a run, as on a command line.

    Args:
        run: of `plan_runs`.
        folder: of the study's runs.
    """
    own = {
        "seed": run.seed,
        "output_dir": str(run_folder(run, folder)),
        "run_name": run.id,
        "resume": True,
        "use_cpu": not torch.cuda.is_available(),
    }
    return [word for key, value in {**run.flags, **own}.items() for word in as_flag(key, value)]


def run_folder(run: PlannedRun, folder: Path) -> Path:
    """The folder of a run; with other settings it is another.

    Args:
        run: of `plan_runs`.
        folder: of the study's runs.
    """
    return folder / f"{run.id}-{run.hash}"


def _recipe_name(recipe: str) -> str:
    return expanded(recipe).stem


def _chosen(study: Study, recipes: list[str], only: Sequence[str]) -> tuple[list[str], list[str]]:
    """The recipes and the arms that are asked for."""
    for word in only:
        if word not in recipes and word not in study.arms:
            known = [*study.arms, *recipes]
            raise StudyError(
                f"{study.name} has no arm or recipe {word!r}{nearest(word, known)}".replace(
                    " It is no key of a recipe.", f" It has {', '.join(known)}."
                )
            )
    chosen_recipes = [name for name in recipes if name in only] or recipes
    return chosen_recipes, [name for name in study.arms if name in only] or list(study.arms)


def _check_keys(study: Study) -> None:
    """Refuse keys that no recipe has, and those that a study gives its runs itself."""
    known = RecipeParser(study.name, ()).keys()
    for part in (study.shared, *study.recipes.values(), *study.arms.values()):
        for key in (*part.values, *part.vary):
            where, outer = f"{study.path}: {part.where}: ", key.partition(".")[0]
            if outer in _OURS:
                raise StudyError(f"{where}{key} differs from run to run; leave it out")
            if outer not in known:
                raise StudyError(f"{where}unknown key {key!r}{nearest(key, known)}")


def _runs_of(
    study: Study, name: str, arms: Sequence[str], seed: int, quick: bool, data_dir: str | None
) -> Iterator[PlannedRun]:
    """The runs of one recipe from one seed."""
    recipe = study.recipes[name]
    beside = study.path.parent / name
    found = str(beside) if beside.is_file() else name
    try:
        path, values = read_values(found)
    except RecipeError as error:
        raise StudyError(f"{study.path}: recipes: {error.message}") from None
    varied = Part("", vary={**study.shared.vary, **recipe.vary})
    for setting in _combinations(varied, quick):
        for arm_name in arms:
            arm = study.arms[arm_name]
            for own in _combinations(arm, quick):
                given = {**study.shared.values, **recipe.values, **arm.values, **setting, **own}
                flags = _nested(study, {**given, **(QUICK if quick else {})}, values)
                if data_dir is not None:
                    flags["data_dir"] = str(expanded(data_dir))
                yield PlannedRun(
                    recipe=found,
                    recipe_name=path.stem,
                    arm=f"{arm_name},{described(own)}" if own else arm_name,
                    setting=setting,
                    seed=seed,
                    flags=flags,
                    settings={"recipe": path.stem, **values, **flags, "seed": seed},
                )


def _combinations(part: Part, quick: bool) -> list[dict[str, Any]]:
    """The combinations of what varies; the first one alone for a quick look."""
    return part.combinations()[: 1 if quick else None]


def _nested(study: Study, given: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """Keys with a dot put into a copy of the recipe's mapping: ``model_config.n_inner``."""
    flags: dict[str, Any] = {key: value for key, value in given.items() if "." not in key}
    for key, value in given.items():
        outer, dot, inner = key.partition(".")
        if not dot:
            continue
        mapping = copy.deepcopy(flags.get(outer, values.get(outer, {})))
        if not isinstance(mapping, dict):
            raise StudyError(f"{study.path}: {key}: {outer} is no mapping in the recipe")
        flags[outer] = {**mapping, inner: value}
    return flags
