"""The output of the command line: text as it is, on any terminal, and whole lines in a pipe."""

from __future__ import annotations

import codecs
import io
import sys
from codecs import register_error
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console, RenderableType
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from steppe.errors import OutputError
from steppe.printable import printable, shortened

_ENCODE_ANYWAY = "steppe.encode_anyway"
# Text is never read as Rich's markup or as the names of emoji: a path may hold [/red] or :smile:.
_out = Console(markup=False, emoji=False, highlight=False)
_err = Console(stderr=True, markup=False, emoji=False, highlight=False)


def prepare_streams() -> None:
    """Let what a stream cannot encode be replaced, instead of ending a command after its work."""
    register_error(_ENCODE_ANYWAY, _encode_anyway)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=_ENCODE_ANYWAY)


def say(*lines: str, style: str = "") -> None:
    """Print lines, unbroken.

    Args:
        lines: of any origin.
        style: of Rich.

    Raises:
        OutputError: the standard output cannot be written.
    """
    with _writing():
        for line in lines:
            _out.print(Text(printable(line), style=style), soft_wrap=True)


def say_path(path: str | Path) -> None:
    """Print where something is, so that a pipe reads it byte by byte.

    Args:
        path: or a command that has one.

    Raises:
        OutputError: the standard output cannot be written.
    """
    with _writing():
        print(printable(str(path)) if _out.is_terminal else path, flush=True)


def show_table(table: RenderableType) -> None:
    """Print a table.

    Args:
        table: of `steppe.report`.

    Raises:
        OutputError: the standard output cannot be written.
    """
    with _writing():
        _out.print(table)


def complain(message: str, first: str = "error:") -> None:
    """Print an error to the standard error stream.

    Args:
        message: of any origin.
        first: its first word.
    """
    text = Text.assemble((first, "bold red"), " ", shortened(printable(message)))
    _err.print(text, soft_wrap=True)


def progress_bars(*shown: str, on_stderr: bool = False) -> Progress:
    """Bars on the standard output or the standard error stream, if that is a terminal.

    Args:
        shown: names of fields of the tasks that are shown beside the bar, as text.
        on_stderr: where nothing is printed to the standard output meanwhile.
    """
    console = _err if on_stderr else _out
    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        *(TextColumn(f"{{task.fields[{name}]}}", markup=False) for name in shown),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
        disable=not console.file.isatty(),  # FORCE_COLOR asks for colours in a pipe, not for bars
        redirect_stdout=not on_stderr,
    )


@contextmanager
def _writing() -> Iterator[None]:
    """Tell a full disk behind the standard output; a closed pipe is the command line's to see."""
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        raise OutputError(f"cannot write to the standard output: {error.strerror}") from None


def _encode_anyway(error: UnicodeError) -> tuple[str | bytes, int]:
    """Bytes of a file's name that are no text as they are, and ? for other characters."""
    try:
        return codecs.lookup_error("surrogateescape")(error)
    except UnicodeError:
        return codecs.lookup_error("replace")(error)
