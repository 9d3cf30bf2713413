"""Targets that do what no target may do: the harness must see it, and go on with the next."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NoReturn

from damaged.targets import WHOLE, Target, write
from steppe.errors import DataError


def _crash(_: Path) -> None:
    os.kill(os.getpid(), signal.SIGSEGV)


def _traceback(_: Path) -> NoReturn:
    raise ValueError("not one of ours")


def _exit(_: Path) -> NoReturn:
    os._exit(3)


def _forever(folder: Path) -> None:
    while folder.exists():
        pass


def _memory(_: Path) -> None:
    bytearray(3 << 30)


def _words(_: Path) -> NoReturn:
    raise DataError("too many " * 100)


def _target(feed: Callable[[Path], None]) -> Target:
    return Target(lambda folder: write(folder, "a.txt", b"a"), "a.txt", feed, (WHOLE,), seconds=1)


TOLD = {
    "crash": "the process ended by SIGSEGV",
    "traceback": "ValueError at : not one of ours",
    "exit": "exit 3",
    "forever": "takes more than 1 s",
    "memory": "MemoryError",
    "words": "too many",
}
"""What is told of each, in part."""
FAULTS: Mapping[str, Target] = {
    "crash": _target(_crash),
    "traceback": _target(_traceback),
    "exit": _target(_exit),
    "forever": _target(_forever),
    "memory": _target(_memory),
    "words": _target(_words),
}
