"""Step: the tests in ``tests/gpu``, each file in a process of its own, four at a time."""

from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from gpu_steps.results import read_json
from gpu_steps.step import Context

FOLDER = Path(__file__).resolve().parents[2] / "tests/gpu"
_AT_ONCE = 4
# Files that take long, by parts of the names of their tests.
_PARTS = {"test_compile": ("default", "reduce-overhead", "watched")}


def run(context: Context) -> None:
    """Run the tests on the device, in a dry run those of finding blocks, on the CPU."""
    files = sorted(FOLDER.glob("test_*.py"))
    if context.is_dry:
        files = [file for file in files if file.stem == "test_verbs"]
    jobs = [(file, part) for file in files for part in _PARTS.get(file.stem, ("",))]
    if context.is_dry:
        jobs = [(file, "find_blocks") for file, _ in jobs]
    outcomes: dict[str, Any] = {}
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        for found in pool.map(lambda job: run_file(context, *job), jobs):
            outcomes.update(found)
            context.keep(outcomes=outcomes)
    bad = {name: text for name, text in outcomes.items() if text.startswith("failed")}
    skipped = sum(text.startswith("skipped") for text in outcomes.values())
    context.keep(passed=len(outcomes) - len(bad) - skipped, skipped=skipped, failed=sorted(bad))
    if bad or not outcomes:
        context.errors.append(f"{len(bad)} of {len(outcomes)} tests failed")


def run_file(context: Context, file: Path, only: str) -> dict[str, str]:
    """The outcome of each test of a file: ``passed``, ``skipped: …`` or ``failed: …``.

    Args:
        context: of the step.
        file: the file.
        only: a part of the names of the tests to run; empty for all.
    """
    results = context.folder / f"{file.stem}{only}.json"
    command = [sys.executable, "-u", "-m", "gpu_steps.run_tests", str(file), str(results)]
    command += ["--device", context.device, "--only", only]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=max(context.left, 1.0)
        )
        output, code = done.stdout + done.stderr, done.returncode
    except subprocess.TimeoutExpired as error:
        output, code = (error.stdout or b"").decode(), -1
    print(output, flush=True)
    outcomes = read_json(results) if results.exists() else {}
    if not outcomes:
        last = (output.strip().splitlines() or ["no output"])[-1][:200]
        outcomes[only or "all of it"] = f"failed: no test ran, exit status {code}: {last}"
    return {
        f"{file.stem}::{name}": (
            f"failed: ended with exit status {code}" if text == "running" else text
        )
        for name, text in outcomes.items()
    }
