"""The ratio's terms over a run: means by tenths that keep the identity."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from steppe.runs import Run, read_run
from steppe.study.terms import PARTS, TERMS, terms_of
from steppe.training.recipe import read_recipe
from steppe.training.run_recipe import run_recipe


def test_the_terms_of_a_run_keep_the_identity(tmp_path: Path) -> None:
    flags = ["--output_dir", str(tmp_path), "--arm", "vanilla", "--max_steps", "20"]
    flags += ["--measure_every", "1", "--use_cpu", "true"]
    run_recipe(read_recipe("digits", flags))
    run = read_run(tmp_path)
    terms = terms_of(run)
    assert set(terms) == set(TERMS)
    density, af, norm, gradient = (terms[term] for term in TERMS)
    for part in range(PARTS):
        assert density[part] == pytest.approx(af[part] / (norm[part] * gradient[part]), rel=1e-5)
    blocks = [block for report in run.training[-2:] for block in report.blocks]
    logs = [math.log(block.derivative_density) for block in blocks]
    assert density[-1] == pytest.approx(math.exp(math.fsum(logs) / len(logs)))
    assert density[0] > density[-1]


def test_a_run_without_measures_has_no_terms() -> None:
    assert terms_of(Run("r", "M", 1.0)) == {term: [None] * PARTS for term in TERMS}
