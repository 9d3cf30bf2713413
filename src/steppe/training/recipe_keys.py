"""Every key of a recipe with its help: what ``steppe train RECIPE --help`` shows."""

from __future__ import annotations

import json
import shlex
from dataclasses import MISSING, Field, dataclass, fields
from enum import Enum
from pathlib import Path
from typing import Any

from transformers import TrainingArguments

from steppe.training.recipe import (
    DEFAULTS,
    ArmArguments,
    DataArguments,
    ModelArguments,
    default_folder,
    read_values,
)

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
        value: what it is if no flag is given, as it would be typed; empty for none.
        help: what it is for.
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
            Key(one.name, _typed(values.get(one.name, _default(one))), _help(one))
            for one in sorted(fields(kind), key=lambda one: one.name not in own)
        ]
        for title, kind in _SECTIONS
    }


def _default(one: Field[Any]) -> Any:
    """The default of a field."""
    if one.default is not MISSING:
        return one.default
    return None if one.default_factory is MISSING else one.default_factory()


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
