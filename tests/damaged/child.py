"""Feeds damaged files to targets in a process that may end at any of them: ``child.py FOLDER``.

Reads names of cases, one a line, and answers each with a line of JSON; a case that takes the
process along is answered with the signal that ended it. What is imported is imported once: the
cases run in a fork, and after a crash in the next one.
"""

from __future__ import annotations

import json
import logging
import os
import random
import resource
import select
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch
import yaml

from damaged.faults import FAULTS
from damaged.hostile import HOSTILE
from damaged.mutations import FILE_WAYS, as_json, damage_bytes, damage_tree, replace_file
from damaged.targets import FILE, TARGETS, TREE, WHOLE, Target
from steppe.errors import SteppeError

GIGABYTES = 2
_PATIENCE = 30  # seconds until a process that hears no alarm is ended
_MESSAGE = 700  # characters, a few hundred and the names of files
_PAGE = resource.getpagesize()


class _Late(BaseException):
    """A case takes too long; not an `Exception`, which a library may swallow."""


def _raise_late(*_: object) -> None:
    raise _Late


def _damage(target: Target, file: Path, kind: str, seed: int) -> None:
    """Damage a whole file as a case says."""
    draw = random.Random(seed)
    if kind == FILE:
        replace_file(file, FILE_WAYS[seed % len(FILE_WAYS)])
    elif kind == TREE:
        file.write_text(_damaged_text(file, draw), encoding="utf-8")
    else:
        file.write_bytes(damage_bytes(file.read_bytes(), draw))


def _damaged_text(file: Path, draw: random.Random) -> str:
    text = file.read_text(encoding="utf-8")
    if file.suffix == ".jsonl":
        lines = text.splitlines()
        at = draw.choice((0, len(lines) - 1))
        lines[at] = as_json(damage_tree(json.loads(lines[at]), draw))
        return "\n".join(lines)
    tree = json.loads(text) if file.suffix == ".json" else yaml.safe_load(text)
    return as_json(damage_tree(tree, draw))  # JSON is YAML, too


def run_case(name: str, wholes: dict[str, Path]) -> dict[str, object]:
    """What comes of one case, ``target/kind/seed``."""
    target_name, kind, seed = name.split("/")
    target = {**TARGETS, **HOSTILE, **FAULTS}[target_name]
    if target_name not in wholes:
        torch.manual_seed(0)
        wholes[target_name] = Path(tempfile.mkdtemp(dir=sys.argv[1]))
        target.make(wholes[target_name])
    folder = wholes[target_name]
    if kind != WHOLE:
        folder = Path(
            shutil.copytree(folder, tempfile.mkdtemp(dir=sys.argv[1]), dirs_exist_ok=True)
        )
        _damage(target, folder / target.file, kind, int(seed))
    start = time.perf_counter()
    verdict, told = "harmless", ""
    signal.setitimer(signal.ITIMER_REAL, target.seconds)
    try:
        target.feed(folder)
    except SteppeError as error:
        told = str(error).replace(str(folder), "FOLDER")
        is_full = isinstance(error, MemoryError) or "MemoryError" in told
        verdict = "wrong" if is_full or len(told) >= _MESSAGE else "clear"
    except _Late:
        verdict, told = "wrong", f"takes more than {target.seconds} s"
    except BaseException as error:
        verdict, told = "wrong", _described(error)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        if kind != WHOLE:
            shutil.rmtree(folder, ignore_errors=True)
    return {
        "case": name,
        "verdict": verdict,
        "told": told[:_MESSAGE],
        "seconds": round(time.perf_counter() - start, 2),
    }


def _described(error: BaseException) -> str:
    """Class, message and the last place of ours of an error."""
    place, frame = "", error.__traceback__
    while frame is not None:
        code = frame.tb_frame.f_code
        if "steppe/" in code.co_filename and "damaged" not in code.co_filename:
            place = f"{code.co_filename.rpartition('steppe/')[2]}:{frame.tb_lineno}"
        frame = frame.tb_next
    return f"{type(error).__name__} at {place}: {str(error)[:200]}"


def _run_fork(names: list[str], answers: int) -> None:
    """Run cases one after the other, each announced before and answered after."""
    signal.signal(signal.SIGALRM, _raise_late)
    used = int(Path("/proc/self/statm").read_text().split()[5]) * _PAGE
    most = used + (GIGABYTES << 30)
    resource.setrlimit(resource.RLIMIT_DATA, (most, most))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    wholes: dict[str, Path] = {}
    for name in names:
        line = json.dumps(run_case(name, wholes)) + "\n"
        os.write(answers, line.encode())
    os._exit(0)


def _answers(reading: int, child: int) -> Iterator[bytes]:
    """The answers of a fork, which is ended where it gives none for too long."""
    rest = b""
    while True:
        if not select.select([reading], [], [], _PATIENCE)[0]:
            os.kill(child, signal.SIGKILL)
        block = os.read(reading, 1 << 16)
        if not block:
            return
        *lines, rest = (rest + block).split(b"\n")
        yield from (line + b"\n" for line in lines)


def main() -> None:
    """Answer every case on standard input."""
    logging.disable(logging.CRITICAL)
    warnings.simplefilter("ignore")
    names = sys.stdin.read().split()
    out, errors = os.dup(1), os.fdopen(os.dup(2), "w", buffering=1)
    quiet = os.open(os.devnull, os.O_WRONLY)
    os.dup2(quiet, 1)
    os.dup2(quiet, 2)
    while names:
        reading, writing = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(reading)
            try:
                _run_fork(names, writing)
            except BaseException:
                traceback.print_exc(file=errors)
            finally:
                os._exit(1)
        os.close(writing)
        for line in _answers(reading, child):
            os.write(out, line)
            names.pop(0)
        os.close(reading)
        _, status = os.waitpid(child, 0)
        if names:
            how = os.waitstatus_to_exitcode(status)
            told = f"the process ended by {signal.Signals(-how).name}" if how < 0 else f"exit {how}"
            answer = {"case": names.pop(0), "verdict": "wrong", "told": told, "seconds": 0.0}
            os.write(out, (json.dumps(answer) + "\n").encode())


if __name__ == "__main__":
    main()
