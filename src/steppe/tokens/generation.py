"""The call of ``generate`` that a thread is in."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from steppe.per_thread import PerThread


@dataclass
class Generation:
    """A call of ``generate``.

    Attributes:
        ended: bool ``[B]``, the rows that it goes on feeding though they have ended.
    """

    ended: Tensor | None = None


# The innermost one that each thread is in, of a model that is watched.
current_generation: PerThread[Generation | None] = PerThread(None)
