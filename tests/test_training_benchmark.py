"""`benchmarks/training_cpu.py` in tiny sizes: its arms train, and its results make a table."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import pytest
import torch

import steppe
import training_cpu
from steppe.ops.cpu.library import kernels

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.skipif(kernels().name != "native", reason=kernels().reason)


@pytest.fixture
def text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    for name, value in (("D_MODEL", 16), ("LAYERS", 1), ("HEADS", 2), ("TOKENS", 32)):
        monkeypatch.setattr(training_cpu, name, value)
    monkeypatch.setattr(training_cpu, "EVALUATED", 2)
    monkeypatch.setattr(training_cpu, "TURNS", 3)
    path = tmp_path / "text"
    path.write_bytes(bytes(range(97, 123)) * 200)
    return training_cpu.Text(path)


def test_every_part_is_measured_and_shown(text: Any) -> None:
    found = {
        "steps": training_cpu.steps(text),
        "runs": training_cpu.runs(text, 6, training_cpu.RUNS),
        "time": {"0.1 s": training_cpu.in_time(text, 0.1, training_cpu.TIME)},
    }
    dense = found["runs"]["vanilla, dense"]
    assert dense["steps"] == 6
    assert dense["loss"] == pytest.approx(found["runs"]["vanilla"]["loss"], rel=1e-4)
    assert all(row["seconds"] >= 0.1 for row in found["time"]["0.1 s"].values())
    wide = found["time"]["0.1 s"]["threshold, 16 d"]
    assert wide["parameters"] > 1.5 * dense["parameters"]
    table = runpy.run_path(str(ROOT / "docs/render.py"))["training_markdown"](found)
    assert f"| vanilla, dense | {dense['ms_a_step']:.0f} |" in table
    assert all(name in table for part in found.values() for name in part)


def test_a_plain_model_gets_the_thresholds_in_its_biases(text: Any) -> None:
    run, plain = (training_cpu.Run(training_cpu.Arm(p)) for p in (training_cpu.THRESHOLD, ()))
    for number in range(4):
        run.step(text.batch(number, text.train), 1.0)
    training_cpu.with_folded_weights(plain, run)
    ids = text.batch(0, text.held_out)
    with torch.no_grad():
        expected, got = (one.model.eval()(input_ids=ids).logits for one in (run, plain))
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    block = steppe.find_blocks(run.model)[0]
    assert block.activated.threshold.deviation.min() > 0
    assert (block.activated.bias - steppe.find_blocks(plain.model)[0].activated.bias).min() > 0
