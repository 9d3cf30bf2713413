"""The record of a checkpoint: read from its config, checked, and turned into plug-ins."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, fields
from typing import Any

from steppe.blocks.pattern_values import fault_in
from steppe.blocks.patterns import BlockPattern
from steppe.checkpoints.weights import find, read_json
from steppe.errors import CheckpointError
from steppe.plugins.base import Plugin
from steppe.plugins.registry import kinds_with, plugin_from_settings
from steppe.record import RECORD_KEY, RECORD_VERSION
from steppe.schema import fault_of
from steppe.surgery.pattern_notes import Noted

CONFIG = "config.json"
ADAPTER_RECORD = "steppe_config.json"
"""File of the record beside an adapter of PEFT."""


@dataclass(frozen=True)
class Own:
    """The user's own patterns and plug-ins that a record may name.

    Attributes:
        patterns: go before those of the record.
        plugins: classes of plug-ins.
    """

    patterns: Sequence[BlockPattern] = ()
    plugins: Sequence[type[Plugin]] = ()


# A loader between `load_pretrained` and the code that applies the record (Transformers', PEFT's,
# the user's) passes no argument of ours on, so they are kept here for the time of the call.
_current_own: ContextVar[Own | None] = ContextVar("current_own", default=None)


@contextmanager
def given_own(own: Own) -> Iterator[None]:
    """Make `current_own` return `own` within the block.

    Args:
        own: of the `load_pretrained` that calls a loader.
    """
    token = _current_own.set(own)
    try:
        yield
    finally:
        _current_own.reset(token)


def current_own() -> Own:
    """The user's own of the `load_pretrained` around this call; nothing outside of one."""
    return _current_own.get() or Own()


@dataclass(frozen=True)
class Record:
    """Plug-ins that a checkpoint's config names, and the blocks of each.

    Attributes:
        applied: the plug-ins with the names of their blocks.
        progress: share of the run that was done, in [0, 1].
        patterns: the user's, as plain values, with the names of the blocks that they match.
    """

    applied: list[tuple[Plugin, list[str]]]
    progress: float
    patterns: list[Noted]

    @property
    def blocks(self) -> set[str]:
        """The names of all blocks."""
        return {name for _, names in self.applied for name in names}


@dataclass(frozen=True)
class _RecordFields:
    """Fields of every record; `patterns` stands only where the user gave some."""

    version: int
    progress: float
    plugins: list[dict[str, Any]]
    patterns: list[dict[str, Any]] = field(default_factory=list)


_FIELDS = tuple(one.name for one in fields(_RecordFields))


def read_record(folder: str, own: Own) -> Record:
    """The record in the ``config.json`` of a folder or a hub repository.

    Args:
        folder: the folder, or a hub id.
        own: plug-ins and patterns of the user's that the record may name.

    Raises:
        CheckpointError: there is no config, or no record in it, or it is damaged.
        ValueError: a plug-in of the user's has the key of another.
    """
    path = find(folder, CONFIG)
    if path is None:
        raise CheckpointError(f"{folder}: expected a model folder or hub id, found no {CONFIG}")
    config = read_json(path)
    record = config.get(RECORD_KEY) if isinstance(config, dict) else None
    if record is None:
        raise CheckpointError(
            f"{path}: no record of steppe; this is a plain model. Load it as such, then"
            " steppe.sparsify_(model, [...])"
        )
    return parse_record(record, str(path), own)


def parse_record(record: Any, path: str, own: Own) -> Record:
    """A record of the JSON values that stand in a config.

    Args:
        record: the values.
        path: of the config, for errors.
        own: plug-ins and patterns of the user's that it may name.

    Raises:
        CheckpointError: it is damaged, or of a newer steppe.
        ValueError: a plug-in of the user's has the key of another.
    """
    values = record if isinstance(record, dict) else {}
    values = {key: values[key] for key in _FIELDS if key in values}
    fault = fault_of(_RecordFields, values)
    if fault is not None:
        raise _damaged(path, fault)
    version, progress = values["version"], float(values["progress"])
    if version != RECORD_VERSION or not 0.0 <= progress <= 1.0:
        raise CheckpointError(
            f"{path}: expected a record of version {RECORD_VERSION} with progress in 0 … 1, got"
            f" version {version!r}, progress {progress}. A newer steppe may have written it."
        )
    plugins = _with_blocks(values["plugins"], path)
    if not plugins:
        raise _damaged(path, "no plug-in")
    patterns = _with_blocks(values.get("patterns", []), path)
    _check_patterns(patterns, path)
    kinds = kinds_with(own.plugins)
    applied = [(plugin_from_settings(entry, kinds), names) for entry, names in plugins]
    return Record(applied, progress, patterns)


def _with_blocks(entries: Sequence[Mapping[str, Any]], path: str) -> list[Noted]:
    """Entries of a record, each with the names of its blocks."""
    found = []
    for entry in entries:
        rest = dict(entry)
        names = rest.pop("blocks", None)
        if not isinstance(names, list) or not names or not all(isinstance(n, str) for n in names):
            raise _damaged(path, "blocks: expected a list of names")
        found.append((rest, names))
    return found


def _check_patterns(patterns: Sequence[Noted], path: str) -> None:
    """Refuse damaged patterns, and two for one block."""
    noted = [name for _, names in patterns for name in names]
    if len(set(noted)) < len(noted):
        raise _damaged(path, "two patterns for one block")
    for pattern, _ in patterns:
        fault = fault_in(pattern)
        if fault is not None:
            raise CheckpointError(
                f"{path}: a pattern in the record under {RECORD_KEY!r} is damaged ({fault})"
            )


def _damaged(path: str, fault: str) -> CheckpointError:
    """The error for a record with a fault."""
    return CheckpointError(f"{path}: the record under {RECORD_KEY!r} is damaged ({fault})")
