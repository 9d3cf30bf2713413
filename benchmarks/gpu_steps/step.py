"""One step in a process of its own: ``python -m gpu_steps.step MODULE``, called by ``gpu.py``."""

from __future__ import annotations

import argparse
import importlib
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gpu_steps.results import write_json
from gpu_steps.stand_ins import fill_in


@dataclass
class Context:
    """What a step is told, and where it puts what it finds.

    Attributes:
        results: the file for that.
        folder: for what one step leaves to another.
        seconds: how long the step may take.
        argument: what else it is told.
        is_dry: whether to run tiny, on the CPU.
        found: what was found up to now, JSON values.
        errors: what went wrong up to now.
    """

    results: Path
    folder: Path
    seconds: float
    argument: str
    is_dry: bool
    started: float = field(default_factory=time.monotonic)
    found: dict[str, Any] = field(default_factory=dict)
    errors: list[str] = field(default_factory=list)

    @property
    def device(self) -> str:
        """``cuda``, or ``cpu`` in a dry run."""
        return "cpu" if self.is_dry else "cuda"

    @property
    def left(self) -> float:
        """Seconds that are left, a tenth and three seconds kept back."""
        return 0.9 * self.seconds - 3.0 - (time.monotonic() - self.started)

    def keep(self, **found: Any) -> None:
        """Write what was found, so that it is there whatever comes next."""
        self.found.update(found)
        write_json(self.results, self.found)
        for name, value in found.items():
            print(f"{name}: {str(value)[:300]}", flush=True)

    def attempt(self, name: str, measure: Callable[[], Any], needs: float = 0.0) -> None:
        """Keep what a function finds under a name, or how it failed, and go on.

        Args:
            name: of the result.
            measure: finds it.
            needs: seconds; with fewer left it is not called.
        """
        if self.left < needs:
            self.keep(**{name: f"left out: {self.left:.0f} s left of {needs:.0f} needed"})
            return
        try:
            value = measure()
        except Exception as error:  # the next one may well be possible
            traceback.print_exc()
            text = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            self.errors.append(f"{name}: {text}")
            value = {"error": text}
        self.keep(**{name: value})


def main() -> int:
    """Run a step.

    Returns:
        0, or 1 if something went wrong; what it was is the result ``error``.
    """
    parser = argparse.ArgumentParser()
    parser.add_argument("module")
    parser.add_argument("--results", type=Path, required=True)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--argument", default="")
    parser.add_argument("--dry-run", action="store_true", dest="is_dry")
    options = vars(parser.parse_args())
    module = options.pop("module")
    context = Context(**options)
    fill_in()
    try:
        importlib.import_module(module).run(context)
    except Exception as error:
        traceback.print_exc()
        context.errors.append(f"{type(error).__name__}: {' '.join(str(error).split())[:300]}")
    context.keep(took_s=time.monotonic() - context.started)
    if context.errors:
        context.keep(error="; ".join(context.errors))
    return 1 if context.errors else 0


if __name__ == "__main__":
    sys.exit(main())
