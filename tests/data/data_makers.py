"""Tiny tokenizers and real folders of data, made on the spot."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

SPECIAL = ["[PAD]", "[BOS]", "[EOS]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
TEXT = "the quick brown fox jumps over a lazy dog and then it sleeps . "
WORDS = [*TEXT.split(), "\n"]


def words_tokenizer(folder: Path, kind: str = "causal", words: Sequence[str] = WORDS) -> Path:
    """A tokenizer of whole words beside a checkpoint; ids from 7 on are words, in their order."""
    vocabulary = {word: index for index, word in enumerate([*SPECIAL, *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
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
