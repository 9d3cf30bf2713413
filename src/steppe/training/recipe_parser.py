"""The parser of a recipe's keys and of the flags in place of them."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Collection, Mapping, Sequence
from itertools import pairwise
from typing import Any, NoReturn

from transformers import HfArgumentParser, TrainingArguments

from steppe.errors import RecipeError
from steppe.training.recipe_arguments import ArmArguments, DataArguments, ModelArguments
from steppe.training.recipe_file import shown

_NEAREST = 3


class RecipeParser(HfArgumentParser):
    """The parser of a recipe: raises steppe's errors, and takes no abbreviations.

    Args:
        where: the recipe, for errors.
        given: the keys that flags give; an error about one is not the recipe's.
    """

    def __init__(self, where: str, given: Collection[str]) -> None:
        self.where = where
        self._given = given
        kinds: Any = (ModelArguments, DataArguments, ArmArguments, TrainingArguments)
        super().__init__(kinds, allow_abbrev=False, add_help=False)

    def keys(self) -> list[str]:
        """The keys of a recipe."""
        return sorted(
            option.removeprefix("--")
            for action in self._actions
            for option in action.option_strings
            if option.startswith("--") and "-" not in option.removeprefix("--")
        )

    def place_of(self, key: str) -> str:
        """The start of an error about a key: the recipe, unless a flag gave the key.

        Args:
            key: of the recipe.
        """
        return "" if key in self._given else f"{self.where}: "

    def parse(self, values: Mapping[str, Any], overrides: Sequence[str]) -> Any:
        """Parse the values of a recipe, and flags in place of them, into the four dataclasses.

        Args:
            values: of the file, by key.
            overrides: flags, as on a command line.

        Raises:
            RecipeError: a value cannot be.
        """
        try:
            flags = [word for key, value in values.items() for word in as_flag(key, value)]
            *parsed, left = self.parse_args_into_dataclasses(
                [*flags, *overrides], look_for_args_file=False, return_remaining_strings=True
            )
        except RecipeError:
            raise
        except (ValueError, TypeError, ImportError, OSError) as error:  # TrainingArguments' checks
            raise RecipeError(f"{self.where}: {shown(error)}") from None
        except Exception as error:  # it computes with the values
            raise RecipeError(f"{self.where}: a value is out of range ({shown(error)})") from None
        if left:
            raise RecipeError(
                f"{' '.join(left)}: expected a flag, which is a key with two dashes, and its value"
            )
        return parsed

    def error(self, message: str) -> NoReturn:
        """Raise instead of ending the process.

        Args:
            message: of argparse.

        Raises:
            RecipeError: always.
        """
        message = re.sub(r"(--\w+)/--[\w-]+", r"\1", message)  # it names both spellings
        of_flag = re.match(r"argument --(\w+)", message)
        raise RecipeError((self.place_of(of_flag[1] if of_flag else "")) + shown(message))


def as_flag(key: str, value: Any) -> list[str]:
    """A value as words of a command line.

    Args:
        key: of a recipe.
        value: as YAML has it; None gives no words.
    """
    if value is None:
        return []
    if isinstance(value, bool):
        return [f"--{key}", str(value).lower()]
    if isinstance(value, Mapping):
        return [f"--{key}", json.dumps(value)]
    if isinstance(value, Sequence) and not isinstance(value, str):
        words = [json.dumps(one) if isinstance(one, Mapping) else str(one) for one in value]
        return [f"--{key}", *words]
    return [f"--{key}={value}"]


def last_value(overrides: Sequence[str], key: str) -> str | None:
    """The last value that flags give a key; None for no such flag.

    Args:
        overrides: flags, as on a command line.
        key: of a recipe.
    """
    found = None
    for word, following in pairwise([*overrides, ""]):
        if word == f"--{key}":
            found = following
        elif word.startswith(f"--{key}="):
            found = word.partition("=")[2]
    return found


def nearest(key: str, known: Sequence[str], prefix: str = "") -> str:
    """The end of an error about an unknown key: the names most like it.

    Args:
        key: the wrong name.
        known: the right ones.
        prefix: of the names, ``--`` for flags.
    """
    near = difflib.get_close_matches(key, known, n=_NEAREST)
    listed = ", ".join(prefix + name for name in near)
    return f". Did you mean {listed}?" if near else ". It is no key of a recipe."
