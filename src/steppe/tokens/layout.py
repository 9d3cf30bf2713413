"""How the tokens of a block are put together by samples."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Layout(NamedTuple):
    """How a block's tokens are to be put together by samples.

    Attributes:
        samples: S.
        tokens_first: of three dimensions the first is that of the tokens.
        longest: of an expert, how many tokens it has of the sample that it has most of; else 0.
        slots: of an expert, int64 ``[n]``, where each of its tokens goes in ``[S · longest]``.
        mask: bool ``[S, T]``, False for a token that does not count; None if all do. Of an expert T
            is `longest`.
    """

    samples: int
    tokens_first: bool
    longest: int = 0
    slots: Tensor | None = None
    mask: Tensor | None = None
