"""Whether a weight was written to since a copy of it was made; see native/writes.h.

A copy of a weight may be served only as long as the dense model would compute the same. A weight
can be changed past every counter that PyTorch keeps, through ``.data``, NumPy or a pointer, so the
system's page protection is asked. Where that is not to be had, no copies are kept, unless the user
has said that the weights are final.
"""

from __future__ import annotations

import ctypes
import errno
import os
import threading
from collections.abc import Sequence
from functools import cache

from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from steppe.ops.cpu.library import kernels, library
from steppe.ops.cpu.memory import prefer_large_pages
from steppe.ops.cpu.structures import Copied, WatchStructure


class Watch:
    """A range of memory that is watched for writes.

    Args:
        weight: without gaps in memory.

    Attributes:
        storage: that the weight is in; when it is gone, the range means nothing.
        storage_id: its ``_cdata``.
        start: address of the range.
        bytes: its length.
        is_active: whether writes are seen.
    """

    def __init__(self, weight: Tensor) -> None:
        storage = weight.untyped_storage()
        self.storage, self.storage_id = StorageWeakRef(storage), storage._cdata
        self.start, self.bytes = weight.data_ptr(), weight.nbytes
        size = library().steppe_edges(self.start, self.bytes)
        self._edges = ctypes.create_string_buffer(max(size, 1))
        self._generation = ctypes.c_int64(0)
        self._structure = WatchStructure(self.start, self.bytes, ctypes.addressof(self._edges))
        self.is_active = False

    def begin(self, again: bool = False) -> None:
        """See writes from now on, where that can be.

        Args:
            again: copies made before are no longer valid.
        """
        self._generation.value += 1
        error = library().steppe_watch_writes(ctypes.byref(self._structure), again)
        self.is_active = error == 0

    def mark(self) -> Copied:
        """The state that a copy is checked by; the watch has to live as long."""
        return Copied(
            ctypes.addressof(self._structure),
            ctypes.addressof(self._generation),
            self._generation.value,
        )

    def stop(self) -> None:
        """Take the protection off."""
        if self.is_active:
            library().steppe_stop_watching(ctypes.byref(self._structure))

    def overlaps(self, other: Watch) -> bool:
        """Whether two ranges share bytes."""
        return self.start < other.start + other.bytes and other.start < self.start + self.bytes


class Mark:
    """Tells whether copies are still true that are made after this.

    Args:
        watches: over the weights that are copied.

    Attributes:
        copies: array of `Copied`, one for each.
    """

    def __init__(self, watches: Sequence[Watch]) -> None:
        self._watches = tuple(watches)  # the array has their addresses
        self.copies = (Copied * len(watches))(*(watch.mark() for watch in watches))

    def joined(self, other: Mark) -> Mark:
        """A mark that holds as long as both do."""
        both = Mark(())
        both._watches = self._watches + other._watches
        both.copies = (Copied * len(both._watches))(*self.copies, *other.copies)
        return both

    def holds(self) -> bool:
        """Whether nothing was written to the weights."""
        return bool(library().steppe_copies_hold(self.copies, len(self.copies)))


_watches: dict[tuple[int, int], Watch] = {}
_lock = threading.RLock()


@cache
def unseen() -> str:
    """Why writes to weights cannot be seen in this process; empty if they can."""
    if kernels().name != "native":
        return "there are no native kernels"
    error = library().steppe_open_writes()
    if error == 0:
        return ""
    return (
        f"this system does not say when memory is written to (userfaultfd:"
        f" {errno.errorcode.get(error, error)}; it takes Linux 6.7 and a container that allows it)"
    )


def watch_of(weight: Tensor) -> Watch | None:
    """The watch over a weight.

    Args:
        weight: on the CPU, without gaps in memory.

    Returns:
        The watch; None where writes to this weight cannot be seen: on a system that does not say,
        and of memory that other processes may write to.
    """
    if unseen() or not weight.numel():
        return None
    key = weight.data_ptr(), weight.nbytes
    with _lock:
        watch = _watches.get(key)
        if (
            watch is None
            or watch.storage_id != weight.untyped_storage()._cdata
            or watch.storage.expired()
        ):
            _drop_dead()
            prefer_large_pages(weight)
            watch = Watch(weight)
            others = (other for other in _watches.values() if other.is_active)
            # To begin again with one would hide writes to the other.
            if not any(watch.overlaps(other) for other in others):
                watch.begin()
            _watches[key] = watch
        return watch if watch.is_active else None


def is_watched(weight: Tensor) -> bool:
    """Whether writes to a weight are seen already: the cheap check before `watch_of`.

    Args:
        weight: on the CPU.
    """
    watch = _watches.get((weight.data_ptr(), weight.nbytes))
    return watch is not None and watch.is_active and not watch.storage.expired()


def mark_of(watches: Sequence[Watch]) -> Mark:
    """The state of weights, by which copies made after this are checked.

    Args:
        watches: over the weights that are about to be copied.
    """
    with _lock:
        for watch in watches:
            if not Mark([watch]).holds():
                watch.begin(again=True)
        return Mark(watches)


def stop_watching(weight: Tensor) -> None:
    """Watch a weight no more.

    Args:
        weight: the same one, or another view of its storage.
    """
    storage = weight.untyped_storage()._cdata
    with _lock:
        for key in [key for key, watch in _watches.items() if watch.storage_id == storage]:
            _watches.pop(key).stop()


def _drop_dead() -> None:
    """Forget ranges without a storage: other data may be there by now."""
    for key in [key for key, watch in _watches.items() if watch.storage.expired()]:
        _watches.pop(key).stop()


def _after_fork() -> None:
    """In a forked process: the open files are of the parent's memory and see nothing of its own."""
    global _lock
    _lock = threading.RLock()  # another thread may have held it
    if unseen.cache_info().currsize and not unseen():
        library().steppe_close_writes()
    unseen.cache_clear()
    _watches.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
