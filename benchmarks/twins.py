"""Train the twins of the paper's recipes in their arms, and keep what came out.

python benchmarks/twins.py --text FOLDER --images FOLDER --json docs/results/twins.json

Each run is the command of docs/recipes.md in a process of its own, with one thread.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path
from typing import Any

from steppe.files import write_json
from steppe.training.recipe_arguments import ARMS

TWINS = {"fashion-mnist-vit": "images", "text-gpt": "text", "text-t5": "text"}
KEPT = (
    "steps",
    "parameters",
    "quality",
    "density",
    "derivative_density",
    "training_density",
    "density_per_block",
    "seconds",
    "versions",
)


def train(recipe: str, arm: str, seed: int, data: Path, runs: Path) -> dict[str, Any]:
    """One run, as its summary tells it; one that is there already is not repeated.

    Raises:
        CalledProcessError: it did not end well.
    """
    folder = runs / recipe / f"{arm}-{seed}"
    summary = folder / "summary.json"
    if not summary.exists():
        command = [sys.executable, "-m", "steppe.cli", "train", recipe, "--resume"]
        command += ["--arm", arm, "--seed", str(seed), "--data_dir", str(data)]
        command += ["--output_dir", str(folder)]
        print(*command[3:], flush=True)
        env = {**os.environ, "OMP_NUM_THREADS": "1"}
        subprocess.run(command, env=env, check=True, stdout=subprocess.DEVNULL)
    told = json.loads(summary.read_text(encoding="utf-8"))
    return {"recipe": recipe, "arm": arm, "seed": seed, **{key: told[key] for key in KEPT}}


def main() -> None:
    """Train all of them and write the file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--text", type=Path, required=True, help="folder of plain text")
    parser.add_argument("--images", type=Path, required=True, help="folder of IDX files")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="runs at a time")
    parser.add_argument("--runs", type=Path, default=Path("runs/twins"))
    parser.add_argument("--json", type=Path, required=True)
    arguments = parser.parse_args()
    data = {"text": arguments.text, "images": arguments.images}
    cases = list(product(range(arguments.seeds), TWINS, ARMS))
    with ThreadPoolExecutor(arguments.jobs) as pool:
        rows = list(
            pool.map(
                lambda case: train(case[1], case[2], case[0], data[TWINS[case[1]]], arguments.runs),
                cases,
            )
        )
    text = sorted(path.name for path in arguments.text.iterdir())
    write_json(arguments.json, {"version": 1, "text": text, "rows": rows})


if __name__ == "__main__":
    main()
