"""Batches of text: windows for language models, pairs for encoder-decoders, classified texts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoTokenizer, DataCollatorForLanguageModeling, PreTrainedModel

from steppe.blocks.huggingface import max_tokens_of
from steppe.data.columns import Classes, pair_columns, text_column
from steppe.data.embedded import BYTES
from steppe.data.sources import Rows, first_line
from steppe.data.span_corruption import SENTINELS, corruption_of
from steppe.errors import DataError
from steppe.plugins.sparsify import sparsification_of
from steppe.plugins.zeroth_bias import ZerothBias
from steppe.tokens import IGNORED_LABEL

DEFAULT_LENGTH = 512  # tokens
MASKED_SHARE = 0.15  # of the tokens, as BERT was trained
_MASKING_SEED = 0
_CHUNK = 100_000  # characters of plain text that are tokenised at once
_NO_LIMIT = 10**9  # above it a tokenizer's model_max_length says that there is none


def load_tokenizer(place: str) -> Any:
    """The tokenizer of a checkpoint; code that comes with it is never run.

    Args:
        place: a folder or a hub id.

    Raises:
        DataError: there is none, or it cannot be read.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(place, trust_remote_code=False)
        tokenizer("a", verbose=False)  # settings of the wrong kind fail here
    except Exception as error:  # of `tokenizers`, which raises no class of its own
        raise DataError(
            f"{place}: its tokenizer cannot be loaded ({first_line(error)}). Save it beside the"
            " weights, or name one",
            {"processor": "FOLDER_OR_HUB_ID"},
        ) from None
    # Transformers makes an empty tokenizer of a folder that has none.
    if len(tokenizer) <= len(set(tokenizer.all_special_ids)):
        raise DataError(
            f"{place}: has no tokenizer. Save it beside the weights with"
            " tokenizer.save_pretrained, or name one",
            {"processor": "FOLDER_OR_HUB_ID"},
        )
    return tokenizer


def tokens_per_window(model: PreTrainedModel, asked: int | None, tokenizer: Any = None) -> int:
    """Tokens per sample: as asked, else the model's limit or 512, whichever is less.

    Args:
        model: a language model.
        asked: by the user.
        tokenizer: it may know a limit that the config does not.

    Raises:
        DataError: more is asked than the model can see.
    """
    limits = [max_tokens_of(model), getattr(tokenizer, "model_max_length", None)]
    sparsification = sparsification_of(model)
    for applied in [] if sparsification is None else sparsification.applied:
        plugin = applied.plugin
        limits.append(plugin.max_tokens if isinstance(plugin, ZerothBias) else None)
    numbers = [limit for limit in limits if isinstance(limit, int | float)]
    known = [int(limit) for limit in numbers if 0 < limit < _NO_LIMIT]
    if asked is not None and known and asked > min(known):
        raise DataError(
            f"{type(model).__name__} and its tokenizer take at most {min(known)} tokens, got a"
            f" length of {asked}",
            {"max_length": min(known)},
        )
    return asked or min([*known, DEFAULT_LENGTH])


class TextBatches:
    """What the kinds of text batches share: the tokenizer, the length, padding and checks."""

    def __init__(self, rows: Rows, model: PreTrainedModel, tokenizer: Any) -> None:
        self._rows = rows
        self._tokenizer = tokenizer
        self._vocabulary = vocabulary_of(model)
        self._length = tokens_per_window(model, rows.source.max_length, tokenizer)
        self._model = type(model).__name__
        pad = tokenizer.pad_token_id
        self._pad = tokenizer.eos_token_id or 0 if pad is None else pad  # masked, so any will do

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


class Windows(TextBatches):
    """Windows of running text: the texts of the rows, one after the other, cut to one length.

    The special tokens that the tokenizer puts around a text stand around each window, and its end
    token stands between rows (between lines of text files, the line break). The last window may be
    shorter; it is left out if it has a single token.

    Args:
        rows: the data.
        model: a language model, or one without a head, whose batches get no labels.
        tokenizer: the model's.
        labelled: whether batches get ``labels``, equal to ``input_ids``, -100 for padding.
    """

    def __init__(self, rows: Rows, model: PreTrainedModel, tokenizer: Any, labelled: bool) -> None:
        super().__init__(rows, model, tokenizer)
        self._labelled = labelled
        self._column = text_column(rows)
        self._before, self._after = _around(tokenizer)
        self._room = self._length - len(self._before) - len(self._after)
        if self._room < 1:
            raise DataError(
                f"{rows.name}: {self._length} tokens leave no room for text beside the special"
                " ones",
                {"max_length": DEFAULT_LENGTH},
            )
        end = tokenizer.eos_token_id
        plain = rows.is_plain_text or end is None or end in self._after
        self._between = [] if plain else [int(end)]

    def samples(self) -> Iterator[list[int]]:
        """The windows, as token ids."""
        pending: list[int] = []
        for text in self._texts():
            pending += [*self._encode(text, add_special_tokens=False), *self._between]
            whole = len(pending) // self._room * self._room
            for start in range(0, whole, self._room):
                yield [*self._before, *pending[start : start + self._room], *self._after]
            pending = pending[whole:]
        if len(pending) > 1:  # of a single token nothing is predicted
            yield [*self._before, *pending, *self._after]

    def collate(self, samples: Sequence[list[int]]) -> dict[str, Tensor]:
        """One batch."""
        batch = self._padded(samples)
        if self._labelled:
            ignored = batch["attention_mask"] == 0
            batch["labels"] = batch["input_ids"].masked_fill(ignored, IGNORED_LABEL)
        return batch

    def restart(self) -> None:
        """Begin anew."""

    def _texts(self) -> Iterator[str]:
        """Texts that are tokenised as a whole: rows, or many lines of a text file."""
        lines: list[str] = []
        size = 0
        for row in self._rows:
            text = row[self._column]
            if not text:
                continue
            if not self._rows.is_plain_text:
                yield text
                continue
            lines.append(text)
            size += len(text)
            if size >= _CHUNK:
                yield "".join(lines)
                lines, size = [], 0
        if lines:
            yield "".join(lines)


class MaskedWindows(Windows):
    """Windows of which 15 % of the tokens are to be guessed, the same ones every time.

    Args:
        rows: the data.
        model: a masked language model.
        tokenizer: the model's, with a mask token.
    """

    def __init__(self, rows: Rows, model: PreTrainedModel, tokenizer: Any) -> None:
        super().__init__(rows, model, tokenizer, labelled=True)
        if tokenizer.mask_token is None:
            raise DataError(
                f"{rows.name}: {type(model).__name__} guesses masked tokens, and the tokenizer has"
                " no mask token. Name the right one",
                {"processor": "FOLDER_OR_HUB_ID"},
            )
        self._special = torch.tensor(tokenizer.all_special_ids)
        self.restart()

    def restart(self) -> None:
        """Begin the random numbers anew."""
        self._collator = DataCollatorForLanguageModeling(
            self._tokenizer, mlm_probability=MASKED_SHARE, seed=_MASKING_SEED
        )

    def collate(self, samples: Sequence[list[int]]) -> dict[str, Tensor]:
        """One batch."""
        batch = self._padded(samples)
        special = torch.isin(batch["input_ids"], self._special) | (batch["attention_mask"] == 0)
        rows = [
            {"input_ids": ids, "attention_mask": mask, "special_tokens_mask": kept}
            for ids, mask, kept in zip(*batch.values(), special.long(), strict=True)
        ]
        return dict(self._collator(rows))


class CorruptedWindows(Windows):
    """Windows with spans taken out, as T5 was trained; the same spans every time.

    A window's corrupted input has the length that was asked for.

    Args:
        rows: the data.
        model: an encoder-decoder model.
        tokenizer: the model's, with sentinels.
    """

    def __init__(self, rows: Rows, model: PreTrainedModel, tokenizer: Any) -> None:
        super().__init__(rows, model, tokenizer, labelled=True)
        self._corruption = corruption_of(tokenizer)
        self._before, self._after = [], []
        self._room = self._corruption.raw_length(self._length)
        self.restart()

    def restart(self) -> None:
        """Begin the random numbers anew."""
        self._generator = torch.Generator().manual_seed(_MASKING_SEED)

    def collate(self, samples: Sequence[list[int]]) -> dict[str, Tensor]:
        """One batch."""
        made = [self._corruption(torch.tensor(ids), self._generator) for ids in samples]
        labels = pad([answer.tolist() for _, answer in made], IGNORED_LABEL)
        return {**self._padded([ids.tolist() for ids, _ in made]), "labels": labels}


class Pairs(TextBatches):
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

    def restart(self) -> None:
        """Begin anew."""


class ClassifiedTexts(TextBatches):
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
            yield ids, 0 if self._classes is None else self._classes(row[self._classes.column])

    def collate(self, samples: Sequence[tuple[list[int], int]]) -> dict[str, Tensor]:
        """One batch."""
        batch = self._padded([ids for ids, _ in samples])
        if self._classes is not None:
            batch["labels"] = torch.tensor([label for _, label in samples])
        return batch

    def restart(self) -> None:
        """Begin anew."""


def corrupts_spans(rows: Rows, tokenizer: Any) -> bool:
    """Whether an encoder-decoder's data is running text, whose spans it has learned to answer.

    Args:
        rows: the data.
        tokenizer: the model's.
    """
    return (
        len(rows.first) == 1
        and rows.source.target_column is None
        and SENTINELS[0] in tokenizer.get_vocab()
    )


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


def vocabulary_of(model: PreTrainedModel) -> int:
    """Number of tokens that a model knows."""
    embedding: Any = model.get_input_embeddings()
    return int(embedding.num_embeddings)


def check_bytes(model: PreTrainedModel, where: str) -> None:
    """Refuse to give bytes to a model whose tokens are something else.

    Args:
        model: the model.
        where: the data's name.

    Raises:
        DataError: its vocabulary is not that of bytes.
    """
    vocabulary = vocabulary_of(model)
    if vocabulary != BYTES:
        raise DataError(
            f"{where}: its tokens are bytes, for a model with a vocabulary of {BYTES}; that of"
            f" {type(model).__name__} has {vocabulary}. For your tokenizer name a file or folder of"
            " text",
            {"data": "FOLDER"},
        )


def _around(tokenizer: Any) -> tuple[list[int], list[int]]:
    """The special tokens that a tokenizer puts before and after a text."""
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    whole = tokenizer("a")["input_ids"]
    for start in range(len(whole) - len(bare) + 1 if bare else 0):
        if whole[start : start + len(bare)] == bare:
            return whole[:start], whole[start + len(bare) :]
    return [], []
