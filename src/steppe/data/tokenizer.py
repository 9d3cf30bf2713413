"""Tokenizers: of a checkpoint, or trained on a text and kept in a cache."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from steppe.data.read_errors import first_line
from steppe.data.span_corruption import SENTINELS
from steppe.errors import DataError
from steppe.files import write_folder

END_OF_TEXT = "<|endoftext|>"
_T5_SPECIAL = ["<pad>", "</s>", "<unk>"]  # ids 0, 1, 2
_logger = logging.getLogger(__name__)


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


def train_tokenizer(texts: Iterable[str], vocab_size: int, with_sentinels: bool) -> Any:
    """A tokenizer of a text's own: byte-level BPE, or T5's kind with its sentinels.

    Args:
        texts: to train it on.
        vocab_size: number of ids, special ones included.
        with_sentinels: T5's kind, a unigram model of words with 100 sentinels.

    Returns:
        A tokenizer of Transformers.

    Raises:
        DataError: the vocabulary is too small, or the text too short for it.
    """
    least = 256 + 1 if not with_sentinels else 256 + len(_T5_SPECIAL) + len(SENTINELS)
    if vocab_size < least:
        raise DataError(
            f"expected a vocabulary of at least {least}, got {vocab_size}", {"vocab_size": least}
        )
    if with_sentinels:
        return _train_unigram(texts, vocab_size)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        unk_token=END_OF_TEXT,
    )


def load_or_train_tokenizer(
    cache: Path, texts: Iterable[str], vocab_size: int, with_sentinels: bool
) -> Any:
    """The cached tokenizer of a text, or a new one, which is cached.

    Several processes may do this at the same time: each renames a whole folder into place.

    Args:
        cache: folder of this very tokenizer.
        texts: as in `train_tokenizer`; not read if there is one.
        vocab_size: as in `train_tokenizer`.
        with_sentinels: as in `train_tokenizer`.

    Raises:
        DataError: as `train_tokenizer`.
        OutputError: it cannot be kept.
    """
    if cache.is_dir():
        try:
            return AutoTokenizer.from_pretrained(str(cache), trust_remote_code=False)
        except Exception as error:  # of `tokenizers`, which raises no class of its own
            _logger.warning("%s: damaged (%s); trained again", cache, first_line(error))
    made = train_tokenizer(texts, vocab_size, with_sentinels)
    write_folder(cache, lambda folder: made.save_pretrained(str(folder)))
    return AutoTokenizer.from_pretrained(str(cache), trust_remote_code=False)


def _train_unigram(texts: Iterable[str], vocab_size: int) -> Any:
    """T5's kind; its normaliser and splitting are those of T5's own."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFKC(), normalizers.Replace("\n", " ")]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=vocab_size - len(SENTINELS),
        special_tokens=_T5_SPECIAL,
        unk_token="<unk>",
        show_progress=False,
    )
    tokenizer.train_from_iterator(_without_empty(texts), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        extra_special_tokens=SENTINELS,
    )


def _without_empty(texts: Iterable[str]) -> Iterator[str]:
    return (text for text in texts if text.strip())
