"""Write results so that a reader sees all of a file or none of it."""

from __future__ import annotations

import errno
import json
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from steppe.errors import OutputError, SteppeError

_PROBE = 2**20  # bytes; a writer that ran into the end of the disk leaves less
_KEPT = 40  # characters of a name that its temporary name ends with: names have 255 bytes at most


def expanded(path: str | Path) -> Path:
    """The path with a home folder in place of its ``~``.

    Args:
        path: of a file or a folder; ``~`` within it is a character like others.

    Raises:
        SteppeError: it begins with ``~`` and the name of no user.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise SteppeError(
            f"{path}: there is no home folder {Path(path).parts[0]}. If it is a name in this"
            f" folder, write ./{path}"
        ) from None


def prepare_folder(folder: str | Path, setting: str | None = None) -> Path:
    """Make a folder and make sure that it can be written to.

    Args:
        folder: made with its parents if it is not there.
        setting: the caller's name for it, which an error says to give another value.

    Returns:
        The folder.

    Raises:
        OutputError: it is a file, read-only or full.
    """
    path = Path(folder)
    with writing_to(path, setting):
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path) as probe:
            probe.write(b"\0" * 4096)
    return path


def why_unwritable(folder: Path) -> str | None:
    """Why nothing can be written to a folder, or None if something can.

    Args:
        folder: the folder; one that is not there is unwritable.
    """
    try:
        with tempfile.TemporaryFile(dir=folder) as probe:
            probe.write(b"\0" * _PROBE)
            probe.flush()
            os.fsync(probe.fileno())
    except OSError as error:
        return error.strerror or str(error)
    return None


def prepare_file(file: str | Path, setting: str | None = None) -> Path:
    """Make a file's folder and make sure that the file can be written.

    Args:
        file: one that is there already may be replaced.
        setting: as in `prepare_folder`.

    Returns:
        The file.

    Raises:
        OutputError: it is a folder or a device, or its folder cannot be written to.
    """
    path = Path(file)
    with writing_to(path, setting):
        _require_replaceable(path)
        path.exists()  # an OSError where the name is too long
    prepare_folder(path.parent, setting)
    return path


@contextmanager
def writing_to(path: Path, setting: str | None = None) -> Iterator[None]:
    """Tell errors of the file system, also those of safetensors, by the name of what is written.

    Args:
        path: the file or folder.
        setting: as in `prepare_folder`.

    Raises:
        OutputError: something could not be written.
    """
    try:
        yield
    except OutputError:
        raise
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        message = f"cannot write to {path}: {reason}"
        if setting is None:
            raise OutputError(message) from None
        raise OutputError(f"{message}. Name another place", {setting: "PATH"}) from None


def write_folder(path: Path, write: Callable[[Path], Any]) -> None:
    """Let `write` fill a folder under a temporary name, then rename it.

    Args:
        path: the folder; one that is there already is replaced.
        write: fills the folder it is given.

    Raises:
        OutputError: it cannot be written; an older folder of the name is still whole.
    """
    with writing_to(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=".") as temporary:
            new, old = Path(temporary) / "new", Path(temporary) / "old"
            _let_write(write, new)
            if path.exists():
                path.rename(old)
            try:
                new.rename(path)
            except BaseException:
                if old.exists():
                    old.rename(path)
                raise


def write_json(path: Path, value: Any) -> None:
    """Write JSON under a temporary name, then rename it.

    Args:
        path: the file.
        value: JSON values.

    Raises:
        OutputError: it cannot be written; an older file of the name is still whole.
    """
    text = json.dumps(value, indent=1) + "\n"
    write_file(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def write_file(path: Path, write: Callable[[Path], Any]) -> None:
    """Let `write` write under a temporary name with the same ending, then rename it.

    Args:
        path: the file.
        write: writes the file it is given.

    Raises:
        OutputError: it cannot be written; an older file of the name is still whole.
    """
    with writing_to(path):
        target = _require_replaceable(path)
        temporary = _temporary(target)
        try:
            _let_write(write, temporary)
            temporary.replace(target)
        finally:
            temporary.unlink(missing_ok=True)


def _require_replaceable(path: Path) -> Path:
    """The file that a path leads to, if another may take its place.

    A device or a pipe must not be replaced: ``/dev/null`` would become a file for everybody.
    """
    target = path.resolve()
    if target.is_dir():
        raise IsADirectoryError(errno.EISDIR, "it is a folder")
    if target.exists() and not target.is_file():
        raise OSError(errno.EINVAL, "it is a device or a pipe, expected a file")
    return target


def _temporary(path: Path) -> Path:
    """Where a file is written before it takes its name."""
    return path.with_name(f".{os.getpid()}.{path.name[-_KEPT:]}")


def _let_write(write: Callable[[Path], Any], path: Path) -> None:
    """Let a library write; some of them do not report a full disk as an OSError."""
    try:
        write(path)
    except (OSError, SafetensorError, SteppeError):
        raise
    except Exception as error:
        reason = why_unwritable(path.parent)
        if reason is None:
            raise
        raise OSError(0, reason) from error
