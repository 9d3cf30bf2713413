"""Another kind of source is one file (``dummy_source.py``) and one line in `OPENERS`."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import models
from data.data_makers import TEXT, batches_of, id_of, words_tokenizer
from howto.dummy_source import TSV
from steppe.data import sources
from steppe.data.local_files import FILE
from steppe.data.rows import open_rows
from steppe.data.sources import Source
from steppe.data.text_data import TextSettings, load_text_data
from steppe.errors import DataError

LINES = ["text\tpage", *(f"{TEXT}\t{page}" for page in range(30))]


@pytest.fixture(autouse=True)
def _registered(monkeypatch: pytest.MonkeyPatch) -> None:
    """The line in the table: before FILE, which refuses every ending that it does not know."""
    at = sources.OPENERS.index(FILE)
    monkeypatch.setattr(sources, "OPENERS", [*sources.OPENERS[:at], TSV, *sources.OPENERS[at:]])


@pytest.fixture
def table(tmp_path: Path) -> Path:
    path = tmp_path / "pages.tsv"
    path.write_text("\n".join(LINES))
    return path


def test_its_rows_are_measured(table: Path) -> None:
    rows = open_rows(Source(str(table)))
    assert (rows.split, rows.is_local) == ("full", True)
    assert [row["page"] for row in rows] == [str(page) for page in range(30)]
    checkpoint = words_tokenizer(table.parent)
    batches = batches_of(table, models.gpt2(), checkpoint, text_column="text", max_length=15)
    ids = torch.cat([batch["input_ids"] for batch in batches])
    assert ids.shape == (30, 15)
    assert ids[7].tolist() == [*map(id_of, TEXT.split()), 2]


def test_its_rows_are_trained_on(table: Path) -> None:
    tokenizer = str(words_tokenizer(table.parent / "tokenizer"))
    data = load_text_data(str(table), TextSettings(15, tokenizer=tokenizer, text_column="text"))
    assert (len(data.train), len(data.held_out)) == (28, 2)
    assert data.train[7]["input_ids"].tolist() == [*map(id_of, TEXT.split()), 2]


def test_its_damage_is_an_error_with_the_datas_name(table: Path) -> None:
    table.write_text("text\tpage\nthe fox\n")
    with pytest.raises(DataError, match=r"pages\.tsv: expected as many columns"):
        open_rows(Source(str(table)))
    table.write_bytes(b"text\tpage\n\xff\t1\n")
    with pytest.raises(DataError, match=r"pages\.tsv: cannot be read.*Fetch it again"):
        open_rows(Source(str(table)))


def test_names_of_other_kinds_are_opened_as_before(table: Path) -> None:
    (table.parent / "a.txt").write_text("one")
    assert list(open_rows(Source(str(table.parent / "a.txt")))) == [{"text": "one"}]
    with pytest.raises(DataError, match="there is no such file or folder"):
        open_rows(Source("./nowhere.tsv"))
