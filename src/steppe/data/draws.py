"""The order of random draws and the seed of each: fixed by the run's seed, epoch and position."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch.utils.data import Sampler

_SEEDS = 2**62


class Draw(NamedTuple):
    """A sample, and the seed of its random numbers this time."""

    sample: int
    seed: int


class DrawSampler(Sampler[Draw]):
    """Random draws that depend on nothing but seed, epoch and position.

    So a run that is resumed in the middle of an epoch, with any number of workers, sees the same
    samples as the uninterrupted one. With `repeats` every image drawn comes so many times in a row,
    each time with another seed (Hoffer et al. 2020, repeated augmentation); an epoch has as many
    draws as samples all the same.

    Args:
        length: number of samples.
        seed: of the run.
        repeats: how often in a row, ≥ 1.
    """

    def __init__(self, length: int, seed: int, repeats: int = 1) -> None:
        if repeats < 1:
            raise ValueError(f"DrawSampler: expected repeats ≥ 1, got {repeats}")
        self._length = length
        self._seed = seed
        self._repeats = repeats
        self._epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Draw for another epoch from now on.

        Args:
            epoch: from 0.
        """
        self._epoch = epoch

    def __len__(self) -> int:
        """Draws per epoch."""
        return self._length

    def __iter__(self) -> Iterator[Draw]:
        """The draws of the epoch."""
        generator = torch.Generator().manual_seed(self._seed * 1_000_003 + self._epoch)
        order = torch.randperm(self._length, generator=generator)
        order = order.repeat_interleave(self._repeats)[: self._length]
        seeds = torch.randint(_SEEDS, (self._length,), generator=generator)
        return (Draw(i, s) for i, s in zip(order.tolist(), seeds.tolist(), strict=True))


def as_draw(key: Draw | int) -> Draw:
    """A draw as it is; a bare index becomes a draw that is always the same.

    Args:
        key: index of a data set's item.
    """
    return key if isinstance(key, Draw) else Draw(int(key), int(key))
