"""Runs cases of damaged files in a child process, and tells what came of each."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

_CHILD = Path(__file__).with_name("child.py")


@dataclass(frozen=True)
class Outcome:
    """What came of a case.

    Attributes:
        case: ``target/kind/seed``, which makes the same file again.
        verdict: ``clear`` (one `SteppeError` of bearable length), ``harmless`` (the file was read),
            or ``wrong``: another error, a crash, more than the child's seconds or memory.
        told: the message.
        seconds: how long it took.
    """

    case: str
    verdict: str
    told: str
    seconds: float


def run_cases(cases: Sequence[str], folder: Path) -> list[Outcome]:
    """Feed damaged files to their targets, many in one process.

    Args:
        cases: ``target/kind/seed`` each.
        folder: for the files; everything that libraries cache goes there, too.
    """
    environment = {
        **os.environ,
        "PYTHONPATH": str(_CHILD.parents[1]),
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(folder / "huggingface"),
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
        "TRANSFORMERS_VERBOSITY": "critical",
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        [sys.executable, str(_CHILD), str(folder)],
        input="\n".join(cases),
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return [Outcome(**json.loads(line)) for line in done.stdout.splitlines()]


def main() -> None:
    """``runner.py FOLDER CASE...``: run cases by hand, e.g. one that a test has named."""
    for outcome in run_cases(sys.argv[2:], Path(sys.argv[1])):
        print(outcome)


if __name__ == "__main__":
    main()
