"""Text to train on, in windows of equal length: files, ``save_to_disk``, or the hub's."""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, TypeAlias

import datasets
import torch
from torch import Tensor
from torch.utils.data import Dataset

from steppe.data.columns import text_column
from steppe.data.draws import Draw, as_draw
from steppe.data.rows import Rows
from steppe.data.sources import Source, open_data
from steppe.data.span_corruption import SpanCorruption, corruption_of
from steppe.data.splits import training_splits
from steppe.data.tokenizer import load_or_train_tokenizer, load_tokenizer
from steppe.data.windows import layout_of, pack
from steppe.errors import DataError

Item: TypeAlias = dict[str, Tensor]
_ROWS = 10_000  # that are packed into windows together; the tokens left over are dropped
_HELD_OUT_SHARE = 0.05  # where the data has no held-out split
_TRAINING_CHARACTERS = 10_000_000  # of text that a tokenizer is trained on


@dataclass(frozen=True)
class TextData:
    """Windows of text in two disjoint parts.

    Attributes:
        train: items by `Draw` or index, or a stream: ``input_ids`` and ``labels``, int64.
        held_out: the same, nothing random about it.
        tokenizer: of Transformers.
        notes: assumptions about the data, for the user.
    """

    train: Any
    held_out: Any
    tokenizer: Any
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class TextSettings:
    """How a text becomes windows.

    Attributes:
        length: tokens of the input.
        corrupted: T5's span corruption; else next tokens are predicted.
        streaming: read as it is asked for.
        tokenizer: folder or hub id; None trains one.
        vocab_size: of the one that is trained.
        cache: where those are kept.
        text_column: by default ``text``, or the only one of strings.
        held_out_split: by default the validation or test split, or the end of the only one.
        held_out_samples: the first so many windows of it; 0 for all.
    """

    length: int
    corrupted: bool = False
    streaming: bool = False
    tokenizer: str | None = None
    vocab_size: int = 8192
    cache: Path = Path("~/.cache/steppe")
    text_column: str | None = None
    held_out_split: str | None = None
    held_out_samples: int = 0


def load_text_data(data: str, settings: TextSettings) -> TextData:
    """Windows of text by name.

    Args:
        data: a file or folder of plain text, JSON lines or parquet, one written by
            ``Dataset.save_to_disk``, or a hub id, ``id:config``.
        settings: how it becomes windows.

    Raises:
        DataError: the data is not there, cannot be read, or is too short.
        OutputError: the tokenizer cannot be kept.
    """
    splits = open_data(data, settings.streaming).splits
    train_name, held_out_name = training_splits(data, splits, settings.held_out_split)
    if held_out_name is None and settings.streaming:
        raise DataError(
            f"{data}: a stream needs a split 'validation' or 'test', it has {', '.join(splits)}."
            " Name files so (validation-0.jsonl), or read it whole",
            {"streaming": False},
        )
    table = splits[train_name]
    # Of any text files: those that `save_to_disk` or the hub has, too.
    is_plain = getattr(table.info, "builder_name", None) == "text"
    source = Source(data, text_column=settings.text_column)
    column = text_column(Rows(table, source, train_name, is_local=True))
    tokenizer = _tokenizer(data, table, column, settings)
    corruption = corruption_of(tokenizer) if settings.corrupted else None
    raw = corruption.raw_length(settings.length) if corruption else settings.length
    layout = layout_of(tokenizer, raw, is_plain, with_special=False)
    cut = partial(pack, tokenizer=tokenizer, column=column, layout=layout)
    train = _packed(table, cut)
    notes: tuple[str, ...] = ()
    if held_out_name is None:
        train, held_out, notes = _hold_out(data, train, raw)
    else:
        held_out = _packed(splits[held_out_name], cut)
    held_out = _first(held_out, settings.held_out_samples)
    _require_windows(data, len(held_out), raw)
    if settings.streaming:
        train = train.map(partial(_streamed, corruption=corruption)).with_format("torch")
    else:
        _require_windows(data, len(train), raw)
        train = _Windows(train, corruption)
    return TextData(train, _Windows(held_out, corruption), tokenizer, notes)


def require_shards(train: Any, processes: int) -> None:
    """Refuse a stream that cannot be shared out by files.

    Args:
        train: of `TextData`.
        processes: that train.

    Raises:
        DataError: it has fewer files than there are processes.
    """
    if isinstance(train, datasets.IterableDataset) and train.n_shards < processes:
        raise DataError(
            f"the stream has {train.n_shards} files for {processes} processes, expected at least"
            f" one each. Split the files, start {train.n_shards} processes, or read it whole",
            {"streaming": False},
        )


class _Windows(Dataset[Item]):
    """Windows by number; with span corruption, a draw's seed decides the spans."""

    def __init__(self, rows: Any, corruption: SpanCorruption | None) -> None:
        self._rows = rows.with_format("torch")
        self._corruption = corruption

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, key: Draw | int) -> Item:
        draw = as_draw(key)
        return _item(self._rows[draw.sample]["input_ids"], draw.seed, self._corruption)


def _item(ids: Tensor, seed: int, corruption: SpanCorruption | None) -> Item:
    """A window as the model takes it."""
    if corruption is None:
        return {"input_ids": ids, "labels": ids}
    input_ids, labels = corruption(ids, torch.Generator().manual_seed(seed))
    return {"input_ids": input_ids, "labels": labels}


def _streamed(row: Mapping[str, Any], corruption: SpanCorruption | None) -> Mapping[str, Any]:
    """An item of a stream; its windows have no number, so the seed is a checksum of the text."""
    ids = torch.tensor(row["input_ids"])
    item = _item(ids, zlib.crc32(ids.numpy().tobytes()), corruption)
    return {key: value.tolist() for key, value in item.items()}


def _packed(split: Any, cut: Any) -> Any:
    """Windows of a split, made once and cached, or made as they are asked for."""
    columns = list(split.column_names or split.features or ())
    return split.map(cut, batched=True, batch_size=_ROWS, remove_columns=columns)


def _hold_out(data: str, windows: Any, raw: int) -> tuple[Any, Any, tuple[str, ...]]:
    """The windows of a single split in two parts, and a note that says so."""
    _require_windows(data, len(windows), raw, least=2)
    end = len(windows) - max(1, round(len(windows) * _HELD_OUT_SHARE))
    note = f"{data}: no held-out split; its last twentieth is held out"
    return windows.select(range(end)), windows.select(range(end, len(windows))), (note,)


def _first(windows: Any, number: int) -> Any:
    """The first so many windows, all for 0; those of a stream are read and kept in memory."""
    if isinstance(windows, datasets.IterableDataset):
        return datasets.Dataset.from_list(list(islice(windows, number or None)))
    return windows.select(range(min(number, len(windows)))) if number else windows


def _tokenizer(data: str, split: Any, column: str, settings: TextSettings) -> Any:
    """The tokenizer that was named, or one that is trained on the text."""
    if settings.tokenizer:
        return load_tokenizer(settings.tokenizer, "tokenizer")
    path = Path(data).expanduser()
    kept = {
        "data": str(path.resolve()) if path.exists() else data,
        "files": sorted((str(f), f.stat().st_size, f.stat().st_mtime_ns) for f in _files(path)),
        "column": column,
        "vocab_size": settings.vocab_size,
        "corrupted": settings.corrupted,
        "characters": _TRAINING_CHARACTERS,
    }
    name = hashlib.sha256(repr(kept).encode()).hexdigest()[:16]
    folder = settings.cache.expanduser() / "tokenizers" / name
    texts = _texts(split, column)
    return load_or_train_tokenizer(folder, texts, settings.vocab_size, settings.corrupted)


def _files(path: Path) -> list[Path]:
    return [file for file in path.rglob("*") if file.is_file()] if path.is_dir() else []


def _texts(split: Any, column: str) -> Iterator[str]:
    """Texts to train a tokenizer on: from all parts of a split, or the first ones of a stream.

    They are bounded, since the training of T5's kind takes minutes for each 10 million characters.
    """
    is_stream = isinstance(split, datasets.IterableDataset)
    read = 0
    for row in split if is_stream else split.shuffle(seed=0):
        if row[column]:
            yield row[column]
            read += len(row[column])
        if read >= _TRAINING_CHARACTERS:
            return


def _require_windows(data: str, number: int, length: int, least: int = 1) -> None:
    """Refuse a text that is too short."""
    if number < least:
        raise DataError(
            f"{data}: expected text for at least {least} windows of {length} tokens, got {number}."
            " More text, or shorter windows",
            {"length": 64},
        )
