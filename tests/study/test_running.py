"""Runs in processes: they fail alone, end with their parent, and are done once."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from steppe.errors import StudyError
from steppe.study.alone import alone_in
from steppe.study.rows import read_rows
from steppe.study.running import LOG, run_in_processes
from study.fake_work import NUMBERS, listen, row_of, work

TESTS = Path(__file__).parents[1]
PATIENCE = 120  # seconds


def task_of(folder: Path, arm: str, seed: int) -> dict:
    row = {**row_of(seed), "arm": arm, "id": f"r/{arm}/seed-{seed}"}
    place = folder / arm / str(seed)
    place.mkdir(parents=True)
    return {"folder": str(place), "row": row}


def until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"


def test_a_run_that_fails_is_told_and_the_others_go_on(tmp_path: Path) -> None:
    tasks = [task_of(tmp_path, arm, 0) for arm in ("raises", "fine", "dies")]
    messages = list(run_in_processes(work, tasks, jobs=2))
    rows = [message.values["row"] for message in messages if "row" in message.values]
    assert rows == [{**tasks[1]["row"], **NUMBERS}]
    ends = {message.task: message.failure for message in messages if not message.values}
    assert set(ends) == {0, 1, 2}
    assert ends[1] is None
    assert "ValueError: no such luck" in ends[0][-2]
    assert ends[2][-3:-1] == ["a line of the log", "ended by SIGKILL"]
    assert ends[2][-1] == f"see {Path(tasks[2]['folder'], LOG)}"
    assert "a line of the log" in Path(tasks[1]["folder"], LOG).read_text()


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="asks /proc which processes are alive")
def test_a_study_killed_goes_on_with_what_was_not_done(tmp_path: Path) -> None:
    tasks = [task_of(tmp_path, "a", seed) for seed in range(4)]
    (tmp_path / "tasks.json").write_text(json.dumps(tasks))
    file, go_on = tmp_path / "s.jsonl", tmp_path / "go on"
    command = [sys.executable, "-m", "study.fake_work", str(tmp_path / "tasks.json"), str(file)]
    env = {**os.environ, "PYTHONPATH": str(TESTS), "STUDY_GO_ON": str(go_on)}

    def starts() -> list[int]:
        places = [Path(task["folder"], "starts") for task in tasks]
        return [len(place.read_text()) if place.exists() else 0 for place in places]

    def pids() -> list[int]:
        places = [Path(tasks[seed]["folder"], "pid") for seed in (1, 2)]
        return [
            int(place.read_text()) for place in places if place.exists() and place.stat().st_size
        ]

    first = subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL)
    try:
        until(lambda: starts() == [1, 1, 1, 0] and len(read_rows(file)) == 1 and len(pids()) == 2)
        assert all(is_alive(pid) for pid in pids())
    finally:
        first.send_signal(signal.SIGKILL)
        first.wait()
    until(lambda: not any(is_alive(pid) for pid in pids()))
    assert [row["seed"] for row in read_rows(file)] == [0]
    go_on.touch()
    subprocess.run(command, env=env, check=True, timeout=PATIENCE)
    assert sorted(row["seed"] for row in read_rows(file)) == [0, 1, 2, 3]
    assert starts() == [1, 2, 2, 1]
    assert len(file.read_text().splitlines()) == 4


def test_ctrl_c_of_a_terminal_which_all_processes_get_is_for_the_study_alone(
    tmp_path: Path,
) -> None:
    before = signal.getsignal(signal.SIGINT)
    told, end = run_in_processes(listen, [task_of(tmp_path, "a", 0)], jobs=1)
    assert told.values == {"ignored": True}
    assert end.failure is None
    assert signal.getsignal(signal.SIGINT) == before


def test_leaving_early_ends_the_processes(tmp_path: Path) -> None:
    messages = run_in_processes(work, [task_of(tmp_path, "a", seed) for seed in range(3)], jobs=1)
    next(messages)
    messages.close()
    begun = [path.parent.name for path in tmp_path.glob("a/*/starts")]
    assert begun == ["0"]


def test_one_study_at_a_time_in_a_folder(tmp_path: Path) -> None:
    told = r"another `steppe study` is at work there.*: out="
    with alone_in(tmp_path), pytest.raises(StudyError, match=told), alone_in(tmp_path):
        pass
    with alone_in(tmp_path):
        pass
