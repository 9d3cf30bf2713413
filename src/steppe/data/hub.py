"""Data sets on the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path

import datasets
from datasets.exceptions import DatasetsError

from steppe.data.embedded import EMBEDDED
from steppe.data.local_files import builder_of
from steppe.data.opened import Opened, Opener
from steppe.data.read_errors import first_line
from steppe.errors import DataError, MissingExtraError


def _takes(data: str, path: Path) -> bool:
    """Any name may be an id."""
    return True


def _open(data: str, path: Path, streaming: bool) -> Opened:
    """A data set on the hub, downloaded as it is asked for where it is streamed.

    Raises:
        DataError: the name can only be a path, the id is unknown, or the hub cannot be reached.
        MissingExtraError: a package that decodes it is not installed.
    """
    if _looks_like_a_path(data):
        raise DataError(
            f"{data}: there is no such file or folder. Expected a path, the id of a data set"
            f" on the Hugging Face hub, or one of the embedded {', '.join(EMBEDDED)}"
        )
    name, _, config = data.partition(":")
    try:
        splits = datasets.load_dataset(name, config or None, streaming=streaming)
    except ImportError as error:
        raise MissingExtraError(f"{data}: {error}") from None
    except (OSError, ValueError, RuntimeError, DatasetsError) as error:
        raise DataError(
            f"{data}: expected a file, a folder, one of {', '.join(EMBEDDED)}, or the id of"
            f" a data set on the Hugging Face hub, as id or id:config ({first_line(error)})"
        ) from None
    return Opened(splits, is_local=False)


def _looks_like_a_path(data: str) -> bool:
    """Whether a name can be no hub id."""
    return (
        data.startswith((".", "/", "~"))
        or data.count("/") > 1
        or "\\" in data
        or builder_of(Path(data)) is not None
    )


HUB = Opener("hub", _takes, _open)
