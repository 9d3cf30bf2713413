"""Span corruption, the training task of T5 (Raffel et al. 2020, section 3.1.4)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from steppe.errors import DataError

SENTINELS = [f"<extra_id_{index}>" for index in range(100)]
"""T5's tokens in place of spans."""


@dataclass(frozen=True)
class SpanCorruption:
    """Replaces random spans of a text by sentinels; the model answers the spans.

    Attributes:
        sentinels: their ids, in the order in which they are used.
        end: id that ends input and answer.
        density: share of the tokens that is taken out.
        mean_span: mean length of a span that is taken out, in tokens.
    """

    sentinels: Sequence[int]
    end: int
    density: float = 0.15
    mean_span: float = 3.0

    def raw_length(self, length: int) -> int:
        """How many tokens of text make an input of a length, so that nothing is padded.

        Args:
            length: of the corrupted input, its end included.

        Raises:
            DataError: so short an input has no span, or a longer one than sentinels.
        """
        raw = max(2, length - 2)
        while self._input_length(raw + 1) <= length:
            raw += 1
        taken, spans = self._counts(raw)
        if raw - taken < spans or self._input_length(raw) != length:
            raise DataError(
                f"span corruption: an input of {length} tokens is too short", {"length": 64}
            )
        if spans > len(self.sentinels):
            raise DataError(
                f"span corruption: an input of {length} tokens has {spans} spans, the tokenizer"
                f" {len(self.sentinels)} sentinels <extra_id_…>. Shorter inputs",
                {"length": 512},
            )
        return raw

    def __call__(self, ids: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Input and answer of one text; their lengths depend on the text's alone.

        Args:
            ids: int64 ``[L]``, without sentinels.
            generator: of the random cuts.

        Returns:
            int64 each: the text with a sentinel for each span, and each sentinel with its span;
            both with the end.
        """
        taken, spans = self._counts(len(ids))
        kept = _random_parts(len(ids) - taken, spans, generator)
        lengths = torch.stack([kept, _random_parts(taken, spans, generator)], 1).flatten()
        # Spans of text and spans taken out take turns, beginning with text.
        part = torch.arange(2 * spans).repeat_interleave(lengths)
        is_taken = part % 2 == 1
        starts = torch.cat([torch.ones(1, dtype=torch.bool), part[1:] != part[:-1]])
        sentinel = torch.tensor(self.sentinels[:spans])[part // 2]
        end = torch.tensor([self.end])
        marked = torch.where(is_taken & starts, sentinel, ids)[~is_taken | starts]
        # Of the answer, each part of text becomes the sentinel of the span behind it.
        answered = torch.where(~is_taken & starts, sentinel, ids)[is_taken | starts]
        return torch.cat([marked, end]), torch.cat([answered, end])

    def _counts(self, length: int) -> tuple[int, int]:
        """Tokens that are taken out of a text, and the number of spans."""
        taken = min(max(round(length * self.density), 1), length - 1)
        return taken, max(round(taken / self.mean_span), 1)

    def _input_length(self, raw: int) -> int:
        taken, spans = self._counts(raw)
        return raw - taken + spans + 1


def corruption_of(tokenizer: Any) -> SpanCorruption:
    """Span corruption with a tokenizer's sentinels.

    Args:
        tokenizer: of Transformers.

    Raises:
        DataError: it has none, or no end token.
    """
    known = tokenizer.get_vocab()
    sentinels = [known[name] for name in SENTINELS if name in known]
    if not sentinels or tokenizer.eos_token_id is None:
        raise DataError(
            f"span corruption: expected a tokenizer with {SENTINELS[0]}, … and an end token, as"
            " T5's have",
            {"tokenizer": "google-t5/t5-base"},
        )
    return SpanCorruption(sentinels, tokenizer.eos_token_id)


def _random_parts(total: int, parts: int, generator: torch.Generator) -> Tensor:
    """Lengths ≥ 1 that sum to a total, each way to cut it equally likely; int64 ``[parts]``."""
    cuts = torch.randperm(total - 1, generator=generator)[: parts - 1].sort().values + 1
    edges = torch.cat([torch.tensor([0]), cuts, torch.tensor([total])])
    return edges.diff()
