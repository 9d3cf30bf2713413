"""The plan of a study: all of its runs, each read as a recipe before the first one begins."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from steppe.errors import RecipeError, StudyError
from steppe.files import expanded
from steppe.study.part import Combination, Part
from steppe.study.planned import PlannedRun, described
from steppe.study.study_file import Study
from steppe.training.recipe import OF_NEW_MODELS, Recipe, read_recipe
from steppe.training.recipe_arguments import ArmArguments
from steppe.training.recipe_file import read_values
from steppe.training.recipe_model import plugins_of
from steppe.training.recipe_parser import RecipeParser, as_flag, nearest
from steppe.training.run_recipe import RESULT

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
_OF_THE_FIRST = (*OF_NEW_MODELS, "checkpoint")  # a run after another takes that one's model
_OURS = ("seed", "output_dir", "run_name", "resume", "use_cpu")  # a study gives these to its runs


def plan_runs(
    study: Study,
    quick: bool = False,
    only: Sequence[str] = (),
    data: Mapping[str, str] | None = None,
) -> list[PlannedRun]:
    """All runs of a study, seed by seed, so that every arm has some early.

    A run that starts from another's model stands behind that one, which is there even if `only`
    leaves its arm out.

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

    A run with plug-ins makes no model to start from: a recipe's checkpoint is a vanilla one.

    Args:
        study: of the runs.
        runs: of `plan_runs`.
        folder: where the runs will be written.

    Raises:
        StudyError: a value cannot be; names the run.
    """
    recipes: dict[tuple[str, str, str], Recipe] = {}
    for run in runs:
        place = run.flags.get("data_dir")
        if place is not None and not expanded(place).exists():
            raise StudyError(
                f"{study.path}: {run.recipe_name}: {place}: there is no such file or folder",
                {"data": f"{run.recipe_name}=FOLDER"},
            )
        for one in (run, *([] if run.after is None else [run.after])):
            which = (one.recipe, one.arm, described(one.setting))
            if which not in recipes:
                recipes[which] = _read(study, one, folder)
            if one is run.after and (plugins := plugins_of(recipes[which])):
                raise StudyError(
                    f"{study.path}: arms: {run.arm}: after: expected an arm without plug-ins,"
                    f" {one.arm} has {', '.join(plugin.key for plugin in plugins)}"
                )


def _read(study: Study, run: PlannedRun, folder: Path) -> Recipe:
    """The recipe of a run."""
    try:
        return read_recipe(run.recipe, words_of(run, folder))
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
    start = {} if run.after is None else {"checkpoint": str(model_folder(run.after, folder))}
    own = {
        **start,
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


def model_folder(run: PlannedRun, folder: Path) -> Path:
    """The folder of the model that a run has trained.

    Args:
        run: of `plan_runs`.
        folder: of the study's runs.
    """
    return run_folder(run, folder) / RESULT


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
    chosen_arms = [name for name in study.arms if name in only] or list(study.arms)
    return chosen_recipes, _behind_their_starts(study, chosen_arms)


def _behind_their_starts(study: Study, arms: Sequence[str]) -> list[str]:
    """Arms, each behind the one that it starts from."""
    order: list[str] = []
    for name in arms:
        chain: list[str] = []
        start: str | None = name
        while start is not None and start not in order:
            chain.append(start)
            start = study.arms[start].after
        order += reversed(chain)
    return order


def _check_keys(study: Study) -> None:
    """Refuse keys that no recipe has, and those that a study gives its runs itself."""
    known = RecipeParser(study.name, ()).keys()
    parts = [
        *((part, None) for part in (study.shared, *study.recipes.values())),
        *((arm, arm.after) for arm in study.arms.values()),
        *(
            (part, study.arms[name].after)
            for recipe in study.recipes.values()
            for name, part in recipe.arms.items()
        ),
    ]
    for part, after in parts:
        for key in part.keys:
            where, outer = f"{study.path}: {part.where}: ", key.partition(".")[0]
            if outer in _OURS:
                raise StudyError(f"{where}{key} is set by the study; leave it out")
            if outer not in known:
                raise StudyError(f"{where}unknown key {key!r}{nearest(key, known)}")
            if after is not None and outer in _OF_THE_FIRST:
                raise StudyError(f"{where}{key}: the model is that of {after}; leave it out")


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
        made: dict[str, PlannedRun] = {}
        for arm_name in arms:
            arm = study.arms[arm_name]
            _check_varied(study, arm, (study.shared, recipe, arm))
            own_values = {**arm.values, **recipe.arms.get(arm_name, Part("")).values}
            for own in _combinations(arm, quick):
                given = {
                    **{**study.shared.values, **recipe.values, **own_values},
                    **{**setting.values, **own.values},
                }
                flags = _nested(study, {**given, **(QUICK if quick else {})}, values)
                if data_dir is not None:
                    flags["data_dir"] = str(expanded(data_dir))
                usual = {"recipe": path.stem, "arm": ArmArguments.arm}
                settings = {**usual, **values, **flags, "seed": seed}
                if arm.after is not None:
                    flags, settings = (_without_model(keys) for keys in (flags, settings))
                made[arm_name] = PlannedRun(
                    recipe=found,
                    recipe_name=path.stem,
                    arm=f"{arm_name},{described(own.setting)}" if own.setting else arm_name,
                    setting=setting.setting,
                    seed=seed,
                    flags=flags,
                    settings=settings,
                    after=None if arm.after is None else made[arm.after],
                )
                yield made[arm_name]


def _check_varied(study: Study, arm: Part, parts: Sequence[Part]) -> None:
    """Refuse a key that varies in two places, of which one would win unseen."""
    axes = [
        {key for choice in choices for key in choice.values}
        for part in parts
        for choices in part.vary.values()
    ]
    for key in sorted(set().union(*axes)):
        if sum(key in axis for axis in axes) > 1:
            raise StudyError(f"{study.path}: {arm.where}: {key} varies in two places; leave one")


def _without_model(keys: Mapping[str, Any]) -> dict[str, Any]:
    """Keys without those of the model, which another run has made."""
    return {key: value for key, value in keys.items() if key not in _OF_THE_FIRST}


def _combinations(part: Part, quick: bool) -> list[Combination]:
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
