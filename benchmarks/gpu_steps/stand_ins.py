"""Names for packages that a machine does not have, where steppe only needs the names.

A machine that is lent for minutes has torch and little else. steppe cannot be imported without
safetensors, which only checkpoints use; here it gets the names, and an error on use.
"""

from __future__ import annotations

import importlib.util
import sys
from types import ModuleType
from typing import Any

OPTIONAL = ("pytest", "transformers", "accelerate", "numpy", "huggingface_hub", "rich")


def fill_in() -> None:
    """Put a stand-in for safetensors in place where there is none."""
    if importlib.util.find_spec("safetensors") is not None:
        return
    module: Any = ModuleType("safetensors")
    module.SafetensorError = type("SafetensorError", (Exception,), {})
    module.safe_open = _refuse
    sys.modules["safetensors"] = module


def left_out() -> list[str]:
    """The packages that are missing, those with a stand-in too."""
    missing = [name for name in OPTIONAL if importlib.util.find_spec(name) is None]
    stands_in = getattr(sys.modules.get("safetensors"), "__spec__", None) is None
    return [*missing, *(["safetensors"] if stands_in else [])]


def _refuse(*args: Any, **kwargs: Any) -> Any:
    raise ModuleNotFoundError("no safetensors here: checkpoints cannot be read", name="safetensors")
