"""Whether a change of steppe has made its kernels slower: two installed versions, in turns.

Each version times the same blocks against dense PyTorch with its own `steppe.bench`, in a
process of its own; the two take turns, so that what slows the machine down for a while slows both.
A row has the median ratio dense time / sparse time of each version over the turns, and their
quotient. With `--busy` other programs run meanwhile, as they do beside a user.

    git worktree add ../before COMMIT && make -C ../before install
    python benchmarks/before_after.py --before ../before/.venv/bin/python \
        --json benchmarks/results/before_after.json
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from busy_programs import busy
from steppe.bench import surroundings
from steppe.files import write_json

# Case, density, tokens, dtype.
SETTINGS = (
    *(("TRAINING", density, 1024, "float32") for density in (0.5, 0.1, 0.03)),
    *(("PREFILL", density, 1024, "float32") for density in (0.5, 0.1, 0.03)),
    *(("DECODE", density, 1, "float32") for density in (0.9, 0.5, 0.1, 0.03)),
    *(("DECODE", 0.1, tokens, "float32") for tokens in (2, 8, 16, 64)),
    ("TRAINING", 0.1, 256, "float32"),
    ("PREFILL", 0.1, 1024, "bfloat16"),
    ("DECODE", 0.1, 1, "bfloat16"),
)
PROGRAM = """
import json, sys
import torch
from steppe import bench  # a module of its own in earlier versions
threads, seconds, settings = json.loads(sys.argv[1])
for case, density, tokens, dtype in settings:
    setting = bench.Setting(
        getattr(bench, case), density, tokens=tokens, dtype=getattr(torch, dtype), threads=threads
    )
    print(json.dumps(bench.time_block(setting, seconds=seconds)["ratio"]), flush=True)
"""


def ratios(python: str, threads: int, seconds: float) -> list[float]:
    """The ratio of each setting, by the steppe of one interpreter."""
    request = json.dumps([threads, seconds, SETTINGS])
    done = subprocess.run(
        [python, "-c", PROGRAM, request], check=True, capture_output=True, text=True
    )
    return [float(line) for line in done.stdout.splitlines()]


def main(
    before: Annotated[str, typer.Option(help="The interpreter with the earlier steppe.")],
    after: Annotated[
        str, typer.Option(help="The interpreter with the later one.")
    ] = sys.executable,
    turns: Annotated[int, typer.Option(min=1, help="Turns of each.")] = 3,
    seconds: Annotated[float, typer.Option(help="Seconds a setting and turn.")] = 1.0,
    threads: Annotated[list[int], typer.Option(help="Numbers of threads.")] = [1, 2],  # noqa: B006
    programs: Annotated[int, typer.Option("--busy", min=0, help="Busy programs beside.")] = 0,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the rows here.")] = None,
) -> None:
    """Compare two versions."""
    rows: list[dict[str, Any]] = []
    for team in threads:
        runs: dict[str, list[list[float]]] = {before: [], after: []}
        with busy(programs):
            for turn in range(turns):
                for python in (before, after) if turn % 2 else (after, before):
                    runs[python].append(ratios(python, team, seconds))
        for place, (case, density, tokens, dtype) in enumerate(SETTINGS):
            old, new = (
                statistics.median(run[place] for run in runs[python]) for python in (before, after)
            )
            row = {"case": case.lower(), "density": density, "tokens": tokens, "dtype": dtype}
            rows.append({**row, "threads": team, "before": old, "after": new, "change": new / old})
            print(*row.values(), team, f"{old:.2f} → {new:.2f}, {new / old:.2f}", flush=True)
    if json_file is not None:
        measured = {"turns": turns, "busy": programs, "rows": rows}
        write_json(json_file, {**surroundings(), **measured})


if __name__ == "__main__":
    typer.run(main)
