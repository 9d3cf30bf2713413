"""The registry has every plug-in of the package, and the documents have the whole registry."""

from __future__ import annotations

import dataclasses
import runpy
from pathlib import Path

from steppe.plugins import PLUGINS, Plugin
from steppe.plugins.registry import plugin_from_settings

DOCS = Path(__file__).parents[2] / "docs"
PAGE = (DOCS / "plugins.md").read_text(encoding="utf-8")
OWN = {key: kind for key, kind in PLUGINS.items() if kind.__module__.startswith("steppe.")}


def _all_below(kind: type[Plugin]) -> set[type[Plugin]]:
    return {one for direct in kind.__subclasses__() for one in (direct, *_all_below(direct))}


def test_every_plugin_of_the_package_is_registered_by_its_key() -> None:
    found = {kind for kind in _all_below(Plugin) if kind.__module__.startswith("steppe.")}
    assert found == set(OWN.values())
    assert all(kind.key == key for key, kind in OWN.items())


def test_settings_make_the_same_plugin_again() -> None:
    for kind in OWN.values():
        needed = {one.name: 0.5 for one in dataclasses.fields(kind) if _has_no_default(one)}
        plugin = kind(**needed)
        assert plugin_from_settings(plugin.settings(), list(OWN.values())) == plugin


def _has_no_default(one: dataclasses.Field[object]) -> bool:
    return one.default is dataclasses.MISSING


def test_the_table_of_the_page_is_the_registry() -> None:
    render = runpy.run_path(str(DOCS / "plugins.py"))["render"]
    assert all(f"`{key}`" in PAGE for key in OWN)
    assert render(PAGE) == PAGE
    assert render(PAGE.replace("| `zeroth_bias` |", "| gone |")) == PAGE
