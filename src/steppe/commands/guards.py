"""The frame of all subcommands: quiet libraries, missing packages, Ctrl-C, and paths from home."""

from __future__ import annotations

import logging
import os
import signal
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import typer

from steppe.commands.terminal import complain
from steppe.errors import MissingExtraError, SteppeError
from steppe.files import expanded

INTERRUPTED = 130  # as in steppe.cli


@contextmanager
def interruptible(consequence: str) -> Iterator[None]:
    """Let Ctrl-C end a command with one line that says what it left."""
    outside = signal.getsignal(signal.SIGINT)
    if outside is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    except KeyboardInterrupt:
        complain(consequence, "interrupted;")
        raise typer.Exit(INTERRUPTED) from None
    finally:
        signal.signal(signal.SIGINT, outside)


@contextmanager
def needing(command: str, extra: str) -> Iterator[None]:
    """Tell which extra has the packages that a command imports."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise MissingExtraError(
            f"`steppe {command}` needs {error.name}: pip install 'steppe[{extra}]'"
        ) from None


def at_home(name: str) -> str:
    """A hub id or data set as it is, a path without its ``~``."""
    if not name:
        raise SteppeError("expected a path or an id, got an empty one")
    return str(expanded(name)) if name.startswith("~") else name


def quieten_libraries() -> None:
    """Keep the libraries' own bars and notes out of ours; errors still show."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    logging.getLogger("transformers").setLevel(logging.ERROR)
    # It prints what went wrong before raising it; our error says it once.
    logging.getLogger("datasets").setLevel(logging.CRITICAL)
    warnings.filterwarnings("ignore", module="torch|transformers|accelerate")
