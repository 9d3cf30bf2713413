"""How many tokens a model takes, and how many it knows."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel

from steppe.blocks.find import max_tokens_of
from steppe.data.embedded import BYTES
from steppe.errors import DataError
from steppe.plugins.applied import sparsification_of

DEFAULT_LENGTH = 512
"""Tokens per sample where neither the user nor the model says how many."""
_NO_LIMIT = 10**9  # above it a tokenizer's model_max_length says that there is none


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
    limits.append(None if sparsification is None else sparsification.longest_sequence)
    numbers = [limit for limit in limits if isinstance(limit, int | float)]
    known = [int(limit) for limit in numbers if 0 < limit < _NO_LIMIT]
    if asked is not None and known and asked > min(known):
        raise DataError(
            f"{type(model).__name__} and its tokenizer take at most {min(known)} tokens, got a"
            f" length of {asked}",
            {"max_length": min(known)},
        )
    return asked or min([*known, DEFAULT_LENGTH])


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
