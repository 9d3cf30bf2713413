"""Batches of texts that stand in rows: pairs for encoder-decoders, and classified texts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from steppe.data.columns import Classes, pair_columns, text_column
from steppe.data.rows import Rows
from steppe.data.text_limits import tokens_per_window, vocabulary_of
from steppe.errors import DataError
from steppe.tokens import IGNORED_LABEL


class TextBatches:
    """Base of all batches of text: the tokenizer, the length, padding and checks.

    Args:
        rows: the data.
        model: a language model.
        tokenizer: the model's.
    """

    def __init__(self, rows: Rows, model: PreTrainedModel, tokenizer: Any) -> None:
        self._rows = rows
        self._tokenizer = tokenizer
        self._vocabulary = vocabulary_of(model)
        self._length = tokens_per_window(model, rows.source.max_length, tokenizer)
        self._model = type(model).__name__
        pad = tokenizer.pad_token_id
        self._pad = tokenizer.eos_token_id or 0 if pad is None else pad  # masked, so any will do

    def restart(self) -> None:
        """Go back to the first sample; by default nothing is random."""

    def _encode(self, text: str, as_target: bool = False, **options: Any) -> list[int]:
        """Ids of a text, checked against the model's vocabulary."""
        given = {"text_target" if as_target else "text": text}
        ids: list[int] = self._tokenizer(**given, verbose=False, **options)["input_ids"]
        if ids and max(ids) >= self._vocabulary:
            raise DataError(
                f"{self._rows.name}: the tokenizer gives the id {max(ids)}, the vocabulary of"
                f" {self._model} has {self._vocabulary}. It is another model's; name the right"
                " one",
                {"processor": "FOLDER_OR_HUB_ID"},
            )
        return ids

    def _padded(self, samples: Sequence[Sequence[int]]) -> dict[str, Tensor]:
        """``input_ids`` and ``attention_mask``, int64 ``[B, T]``, padded on the right."""
        return {
            "input_ids": pad(samples, self._pad),
            "attention_mask": pad([[1] * len(sample) for sample in samples], 0),
        }


class PairBatches(TextBatches):
    """Inputs and targets for an encoder-decoder model, each cut to the length.

    Args:
        rows: the data.
        model: the model.
        tokenizer: the model's.
    """

    def __init__(self, rows: Rows, model: PreTrainedModel, tokenizer: Any) -> None:
        super().__init__(rows, model, tokenizer)
        self._columns = pair_columns(rows)

    def samples(self) -> Iterator[tuple[list[int], list[int]]]:
        """Ids of input and target."""
        source, target = self._columns
        options: dict[str, Any] = {"truncation": True, "max_length": self._length}
        for row in self._rows:
            if not row[source] or not row[target]:
                continue
            ids = self._encode(row[source], **options)
            answer = self._encode(row[target], as_target=True, **options)
            if ids and answer:
                yield ids, answer

    def collate(self, samples: Sequence[tuple[list[int], list[int]]]) -> dict[str, Tensor]:
        """One batch."""
        labels = pad([target for _, target in samples], IGNORED_LABEL)
        return {**self._padded([source for source, _ in samples]), "labels": labels}


class ClassifiedBatches(TextBatches):
    """Texts with their classes, each cut to the length.

    Args:
        rows: the data.
        model: a model that classifies sequences.
        tokenizer: the model's.
        classes: the model's classes of the data; None for no labels.
    """

    def __init__(
        self, rows: Rows, model: PreTrainedModel, tokenizer: Any, classes: Classes | None
    ) -> None:
        super().__init__(rows.shuffled(), model, tokenizer)
        self._column = text_column(rows)
        self._classes = classes

    def samples(self) -> Iterator[tuple[list[int], int]]:
        """Ids and class."""
        for row in self._rows:
            ids = self._encode(row[self._column] or "", truncation=True, max_length=self._length)
            if not ids:
                continue
            yield ids, 0 if self._classes is None else self._classes(row)

    def collate(self, samples: Sequence[tuple[list[int], int]]) -> dict[str, Tensor]:
        """One batch."""
        batch = self._padded([ids for ids, _ in samples])
        if self._classes is not None:
            batch["labels"] = torch.tensor([label for _, label in samples])
        return batch


def pad(samples: Sequence[Sequence[int]], value: int) -> Tensor:
    """Rows of different lengths as one tensor.

    Args:
        samples: the rows.
        value: stands where a row has ended.

    Returns:
        int64 ``[B, T]``.
    """
    rows = [torch.tensor(sample, dtype=torch.int64) for sample in samples]
    return pad_sequence(rows, batch_first=True, padding_value=value)
