"""`benchmarks/models_cpu.py` on tiny shapes: every row is there, wrong outputs would be seen."""

from __future__ import annotations

import copy
import json
import runpy
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import typer

import models_cpu
from steppe import find_blocks

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_every_row_is_measured_and_has_the_outputs_of_dense(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    models_cpu.main(path, quick=True, model=None)
    rows = json.loads(path.read_text())["models"]
    assert [(row["model"], row["case"]) for row in rows] == [
        (name, case) for name, subject in models_cpu.SUBJECTS.items() for case in subject.runs
    ]
    for row in rows:
        assert row["is_same"]
        assert 0.5 < row["density"] / row["wanted_density"] < 2.0
        assert set(row["blocks"]) <= {"sparse", "screened"}  # compared with the kernels' outputs
        assert row["rounds"] >= 3
        assert row["ratio"] > 0.0
    table = runpy.run_path(str(ROOT / "docs/render.py"))["models_markdown"]
    result = json.loads(path.read_text())
    row = result["models"][1]
    line = f"| NLLB-600M: 4 beams | float32 | {row['ratio']:.2f}× |"
    assert line in table(result)


@pytest.mark.parametrize("name", models_cpu.SUBJECTS)
def test_a_model_without_its_mlps_would_be_seen(name: str) -> None:
    dense, batch = models_cpu.made(name, quick=True)
    models_cpu.set_density_(dense.eval(), batch, 0.1)
    other = copy.deepcopy(dense)
    with torch.no_grad():
        for block in find_blocks(other):
            block.down.weight.zero_()
    for run in models_cpu.SUBJECTS[name].runs.values():
        apart = models_cpu.difference(run(dense, batch), run(other, batch))
        assert apart > 10.0 * max(models_cpu.TOLERANCE.values())


def test_other_outputs_end_the_program_with_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models_cpu, "TOLERANCE", {"float32": -1.0, "bfloat16": -1.0})
    with pytest.raises(typer.Exit) as raised:
        models_cpu.main(None, quick=True, model=["gated 7B, 1 layer"])
    assert raised.value.exit_code == 1
