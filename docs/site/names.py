"""The public names of steppe, read from the sources without importing them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path

import griffe

ROOT = Path(__file__).parents[2]

# The modules whose names are promised. Without an `__all__`: what they define.
PUBLIC_MODULES = (
    "steppe",
    "steppe.plugins",
    "steppe.measures",
    "steppe.checkpoints",
    "steppe.training",
    "steppe.training.lightning",
    "steppe.errors",
    "steppe.ops.products",
)
# Names that the pages use, of modules that are not public as a whole.
PUBLIC_NAMES = (
    "steppe.activations.KnownRectifier",
    "steppe.ops.cuda.decode.decode_token",
    "steppe.ops.cuda.decode.screen_of",
    "steppe.ops.cuda.pack.act_pack",
    "steppe.ops.cuda.pack.unpack_grad",
)


@dataclass(frozen=True)
class PublicName:
    """A name that users import.

    Attributes:
        path: as they import it.
        part: of steppe, the package below `steppe` that defines it.
        summary: the first line of its docstring; empty if it has none of its own.
    """

    path: str
    part: str
    summary: str


@cache
def public_names() -> tuple[PublicName, ...]:
    """Every public name once, by the shortest path at which it is exported."""
    package = griffe.load("steppe", search_paths=[ROOT / "src"])
    found: dict[str, PublicName] = {}
    paths = [f"{module}.{name}" for module in PUBLIC_MODULES for name in _exports(package, module)]
    for path in (*paths, *PUBLIC_NAMES):
        target = _target(package, path)
        if target.path not in found:
            part = target.path.split(".")[1]
            docstring = target.docstring.value if target.docstring else ""
            found[target.path] = PublicName(path, part, docstring.partition("\n")[0])
    return tuple(found.values())


def _exports(package: griffe.Module, module: str) -> list[str]:
    """The names that a module exports, functions first."""
    if module == "steppe":  # which takes them from there at the first use
        module = "steppe.public"
    found = package[module.removeprefix("steppe.")]
    if found.exports is not None:
        return sorted(map(str, found.exports), key=lambda name: (not name.islower(), name.lower()))
    return [
        name
        for name, member in found.members.items()
        if not name.startswith("_")
        and not member.is_alias
        and (member.is_function or member.is_class)
    ]


def _target(package: griffe.Module, path: str) -> griffe.Object:
    """The definition behind a path."""
    inner = path.removeprefix("steppe.")
    if "." not in inner:
        inner = f"public.{inner}"
    found = package[inner]
    target = found.final_target if found.is_alias else found
    if target.is_module:  # a function in a module of its name
        target = target.members[target.name]
    return target
