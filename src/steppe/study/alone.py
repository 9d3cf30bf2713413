"""One study at a time in a folder."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from steppe.errors import StudyError
from steppe.files import writing_to

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

LOCK = ".lock"


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Hold a folder's lock, which the system lets go when the process ends, however it ends.

    Args:
        folder: of a study.

    Raises:
        StudyError: another process holds it.
    """
    with writing_to(folder, "out"):
        file = (folder / LOCK).open("a")
    with file:
        try:
            if fcntl is not None:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise StudyError(
                f"{folder}: another `steppe study` is at work there. Wait for its end, or name"
                " another folder",
                {"out": "FOLDER"},
            ) from None
        yield
