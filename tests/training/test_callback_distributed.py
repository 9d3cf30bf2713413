"""A stock Trainer in two processes counts what one process counts, and saving does not hang."""

from __future__ import annotations

import json
import socket
from pathlib import Path

import pytest
from torch import multiprocessing

from training import trainer_worker

pytestmark = pytest.mark.distributed
WORLD = 2


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_two_processes_count_what_one_counts(tmp_path: Path) -> None:
    multiprocessing.spawn(trainer_worker.work, (tmp_path, free_port(), WORLD), nprocs=WORLD)
    by_rank = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(WORLD)]
    assert by_rank[0] == by_rank[1]
    alone = trainer_worker.train(tmp_path / "alone", world=1)
    # The first step sees the same weights: exact counts. Later ones differ by rounding.
    assert by_rank[0]["history"][0] == alone["history"][0]
    steps = [entry["step"] for entry in alone["history"]]
    assert [entry["step"] for entry in by_rank[0]["history"]] == steps == [1, 3, 5, 7]
    for one, two in zip(alone["history"], by_rank[0]["history"], strict=True):
        assert two["density"] == pytest.approx(one["density"], abs=2e-3)
    assert by_rank[0]["saved_at_6"] == by_rank[0]["history"][:3]
    assert len(by_rank[0]["logged"]) == len(alone["logged"]) >= 2
