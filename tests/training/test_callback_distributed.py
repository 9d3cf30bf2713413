"""A stock Trainer in two processes counts what one process counts, and saving does not hang."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from training import trainer_worker
from training.processes import run_together

pytestmark = pytest.mark.distributed
WORLD = 2


def approximately(value: Any) -> Any:
    """To 1e-5: the processes' gradients are of the same losses in another order of sums."""
    if isinstance(value, dict):
        return {key: approximately(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [approximately(entry) for entry in value]
    return value if value is None else pytest.approx(value, rel=1e-5)


def test_two_processes_count_what_one_counts(tmp_path: Path) -> None:
    run_together(trainer_worker.work, WORLD, tmp_path, WORLD)
    by_rank = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(WORLD)]
    assert by_rank[0] == by_rank[1]
    alone = trainer_worker.train(tmp_path / "alone", world=1)
    # The first step sees the same weights: exact counts, and AF up to the order of the sum. Later
    # ones differ by rounding.
    first, same = alone["history"][0], by_rank[0]["history"][0]
    for key, value in first.items():
        if "AF" in key or "gain" in key or "squared" in key or "errors" in key:
            assert same[key] == approximately(value), key
        else:
            assert same[key] == value, key
    assert first["AF_up_per_block"][0] > 0
    steps = [entry["step"] for entry in alone["history"]]
    assert [entry["step"] for entry in by_rank[0]["history"]] == steps == [1, 3, 5, 7]
    for one, two in zip(alone["history"], by_rank[0]["history"], strict=True):
        assert two["density"] == pytest.approx(one["density"], abs=2e-3)
    assert by_rank[0]["saved_at_6"] == by_rank[0]["history"][:3]
    assert len(by_rank[0]["logged"]) == len(alone["logged"]) >= 2


def test_two_accelerated_processes_train_as_one_dense_one(tmp_path: Path) -> None:
    run_together(trainer_worker.work, WORLD, tmp_path, WORLD, True)
    by_rank = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(WORLD)]
    alone = trainer_worker.train(tmp_path / "alone", world=1)
    assert by_rank[0]["losses"] == by_rank[1]["losses"] == pytest.approx(alone["losses"], rel=1e-4)
    for one, two in zip(alone["history"], by_rank[0]["history"], strict=True):
        assert two["density"] == pytest.approx(one["density"], abs=2e-3)
    for result in by_rank:
        blocks = result["acceleration"]["blocks"]
        assert [block["calls"]["sparse"] > 0 for block in blocks] == [True, True]
