"""Tiny tokenizers and real folders of data, made on the spot."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import tokenizers
from PIL import Image
from tokenizers import pre_tokenizers, processors
from torch import Tensor
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

import models
from steppe.data.batches import load_batches
from steppe.data.sources import Source

SPECIAL = ["[PAD]", "[BOS]", "[EOS]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
TEXT = "the quick brown fox jumps over a lazy dog and then it sleeps . "
WORDS = [*TEXT.split(), "\n"]


def words_tokenizer(folder: Path, kind: str = "causal", words: Sequence[str] = WORDS) -> Path:
    """A tokenizer of whole words beside a checkpoint; ids from 7 on are words, in their order."""
    vocabulary = {word: index for index, word in enumerate([*SPECIAL, *words])}
    words_to_ids = tokenizers.models.WordLevel(vocabulary, unk_token="[UNK]")
    tokenizer = tokenizers.Tokenizer(words_to_ids)
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", behavior="removed")
    named = {"unk_token": "[UNK]"}
    if kind == "masked":
        tokenizer.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 4), ("[SEP]", 5)]
        )
        named |= {"mask_token": "[MASK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
        named["pad_token"] = "[PAD]"
    elif kind == "pairs":
        tokenizer.post_processor = processors.TemplateProcessing(
            single="$A [EOS]", special_tokens=[("[EOS]", 2)]
        )
        named |= {"eos_token": "[EOS]", "pad_token": "[PAD]"}
    else:
        named |= {"eos_token": "[EOS]"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **named).save_pretrained(folder)
    return folder


def id_of(word: str) -> int:
    """The id of a word."""
    return [*SPECIAL, *WORDS].index(word)


def write_images(folder: Path, classes: Sequence[str], each: int = 3, mode: str = "RGB") -> Path:
    """PNGs in one folder a class; image i of class c is uniformly 20 i + 100 c, modulo 251."""
    for number, name in enumerate(classes):
        (folder / name).mkdir(parents=True)
        for index in range(each):
            shade = (20 * index + 100 * number) % 251
            size = (12, 10) if mode == "L" else (12, 10, 3)
            image = Image.fromarray(np.full(size, shade, dtype=np.uint8))
            image.save(folder / name / f"{index}.png")
    return folder


def write_jsonl(path: Path, rows: Sequence[object]) -> Path:
    """One JSON value a line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def batches_of(
    data: Path | str, model: PreTrainedModel, checkpoint: Path | str = "", **options: object
) -> list[dict[str, Tensor]]:
    return list(load_batches(Source(str(data), **options), model, str(checkpoint)))


def named_vit(*names: str) -> PreTrainedModel:
    """A ViT whose classes have names."""
    model = models.vit()
    model.config.id2label = dict(enumerate(names))
    model.config.label2id = {name: index for index, name in enumerate(names)}
    return model


def text_classifier(labels: int = 2) -> PreTrainedModel:
    return BertForSequenceClassification(BertConfig(**models.TEXT, num_labels=labels))
