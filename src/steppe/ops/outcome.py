"""How a block ran: the record that the ops and the routing make for `steppe.explain`."""

from __future__ import annotations

import threading
from typing import NamedTuple

DENSE, SPARSE, SCREENED, PACKED = "dense", "sparse", "screened", "packed"
OWN_MODULES = "own modules"


class Outcome(NamedTuple):
    """How a call of a block ran.

    Attributes:
        how: ``sparse``, ``screened`` (sparse, its first product screened), ``dense`` (by the op,
            too many entries were active), ``packed`` (dense products, activations packed for the
            backward pass), or ``own modules`` (dense, as without steppe).
        rows: tokens of the call.
        density: share of the entries of r that are active; NaN where they were not counted. Of a
            packed call on a GPU that of an earlier call, as nothing waits for it.
        candidates: share of the entries that screening left as candidates; NaN without it.
        trains: whether a backward pass could follow.
        is_few: whether it was decoding: few tokens, in one native call.
        reason: why it was not sparse; empty if it was.
        is_too_dense: whether that was because too many entries are active.
    """

    how: str
    rows: int
    density: float = float("nan")
    candidates: float = float("nan")
    trains: bool = False
    is_few: bool = False
    reason: str = ""
    is_too_dense: bool = False


class _Last(threading.local):
    """The last outcome of each thread."""

    outcome: Outcome | None = None


_last = _Last()


def note(outcome: Outcome) -> None:
    """Record how the op of this thread ran."""
    _last.outcome = outcome


def noted() -> Outcome | None:
    """How the last op of this thread ran."""
    return _last.outcome
