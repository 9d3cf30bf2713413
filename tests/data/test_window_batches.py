"""Windows of running text to measure on: their length, their ends, and their masked tokens."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import GPT2Config, GPT2Model

import models
import steppe
from data.data_makers import TEXT, batches_of, id_of, words_tokenizer, write_jsonl
from steppe.data.batches import load_batches
from steppe.data.sources import Source
from steppe.errors import DataError


def test_running_text_is_cut_into_windows_of_one_length(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text((TEXT * 3)[: -len("it sleeps . ")])  # 39 words
    words_tokenizer(tmp_path)
    batches = batches_of(tmp_path / "a.txt", models.gpt2(), tmp_path, batch_size=2, max_length=10)
    assert [list(batch["input_ids"].shape) for batch in batches] == [[2, 10], [2, 10]]
    ids = torch.cat([batch["input_ids"] for batch in batches])
    mask = torch.cat([batch["attention_mask"] for batch in batches])
    words = [id_of(word) for word in (TEXT * 3).split()][:39]
    assert ids[mask == 1].tolist() == words  # every word once, in order
    assert mask.sum() == 39
    labels = torch.cat([batch["labels"] for batch in batches])
    assert torch.equal(labels, ids.where(mask == 1, torch.tensor(-100)))
    assert labels[-1, -1] == -100


@pytest.mark.parametrize("words", [30, 31])
def test_no_batch_is_without_a_label_that_counts(tmp_path: Path, words: int) -> None:
    (tmp_path / "a.txt").write_text(" ".join((TEXT * 3).split()[:words]))
    words_tokenizer(tmp_path, "causal")
    options = {"batch_size": 1, "max_length": 5}
    causal = batches_of(tmp_path / "a.txt", models.gpt2(), tmp_path, **options)
    assert len(causal) == 6  # not a seventh of one token
    words_tokenizer(tmp_path, "masked")
    masked = batches_of(tmp_path / "a.txt", models.bert(), tmp_path, **options)
    assert 0 < len(masked) < 10  # of some windows of 3 words none is masked
    assert all((batch["labels"] != -100).any() for batch in masked)


def test_the_end_token_stands_between_rows_but_not_between_lines(tmp_path: Path) -> None:
    words_tokenizer(tmp_path)
    write_jsonl(tmp_path / "a.jsonl", [{"text": "the fox "}, {"text": None}, {"text": "a dog "}])
    (tmp_path / "a.txt").write_text("the fox \n a dog ")
    (rows,) = batches_of(tmp_path / "a.jsonl", models.gpt2(), tmp_path)
    (lines,) = batches_of(tmp_path / "a.txt", models.gpt2(), tmp_path)
    the, fox, a, dog = (id_of(word) for word in ("the", "fox", "a", "dog"))
    assert rows["input_ids"].tolist() == [[the, fox, 2, a, dog, 2]]
    assert lines["input_ids"].tolist() == [[the, fox, id_of("\n"), a, dog]]


def test_the_length_is_the_models_or_the_zeroth_biases(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(TEXT * 50)
    words_tokenizer(tmp_path)
    model = models.gpt2()
    assert batches_of(tmp_path / "a.txt", model, tmp_path)[0]["input_ids"].shape[1] == 32
    with pytest.raises(DataError, match="at most 32 tokens, got a length of 33: max_length=32"):
        batches_of(tmp_path / "a.txt", model, tmp_path, max_length=33)
    steppe.sparsify_(model, [steppe.ZerothBias(max_tokens=20)])
    assert batches_of(tmp_path / "a.txt", model, tmp_path)[0]["input_ids"].shape[1] == 20
    with pytest.raises(DataError, match="at most 20"):
        batches_of(tmp_path / "a.txt", model, tmp_path, max_length=21)


def test_masked_models_guess_the_same_tokens_every_time(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(TEXT * 60)
    words_tokenizer(tmp_path, "masked")
    source = Source(str(tmp_path / "a.txt"), max_length=12)
    loader = load_batches(source, models.bert(), str(tmp_path))
    first, second = list(loader), list(loader)
    ids, labels, mask = (
        torch.cat([batch[key] for batch in first])
        for key in ("input_ids", "labels", "attention_mask")
    )
    assert all(
        torch.equal(one[key], two[key])
        for one, two in zip(first, second, strict=True)
        for key in one
    )
    guessed = labels != -100
    assert 0.10 < guessed.sum() / mask.sum() < 0.20
    whole = ids.where(~guessed, labels)
    assert (whole[:, 0] == 4).all()  # [CLS]
    assert ((whole == 5).sum(-1) == 1).all()  # [SEP]
    assert not guessed[(whole < 7)].any()  # special tokens and padding
    words = [id_of(word) for word in (TEXT * 60).split()]
    assert whole[whole >= 7].tolist() == words
    assert not torch.equal(ids, whole)


def test_a_masked_model_needs_a_mask_token(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(TEXT)
    words_tokenizer(tmp_path)
    with pytest.raises(DataError, match="no mask token"):
        batches_of(tmp_path / "a.txt", models.bert(), tmp_path)


def test_a_model_without_a_head_gets_no_labels(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(TEXT)
    words_tokenizer(tmp_path)
    model = GPT2Model(GPT2Config(vocab_size=64, n_embd=16, n_layer=1, n_head=2, n_positions=32))
    (batch,) = batches_of(tmp_path / "a.txt", model, tmp_path)
    assert sorted(batch) == ["attention_mask", "input_ids"]
    model(**batch)
