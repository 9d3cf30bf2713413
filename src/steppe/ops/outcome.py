"""How a block ran: what the ops and the routing tell `steppe.explain`."""

from __future__ import annotations

import threading
from typing import NamedTuple

DENSE, SPARSE, SCREENED, OWN_MODULES = "dense", "sparse", "screened", "own modules"


class Outcome(NamedTuple):
    """How a call of a block ran.

    Attributes:
        how: ``sparse``, ``screened`` (sparse, its first product screened), ``dense`` (by the op,
            too many entries were active), or ``own modules`` (dense, as without steppe).
        rows: tokens of the call.
        density: share of the entries of r that are active; NaN where they were not counted.
        candidates: share of the entries that screening could not tell to be zero; NaN without it.
        trains: whether a backward pass could follow.
        is_few: whether it was computed in one call for few rows.
        reason: why it was not sparse; empty if it was.
        is_too_dense: whether that was because of how many entries are active.
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
    """Of each thread."""

    outcome: Outcome | None = None


_last = _Last()


def note(outcome: Outcome) -> None:
    """Take down how the op ran that this thread is in."""
    _last.outcome = outcome


def noted() -> Outcome | None:
    """How the last op of this thread ran."""
    return _last.outcome
