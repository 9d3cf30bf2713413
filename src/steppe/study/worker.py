"""One run of a study in its own process: what ``steppe train`` does, and the row of its result."""

from __future__ import annotations

import math
import platform
import time
from pathlib import Path
from typing import Any

import torch

from steppe.runs import Run, read_run
from steppe.study.rows import ROW_VERSION
from steppe.study.running import Tell
from steppe.study.terms import terms_of
from steppe.training.recipe import read_recipe
from steppe.training.run_recipe import run_recipe

_BETWEEN = 0.2  # seconds from one message to the next


def train(task: dict[str, Any], tell: Tell) -> None:
    """Train by a recipe on one core, and tell the steps and at last the row.

    Args:
        task: ``recipe`` and ``flags`` as `read_recipe` takes them, ``folder`` of the run, and
            ``row``, what its row has besides the results.
        tell: sends a message.

    Raises:
        SteppeError: as `run_recipe` does.
    """
    torch.set_num_threads(1)
    last = 0.0

    def on_step(step: int, steps: int) -> None:
        nonlocal last
        if time.monotonic() - last > _BETWEEN:
            last = time.monotonic()
            tell({"step": step, "steps": steps})

    summary = run_recipe(read_recipe(task["recipe"], task["flags"]), on_step=on_step, on_log=print)
    tell({"row": {**task["row"], **results_of(summary, read_run(Path(task["folder"])))}})


def results_of(summary: dict[str, Any], run: Run) -> dict[str, Any]:
    """The part of a row that a run has given, JSON values.

    Args:
        summary: of `run_recipe`.
        run: its record.
    """
    held_out = run.held_out[-1]
    units = sum(block.d_hidden for block in held_out.blocks)
    dead = sum(block.dead_neurons for block in held_out.blocks)
    numbers = {
        **{key: summary[key] for key in ("density", "training_density", "derivative_density")},
        "dead_units": dead / units,
        "seconds": summary["seconds"],
        "processor_seconds": summary["processor_seconds"],
    }
    return {
        "version": ROW_VERSION,
        **{key: _finite(value) for key, value in numbers.items()},
        "quality": {key: _finite(value) for key, value in summary["quality"].items()},
        "terms": terms_of(run),
        "steps": summary["steps"],
        "parameters": summary["parameters"],
        "resumed_from": summary["resumed_from"],
        "device": "cuda" if torch.cuda.is_available() else "cpu",
        "machine": platform.machine(),
        "versions": run.versions,
    }


def _finite(value: float) -> float | None:
    """A number; None for NaN and infinity, which JSON does not have."""
    return value if math.isfinite(value) else None
