"""The pages of the reference, made from the public names and the command line."""

from __future__ import annotations

from dataclasses import MISSING, fields
from typing import Any

import typer
from names import PublicName, public_names

from steppe.commands.app import app
from steppe.training.recipe_arguments import ArmArguments, DataArguments, ModelArguments

# A part that is missing here gets a page all the same, under its own name.
TITLES = {
    "blocks": "Find blocks",
    "measures": "Measure",
    "plugins": "Plug-ins",
    "training": "Callbacks",
    "checkpoints": "Load",
    "acceleration": "Accelerate",
    "activations": "Activations",
    "ops": "Kernels",
    "errors": "Errors",
}
_SECTIONS = (
    ("The model", ModelArguments),
    ("The data", DataArguments),
    ("The part of steppe", ArmArguments),
)


def reference_pages() -> dict[str, tuple[str, str]]:
    """The pages by their path: title and Markdown."""
    parts = sorted({name.part for name in public_names()}, key=_order)
    named = {part: [name for name in public_names() if name.part == part] for part in parts}
    pages = {"reference/index.md": ("All names", _overview(named))}
    for part, names in named.items():
        pages[f"reference/{part}.md"] = (_title(part), _page(part, names))
    pages["reference/command_line.md"] = ("Command line", _command_line())
    pages["reference/recipe_keys.md"] = ("Keys of a recipe", _recipe_keys())
    return pages


def _order(part: str) -> tuple[int, str]:
    known = list(TITLES)
    return known.index(part) if part in known else len(known), part


def _title(part: str) -> str:
    return TITLES.get(part, part)


def _overview(named: dict[str, list[PublicName]]) -> str:
    lines = ["# Reference", "", "Every public name.", ""]
    for part, names in named.items():
        lines += [f"## {_title(part)}", ""]
        lines += [f"- [`{name.path}`][{name.path}]: {name.summary}" for name in names] + [""]
    return "\n".join(lines)


def _page(part: str, names: list[PublicName]) -> str:
    return "\n\n".join([f"# {_title(part)}", *(f"::: {name.path}" for name in names)]) + "\n"


def _command_line() -> str:
    """The subcommands with their arguments and flags, as typer knows them."""
    lines = ["# The command line", ""]
    commands = vars(typer.main.get_command(app))["commands"]
    for name, command in commands.items():
        words = [_shown(one) for one in command.params if one.param_type_name == "argument"]
        usage = " ".join(["steppe", name, *words, "[OPTIONS]"])
        lines += [f"## steppe {name}", "", command.help.replace("[", "\\["), "", f"    {usage}", ""]
        lines += ["| | default | |", "|---|---|---|"]
        for one in command.params:
            default = "required" if one.required else _value(one.default)
            lines.append(f"| `{_shown(one)}` | {default} | {_cell(one.help or '')} |")
        lines.append("")
    return "\n".join(lines)


def _shown(one: Any) -> str:
    """An argument or a flag as it is typed."""
    if one.param_type_name == "argument":
        return str(one.metavar or one.name.upper())
    return " / ".join([*one.opts, *one.secondary_opts])


def _recipe_keys() -> str:
    """The keys of a recipe that are steppe's own."""
    lines = [
        *("# The keys of a recipe", ""),
        "Each is a key of the YAML file and a flag of"
        " [`steppe train`](command_line.md#steppe-train). So are those of transformers'"
        " `TrainingArguments`: `steppe train RECIPE --help` lists all of them."
        " [Recipes](../recipes.md) says more.",
        "",
    ]
    for title, kind in _SECTIONS:
        lines += [f"## {title}", "", "| key | default | |", "|---|---|---|"]
        for one in fields(kind):
            default = one.default if one.default_factory is MISSING else one.default_factory()
            lines.append(f"| `{one.name}` | {_value(default)} | {_cell(one.metadata['help'])} |")
        lines.append("")
    return "\n".join(lines)


def _value(default: Any) -> str:
    """A default in a cell of a table; empty for none."""
    value = getattr(default, "value", default)
    if value in (None, MISSING, "", False, ...) or value == [] or callable(value):
        return ""
    return f"`{_cell(str(value))}`"


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")
