"""Every key of a recipe with its help, for ``steppe train RECIPE --help``."""

from __future__ import annotations

import json
import shlex
from dataclasses import Field, dataclass, fields
from enum import Enum
from pathlib import Path
from typing import Any

from transformers import TrainingArguments

from steppe.training.recipe import DEFAULTS, default_folder, default_of
from steppe.training.recipe_arguments import ArmArguments, DataArguments, ModelArguments
from steppe.training.recipe_file import read_values

_SECTIONS = (
    ("what is trained", ModelArguments),
    ("what it is trained on", DataArguments),
    ("what steppe does", ArmArguments),
    ("how: the arguments of transformers' Trainer", TrainingArguments),
)


@dataclass(frozen=True)
class Key:
    """A key of a recipe.

    Attributes:
        name: as in the file.
        value: without a flag, as it would be typed; empty for none.
        help: its purpose in one line.
    """

    name: str
    value: str
    help: str


def keys_of(recipe: str | Path) -> dict[str, list[Key]]:
    """The keys of a recipe, each with the value that it has without a flag.

    Args:
        recipe: as `read_recipe` takes it.

    Returns:
        The keys by section, those of this recipe's own values first.

    Raises:
        RecipeError: there is no such recipe, or it is no YAML mapping.
    """
    path, values = read_values(recipe)
    own = set(values)
    arm = values.get("arm", ArmArguments.arm)
    values = {**DEFAULTS, "output_dir": default_folder(path, arm), **values}
    return {
        title: [
            Key(one.name, _typed(values.get(one.name, default_of(one))), _help(one))
            for one in sorted(fields(kind), key=lambda one: one.name not in own)
        ]
        for title, kind in _SECTIONS
    }


def _typed(value: Any) -> str:
    """A value as it is typed on a command line."""
    if value is None:
        return ""
    if isinstance(value, Enum):
        return str(value.value)
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, dict):
        return shlex.quote(json.dumps(value))
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def _help(one: Field[Any]) -> str:
    """The help of a field on one line."""
    return " ".join(str(one.metadata.get("help", "")).replace("%%", "%").split())
