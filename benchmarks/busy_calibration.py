"""Calibrates beside busy programs: thresholds are those of a quiet machine, or the built-in ones.

Calibrations with none, one, two and four busy child processes take turns. A row says of each number
how many thresholds were measured, and how far they lie at most beyond both the built-in one and the
one beside none: a calibration that is less sure stops between the two. `distance` is what that may
be, the step between two densities. With one thread the processor's time is compared.

    python benchmarks/busy_calibration.py --json benchmarks/results/busy_calibration.json
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from busy_programs import busy
from steppe.bench import surroundings
from steppe.files import write_json
from steppe.ops.cpu.calibration import Calibration, Effort, calibrate

BUSY = (0, 1, 2, 4)
DISTANCE = 0.25  # the largest step of `Effort.densities`


def beyond(used: float, built_in: float, quiet: float) -> float:
    """How far a threshold lies outside the range of two others."""
    low, high = sorted([built_in, quiet])
    return round(max(0.0, low - used, used - high), 3)


def row(processes: int, found: Calibration, quiet: Calibration) -> dict[str, Any]:
    """What came of a calibration beside busy processes, against one beside none."""
    pairs = list(zip(found.thresholds, quiet.thresholds, strict=True))
    counted, left_out = found.rounds
    changed = [(one, alone) for one, alone in pairs if one.is_measured]
    return {
        "busy": processes,
        "threads": found.threads,
        "dtype": str(found.dtype).removeprefix("torch."),
        "thresholds": len(pairs),
        "measured": len(changed),
        "out_of_time": found.missing,
        "rounds": counted,
        "rounds_left_out": left_out,
        "largest_distance": max(
            (beyond(one.used, one.built_in, alone.used) for one, alone in changed), default=0.0
        ),
        "zero_where_built_in_is_not": sum(
            one.used == 0.0 and one.built_in > 0.0 for one, _ in pairs
        ),
        "used": [
            {
                "kind": one.kind,
                "width": one.width,
                "rows": one.rows,
                "trains": one.trains,
                "built_in": one.built_in,
                "used": one.used,
                "quiet": alone.used,
            }
            for one, alone in pairs
        ],
    }


def main(
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the rows there.")] = None,
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16.")] = "float32",
    threads: Annotated[list[int] | None, typer.Option(help="Of torch; 1 and 2.")] = None,
    seconds: Annotated[float, typer.Option(min=0.0, help="For each calibration.")] = 25.0,
) -> None:
    """Calibrate beside busy processes."""
    rows = []
    effort = Effort(seconds=seconds)
    for number in threads or [1, 2]:
        torch.set_num_threads(number)
        quiet: Calibration | None = None
        for processes in BUSY:
            with busy(processes), tempfile.TemporaryDirectory() as folder:
                path = Path(folder) / "thresholds.json"
                found = calibrate(getattr(torch, dtype), effort=effort, path=path)
            quiet = quiet or found
            rows.append(row(processes, found, quiet))
            shown = {name: value for name, value in rows[-1].items() if name != "used"}
            typer.echo(shown)
    if json_file is not None:
        write_json(json_file, {**surroundings(), "distance": DISTANCE, "rows": rows})


if __name__ == "__main__":
    typer.run(main)
