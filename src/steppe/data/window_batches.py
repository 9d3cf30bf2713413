"""Batches of windows of running text, for language models."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import DataCollatorForLanguageModeling, PreTrainedModel

from steppe.data.columns import text_column
from steppe.data.rows import Rows
from steppe.data.span_corruption import SENTINELS, corruption_of
from steppe.data.text_batches import TextBatches, pad
from steppe.data.text_limits import DEFAULT_LENGTH
from steppe.data.windows import WindowLayout, layout_of, texts_of
from steppe.errors import DataError
from steppe.tokens import IGNORED_LABEL

MASKED_SHARE = 0.15  # of the tokens, as BERT was trained
_MASKING_SEED = 0


class WindowBatches(TextBatches):
    """Windows of running text: the texts of the rows, one after the other, cut to one length.

    The special tokens that the tokenizer puts around a text stand around each window, and its end
    token stands between rows (between lines of text files, the line break). The last window may be
    shorter; it is left out if it has a single token.

    Args:
        rows: the data.
        model: a language model, or one without a head; batches of the latter get no labels.
        tokenizer: the model's.
        labelled: whether batches get ``labels``, equal to ``input_ids``, -100 for padding.
    """

    def __init__(self, rows: Rows, model: PreTrainedModel, tokenizer: Any, labelled: bool) -> None:
        super().__init__(rows, model, tokenizer)
        self._labelled = labelled
        self._column = text_column(rows)
        layout = layout_of(tokenizer, self._length, rows.is_plain_text, with_special=True)
        if layout.room < 1:
            raise DataError(
                f"{rows.name}: {self._length} tokens leave no room for text beside the special"
                " ones",
                {"max_length": DEFAULT_LENGTH},
            )
        self._layout: WindowLayout = layout

    def samples(self) -> Iterator[list[int]]:
        """The windows, as token ids."""
        texts = texts_of(self._rows, self._column)
        ids = (self._encode(text, add_special_tokens=False) for text in texts)
        return self._layout.cut(ids, keep_rest=True)

    def collate(self, samples: Sequence[list[int]]) -> dict[str, Tensor]:
        """One batch."""
        batch = self._padded(samples)
        if self._labelled:
            ignored = batch["attention_mask"] == 0
            batch["labels"] = batch["input_ids"].masked_fill(ignored, IGNORED_LABEL)
        return batch


class MaskedBatches(WindowBatches):
    """Windows with 15 % of the tokens masked, the same ones every time.

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
        """Start the random numbers from their seed again."""
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


class CorruptedBatches(WindowBatches):
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
        room = self._corruption.raw_length(self._length)
        self._layout = replace(self._layout, room=room, before=(), after=())
        self.restart()

    def restart(self) -> None:
        """Start the random numbers from their seed again."""
        self._generator = torch.Generator().manual_seed(_MASKING_SEED)

    def collate(self, samples: Sequence[list[int]]) -> dict[str, Tensor]:
        """One batch."""
        made = [self._corruption(torch.tensor(ids), self._generator) for ids in samples]
        labels = pad([answer.tolist() for _, answer in made], IGNORED_LABEL)
        return {**self._padded([ids.tolist() for ids, _ in made]), "labels": labels}


def corrupts_spans(rows: Rows, tokenizer: Any) -> bool:
    """Whether an encoder-decoder's data is running text: it has learned to answer its spans.

    Args:
        rows: the data.
        tokenizer: the model's.
    """
    return (
        len(rows.first) == 1
        and rows.source.target_column is None
        and SENTINELS[0] in tokenizer.get_vocab()
    )
