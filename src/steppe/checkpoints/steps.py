"""The optimizer step of each checkpoint of a run, by its files or its name."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path

from steppe.data.read_errors import first_line
from steppe.errors import CheckpointError

_MOST_STEPS = 2**53
_NUMBERED = re.compile(r"-(\d+)$")  # checkpoint-1234, as the Trainer names them


def steps_of(names: Sequence[str]) -> dict[str, int]:
    """The optimizer step of each checkpoint, or 0, 1, 2, … in their order if one has none.

    Args:
        names: folders or hub ids.

    Returns:
        Steps by name.

    Raises:
        CheckpointError: two have the same name or step, or a ``trainer_state.json`` is damaged.
    """
    known = {name: _step_of(name) for name in names}
    if len(known) < len(names):
        raise CheckpointError("the same checkpoint is named twice; name each once")
    steps = {name: step for name, step in known.items() if step is not None}
    if len(steps) < len(names):
        return {name: number for number, name in enumerate(names)}
    if len(set(steps.values())) < len(names):
        raise CheckpointError(
            f"expected checkpoints of one run, got two of the same step: {steps}. Measure each run"
            " by itself, and compare the runs with `steppe report`"
        )
    return steps


def _step_of(name: str) -> int | None:
    """The optimizer step of one checkpoint; None where neither its files nor its name has it."""
    path = Path(name) / "trainer_state.json"
    if path.is_file():
        try:
            step = json.loads(path.read_text(encoding="utf-8"))["global_step"]
            if isinstance(step, bool) or not isinstance(step, int) or not 0 <= step < _MOST_STEPS:
                raise ValueError("global_step is no number of steps")
            return step
        except (KeyError, TypeError, ValueError, OSError, RecursionError) as error:
            raise CheckpointError(
                f"{path}: damaged ({type(error).__name__}: {first_line(error)}). Copy it again, or"
                " remove it: then the step is that of the folder's name."
            ) from None
    numbered = _NUMBERED.search(name.rstrip("/"))
    return int(numbered[1]) if numbered and Path(name).is_dir() else None
