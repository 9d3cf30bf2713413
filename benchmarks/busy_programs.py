"""Other programs that keep the machine busy while something is measured."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator
from contextlib import contextmanager

import torch


def spin() -> None:
    """Keep a core busy, and some of the cache."""
    torch.set_num_threads(1)
    matrix = torch.randn(512, 512)
    while True:
        matrix = matrix @ matrix
        matrix /= matrix.norm()


@contextmanager
def busy(processes: int) -> Iterator[None]:
    """Some child processes that compute."""
    context = multiprocessing.get_context("spawn")
    children = [context.Process(target=spin, daemon=True) for _ in range(processes)]
    for child in children:
        child.start()
    try:
        yield
    finally:
        for child in children:
            child.kill()
            child.join()
