"""Copies of weights in the layout that a kernel reads, kept for inference.

A copy is served only while the weight is the one it was made from, the same storage at the same
address and version, and nothing was written to its memory since. Where writes cannot be seen, see
`steppe.ops.cpu.writes`, copies are kept of weights alone that the user has said are final.
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

_Copy = TypeVar("_Copy", Panels, Tensor, "KeptScreen")
_Key = tuple[object, ...]


class KeptScreen(NamedTuple):
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
    """A copy, and what tells whether it is still true."""

    storage: StorageWeakRef
    address: int
    version: int
    mark: Mark | None  # None: the weight is final
    copy: Panels | Tensor | KeptScreen


_entries: dict[_Key, _Entry] = {}
_final: dict[int, StorageWeakRef] = {}  # by the storage's ``_cdata``
_met: dict[int, StorageWeakRef] = {}  # likewise: storages of weights that were asked for
_lock = threading.Lock()


def kept_panels(weight: Tensor) -> Panels | None:
    """The panels of a weight ``[N, D]``; None where no copy may be kept."""
    return _kept("panels", weight, pack)


def kept_rows(weight: Tensor) -> Tensor | None:
    """A weight ``[N, D]`` with its rows contiguous; itself if they are."""
    return weight if rows_are_contiguous(weight) else _kept("rows", weight, _make_rows)


def _make_rows(weight: Tensor) -> Tensor:
    return lasting(weight.shape, weight.dtype).copy_(weight.detach())


def kept_screen(weight: Tensor) -> KeptScreen | None:
    """The screen of a weight ``[F, D]``; None where no copy may be kept."""
    return _kept("screen", weight, _make_screen)


def _make_screen(weight: Tensor) -> KeptScreen:
    return KeptScreen(screen_of(weight), BackOff(), BackOff())


def declare_final(weight: Tensor) -> None:
    """Take it that nobody writes to a weight past PyTorch's version counter, until `forget`."""
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


def keeps(weight: Tensor) -> bool:
    """Whether copies of a weight are worth it, and may be kept: not of one that is met first."""
    if is_watched(weight) and _is_dense(weight):
        return True
    return not is_new(weight) and not why_not_kept(weight)


def why_not_kept(weight: Tensor) -> str:
    """Why nothing that is made of a weight may be kept; empty if it may."""
    if not _is_dense(weight):
        return "a weight has gaps in memory"
    if is_final(weight) or watch_of(weight) is not None:
        return ""
    cure = "accelerate_(model, weights_are_final=True) keeps copies all the same"
    why = unseen() or "others may write to the memory of its weights"
    return f"copies of its weights could grow stale unseen: {why}; {cure}"


def marks_of(weights: Sequence[Tensor]) -> Mark:
    """What is made of some weights after this is to be checked by; final ones are not.

    Args:
        weights: each of which `why_not_kept` has nothing against.
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


def _kept(layout: str, weight: Tensor, make: Callable[[Tensor], _Copy]) -> _Copy | None:
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
