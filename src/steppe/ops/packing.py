"""Copies of weights in the layout that a kernel reads, kept for inference.

A copy is served only while the weight is the one it was made from: the same storage, at the same
address and version, which every in-place change raises, and with the same values at a few places,
since changes through ``.data`` raise no version.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from steppe.ops.calls import Panels, lasting, library, pack, pointer, rows_are_contiguous
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


class Probes:
    """Values spread over weights' memory, by which changes are noticed that raise no version.

    They are good as long as the weights are where they are.

    Args:
        weights: without gaps in memory, of one dtype.

    Attributes:
        places: an array of the addresses.
        values: what is there, as bits, so that NaN equals itself.
    """

    def __init__(self, weights: Sequence[Tensor]) -> None:
        places: list[int] = []
        values = []
        for weight in weights:
            count = min(weight.numel(), _PROBES)
            step = weight.numel() // max(count, 1)
            size = weight.element_size()
            places += [weight.data_ptr() + i * step * size for i in range(count)]
            bits = torch.int32 if weight.dtype == torch.float32 else torch.int16
            values.append(weight.detach().as_strided((count,), (step,)).view(bits))
        self.places = (ctypes.c_void_p * len(places))(*places)
        self.values = torch.cat(values) if values else None
        self._pointer = pointer(self.values)
        self._size = 0 if self.values is None else self.values.element_size()

    def hold(self) -> bool:
        """Whether the values are the same."""
        return bool(
            library().steppe_probes_hold(self.places, self._pointer, len(self.places), self._size)
        )


@dataclass
class _Entry:
    """A copy, and what tells whether it is still true."""

    storage: StorageWeakRef
    address: int
    version: int
    probes: Probes
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
    if (
        entry is not None
        and not entry.storage.expired()
        and entry.address == weight.data_ptr()  # the probes' places are there
        and entry.version == weight._version
        and entry.probes.hold()
    ):
        return entry.copy  # type: ignore[return-value]  # the layout is in the key
    state = weight.data_ptr(), weight._version, Probes([weight])
    copy = make(weight)
    with _lock:
        for old in [old for old, entry in _entries.items() if entry.storage.expired()]:
            del _entries[old]
        _entries[key] = _Entry(StorageWeakRef(storage), *state, copy)
    return copy


def _is_dense(weight: Tensor) -> bool:
    """Whether a matrix fills its part of the memory without gaps, in either order."""
    rows, columns = weight.shape
    return weight.stride() in ((columns, 1), (1, rows))
