"""The file of a study: found by path or name, and read as plain YAML."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from steppe.errors import RecipeError, StudyError
from steppe.files import expanded
from steppe.study.part import Part, choices_of
from steppe.training.recipe_file import read_mapping, shown

STUDIES = Path(__file__).parents[1] / "studies"
"""The folder of the studies that come with steppe."""
VARY = "vary"
AFTER = "after"
ARMS = "arms"
FACTORS = "factors"
_KEYS = ("recipes", ARMS, "seeds", "baseline", "set", VARY, FACTORS)
_NAME = re.compile(r"[\w.+-]+")
_MOST_SEEDS = 1000


@dataclass(frozen=True)
class Study:
    """A study as its file has it.

    Attributes:
        path: of the file.
        recipes: by the recipe's name or path.
        arms: by a name that the study gives them.
        seeds: of the runs; each arm has the same ones.
        baseline: the arm that the others are compared with.
        shared: by all runs.
        factors: keys of `vary` whose values make other models; arms are compared at each of them.
    """

    path: Path
    recipes: dict[str, Part]
    arms: dict[str, Part]
    seeds: list[int]
    baseline: str
    shared: Part
    factors: list[str]

    @property
    def name(self) -> str:
        """The file's name without its ending."""
        return self.path.stem


def list_studies() -> dict[str, str]:
    """The studies that come with steppe: their names and the first lines of their files."""
    return {
        path.stem: path.read_text(encoding="utf-8").splitlines()[0].lstrip("# ")
        for path in sorted(STUDIES.glob("*.yaml"))
    }


def read_study(study: str | Path) -> Study:
    """Read the file of a study.

    Args:
        study: a YAML file, or the name of one that comes with steppe.

    Raises:
        StudyError: there is no such study, or it is none: names the key, what was expected and
            what is there.
    """
    path = _find(study)
    try:
        values = read_mapping(path)
    except RecipeError as error:
        raise StudyError(error.message) from None
    for key in values:
        if key not in _KEYS:
            near = difflib.get_close_matches(key, _KEYS, n=1)
            hint = f"Did you mean {near[0]}?" if near else f"A study has {', '.join(_KEYS)}."
            raise StudyError(f"{path}: unknown key {shown(key)!r}. {hint}")
    recipes = {
        name: _recipe(path, part)
        for name, part in _parts(path, values, "recipes", "recipes: {digits: }").items()
    }
    arms = {
        name: _arm(path, part)
        for name, part in _parts(path, values, ARMS, "arms: {vanilla: {arm: vanilla}}").items()
    }
    for name in arms:
        if not _NAME.fullmatch(name):
            raise StudyError(
                f"{path}: arms: expected names of letters, digits, '_', '-', '+' and '.', got"
                f" {shown(name)!r}"
            )
    _check_arms(path, arms, recipes)
    baseline = values.get("baseline", next(iter(arms)))
    if baseline not in arms:
        raise StudyError(
            f"{path}: baseline: expected one of the arms {', '.join(arms)}, got {shown(baseline)!r}"
        )
    if arms[baseline].vary:
        raise StudyError(
            f"{path}: baseline: expected an arm without `{VARY}`, got {baseline!r}; give it one"
            " value of each key"
        )
    shared = {key: {} if values.get(key) is None else values[key] for key in ("set", VARY)}
    if not isinstance(shared["set"], Mapping):
        raise StudyError(_fault(path, "set", "keys of a recipe and their values", shared["set"]))
    whole = _part(path, "set", {**shared["set"], VARY: shared[VARY]})
    factors = _factors(path, values.get(FACTORS, []), [whole, *recipes.values()])
    seeds = _seeds(path, values.get("seeds", 5))
    return Study(path, recipes, arms, seeds, baseline, whole, factors)


def _factors(path: Path, given: Any, parts: Sequence[Part]) -> list[str]:
    """Keys that vary in recipes, or for all runs, and are no choice."""
    varied = sorted({key for part in parts for key in part.vary})
    if not isinstance(given, list) or not all(one in varied for one in given):
        expected = f"a list of keys that `{VARY}` has in recipes or for all runs, {varied}"
        raise StudyError(_fault(path, FACTORS, expected, given))
    return list(given)


def _find(study: str | Path) -> Path:
    """The file of a study."""
    path = expanded(study)
    if path.is_file():
        return path
    ours = STUDIES / f"{path.name}.yaml"
    if ours.is_file():
        return ours
    names = list(list_studies())
    near = difflib.get_close_matches(path.stem, names, n=1)
    raise StudyError(
        f"{study}: there is no such file or study; steppe has {', '.join(names)}"
        + (f". Did you mean: steppe study {near[0]}" if near else "")
    )


def _parts(path: Path, values: Mapping[str, Any], key: str, example: str) -> dict[str, Part]:
    """The recipes or the arms."""
    found = values.get(key)
    if not isinstance(found, Mapping) or not found:
        raise StudyError(_fault(path, key, f"names with their settings, e.g. `{example}`", found))
    return {str(name): _part(path, f"{key}: {name}", given) for name, given in found.items()}


def _recipe(path: Path, part: Part) -> Part:
    """A recipe, whose values for single arms are parts."""
    given = part.values.pop(ARMS, None)
    given = {} if given is None else given
    if not isinstance(given, Mapping):
        expected = "arms with keys of a recipe and their values"
        raise StudyError(_fault(path, f"{part.where}: {ARMS}", expected, given))
    arms = {
        str(name): _part(path, f"{part.where}: {ARMS}: {name}", own) for name, own in given.items()
    }
    for one in arms.values():
        if one.vary:
            raise StudyError(f"{path}: {one.where}: {VARY}: expected it in the arm or the recipe")
    return replace(part, arms=arms)


def _arm(path: Path, part: Part) -> Part:
    """An arm, with the one that it starts from."""
    after = part.values.pop(AFTER, None)
    if after is not None and not isinstance(after, str):
        raise StudyError(_fault(path, f"{part.where}: {AFTER}", "the name of an arm", after))
    return replace(part, after=after)


def _check_arms(path: Path, arms: Mapping[str, Part], recipes: Mapping[str, Part]) -> None:
    """Refuse unknown arms in other places, and arms that cannot start from another."""
    for recipe in recipes.values():
        for name in recipe.arms:
            if name not in arms:
                expected = f"some of the arms {', '.join(arms)}"
                raise StudyError(_fault(path, f"{recipe.where}: {ARMS}", expected, name))
    for arm in arms.values():
        if arm.after is None:
            continue
        where = f"{arm.where}: {AFTER}"
        if arm.after not in arms:
            raise StudyError(_fault(path, where, f"one of the arms {', '.join(arms)}", arm.after))
        if arms[arm.after].vary:
            expected = f"an arm without `{VARY}`"
            raise StudyError(
                f"{_fault(path, where, expected, arm.after)}; give it one value of each key"
            )
    for name in arms:
        chain = [name]
        while (after := arms[chain[-1]].after) is not None and after not in chain:
            chain.append(after)
        if after is not None:
            told = " after ".join([*chain[chain.index(after) :], after])
            raise StudyError(f"{path}: {ARMS}: expected a first arm, got a circle: {told}")


def _part(path: Path, where: str, given: Any) -> Part:
    """A part, whose values that vary are lists."""
    if given is None:  # `digits:` alone
        given = {}
    if not isinstance(given, Mapping):
        raise StudyError(_fault(path, where, "keys of a recipe and their values", given))
    values = {str(key): value for key, value in given.items() if key != VARY}
    vary = {} if given.get(VARY) is None else given[VARY]
    if not isinstance(vary, Mapping):
        raise StudyError(
            _fault(path, f"{where}: {VARY}", "keys with lists, `learning_rate: [0.001]`", vary)
        )
    for key, several in vary.items():
        _check_choices(path, f"{where}: {VARY}: {key}", key, several)
    return Part(where, values, {str(key): choices_of(str(key), some) for key, some in vary.items()})


def _check_choices(path: Path, where: str, key: str, several: Any) -> None:
    """Refuse what is neither a list of values nor settings by name."""
    if isinstance(several, Mapping) and several:
        for name, values in several.items():
            if not _NAME.fullmatch(str(name)) or not isinstance(values, Mapping) or not values:
                expected = f"settings by name, `{key}: {{small: {{length: 32}}}}`"
                raise StudyError(_fault(path, where, expected, {name: values}))
        return
    if not isinstance(several, list) or not several:
        expected = f"a list of values, `{key}: [VALUE, VALUE]`"
        raise StudyError(_fault(path, where, expected, several))
    if any(several.count(one) > 1 for one in several):
        raise StudyError(_fault(path, where, "each value once", shown(several)))


def _seeds(path: Path, given: Any) -> list[int]:
    """The seeds: a list, or their number."""
    if isinstance(given, int) and not isinstance(given, bool) and 1 <= given <= _MOST_SEEDS:
        return list(range(given))
    is_list = isinstance(given, list) and all(type(one) is int and one >= 0 for one in given)
    if is_list and given and len(set(given)) == len(given):
        return list(given)
    expected = "a number of seeds, `seeds: 5`, or a list of different ones, `seeds: [0, 1]`"
    raise StudyError(_fault(path, "seeds", expected, given))


def _fault(path: Path, where: str, expected: str, got: object) -> str:
    """The message of a wrong value."""
    told = "nothing" if got is None else shown(repr(got))
    return f"{path}: {where}: expected {expected}, got {told}"
