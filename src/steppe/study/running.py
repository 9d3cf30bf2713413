"""Runs in processes of their own, so many at a time."""

from __future__ import annotations

import io
import json
import multiprocessing
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import forkserver
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerContext, SpawnContext
from pathlib import Path
from typing import Any

from steppe.errors import SteppeError

Tell = Callable[[dict[str, Any]], None]
"""Sends a message, JSON values, to the process that began the run."""
Work = Callable[[dict[str, Any], Tell], None]
"""Does a task in its own process; a function of a module, so that other processes find it."""
LOG = "log.txt"
_LAST_LINES = 5
_LOG_END = 20_000  # bytes


@dataclass(frozen=True)
class Message:
    """What a process has told, or its end.

    Attributes:
        task: its index.
        values: of the message; empty at the end of the process.
        failure: the last lines of a process that has failed; None for all others.
    """

    task: int
    values: dict[str, Any]
    failure: list[str] | None = None


def run_in_processes(
    work: Work, tasks: Sequence[dict[str, Any]], jobs: int
) -> Generator[Message, None, None]:
    """Do tasks in processes, and give their messages as they come.

    If the iteration ends early, the processes are killed. If this process is killed, they end
    themselves. Ctrl-C reaches this process alone.

    Args:
        work: done for each task.
        tasks: JSON values; each names in ``folder`` the place for what it prints. One that must
            wait for an earlier one has its index in ``after``; it is not begun if that one fails.
        jobs: number of processes at a time.

    Yields:
        Messages, of each process last the one about its end.
    """
    context = _context(work.__module__)
    waiting, busy = list(range(len(tasks))), dict[Connection, tuple[int, Any]]()
    is_well: dict[int, bool] = {}  # of the tasks that have ended
    try:
        while waiting or busy:
            for index in list(waiting):  # one that waits stands behind what it waits for
                first = tasks[index].get("after")
                if first is not None and not is_well.get(first, True):
                    waiting.remove(index)
                    is_well[index] = False
                    name = tasks[first]["row"]["id"]
                    yield Message(index, {}, [f"not begun: it starts from {name}, which failed"])
            while len(busy) < jobs and (begun := _ready(waiting, tasks, is_well)) is not None:
                waiting.remove(begun)
                ours, theirs = context.Pipe(duplex=False)
                process = context.Process(target=_do, args=(work, tasks[begun], theirs))
                busy[ours] = (begun, process)
                process.start()
                theirs.close()
            for ready in wait(list(busy)) if busy else ():  # for nothing it would wait for ever
                assert isinstance(ready, Connection)
                index, process = busy[ready]
                try:
                    yield Message(index, json.loads(ready.recv_bytes()))
                except (EOFError, OSError):
                    process.join()
                    del busy[ready]
                    ready.close()
                    is_well[index] = process.exitcode == 0
                    end = None if is_well[index] else _end_of(tasks[index], process.exitcode)
                    yield Message(index, {}, end)
    finally:
        for _, process in busy.values():
            if process.pid is not None:
                process.kill()
                process.join()


def _ready(
    waiting: Sequence[int], tasks: Sequence[dict[str, Any]], is_well: dict[int, bool]
) -> int | None:
    """The first task that waits for none that is still to end; None for none."""
    for index in waiting:
        first = tasks[index].get("after")
        if first is None or first in is_well:
            return index
    return None


def _context(module: str) -> ForkServerContext | SpawnContext:
    """Processes that start in a moment where the system can: a server imports once, and forks."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([module])
    with _ctrl_c_ignored():  # for good in the server, and so in its children
        forkserver.ensure_running()
    return context


@contextmanager
def _ctrl_c_ignored() -> Iterator[None]:
    """Start what shall not listen to Ctrl-C; other threads than the first cannot change that."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    outside = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, outside)


def _do(work: Work, task: dict[str, Any], connection: Connection) -> None:
    """Do one task; this is the process's whole life."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    folder = Path(task["folder"])
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / LOG).open("ab") as log:
        for stream in (1, 2):
            os.dup2(log.fileno(), stream)
    if isinstance(sys.stdout, io.TextIOWrapper):  # so that the log of a killed process has all
        sys.stdout.reconfigure(line_buffering=True)
    code = 1
    try:
        work(task, lambda values: connection.send_bytes(json.dumps(values).encode()))
        code = 0
    except SteppeError as error:
        print(f"error: {error}", file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    sys.exit(code)  # not os._exit: the semaphores of libraries would be left behind


def _end_with_parent() -> None:
    """End this process as soon as the one that began the study is gone, however it went."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _end_of(task: dict[str, Any], code: int | None) -> list[str]:
    """The last lines that a process has printed, and how it ended if it did not say."""
    log = Path(task["folder"]) / LOG
    text = log.read_bytes()[-_LOG_END:].decode("utf-8", "replace") if log.is_file() else ""
    lines = [line for line in text.splitlines() if line.strip()][-_LAST_LINES:]
    if code is not None and code < 0:
        lines.append(f"ended by {signal.Signals(-code).name}")
    return [*lines, f"see {log}"]
