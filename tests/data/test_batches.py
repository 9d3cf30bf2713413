"""Held-out data as batches: what a model gets of each kind of data, and what does not fit it."""

from __future__ import annotations

from pathlib import Path

import datasets
import pytest
import torch
from torch import Tensor
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2Model,
    PreTrainedModel,
    T5Config,
    T5Model,
)
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

import models
import steppe
from data.data_makers import TEXT, id_of, words_tokenizer, write_images, write_jsonl
from steppe.data.batches import load_batches
from steppe.data.embedded import load_digits_split, load_pydoc_split
from steppe.data.sources import Source
from steppe.errors import DataError
from steppe.training.demo import language_model

ANIMALS = ("cat", "dog")


@pytest.fixture(autouse=True)
def _no_bars() -> None:
    datasets.disable_progress_bars()


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


# Text.


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


def test_the_column_of_the_text_is_found_or_asked_for(tmp_path: Path) -> None:
    words_tokenizer(tmp_path)
    path = write_jsonl(tmp_path / "a.jsonl", [{"title": "the", "body": "fox", "n": 1}])
    with pytest.raises(DataError, match=r"title \(str\), body \(str\), n \(int\).*text_column="):
        batches_of(path, models.gpt2(), tmp_path)
    with pytest.raises(DataError, match="expected a column of strings 'n'"):
        batches_of(path, models.gpt2(), tmp_path, text_column="n")
    (batch,) = batches_of(path, models.gpt2(), tmp_path, text_column="body")
    assert batch["input_ids"].tolist() == [[id_of("fox"), 2]]
    only = write_jsonl(tmp_path / "b.jsonl", [{"body": "fox", "n": 1}])
    assert batches_of(only, models.gpt2(), tmp_path)[0]["input_ids"].shape == (1, 2)
    none = write_jsonl(tmp_path / "c.jsonl", [{"n": 1}])
    with pytest.raises(DataError, match="text_column=NAME"):
        batches_of(none, models.gpt2(), tmp_path)


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


def test_a_model_without_a_head_gets_no_labels(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(TEXT)
    words_tokenizer(tmp_path)
    model = GPT2Model(GPT2Config(vocab_size=64, n_embd=16, n_layer=1, n_head=2, n_positions=32))
    (batch,) = batches_of(tmp_path / "a.txt", model, tmp_path)
    assert sorted(batch) == ["attention_mask", "input_ids"]
    model(**batch)


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


@pytest.mark.parametrize(
    ("label", "message"),
    [
        (2, r"has 2, the model knows 2 classes"),
        (-1, r"withheld: split=validation"),
        (0.5, r"has 0.5"),
        ("cat", r"has 'cat'"),
        (None, r"has None"),
    ],
)
def test_labels_beyond_the_models_are_errors(tmp_path: Path, label: object, message: str) -> None:
    words_tokenizer(tmp_path, "masked")
    write_jsonl(tmp_path / "a.jsonl", [{"text": "the", "label": label}])
    with pytest.raises(DataError, match=message):
        batches_of(tmp_path / "a.jsonl", text_classifier(), tmp_path)


def test_the_column_of_the_classes_is_found_or_asked_for(tmp_path: Path) -> None:
    words_tokenizer(tmp_path, "masked")
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": "the", "sentiment": 1}])
    with pytest.raises(DataError, match=r"'label' of classes.*label_column=NAME"):
        batches_of(path, text_classifier(), tmp_path)
    (batch,) = batches_of(path, text_classifier(), tmp_path, label_column="sentiment")
    assert batch["labels"].tolist() == [1]


# Images.


def test_images_are_made_as_the_checkpoints_processor_says(tmp_path: Path) -> None:
    data = write_images(tmp_path / "data", ANIMALS)
    ViTImageProcessorPil(
        size={"height": 8, "width": 8}, image_mean=[0.25], image_std=[0.125]
    ).save_pretrained(tmp_path)
    loader = load_batches(Source(str(data)), named_vit("dog", "cat"), str(tmp_path))
    (batch,) = loader
    assert loader.notes == ()
    assert loader.total == 1
    assert batch["pixel_values"].shape == (6, 1, 8, 8)
    # Uniform images of shade 20 i + 100 c, so resizing leaves them; the model calls cat 1.
    shades = (batch["pixel_values"].mean((1, 2, 3)) * 0.125 + 0.25) * 255
    pairs = sorted(zip(shades.round().int().tolist(), batch["labels"].tolist(), strict=True))
    assert pairs == [(0, 1), (20, 1), (40, 1), (100, 0), (120, 0), (140, 0)]


def test_without_a_processor_the_config_decides_and_says_so(tmp_path: Path) -> None:
    data = write_images(tmp_path / "data", ANIMALS, mode="L")
    loader = load_batches(Source(str(data)), named_vit(*ANIMALS), str(tmp_path))
    (batch,) = loader
    shades = (batch["pixel_values"].mean((1, 2, 3)) * 0.5 + 0.5) * 255
    assert sorted(shades.round().int().tolist()) == [0, 20, 40, 100, 120, 140]
    assert any("no preprocessor_config.json; images are resized to 8" in n for n in loader.notes)
    model = named_vit(*ANIMALS).to(torch.bfloat16)
    assert batches_of(data, model, tmp_path)[0]["pixel_values"].dtype == torch.bfloat16


def test_images_in_folders_of_splits_have_the_classes_of_all(tmp_path: Path) -> None:
    write_images(tmp_path / "train", ("ant", "cat", "dog"))
    write_images(tmp_path / "val", ("cat", "dog"))  # alphabetically 0 and 1, among all 1 and 2
    model = models.vit()
    model.config.num_labels = 3
    (batch,) = batches_of(tmp_path, model, tmp_path)
    assert sorted(batch["labels"].tolist()) == [1, 1, 1, 2, 2, 2]


def test_a_class_may_be_called_train(tmp_path: Path) -> None:
    write_images(tmp_path, ("car", "train"))
    (batch,) = batches_of(tmp_path, named_vit("car", "train"), tmp_path)
    assert sorted(batch["labels"].tolist()) == [0, 0, 0, 1, 1, 1]


def test_many_images_are_mixed_the_same_way_every_time(tmp_path: Path) -> None:
    write_images(tmp_path, ANIMALS, each=30)
    loader = load_batches(Source(str(tmp_path), batch_size=10), named_vit(*ANIMALS), str(tmp_path))
    first = next(iter(loader))
    assert 0 < first["labels"].sum() < 10
    assert torch.equal(first["pixel_values"], next(iter(loader))["pixel_values"])
    assert loader.total == 6 == len(list(loader))


@pytest.mark.slow  # a quarter of a minute
def test_images_in_parquet_files(tmp_path: Path) -> None:
    data = write_images(tmp_path / "data", ANIMALS)
    rows = datasets.load_dataset("imagefolder", data_files=str(data / "**/*.png"), streaming=True)
    rows = list(rows["train"].cast_column("image", datasets.Image(decode=False)))
    for row in rows:
        row["image"] = {"bytes": Path(row["image"]["path"]).read_bytes(), "path": None}
    features = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(names=ANIMALS))
    typed = datasets.Dataset.from_list(rows, features=features)
    typed.to_parquet(tmp_path / "typed.parquet")
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "bare.parquet")
    model = models.vit()
    model.config.num_labels = 2
    for name in ("typed", "bare"):
        (batch,) = batches_of(tmp_path / f"{name}.parquet", model, tmp_path)
        assert batch["pixel_values"].shape == (6, 1, 8, 8)
        assert sorted(batch["labels"].tolist()) == [0, 0, 0, 1, 1, 1]


@pytest.mark.parametrize(
    ("folders", "known", "message"),
    [
        (ANIMALS, ("cat", "ape"), r"the classes dog are not the model's.*cat, ape"),
        (ANIMALS, ("a", "b", "c"), r"expected the model's 3 classes \(a, b, c\), the data has 2"),
        (
            ANIMALS,
            tuple(f"LABEL_{i}" for i in range(10)),
            r"the model's 10 classes, the data",
        ),
        (("0", "7"), ("LABEL_0", "LABEL_1"), r"has 1, the model knows 2 classes"),
    ],
)
def test_classes_that_are_not_the_models_are_errors(
    tmp_path: Path, folders: tuple[str, ...], known: tuple[str, ...], message: str
) -> None:
    write_images(tmp_path, folders)
    with pytest.raises(DataError, match=message):
        batches_of(tmp_path, named_vit(*known), tmp_path)


def test_numbers_as_names_are_the_models_numbers(tmp_path: Path) -> None:
    write_images(tmp_path, ("2", "10", "9"))  # alphabetically 10, 2, 9
    model = models.vit()
    model.config.num_labels = 11
    (batch,) = batches_of(tmp_path, model, tmp_path, batch_size=9)
    assert sorted(set(batch["labels"].tolist())) == [2, 9, 10]


def test_as_many_classes_of_other_names_go_by_position_and_are_noted(tmp_path: Path) -> None:
    write_images(tmp_path, ("n01440764", "n01443537"))
    loader = load_batches(Source(str(tmp_path)), named_vit("tench", "goldfish"), str(tmp_path))
    assert any("by their position (n01440764 is class 0)" in note for note in loader.notes)
    assert sorted(next(iter(loader))["labels"].tolist()) == [0, 0, 0, 1, 1, 1]


def test_images_without_classes_are_an_error_unless_none_are_needed(tmp_path: Path) -> None:
    write_images(tmp_path, ("all",))
    with pytest.raises(DataError, match=r"Images need a folder a class.*labels=model"):
        batches_of(tmp_path, models.vit(), tmp_path)
    loader = load_batches(Source(str(tmp_path)), models.vit(), str(tmp_path), with_classes=False)
    assert sorted(next(iter(loader))) == ["pixel_values"]


def test_damaged_images_and_processors_are_errors(tmp_path: Path) -> None:
    data = write_images(tmp_path / "data", ANIMALS)
    (tmp_path / "preprocessor_config.json").write_text("{")
    with pytest.raises(DataError, match="its image processor cannot be loaded"):
        batches_of(data, named_vit(*ANIMALS), tmp_path)
    ViTImageProcessorPil(size={"height": 16, "width": 16}).save_pretrained(tmp_path)
    with pytest.raises(
        DataError, match="processor=FOLDER_OR_HUB_ID"
    ):  # three means for one channel
        batches_of(data, named_vit(*ANIMALS), tmp_path)
    ViTImageProcessorPil(
        size={"height": 16, "width": 16}, image_mean=[0.5], image_std=[0.5]
    ).save_pretrained(tmp_path)
    with pytest.raises(DataError, match=r"takes images of 1 × 8 × 8 .*, got 1 × 16 × 16"):
        batches_of(data, named_vit(*ANIMALS), tmp_path)
    (tmp_path / "preprocessor_config.json").unlink()
    (data / "cat" / "0.png").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"0\.png: the image cannot be read"):
        batches_of(data, named_vit(*ANIMALS), tmp_path)


def test_text_for_an_image_model_is_an_error(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": "the", "label": 1}])
    with pytest.raises(DataError, match="expected a column 'image', it has text"):
        batches_of(path, models.vit(), tmp_path)


# Embedded.


def test_digits_and_pydoc_are_the_held_out_parts_of_the_demo() -> None:
    digits = load_batches(Source("digits", batch_size=50), models.vit(), "")
    expected = load_digits_split().held_out
    pixels = torch.cat([batch["pixel_values"] for batch in digits])
    assert len(pixels) == len(expected) == 360
    assert torch.equal(pixels[123], expected[123]["pixel_values"])
    assert (digits.split, digits.total) == ("held_out", 8)
    pydoc = load_batches(Source("pydoc"), language_model(), "")
    ids = torch.cat([batch["input_ids"] for batch in pydoc])
    windows = load_pydoc_split(64).held_out
    assert ids.shape == (len(windows), 64)
    assert torch.equal(ids[5], windows[5]["input_ids"])


@pytest.mark.parametrize(
    ("data", "model", "message"),
    [
        ("pydoc", models.gpt2, "pydoc: its tokens are bytes.*256; that of GPT2LMHeadModel has 64"),
        ("pydoc", models.vit, "takes images, this is text.*data=digits"),
        ("digits", models.gpt2, "takes text, this is images.*data=pydoc"),
    ],
)
def test_an_embedded_set_that_does_not_fit_is_one_error(
    data: str, model: object, message: str
) -> None:
    with pytest.raises(DataError, match=message):
        batches_of(data, model())


def test_digits_for_larger_images_or_fewer_classes_are_errors() -> None:
    model = models.vit()
    model.config.image_size = 224
    with pytest.raises(DataError, match=r"takes images of 1 × 224 × 224 .*, got 1 × 8 × 8"):
        batches_of("digits", model)
    with pytest.raises(DataError, match="10 classes, ViTForImageClassification knows 2"):
        batches_of("digits", named_vit(*ANIMALS))
    with pytest.raises(DataError, match="leave it out"):
        batches_of("digits", models.vit(), split="train")
