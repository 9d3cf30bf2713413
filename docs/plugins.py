"""Renders the table of steppe's plug-ins, taken from the registry, into docs/plugins.md.

python docs/plugins.py
"""

from __future__ import annotations

import re
from dataclasses import MISSING, fields
from pathlib import Path

from steppe.plugins import PLUGINS, Plugin

PAGE = Path(__file__).with_name("plugins.md")


def render(page: str) -> str:
    """A page with the table between its marks."""
    return re.sub(
        r"(<!-- plug-ins -->\n).*?(<!-- end -->)",
        lambda marks: marks[1] + table() + marks[2],
        page,
        flags=re.DOTALL,
    )


def table() -> str:
    """A row for each registered plug-in of steppe: its settings, its key, its first sentence."""
    rows = [
        f"| `{kind.__name__}({_settings(kind)})` | `{kind.key}` | {_first_line(kind)} |"
        for kind in PLUGINS.values()
        if kind.__module__.startswith("steppe.")
    ]
    return "\n".join(
        ["| plug-in and its defaults | key in `config.json` | |", "|---|---|---|", *rows, ""]
    )


def _settings(kind: type[Plugin]) -> str:
    """The fields of a plug-in as they are typed, with their defaults."""
    return ", ".join(
        one.name if one.default is MISSING else f"{one.name}={one.default}" for one in fields(kind)
    )


def _first_line(kind: type[Plugin]) -> str:
    """The first line of a plug-in's docstring, in a cell of a table."""
    return (kind.__doc__ or "").partition("\n")[0].replace("``", "`").replace("|", "\\|")


if __name__ == "__main__":
    PAGE.write_text(render(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
