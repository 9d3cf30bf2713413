"""Recipes: YAML files with flags in place of some of their values."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import MISSING, Field, dataclass, fields
from pathlib import Path
from typing import Any

from transformers import TrainingArguments

from steppe.errors import RecipeError
from steppe.files import expanded
from steppe.training.recipe_arguments import (
    ARMS,
    TASKS,
    ArmArguments,
    DataArguments,
    ModelArguments,
    model_settings,
    patterns_of,
)
from steppe.training.recipe_file import name_of, read_values, shown
from steppe.training.recipe_parser import RecipeParser, last_value, nearest
from steppe.training.recipe_plugins import named_plugins
from steppe.training.recipe_values import wrong_values

# In place of the Trainer's own: logs of any kind at all, and no search for parameters that a step
# has not used, which the Trainer switches on for every model.
DEFAULTS = {"report_to": "tensorboard", "ddp_find_unused_parameters": False}
OF_NEW_MODELS = ("model_type", "model_config", "xavier")
"""Keys of a model that is made from scratch; a checkpoint has its own."""
# Keys that older runs do not know: a default is left out, so that those can be resumed.
_LATER = ("patterns", "plugins", "xavier", "held_out_flatness", "time_blocks", "accelerate")
_NO_PATHS_YET = ("checkpoint", "tokenizer")  # these may be hub ids
_PATHS = ("data_dir", "cache_dir", "output_dir", *_NO_PATHS_YET)


@dataclass(frozen=True)
class Recipe:
    """A recipe as it will be run.

    Attributes:
        name: the file's, without its ending.
        model: the model that is trained.
        data: the data that it is trained on.
        arm: the part that steppe has in it.
        training: the Trainer's arguments.
    """

    name: str
    model: ModelArguments
    data: DataArguments
    arm: ArmArguments
    training: TrainingArguments


def read_recipe(recipe: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """A recipe with flags in place of some of its values.

    The flag ``--checkpoint`` takes the place of the file's new model, so ``model_type``,
    ``model_config`` and ``xavier`` of the file are left out with it.

    Args:
        recipe: a YAML file, or the name of one that comes with steppe.
        overrides: as on a command line, ``["--learning_rate", "1e-3"]``; any key of the recipe's
            own dataclasses, and of ``TrainingArguments``.

    Returns:
        The recipe; the Trainer's arguments have seen the machine.

    Raises:
        RecipeError: there is no such recipe, it is no YAML mapping, a key is unknown (names the
            nearest), or a value is out of its range.
    """
    path, values = read_values(recipe)
    given = {
        flag.removeprefix("--").partition("=")[0].replace("-", "_"): flag
        for flag in overrides
        if flag.startswith("--")
    }
    parser = RecipeParser(name_of(path), given)
    known = parser.keys()
    for key, flag in given.items():
        if key not in known:
            raise RecipeError(f"unknown flag {flag}{nearest(key, known, '--')}")
    for key in values:
        if key not in known:
            raise RecipeError(f"{parser.where}: unknown key {shown(key)!r}{nearest(key, known)}")
    if "checkpoint" in given:
        values = {key: value for key, value in values.items() if key not in OF_NEW_MODELS}
    for key, value in DEFAULTS.items():
        if key not in given:
            values.setdefault(key, value)
    if "output_dir" not in given:
        arm = last_value(overrides, "arm") or values.get("arm", ArmArguments.arm)
        values.setdefault("output_dir", default_folder(path, arm))
    result = Recipe(path.stem, *parser.parse(values, overrides))
    _check(result, parser)
    return result


def default_folder(path: Path, arm: str) -> str:
    """Where a run of a recipe is written, unless ``output_dir`` says it.

    Args:
        path: of the recipe.
        arm: of the run.
    """
    return f"runs/{path.stem}/{arm}"


def settings_of(recipe: Recipe) -> dict[str, Any]:
    """The values of a recipe's own keys, without those of the Trainer, as JSON values.

    Args:
        recipe: as it is run.
    """
    ours = {
        field.name: getattr(part, field.name)
        for part in (recipe.model, recipe.data, recipe.arm)
        for field in fields(part)
        if field.name not in _LATER or getattr(part, field.name) != default_of(field)
    }
    return {"recipe": recipe.name, **ours}


def default_of(field: Field[Any]) -> Any:
    """The default of a dataclass's field; None where there is none.

    Args:
        field: of the dataclass.
    """
    if field.default is not MISSING:
        return field.default
    return None if field.default_factory is MISSING else field.default_factory()


def _check(recipe: Recipe, parser: RecipeParser) -> None:
    """Refuse values that mean nothing, and put homes in place of ``~``."""
    model, data, training = recipe.model, recipe.data, recipe.training
    values = {**vars(model), **vars(data), **vars(recipe.arm), **vars(training)}
    wrong = wrong_values(values)
    for key, names in (("task", TASKS), ("arm", ARMS)):
        if values[key] not in names:
            wrong[key] = f"expected one of {', '.join(names)}, got {values[key]!r}"
    if training.label_smoothing_factor:
        wrong["label_smoothing_factor"] = "it cannot take mixed labels; use label_smoothing"
    for key, fault in wrong.items():
        raise RecipeError(f"{parser.place_of(key)}{key}: {fault}")
    for missing, instead in _missing(recipe):
        raise RecipeError(f"{parser.where}: {missing}", instead)
    model_settings(model)
    patterns_of(model)
    named_plugins(recipe.arm.plugins)
    for key in _PATHS:
        if values[key] == "" and key != "tokenizer":  # without one, the data's own is trained
            raise RecipeError(f"{parser.place_of(key)}{key}: expected a path, got an empty one")
        if str(values[key]).startswith("~"):
            home = str(expanded(values[key]))
            if key in _NO_PATHS_YET:
                setattr(model if key == "checkpoint" else data, key, home)


def _missing(recipe: Recipe) -> Iterator[tuple[str, dict[str, object]]]:
    """The faults of keys that need each other, each with a setting to give."""
    model, data = recipe.model, recipe.data
    if (model.model_type is None) == (model.checkpoint is None):
        fault = "expected either model_type (from scratch) or checkpoint (finetuning)"
        yield fault, {"checkpoint": "FOLDER_OR_HUB_ID"}
    if data.data_dir is None and data.dataset is None:
        yield "no data: expected data_dir or dataset", {"data_dir": "FOLDER"}
    if data.streaming and recipe.training.max_steps < 1:
        yield "a stream has no length: expected max_steps", {"max_steps": "100000"}
    if model.xavier and model.checkpoint is not None:
        yield "xavier is for new models; a checkpoint has its weights", {"xavier": False}
    if model_settings(model) and model.checkpoint is not None:
        yield "model_config is for new models; a checkpoint has its config", {"model_config": "{}"}
    if model.checkpoint is not None and _is_within(model.checkpoint, recipe.training.output_dir):
        fault = f"output_dir: {recipe.training.output_dir} holds the checkpoint {model.checkpoint}"
        yield f"{fault}, which the run would overwrite", {"output_dir": "FOLDER"}
    if model.lora_rank and not model.lora_targets:
        yield "lora_rank: expected lora_targets too", {"lora_targets": "q v"}


def _is_within(place: str, folder: str | None) -> bool:
    """Whether a local folder is another one, or lies in it."""
    path = expanded(place)
    return path.exists() and path.resolve().is_relative_to(expanded(str(folder)).resolve())
