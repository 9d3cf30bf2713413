from __future__ import annotations

import json
import logging
import pydoc_data.topics
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from steppe.data.draws import Draw
from steppe.data.span_corruption import SENTINELS
from steppe.data.text_data import TextSettings, load_text_data, require_shards
from steppe.data.tokenizer import load_or_train_tokenizer, train_tokenizer
from steppe.errors import DataError

TOPICS = [pydoc_data.topics.topics[name] for name in sorted(pydoc_data.topics.topics)][:40]


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plain")
    (folder / "all.txt").write_text("\n".join(TOPICS), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shards")
    for index, name in enumerate(("train-0", "train-1", "train-2", "validation-0")):
        rows = [json.dumps({"text": text, "url": "x"}) for text in TOPICS[index::4]]
        (folder / f"{name}.jsonl").write_text("\n".join(rows), encoding="utf-8")
    return folder


def settings(cache: Path, **given) -> TextSettings:
    return TextSettings(**{"length": 64, "vocab_size": 600, "cache": cache, **given})


def test_plain_text_comes_back_from_its_windows(plain: Path, cache: Path) -> None:
    data = load_text_data(str(plain), settings(cache))
    items = [data.train[index] for index in range(len(data.train))]
    assert all(item["input_ids"].shape == (64,) for item in items)
    assert torch.equal(items[0]["input_ids"], items[0]["labels"])
    text = "\n".join(TOPICS)
    told = data.tokenizer.decode(torch.cat([item["input_ids"] for item in items]))
    assert text.startswith(told)
    assert len(told) > 0.9 * len(text)
    assert "last twentieth" in data.notes[0]
    after = data.tokenizer.decode(data.held_out[0]["input_ids"])
    assert text[len(told) :].startswith(after)


def test_texts_of_their_own_end_with_the_end_token(shards: Path, cache: Path) -> None:
    data = load_text_data(str(shards), settings(cache))
    ids = torch.cat([data.train[index]["input_ids"] for index in range(len(data.train))])
    ends = int((ids == data.tokenizer.eos_token_id).sum())
    assert 28 <= ends <= 30  # of thirty texts; the last may be cut off
    assert data.notes == ()


def test_corrupted_windows_depend_on_the_draw(plain: Path, cache: Path) -> None:
    data = load_text_data(str(plain), settings(cache, corrupted=True))
    one, same, other = (data.train[Draw(3, seed)] for seed in (1, 1, 2))
    assert torch.equal(one["input_ids"], same["input_ids"])
    assert not torch.equal(one["input_ids"], other["input_ids"])
    assert one["input_ids"].shape == (64,)
    first = data.tokenizer.convert_tokens_to_ids(SENTINELS[0])
    assert first in one["input_ids"]
    assert one["labels"][0] == first
    assert one["input_ids"][-1] == one["labels"][-1] == data.tokenizer.eos_token_id


@pytest.mark.parametrize("corrupted", [False, True])
def test_a_stream_has_the_windows_of_the_whole(shards: Path, cache: Path, corrupted: bool) -> None:
    stream = load_text_data(
        str(shards), settings(cache, corrupted=corrupted, streaming=True, held_out_samples=5)
    )
    assert stream.train.n_shards == 3
    assert len(stream.held_out) == 5
    items = list(stream.train)
    again = list(stream.train)
    assert all(item["input_ids"].shape == (64,) for item in items)
    assert all(
        torch.equal(a["input_ids"], b["input_ids"]) for a, b in zip(items, again, strict=True)
    )
    distinct = {tuple(torch.cat([i["input_ids"], i["labels"]]).tolist()) for i in items}
    assert len(distinct) == len(items)  # the labels alone may repeat: the text does
    halves = [list(stream.train.shard(num_shards=3, index=index)) for index in range(3)]
    assert sum(map(len, halves)) == pytest.approx(len(items), abs=3)


def test_more_processes_than_files_are_refused(shards: Path, cache: Path) -> None:
    train = load_text_data(str(shards), settings(cache, streaming=True, held_out_samples=5)).train
    require_shards(train, 3)
    with pytest.raises(DataError, match=r"3 files for 4 processes.*streaming=False"):
        require_shards(train, 4)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"streaming": True}, r"a stream needs a split 'validation'"),
        ({"length": 100_000}, r"at least 2 windows of 100000 tokens, got 0"),
        ({"vocab_size": 100}, r"at least 257, got 100: vocab_size=257"),
        ({"held_out_split": "dev"}, r"expected a split 'dev', it has full"),
        ({"text_column": "body"}, r"'body'"),
        ({"tokenizer": "./nowhere"}, r"nowhere"),
    ],
)
def test_what_cannot_be_is_told(plain: Path, cache: Path, given, message: str) -> None:
    with pytest.raises(DataError, match=message):
        load_text_data(str(plain), settings(cache, **given))


def test_a_folder_that_is_not_there_is_told(cache: Path) -> None:
    with pytest.raises(DataError, match="there is no such file or folder"):
        load_text_data("./nowhere", settings(cache))


@pytest.mark.parametrize("with_sentinels", [False, True])
def test_tokenizers_are_made_the_same_and_kept(tmp_path: Path, with_sentinels: bool) -> None:
    place = tmp_path / "kept"
    one = load_or_train_tokenizer(place, TOPICS, 600, with_sentinels)
    again = load_or_train_tokenizer(place, iter(()), 600, with_sentinels)
    fresh = train_tokenizer(TOPICS, 600, with_sentinels)
    ids = one(TOPICS[0])["input_ids"]
    assert ids == again(TOPICS[0])["input_ids"] == fresh(TOPICS[0])["input_ids"]
    assert len(one) == 600
    assert max(ids) < 600
    if with_sentinels:
        names = ["<pad>", "</s>", "<unk>"]
        assert one.convert_tokens_to_ids(names) == [0, 1, 2]
        assert len(set(one.convert_tokens_to_ids(SENTINELS))) == 100
        assert one("a <extra_id_7> b")["input_ids"].count(one.get_vocab()["<extra_id_7>"]) == 1
    else:
        assert one.decode(ids) == TOPICS[0]
    assert AutoTokenizer.from_pretrained(str(place))(TOPICS[1]) == one(TOPICS[1])


def test_a_damaged_tokenizer_is_trained_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    place = tmp_path / "kept"
    one = load_or_train_tokenizer(place, TOPICS, 600, False)
    (place / "tokenizer.json").write_text("{")
    with caplog.at_level(logging.WARNING):
        again = load_or_train_tokenizer(place, TOPICS, 600, False)
    assert "trained again" in caplog.text
    assert again(TOPICS[0]) == one(TOPICS[0])
