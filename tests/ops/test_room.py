"""The room for packed values: from the last number that is known, and not while it is needed."""

from __future__ import annotations

import gc
import math

import pytest
import torch
from torch import Tensor

from steppe.ops.room import FIRST, LEAST, MARGIN, WHOLE, Room, parts_for, room_of


def starts(active: int, rows: int = 4) -> Tensor:
    """Of a pack with so many active entries."""
    return torch.tensor([0] * rows + [active])


def test_a_room_is_the_margin_rounded_down_by_a_sixteenth_at_most() -> None:
    for share in torch.linspace(0.001, 1.0, 5000).tolist():
        parts = parts_for(share)
        if MARGIN * share * WHOLE < LEAST:
            assert parts == LEAST
        elif MARGIN * share >= 1.0:
            assert parts == WHOLE
        else:
            wanted = int(MARGIN * share * WHOLE)
            assert 16 / 17 * wanted < parts <= wanted
    assert parts_for(0.0) == LEAST
    octave = {parts_for(share) for share in torch.linspace(0.1, 0.2, 999).tolist()}
    assert len(octave) <= 17


def test_the_first_room_is_for_half_of_the_entries_and_a_quarter_more() -> None:
    room = Room()
    assert room.capacity(1000) == 625
    assert math.isnan(room.share)
    room.refresh()
    assert room.capacity(1000) == 625


def test_the_next_room_is_that_of_the_last_number() -> None:
    room = Room()
    room.note(starts(100), 1000)
    assert room.share == pytest.approx(0.1)
    assert room.size.shape == (FIRST, 0)
    room.refresh()
    assert 0.94 * 120 < room.capacity(1000) <= 120
    assert 0.94 * 240 < room.capacity(2000) <= 240
    room.note(starts(0), 0)  # no tokens: nothing is known of them
    room.note(starts(900), 1000)
    room.refresh()
    assert room.capacity(1000) == 1000


def test_a_room_stays_while_a_backward_pass_is_to_come() -> None:
    room = Room()
    one, other = room.claim(), room.claim()
    room.note(starts(100), 1000)
    room.refresh()
    assert room.capacity(1000) == 625
    room.end(one)
    room.refresh()
    assert room.capacity(1000) == 625
    del other  # a call whose backward pass nobody wants any more
    gc.collect()
    room.refresh()
    assert room.capacity(1000) <= 120


def test_a_room_is_found_by_its_number_and_goes_with_its_model() -> None:
    room = Room()
    number = room.number
    assert room_of(number) is room
    assert Room().number != number
    del room
    gc.collect()
    assert room_of(number) is None
