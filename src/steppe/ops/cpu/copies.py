"""The cache of weights in the layouts that kernels read, for inference.

A copy is valid only while the weight is the one that it was made from. PyTorch's version counter
does not tell: ``.data``, NumPy and raw pointers change a weight past it, and the dense model would
compute with the new values. So an entry is valid while three things hold: the storage, which the
cache refers to weakly, is at the same address; the version is the same; and the system's page
protection has seen no write to its memory (`steppe.ops.cpu.writes`). Where writes cannot be seen,
only weights are cached that the user has declared final.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from steppe.ops.cpu.back_off import BackOff
from steppe.ops.cpu.calls import Panels, pack, rows_are_contiguous
from steppe.ops.cpu.memory import lasting
from steppe.ops.cpu.screen import Screen, screen_of
from steppe.ops.cpu.writes import (
    Mark,
    Watch,
    is_watched,
    mark_of,
    stop_watching,
    unseen,
    watch_of,
)

_Copy = TypeVar("_Copy", Panels, Tensor, "CachedScreen")
_Key = tuple[object, ...]


class CachedScreen(NamedTuple):
    """The screen of a weight, and when to try it again.

    Attributes:
        screen: the integers and their bounds.
        few: back-off of decoding calls, whose inputs are rounded to 16 bits.
        many: back-off of the others.
    """

    screen: Screen
    few: BackOff
    many: BackOff


@dataclass
class _Entry:
    """A copy, and the state of its weight when it was made."""

    storage: StorageWeakRef
    address: int
    version: int
    mark: Mark | None  # None: the weight is final
    copy: Panels | Tensor | CachedScreen


_entries: dict[_Key, _Entry] = {}
_final: dict[int, StorageWeakRef] = {}  # by the storage's ``_cdata``
_met: dict[int, StorageWeakRef] = {}  # by the same: storages of weights that were asked for
_lock = threading.Lock()


def cached_panels(weight: Tensor) -> Panels | None:
    """The panels of a weight ``[N, D]``; None where it cannot be cached."""
    return _cached("panels", weight, pack)


def cached_rows(weight: Tensor) -> Tensor | None:
    """A weight ``[N, D]`` with its rows contiguous; itself if they are."""
    return weight if rows_are_contiguous(weight) else _cached("rows", weight, _make_rows)


def _make_rows(weight: Tensor) -> Tensor:
    return lasting(weight.shape, weight.dtype).copy_(weight.detach())


def cached_screen(weight: Tensor) -> CachedScreen | None:
    """The screen of a weight ``[F, D]``; None where it cannot be cached."""
    return _cached("screen", weight, _make_screen)


def _make_screen(weight: Tensor) -> CachedScreen:
    return CachedScreen(screen_of(weight), BackOff(), BackOff())


def declare_final(weight: Tensor) -> None:
    """Trust that nobody writes to a weight past PyTorch's version counter, until `forget`."""
    storage = weight.untyped_storage()
    with _lock:
        for dead in [key for key, reference in _final.items() if reference.expired()]:
            del _final[dead]
        _final[storage._cdata] = StorageWeakRef(storage)


def is_final(weight: Tensor) -> bool:
    """Whether a weight was declared to be final."""
    reference = _final.get(weight.untyped_storage()._cdata)
    return reference is not None and not reference.expired()


def is_new(weight: Tensor) -> bool:
    """Whether a weight is met for the first time, as one that autocast has cast always is.

    Making copies of it takes longer than they save in one call.
    """
    storage = weight.untyped_storage()
    reference = _met.get(storage._cdata)
    if reference is not None and not reference.expired():
        return False
    with _lock:
        for dead in [key for key, reference in _met.items() if reference.expired()]:
            del _met[dead]
        _met[storage._cdata] = StorageWeakRef(storage)
    return True


def is_cacheable(weight: Tensor) -> bool:
    """Whether a weight can be cached, and pays: not one that is met for the first time."""
    if is_watched(weight) and _is_dense(weight):
        return True
    return not is_new(weight) and not why_not_cached(weight)


def why_not_cached(weight: Tensor) -> str:
    """Why a weight cannot be cached; empty if it can."""
    if not _is_dense(weight):
        return "a weight has gaps in memory"
    if is_final(weight) or watch_of(weight) is not None:
        return ""
    cure = "accelerate_(model, weights_are_final=True) keeps copies all the same"
    why = unseen() or "others may write to the memory of its weights"
    return f"copies of its weights could grow stale unseen: {why}; {cure}"


def marks_of(weights: Sequence[Tensor]) -> Mark:
    """The state of some weights, by which copies made after this are checked.

    Args:
        weights: cacheable, see `why_not_cached`; final ones are not checked.
    """
    watches = [watch_of(weight) for weight in weights if not is_final(weight)]
    return mark_of([watch for watch in watches if watch is not None])


def forget(weight: Tensor) -> None:
    """Free the copies of a weight."""
    storage = weight.untyped_storage()._cdata
    with _lock:
        _final.pop(storage, None)
        _met.pop(storage, None)
        for key in [key for key in _entries if key[0] == storage]:
            del _entries[key]
    stop_watching(weight)


def _cached(layout: str, weight: Tensor, make: Callable[[Tensor], _Copy]) -> _Copy | None:
    if not _is_dense(weight):
        return None
    storage = weight.untyped_storage()
    key = (
        storage._cdata,
        layout,
        weight.storage_offset(),
        weight.shape,
        weight.stride(),
        weight.dtype,
    )
    with _lock:
        entry = _entries.get(key)
    version = 0 if weight.is_inference() else weight._version
    if (
        entry is not None
        and not entry.storage.expired()
        and entry.address == weight.data_ptr()  # another's memory may be there by now
        and entry.version == version
        and (is_final(weight) if entry.mark is None else entry.mark.holds())
    ):
        return entry.copy  # type: ignore[return-value]  # the layout is in the key
    final = is_final(weight)
    watch: Watch | None = None if final else watch_of(weight)
    if not final and watch is None:
        return None
    address = weight.data_ptr()
    mark = None if watch is None else mark_of([watch])  # before the weight is read
    copy = make(weight)
    with _lock:
        for old in [old for old, entry in _entries.items() if entry.storage.expired()]:
            del _entries[old]
        _entries[key] = _Entry(StorageWeakRef(storage), address, version, mark, copy)
    return copy


def _is_dense(weight: Tensor) -> bool:
    """Whether a matrix fills its part of the memory without gaps, in either order; or a vector."""
    if weight.ndim < 2:
        return weight.is_contiguous()
    rows, columns = weight.shape
    return weight.stride() in ((columns, 1), (1, rows))
