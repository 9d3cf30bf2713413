"""Copies of weights in the layout that a kernel reads, kept for inference.

A copy is served only while the weight is the one it was made from: the same storage, at the same
version, which every in-place change raises, and with the same values at a few places, since changes
through ``.data`` raise no version.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from steppe.ops.calls import Panels, lasting, pack, rows_are_contiguous
from steppe.ops.dispatch import Habit
from steppe.ops.screened import Screen, screen_of

_PROBES = 8  # each a read from memory, of a weight that only its copy is read of else
_Copy = TypeVar("_Copy", Panels, Tensor, "KeptScreen", "_Sight")
_Key = tuple[object, ...]


class KeptScreen(NamedTuple):
    """The screen of a weight, and whether it has paid.

    Attributes:
        screen: the integers and their bounds.
        few: the habit of calls with few rows, which screen inputs of 16 bits.
        many: the habit of the others.
    """

    screen: Screen
    few: Habit
    many: Habit


@dataclass
class _Entry:
    """A copy, and what tells whether it is still true."""

    storage: StorageWeakRef
    version: int
    probes: Tensor
    copy: Panels | Tensor | KeptScreen | _Sight


_entries: dict[_Key, _Entry] = {}
_lock = threading.Lock()


def kept_panels(weight: Tensor) -> Panels:
    """The panels of a weight ``[N, D]``."""
    return _kept("panels", weight, pack)


def kept_rows(weight: Tensor) -> Tensor:
    """A weight ``[N, D]`` with its rows contiguous; itself if they are."""
    return weight if rows_are_contiguous(weight) else _kept("rows", weight, _make_rows)


def _make_rows(weight: Tensor) -> Tensor:
    return lasting(weight.shape, weight.dtype).copy_(weight.detach())


def kept_screen(weight: Tensor) -> KeptScreen:
    """The screen of a weight ``[F, D]``."""
    return _kept("screen", weight, _make_screen)


def kept_screen_of_known(weight: Tensor) -> KeptScreen | None:
    """The same; None for a weight that is met for the first time, as one of autocast always is.

    Making it takes longer than a call with few rows.
    """
    sight = _Sight()
    return None if _kept("sight", weight, lambda _: sight) is sight else kept_screen(weight)


class _Sight:
    """That a weight was met."""


def _make_screen(weight: Tensor) -> KeptScreen:
    return KeptScreen(screen_of(weight), Habit(), Habit())


def forget(weight: Tensor) -> None:
    """Free the copies of a weight."""
    storage = weight.untyped_storage()._cdata
    with _lock:
        for key in [key for key in _entries if key[0] == storage]:
            del _entries[key]


def _kept(layout: str, weight: Tensor, make: Callable[[Tensor], _Copy]) -> _Copy:
    if weight.is_inference() or not _is_dense(weight):  # the first has no version
        return make(weight)
    storage = StorageWeakRef(weight.untyped_storage())
    key = (
        storage.cdata,
        layout,
        weight.storage_offset(),
        weight.shape,
        weight.stride(),
        weight.dtype,
    )
    probes = probes_of(weight)
    with _lock:
        entry = _entries.get(key)
    if (
        entry is not None
        and not entry.storage.expired()
        and entry.version == weight._version
        and torch.equal(entry.probes, probes)
    ):
        return entry.copy  # type: ignore[return-value]  # the layout is in the key
    copy = make(weight)
    with _lock:
        for old in [old for old, entry in _entries.items() if entry.storage.expired()]:
            del _entries[old]
        _entries[key] = _Entry(storage, weight._version, probes, copy)
    return copy


def _is_dense(weight: Tensor) -> bool:
    """Whether a matrix fills its part of the memory without gaps, in either order."""
    rows, columns = weight.shape
    return weight.stride() in ((columns, 1), (1, rows))


def probe_places(weight: Tensor) -> list[int]:
    """Where in memory the values of `probes_of` are."""
    count, step = _spread(weight)
    start, size = weight.data_ptr(), weight.element_size()
    return [start + i * step * size for i in range(count)]


def probes_of(weight: Tensor) -> Tensor:
    """Values spread over a dense weight's memory, as bits, so that NaN equals itself."""
    count, step = _spread(weight)
    bits = torch.int32 if weight.dtype == torch.float32 else torch.int16
    return weight.detach().as_strided((count,), (step,)).view(bits).clone()


def _spread(weight: Tensor) -> tuple[int, int]:
    """How many values are looked at, and how far apart they are."""
    count = min(weight.numel(), _PROBES)
    return count, weight.numel() // max(count, 1)
