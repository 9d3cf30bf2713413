from __future__ import annotations

import pytest
import torch

from steppe.data.span_corruption import SpanCorruption
from steppe.errors import DataError

SENTINELS = list(range(1000, 1100))
END = 1
corruption = SpanCorruption(SENTINELS, END)


def corrupt(ids: torch.Tensor, seed: int) -> tuple[list[int], list[int]]:
    one, other = corruption(ids, torch.Generator().manual_seed(seed))
    return one.tolist(), other.tolist()


def put_together(marked: list[int], answered: list[int]) -> list[int]:
    """The text again: each sentinel of the input replaced by its span in the answer."""
    spans: dict[int, list[int]] = {}
    for token in answered[:-1]:
        if token in SENTINELS:
            spans[token] = []
            last = token
        else:
            spans[last].append(token)
    text: list[int] = []
    for token in marked[:-1]:
        text += spans.pop(token) if token in SENTINELS else [token]
    assert not spans
    return text


@pytest.mark.parametrize("length", [8, 64, 512])
@pytest.mark.parametrize("seed", range(5))
def test_input_and_answer_have_the_whole_text(length: int, seed: int) -> None:
    raw = corruption.raw_length(length)
    ids = torch.arange(100, 100 + raw)
    marked, answered = corrupt(ids, seed)
    assert len(marked) == length
    assert marked[-1] == answered[-1] == END
    assert put_together(marked, answered) == ids.tolist()
    used = [token for token in marked if token in SENTINELS]
    assert used == [token for token in answered if token in SENTINELS] == SENTINELS[: len(used)]


def test_the_numbers_are_those_of_t5() -> None:
    # https://github.com/google-research/text-to-text-transfer-transformer: 512 tokens of input
    # come of 568 of text, and have 114 of answer.
    assert corruption.raw_length(512) == 568
    marked, answered = corrupt(torch.arange(100, 668), 0)
    assert (len(marked), len(answered)) == (512, 114)


def test_a_window_that_is_one_token_longer_would_not_fit() -> None:
    for length in (16, 64, 128, 512):
        raw = corruption.raw_length(length)
        marked, _ = corrupt(torch.arange(100, 101 + raw), 0)
        assert len(marked) > length


def test_seeds_decide_which_spans() -> None:
    ids = torch.arange(100, 300)
    assert corrupt(ids, 0) == corrupt(ids, 0)
    assert corrupt(ids, 0) != corrupt(ids, 1)


def test_spans_fall_everywhere_and_have_the_mean_length() -> None:
    taken = torch.zeros(568)
    lengths = []
    for seed in range(300):
        _, answered = corrupt(torch.arange(100, 668), seed)
        text = [token for token in answered[:-1] if token not in SENTINELS]
        taken[torch.tensor(text) - 100] += 1
        lengths.append(len(text) / (len(answered) - 1 - len(text)))
    assert sum(lengths) / len(lengths) == pytest.approx(3.0, rel=0.02)
    share = taken[30:-30].reshape(-1, 4).mean(1) / 300
    assert share.min() > 0.08
    assert share.max() < 0.22


def test_too_few_sentinels_and_too_short_inputs_are_refused() -> None:
    with pytest.raises(DataError, match="sentinels"):
        SpanCorruption(SENTINELS[:10], END).raw_length(512)
    with pytest.raises(DataError, match="too short"):
        corruption.raw_length(2)
