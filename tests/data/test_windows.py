"""Windows are the texts one after the other, wherever the texts are cut, on both roads."""

from __future__ import annotations

from itertools import chain
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from data.data_makers import id_of, words_tokenizer
from steppe.data.windows import WindowLayout, layout_of, pack

TEXTS = st.lists(st.lists(st.integers(10, 99), max_size=9), max_size=9)


@given(TEXTS, st.integers(1, 7), st.booleans())
def test_windows_joined_are_the_texts_joined(texts, room: int, keep_rest: bool) -> None:
    layout = WindowLayout(room, between=(1,), before=(2, 3), after=(4,))
    joined = list(chain.from_iterable([*text, 1] for text in texts))
    windows = list(layout.cut(texts, keep_rest))
    assert all(window[:2] == [2, 3] and window[-1] == 4 for window in windows)
    inner = list(chain.from_iterable(window[2:-1] for window in windows))
    rest = len(joined) % room
    kept = keep_rest and rest > 1
    assert inner == (joined if kept else joined[: len(joined) - rest])
    assert [len(window) for window in windows[: len(joined) // room]] == [room + 3] * (
        len(joined) // room
    )


@pytest.mark.parametrize(
    ("kind", "is_plain", "with_special", "expected"),
    [
        ("causal", False, True, WindowLayout(8, between=(2,))),
        ("causal", True, True, WindowLayout(8)),
        ("masked", False, True, WindowLayout(6, before=(4,), after=(5,))),
        ("masked", False, False, WindowLayout(8)),
        ("pairs", False, True, WindowLayout(7, after=(2,))),  # each window ends with the end token
        ("pairs", False, False, WindowLayout(8, between=(2,))),
    ],
)
def test_special_tokens_stand_around_windows_and_end_tokens_between_texts(
    tmp_path: Path, kind: str, is_plain: bool, with_special: bool, expected: WindowLayout
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(words_tokenizer(tmp_path, kind))
    assert layout_of(tokenizer, 8, is_plain, with_special) == expected


def test_a_batch_of_rows_is_packed_into_whole_windows(tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(words_tokenizer(tmp_path))
    layout = layout_of(tokenizer, 2, is_plain_text=False, with_special=False)
    the, fox, dog = map(id_of, ("the", "fox", "dog"))
    rows = {"text": ["the fox", "", "dog", "the"]}  # the fox END dog END the END
    packed = pack(rows, tokenizer, "text", layout)
    assert packed == {"input_ids": [[the, fox], [2, dog], [2, the]]}
    assert pack({"text": [""]}, tokenizer, "text", layout) == {"input_ids": []}
