from __future__ import annotations

from collections import Counter

import pytest

from steppe.data.draws import Draw, DrawSampler, as_draw


def draws(seed: int = 0, epoch: int = 0, repeats: int = 1) -> list[Draw]:
    sampler = DrawSampler(50, seed, repeats)
    sampler.set_epoch(epoch)
    return list(sampler)


def test_an_epoch_draws_every_sample_once() -> None:
    assert sorted(draw.sample for draw in draws()) == list(range(50))


def test_the_draws_depend_on_seed_and_epoch_alone() -> None:
    assert draws(1, 2) == draws(1, 2)
    assert draws(1, 2) != draws(1, 3)
    assert draws(1, 2) != draws(2, 2)
    assert len({draw.seed for draw in draws()}) == 50


def test_repeated_augmentation_draws_in_a_row_with_other_seeds() -> None:
    found = draws(repeats=3)
    assert len(found) == 50
    assert sorted(Counter(draw.sample for draw in found).values()) == [2] + [3] * 16
    assert len({draw.sample for draw in found[:3]}) == 1
    assert len({draw.seed for draw in found[:3]}) == 3


def test_no_repeats_is_refused() -> None:
    with pytest.raises(ValueError, match="repeats"):
        DrawSampler(50, 0, 0)


def test_a_bare_index_is_always_the_same_draw() -> None:
    assert as_draw(3) == as_draw(3) == Draw(3, 3)
    assert as_draw(Draw(3, 9)) == Draw(3, 9)
