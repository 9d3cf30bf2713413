"""The file of a recipe: found by path or name, and read as plain YAML."""

from __future__ import annotations

import difflib
from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import Any

import yaml

from steppe.errors import RecipeError
from steppe.files import expanded

RECIPES = Path(__file__).parents[1] / "recipes"
"""The folder of the recipes that come with steppe."""
_MOST_BYTES = 1 << 18  # of a recipe
_SHOWN = 300  # characters of a message that is not ours


def list_recipes() -> dict[str, str]:
    """The recipes that come with steppe: their names and the first lines of their files."""
    return {
        path.stem: path.read_text(encoding="utf-8").splitlines()[0].lstrip("# ")
        for path in sorted(RECIPES.glob("*.yaml"))
    }


def read_values(recipe: str | Path) -> tuple[Path, dict[str, Any]]:
    """Read the file of a recipe: its path, and its values by key.

    Args:
        recipe: a YAML file, or the name of one that comes with steppe.

    Raises:
        RecipeError: there is no such recipe, or it is no YAML mapping.
    """
    path = _find(recipe)
    return path, read_mapping(path)


def name_of(path: Path) -> str:
    """The name of a recipe in errors: of one of ours the name, of another the path.

    Args:
        path: of the recipe.
    """
    return path.stem if path.parent == RECIPES else str(path)


def shown(text: object) -> str:
    """The first 300 characters of a message or a value that is not ours.

    Args:
        text: a value, or an error; the type names an error without a message.
    """
    empty = type(text).__name__ if isinstance(text, Exception) else ""
    return str(text)[:_SHOWN] or empty


def _find(recipe: str | Path) -> Path:
    """The file of a recipe."""
    path = expanded(recipe)
    if path.is_file():
        return path
    ours = RECIPES / f"{path.stem}.yaml"
    if ours.is_file() and (path.name == path.stem or path.parent.name == "recipes"):
        return ours
    names = ", ".join(list_recipes())
    near = difflib.get_close_matches(path.stem, list_recipes(), n=1)
    raise RecipeError(
        f"{recipe}: there is no such file or recipe; steppe has {names}"
        + (f". Did you mean: steppe train {near[0]}" if near else "")
    )


def read_mapping(path: Path) -> dict[str, Any]:
    """The values of a YAML file by key.

    Args:
        path: of a recipe or a study.

    Raises:
        RecipeError: it is no YAML mapping.
    """
    if path.stat().st_size > _MOST_BYTES:
        raise RecipeError(
            f"{path}: has more than {_MOST_BYTES >> 10} KiB, and is no recipe or study"
        )
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), Loader=_PlainYaml)
    except Exception as error:  # of yaml's constructors: a date, a number, a depth
        raise RecipeError(f"{path}: not valid YAML: {shown(error)}") from None
    if not isinstance(values, Mapping):
        raise RecipeError(f"{path}: expected lines `key: value`, got {type(values).__name__}")
    for key, value in values.items():
        if "\0" in str(value):
            raise RecipeError(f"{path}: {key}: expected text, got a zero byte in {value!r}")
    return {str(key): value for key, value in values.items()}


class _PlainYaml(yaml.SafeLoader):
    """YAML without duplicate keys, and without aliases: a few lines of them make gigabytes."""

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        """The next node."""
        if self.check_event(yaml.AliasEvent):
            mark = self.peek_event().start_mark
            raise yaml.composer.ComposerError(None, None, "write it out, without an alias", mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """The mapping of a node."""
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, Hashable):
                wrong = f"a key is a word, got {shown(key)}"
            elif key in seen:
                wrong = f"the key {key!r} stands twice"
            else:
                wrong = ""
            if wrong:
                raise yaml.constructor.ConstructorError(None, None, wrong, key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep=deep)
