"""A part of a study's file, a recipe or an arm, and the combinations of what varies in it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import product
from typing import Any


@dataclass(frozen=True)
class Choice:
    """One of the settings that a key of `vary` takes.

    Attributes:
        label: the value itself, or the name of several.
        values: of keys of the recipe.
    """

    label: Any
    values: dict[str, Any]


@dataclass(frozen=True)
class Combination:
    """One choice of each key that varies.

    Attributes:
        setting: labels by key.
        values: of keys of the recipe.
    """

    setting: dict[str, Any] = field(default_factory=dict)
    values: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Part:
    """A recipe or an arm of a study, or what all of its runs share.

    Attributes:
        where: its place in the file, for errors.
        values: of keys of the recipe that are the same in all its runs.
        vary: choices by key; the runs have all combinations.
        after: of an arm, the one whose trained model it starts from; None for a new model.
        arms: of a recipe, values that an arm has there alone, by arm.
    """

    where: str
    values: dict[str, Any] = field(default_factory=dict)
    vary: dict[str, list[Choice]] = field(default_factory=dict)
    after: str | None = None
    arms: dict[str, Part] = field(default_factory=dict)

    @property
    def keys(self) -> list[str]:
        """All keys of the recipe that it has values for."""
        varied = (key for some in self.vary.values() for one in some for key in one.values)
        return list(dict.fromkeys((*self.values, *varied)))

    def combinations(self) -> list[Combination]:
        """All combinations of what varies; one empty one where nothing does.

        Example:
            >>> rates = choices_of("rate", [1, 2])
            >>> sizes = choices_of("size", {"small": {"d": 8, "f": 32}})
            >>> [
            ...     one.setting
            ...     for one in Part("a", vary={"rate": rates, "size": sizes}).combinations()
            ... ]
            [{'rate': 1, 'size': 'small'}, {'rate': 2, 'size': 'small'}]
        """
        return [
            Combination(
                {key: one.label for key, one in zip(self.vary, chosen, strict=True)},
                {key: value for one in chosen for key, value in one.values.items()},
            )
            for chosen in product(*self.vary.values())
        ]


def choices_of(key: str, given: list[Any] | Mapping[str, Mapping[str, Any]]) -> list[Choice]:
    """The choices of a key.

    Args:
        key: of a recipe, or any name for settings that have names.
        given: values of the key, or settings of several keys by name.

    Example:
        >>> choices_of("size", {"small": {"d": 8}})
        [Choice(label='small', values={'d': 8})]
    """
    if isinstance(given, Mapping):
        return [
            Choice(str(name), {str(one): value for one, value in values.items()})
            for name, values in given.items()
        ]
    return [Choice(value, {key: value}) for value in given]
