"""Scripts of docs, which are in no package."""

from __future__ import annotations

import importlib.util
import sys
from types import ModuleType

from test_readme import ROOT


def load_page(name: str) -> ModuleType:
    """The script docs/NAME.py as a module."""
    spec = importlib.util.spec_from_file_location(f"docs_{name}", ROOT / "docs" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[module.__name__] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module
