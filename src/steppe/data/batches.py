"""Held-out data as batches for a model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

from torch import Tensor
from torch.utils.data import default_collate
from transformers import PreTrainedModel
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
)

from steppe.blocks.find import forward_parameters
from steppe.data.columns import Classes
from steppe.data.embedded import EMBEDDED, TensorDataset, load_digits_split, load_pydoc_split
from steppe.data.image_batches import ImageBatches
from steppe.data.image_processor import image_shape_of
from steppe.data.rows import Rows, open_rows
from steppe.data.sources import Source
from steppe.data.text_batches import ClassifiedBatches, PairBatches
from steppe.data.text_limits import check_bytes, tokens_per_window
from steppe.data.tokenizer import load_tokenizer
from steppe.data.window_batches import (
    CorruptedBatches,
    MaskedBatches,
    WindowBatches,
    corrupts_spans,
)
from steppe.errors import DataError
from steppe.tokens import IGNORED_LABEL

Batch = dict[str, Tensor]


class Preparation(Protocol):
    """Makes samples of rows, and batches of samples."""

    def samples(self) -> Iterator[Any]:
        """All samples, in the same order every time."""

    def collate(self, samples: Sequence[Any]) -> Batch:
        """One batch."""

    def restart(self) -> None:
        """Go back to the first sample, so that the next pass gives the same batches."""


class Batches:
    """Batches for one model; iterating again gives the same ones.

    Args:
        preparation: of the samples.
        size: samples per batch; the last may have fewer.
        split: the split's name.
        total: number of batches, None where it is unknown before all is read.
        notes: assumptions about the data, for the user.
    """

    def __init__(
        self,
        preparation: Preparation,
        size: int,
        split: str,
        total: int | None,
        notes: tuple[str, ...] = (),
    ) -> None:
        self._preparation = preparation
        self._size = size
        self.split = split
        self.total = total
        self.notes = notes

    def __iter__(self) -> Iterator[Batch]:
        """The batches, from the first.

        Raises:
            DataError: the data cannot be read, or does not fit the model.
        """
        self._preparation.restart()
        samples: list[Any] = []
        for sample in self._preparation.samples():
            samples.append(sample)
            if len(samples) == self._size:
                yield from self._labelled(samples)
                samples = []
        if samples:
            yield from self._labelled(samples)

    def _labelled(self, samples: list[Any]) -> Iterator[Batch]:
        """The batch, if its loss has a term: of a short last one perhaps no token is masked."""
        batch = self._preparation.collate(samples)
        if "labels" not in batch or bool((batch["labels"] != IGNORED_LABEL).any()):
            yield batch


class _EmbeddedBatches:
    """Batches of an embedded set, which is made of tensors already."""

    def __init__(self, data: TensorDataset, labelled: bool) -> None:
        self._data = data
        self._labelled = labelled

    def samples(self) -> Iterator[Batch]:
        """All samples."""
        for index in range(len(self._data)):
            sample = self._data[index]
            if not self._labelled:
                del sample["labels"]
            yield sample

    def collate(self, samples: Sequence[Batch]) -> Batch:
        """One batch."""
        batch: Batch = default_collate(list(samples))
        return batch

    def restart(self) -> None:
        """Go back to the first sample; nothing is random."""


def load_batches(
    source: Source, model: PreTrainedModel, checkpoint: str, with_classes: bool = True
) -> Batches:
    """Held-out data as batches for a model, by its class, its config and its checkpoint's files.

    Language models get windows of running text, encoder-decoders pairs of input and target (of text
    alone, windows with spans taken out, if the tokenizer has T5's sentinels), masked language
    models windows with 15 % masked by a fixed seed, classifiers classes. Models without a head get
    no ``labels``.

    Args:
        source: the data.
        model: a Hugging Face model.
        checkpoint: folder or hub id with its tokenizer or image processor.
        with_classes: give classifiers ``labels``.

    Returns:
        The batches: ``pixel_values`` in the model's dtype ``[B, C, H, W]``, or ``input_ids`` and
        ``attention_mask`` int64 ``[B, T]``, and ``labels`` int64 ``[B]`` or ``[B, T]``.

    Raises:
        DataError: the data is not there, cannot be read, or does not fit the model.
        MissingExtraError: a package that it needs is not installed.
    """
    takes_images = getattr(model, "main_input_name", "input_ids") == "pixel_values"
    labelled = "labels" in forward_parameters(model)
    if source.data in EMBEDDED:
        return _embedded(source, model, takes_images, labelled)
    rows = open_rows(source)
    place = source.processor or checkpoint
    kind = type(model).__name__
    classifies = kind in {
        *MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES.values(),
        *MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES.values(),
    }
    classes = Classes(rows, model.config) if classifies and with_classes else None
    notes = () if classes is None else classes.notes
    preparation: Preparation
    if takes_images:
        preparation = ImageBatches(rows, model, place, classes)
        return _batches(preparation, rows, rows.number, (*notes, *preparation.notes))
    tokenizer = load_tokenizer(place)
    if classifies:
        preparation = ClassifiedBatches(rows, model, tokenizer, classes)
        return _batches(preparation, rows, rows.number, notes)
    if model.config.is_encoder_decoder:
        _require_head(rows.name, kind, labelled)
        if corrupts_spans(rows, tokenizer):
            note = f"{rows.name}: no targets; spans of the text are taken out, as T5 was trained"
            return _batches(CorruptedBatches(rows, model, tokenizer), rows, notes=(note,))
        return _batches(PairBatches(rows, model, tokenizer), rows, rows.number)
    if kind in MODEL_FOR_MASKED_LM_MAPPING_NAMES.values() and "ForMaskedLM" in kind:
        return _batches(MaskedBatches(rows, model, tokenizer), rows)
    language = kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()
    return _batches(WindowBatches(rows, model, tokenizer, labelled=language), rows)


def _batches(
    preparation: Preparation, rows: Rows, samples: int | None = None, notes: tuple[str, ...] = ()
) -> Batches:
    size = rows.source.batch_size
    total = None if samples is None else -(-samples // size)
    return Batches(preparation, size, rows.split, total, notes)


def _embedded(
    source: Source, model: PreTrainedModel, takes_images: bool, labelled: bool
) -> Batches:
    """Batches of the held-out part of `digits` or `pydoc`."""
    if source.split not in (None, "held_out"):
        raise DataError(
            f"{source.data}: is measured on its held-out part only, got split={source.split};"
            " leave it out"
        )
    if takes_images != (source.data == "digits"):
        raise DataError(
            f"{source.data}: {type(model).__name__} takes {'images' if takes_images else 'text'},"
            f" this is {'text' if takes_images else 'images'}. Name other data",
            {"data": "digits" if takes_images else "pydoc"},
        )
    if takes_images:
        data = load_digits_split().held_out
        image_shape_of(model).check(data[0]["pixel_values"][None], source.data)
        if labelled and (model.config.num_labels or 0) < 10:
            raise DataError(
                f"digits: it has 10 classes, {type(model).__name__} knows"
                f" {model.config.num_labels}. Name the data that the model was trained for."
            )
    else:
        check_bytes(model, source.data)
        length = source.max_length
        data = load_pydoc_split(tokens_per_window(model, length)).held_out
    total = -(-len(data) // source.batch_size)
    return Batches(_EmbeddedBatches(data, labelled), source.batch_size, "held_out", total)


def _require_head(where: str, kind: str, labelled: bool) -> None:
    if not labelled:
        raise DataError(
            f"{where}: {kind} has no head that takes labels, so its decoder has no input. Save and"
            " measure the model with its head, e.g. T5ForConditionalGeneration."
        )
