"""Data that has been opened, and the entry by which a kind of source is known."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

WHOLE = "full"
"""Name of the only split where the names of files and folders tell none."""


@dataclass(frozen=True)
class Opened:
    """The splits of a data set, and known facts about them.

    Attributes:
        splits: ``datasets.Dataset`` or ``datasets.IterableDataset`` by the split's name.
        is_local: whether reading all of it costs no download.
        builder: the builder of ``datasets`` that reads the files; empty for none.
        files: paths of the files by split, where a builder reads them.
        tensors: images uint8 ``[N, H, W]`` and classes int64 ``[N]`` by split, where they are in
            memory already; else empty.
    """

    splits: Mapping[str, Any]
    is_local: bool
    builder: str = ""
    files: Mapping[str, list[str]] = field(default_factory=dict)
    tensors: Mapping[str, tuple[Tensor, Tensor]] = field(default_factory=dict)


@dataclass(frozen=True)
class Opener:
    """One kind of source.

    Attributes:
        kind: its name.
        takes: whether the data's name, and the path that the name is if it is one, are of this
            kind; must not raise.
        open: opens it, given the name, the path, and whether to stream: read rows as they are asked
            for, instead of preparing all of them once. Raises `DataError` where it cannot.
    """

    kind: str
    takes: Callable[[str, Path], bool]
    open: Callable[[str, Path, bool], Opened]
