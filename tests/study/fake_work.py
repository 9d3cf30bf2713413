"""Work for the processes of a study that imports nothing slow."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

from steppe.study.running import Tell

NUMBERS = {
    **{"version": 1, "density": 0.25, "training_density": 0.5, "derivative_density": 0.25},
    **{"dead_units": 0.0, "seconds": 1.0, "quality": {"loss": 2.0}, "versions": {"torch": "2.8.0"}},
}


def row_of(seed: int) -> dict[str, Any]:
    """A row of one arm."""
    return {
        **{"study": "s", "id": f"r/a/seed-{seed}", "hash": "0", "recipe": "r", "arm": "a"},
        **{"baseline": "a", "setting": {}, "seed": seed, "settings": {}},
        **NUMBERS,
    }


def count_starts(task: dict[str, Any]) -> None:
    """One more letter for each start of a task."""
    with Path(task["folder"], "starts").open("a") as file:
        file.write("x")


def work(task: dict[str, Any], tell: Tell) -> None:
    """Tell two steps and the row, and make a model; the arms `raises` and `dies` fail."""
    count_starts(task)
    if task.get("after") is not None:
        start = next(word for word in task["flags"] if word.startswith("--checkpoint="))
        Path(task["folder"], "start").write_text(Path(start.partition("=")[2], "made").read_text())
    print("a line of the log")
    tell({"step": 1, "steps": 2})
    if task["row"]["arm"] == "raises":
        raise ValueError("no such luck")
    if task["row"]["arm"] == "dies":
        os.kill(os.getpid(), signal.SIGKILL)
    model = Path(task["folder"], "model")
    model.mkdir(exist_ok=True)
    (model / "made").write_text(task["row"]["id"])
    tell({"row": {**task["row"], **NUMBERS}})


def listen(task: dict[str, Any], tell: Tell) -> None:
    """Tell whether Ctrl-C is ignored."""
    tell({"ignored": signal.getsignal(signal.SIGINT) == signal.SIG_IGN})


def slow_work(task: dict[str, Any], tell: Tell) -> None:
    """The first seed is done at once; the others wait for a file beside the study's folder."""
    count_starts(task)
    Path(task["folder"], "pid").write_text(str(os.getpid()))
    while task["row"]["seed"] > 0 and not Path(os.environ["STUDY_GO_ON"]).exists():
        time.sleep(0.02)
    tell({"row": {**task["row"], **NUMBERS}})


def main() -> None:
    """Do the tasks of a JSON file and write their rows, as a program that can be killed."""
    import json

    from steppe.study.rows import append_row, read_rows
    from steppe.study.running import run_in_processes

    tasks, file = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
    done = {row["id"] for row in read_rows(file)}
    left = [task for task in tasks if task["row"]["id"] not in done]
    for message in run_in_processes(slow_work, left, jobs=2):
        if message.values:
            append_row(file, message.values["row"])


if __name__ == "__main__":
    main()
