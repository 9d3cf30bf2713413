"""Room: how many values a block's packs have room for, without a wait for the device.

The number of active entries is on the device when a call has to make room for them. So the room is
that of an earlier call, and a fifth more: in each call a number is copied to the CPU's memory while
both go on, and whatever number has arrived is taken. Rows that do not fit are computed again in the
backward pass (`steppe.ops.bitmask.recompute_lost_`): another room is other time and memory, and the
same results.

When it changes. Checkpointing repeats a forward pass and insists that it saves tensors of the same
shapes. So the room changes at the end of a backward pass, and only while no other call of the block
has one still to come.

Compiled code. The room is the length of an empty tensor, since torch.compile guards on numbers that
it finds in modules, and would compile again for each new one. A length it takes for a variable once
it has changed. A CUDA graph keeps the room that it was captured with.
"""

from __future__ import annotations

import itertools
import weakref

import torch
from torch import Tensor

from steppe.ops.arrival import Arrival

WHOLE = 2**14  # parts of a room; as many as there are entries
FIRST = 5 * WHOLE // 8  # while nothing is known: half of them are active, and a quarter more
MARGIN = 1.2  # times the last number. 1/16 + 1.2 ρ is less than ⅛ of 16-bit entries at ρ = 0.05
LEAST = 16  # a thousandth
_STEPS = 16  # in which a room doubles, so that memory that was freed fits again


def parts_for(share: float) -> int:
    """The parts of a room for a share of active entries.

    Args:
        share: in [0, 1].

    Returns:
        At most `WHOLE`, and at most `MARGIN` times the share, unless that is less than `LEAST`.

    Example:
        >>> parts_for(0.05) / WHOLE, parts_for(0.051) / WHOLE, parts_for(0.9) / WHOLE
        (0.05859375, 0.060546875, 1.0)
    """
    wanted = max(int(MARGIN * share * WHOLE), LEAST)
    step = 1 << (wanted // _STEPS).bit_length() - 1
    return min(wanted // step * step, WHOLE)


class Claim:
    """A call whose backward pass is still to come; it ends with that, or when it is forgotten."""


class Room:
    """The room for the values of one block.

    Attributes:
        number: its name in the ops; see `room_of`.
        size: ``[parts, 0]``, see above.
    """

    def __init__(self) -> None:
        self.number = next(_numbers)
        self.size = torch.empty(FIRST, 0)
        self._claims: weakref.WeakSet[Claim] = weakref.WeakSet()
        self._share = Arrival()
        _rooms[self.number] = self

    def capacity(self, entries: int) -> int:
        """How many values the next call makes room for.

        Args:
            entries: T · F of the call.
        """
        return entries * self.size.shape[0] // WHOLE

    @property
    def share(self) -> float:
        """Share of active entries in the last call that is known of; NaN for none."""
        return self._share.read()

    def claim(self) -> Claim:
        """Hold the room as it is while the result lives, or until `end`."""
        claim = Claim()
        self._claims.add(claim)
        return claim

    def end(self, claim: Claim) -> None:
        """Give a claim up."""
        self._claims.discard(claim)

    def note(self, starts: Tensor, entries: int) -> None:
        """Have the number of active entries of a call come to the CPU, some time.

        Args:
            starts: of its `Packed`.
            entries: T · F.
        """
        if entries:
            self._share.send(starts[-1] / entries)

    def refresh(self) -> None:
        """Take the last number that has arrived, unless a backward pass is still to come."""
        share = self.share
        if self._claims or not 0.0 <= share <= 1.0:
            return
        parts = parts_for(share)
        if parts != self.size.shape[0]:
            self.size = torch.empty(parts, 0)


# An op cannot take an object of ours, but it takes a number. The table is weak: rooms go with their
# models.
_rooms: weakref.WeakValueDictionary[int, Room] = weakref.WeakValueDictionary()
_numbers = itertools.count()
NO_ROOM = -1


def room_of(number: int) -> Room | None:
    """The room of a number; None for `NO_ROOM`, and for one that is no more."""
    return _rooms.get(number)
