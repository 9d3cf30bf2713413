"""Pairs and classified texts to measure on, and tokenizers that do not fit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import T5Config, T5Model

import models
from data.data_makers import TEXT, batches_of, id_of, text_classifier, words_tokenizer, write_jsonl
from steppe.data.batches import load_batches
from steppe.data.sources import Source
from steppe.errors import DataError


@pytest.mark.parametrize(
    ("row", "options"),
    [
        ({"input": "the fox", "target": "a dog"}, {}),
        ({"id": "7", "document": "the fox", "summary": "a dog"}, {}),
        ({"q": "the fox", "a": "a dog"}, {"text_column": "q", "target_column": "a"}),
        ({"text": "the fox", "a": "a dog"}, {"target_column": "a"}),
    ],
)
def test_encoder_decoders_get_inputs_and_targets(
    tmp_path: Path, row: dict[str, str], options: dict[str, str]
) -> None:
    words_tokenizer(tmp_path, "pairs")
    longer = {**row, **{key: f"{value} sleeps" for key, value in row.items() if value == "a dog"}}
    write_jsonl(tmp_path / "a.jsonl", [row, longer])
    (batch,) = batches_of(tmp_path / "a.jsonl", models.t5(), tmp_path, **options)
    the, fox, a, dog = (id_of(word) for word in ("the", "fox", "a", "dog"))
    assert batch["input_ids"].tolist() == [[the, fox, 2]] * 2
    assert batch["labels"].tolist() == [[a, dog, 2, -100], [a, dog, id_of("sleeps"), 2]]
    models.t5()(**batch)


def test_encoder_decoders_without_pairs_or_head_are_errors(tmp_path: Path) -> None:
    words_tokenizer(tmp_path, "pairs")
    write_jsonl(tmp_path / "a.jsonl", [{"text": "the fox", "n": 3}])
    with pytest.raises(
        DataError, match=r"input/target.*text \(str\), n \(int\).*target_column=TARGET"
    ):
        batches_of(tmp_path / "a.jsonl", models.t5(), tmp_path)
    headless = T5Model(T5Config(vocab_size=64, d_model=16, d_kv=4, d_ff=32, num_layers=1))
    with pytest.raises(DataError, match="no head"):
        batches_of(tmp_path / "a.jsonl", headless, tmp_path)


def test_no_tokenizer_and_another_models_tokenizer_are_errors(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(TEXT)
    model = models.gpt2()
    model.save_pretrained(tmp_path / "model")
    with pytest.raises(DataError, match=r"has no tokenizer.*processor=FOLDER_OR_HUB_ID"):
        batches_of(tmp_path / "a.txt", model, tmp_path / "model")
    other = words_tokenizer(tmp_path / "other", words=[f"w{i}" for i in range(80)] + ["fox"])
    with pytest.raises(DataError, match="the id 87, the vocabulary of GPT2LMHeadModel has 64"):
        batches_of(tmp_path / "a.txt", model, tmp_path / "model", processor=str(other))
    (other / "tokenizer.json").write_text("{")
    with pytest.raises(DataError, match="cannot be loaded"):
        batches_of(tmp_path / "a.txt", model, other)
    right = words_tokenizer(tmp_path / "right")
    assert batches_of(tmp_path / "a.txt", model, tmp_path / "model", processor=str(right))


def test_texts_are_classified_in_a_fixed_random_order(tmp_path: Path) -> None:
    words_tokenizer(tmp_path, "masked")
    rows = [{"text": "the fox", "label": int(i >= 20)} for i in range(40)]
    write_jsonl(tmp_path / "a.jsonl", rows)
    one, two = (batches_of(tmp_path / "a.jsonl", text_classifier(), tmp_path) for _ in range(2))
    labels = torch.cat([batch["labels"] for batch in one])
    assert labels.sum() == 20
    assert 0 < labels[:10].sum() < 10  # mixed
    assert torch.equal(labels, torch.cat([batch["labels"] for batch in two]))
    assert one[0]["input_ids"][0].tolist() == [4, id_of("the"), id_of("fox"), 5]
    loader = load_batches(
        Source(str(tmp_path / "a.jsonl")), text_classifier(), str(tmp_path), False
    )
    assert "labels" not in next(iter(loader))
