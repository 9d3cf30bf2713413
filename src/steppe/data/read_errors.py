"""Errors of the libraries that read data, as one line of steppe's."""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager

from datasets.exceptions import DatasetsError

from steppe.errors import DataError, MissingExtraError, OutOfMemoryError, SteppeError

_SHOWN = 300  # characters of another library's message


@contextmanager
def reading(data: str) -> Iterator[None]:
    """Give an error of ``datasets`` the data's name; a stream raises it wherever it is read.

    Args:
        data: as the user named it.

    Raises:
        DataError: a file is damaged, ends too early, or has other columns than the first.
    """
    try:
        yield
    except SteppeError:
        raise
    except Exception as error:
        of_worker = "in DataLoader worker process" in str(error)  # its frames are text
        frames = [frame.f_globals for frame, _ in traceback.walk_tb(error.__traceback__)]
        if not of_worker and not any(
            str(names.get("__name__")).partition(".")[0] == "datasets" for names in frames
        ):
            raise
        lines = str(error).strip().splitlines() or [type(error).__name__]
        reason = lines[-1] if of_worker else " ".join(line.strip() for line in lines)
        raise DataError(
            f"{data}: cannot be read on ({reason[:_SHOWN]}). Were all files downloaded whole, and"
            " have they the same columns?"
        ) from None


def unreadable(what: str, error: Exception) -> SteppeError:
    """The error for one of a library that reads or decodes files; one of steppe's stays as it is.

    Args:
        what: begin of the message: the data's name, and the part that cannot be read.
        error: of the library.

    Returns:
        The error to raise.
    """
    while isinstance(error, DatasetsError) and isinstance(error.__cause__, Exception):
        error = error.__cause__  # "an error occurred while generating the dataset"
    if isinstance(error, SteppeError):
        return error
    if isinstance(error, ImportError):
        return MissingExtraError(f"{what}: {first_line(error)}")
    if isinstance(error, MemoryError):
        return OutOfMemoryError(f"{what} ({first_line(error)}). It does not fit into the memory.")
    reason = "there is nothing in it" if isinstance(error, StopIteration) else first_line(error)
    return DataError(
        f"{what} ({reason}). Is a file damaged or cut short, or of another format than its name"
        " says? Fetch it again."
    )


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its class where it has none.

    Args:
        error: of a library.

    Returns:
        Text without a full stop, of at most some hundred characters.
    """
    lines = str(error).strip().splitlines()
    return lines[0][:_SHOWN].rstrip(".") if lines else type(error).__name__
