"""The record of a run: what is written is read back, and nothing else is."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import pytest

import models
import steppe
from steppe.errors import OutputError, RunError
from steppe.measures.report import Report, report_from_dict
from steppe.runs import RUN_FILE, RUN_VERSION, Run, read_run, write_run


@pytest.fixture(scope="module")
def report() -> Report:
    ids = models.token_ids(3, 5)
    return steppe.measure(models.gpt2(), [{"input_ids": ids, "labels": ids}])


ACCELERATION = {
    "kernels": "avx2",
    "blocks": [{"name": "h.0", "calls": {"sparse": 3, "dense": 1}, "reasons": {"why": 1}}],
    "not_accelerated": {"h.1": "GELU"},
}


def run_of(report: Report) -> Run:
    return Run(
        name="a <b>",
        model="GPT2LMHeadModel",
        tokens_per_sample=5.0,
        steps=[1, 2],
        training=[report, report],
        held_out_steps=[2],
        held_out=[report],
        logs=[{"step": 1, "loss": 0.5}],
        quality={"loss": 0.25},
        speed=[
            {"case": "training", "dtype": "float32", "d": 8, "tokens": 4, "threads": 1}
            | {"density": 0.5, "candidates": 0.6, "dense_ms": 2.0, "ratio": 1.5, "bound": 2.5}
            | {"unscreened_ratio": 1.25}
        ],
        acceleration=ACCELERATION,
    )


def same(one: Report, two: Report) -> bool:
    """Equal where NaN is NaN."""
    return one.to_dict() == two.to_dict()


def test_a_report_survives_as_json(report: Report) -> None:
    text = json.dumps(report.to_dict(), allow_nan=False)
    again = report_from_dict(json.loads(text))
    assert same(again, report)
    assert math.isnan(again.blocks[0].AF_gate)
    assert again.blocks[0].neuron_frequency == report.blocks[0].neuron_frequency
    for block, wanted in zip(again.blocks, report.blocks, strict=True):
        assert block.AF_per_entry == wanted.AF_per_entry
        assert block.standard_errors["AF_up"] == wanted.standard_errors["AF_up"]


def test_what_was_not_covered_is_kept_and_may_be_unknown(report: Report, tmp_path: Path) -> None:
    part = dataclasses.replace(
        report, coverage=0.25, not_covered=("odd: fc_in, act, fc_out (4 → 8 → 4)",)
    )
    values = json.loads(json.dumps(part.to_dict()))
    again = report_from_dict(values)
    assert (again.coverage, again.not_covered) == (0.25, part.not_covered)
    run = dataclasses.replace(run_of(report), training=[part, part], held_out=[part])
    write_run(run, tmp_path / "steppe.json")
    text = (tmp_path / "steppe.json").read_text()
    assert text.count("not_covered") == 1  # not in each step
    assert all(one.coverage == 0.25 for one in read_run(tmp_path).training)
    old = json.loads(text)
    del old["blocks"]["coverage"], old["blocks"]["not_covered"]
    (tmp_path / "steppe.json").write_text(json.dumps(old))
    first = read_run(tmp_path).held_out[0]
    assert math.isnan(first.coverage)
    assert first.not_covered == ()
    old["blocks"]["not_covered"] = [3]
    (tmp_path / "steppe.json").write_text(json.dumps(old))
    with pytest.raises(RunError, match="not_covered"):
        read_run(tmp_path)


def test_a_run_is_read_as_it_was_written(report: Report, tmp_path: Path) -> None:
    run = run_of(report)
    write_run(run, tmp_path / RUN_FILE)
    for path in (tmp_path, tmp_path / RUN_FILE):
        again = read_run(path)
        for field in dataclasses.fields(Run):
            one, two = getattr(again, field.name), getattr(run, field.name)
            if field.name in ("training", "held_out"):
                assert all(same(a, b) for a, b in zip(one, two, strict=True))
            else:
                assert one == two, field.name
    assert run.block_names == ("transformer.h.0", "transformer.h.1")
    assert run.training_density == pytest.approx(report.density)
    assert [path.name for path in tmp_path.iterdir()] == [RUN_FILE]


def test_a_run_without_reports_is_a_run(tmp_path: Path) -> None:
    write_run(Run(name="empty", model="M", tokens_per_sample=float("nan")), tmp_path / "run.json")
    run = read_run(tmp_path / "run.json")
    assert math.isnan(run.tokens_per_sample)
    assert math.isnan(run.training_density)
    assert run.block_names == ()


def test_a_run_of_before_speed_was_recorded_is_read(report: Report, tmp_path: Path) -> None:
    write_run(run_of(report), tmp_path / RUN_FILE)
    values = json.loads((tmp_path / RUN_FILE).read_text())
    del values["speed"], values["acceleration"]
    (tmp_path / RUN_FILE).write_text(json.dumps(values))
    assert read_run(tmp_path).speed == []
    assert read_run(tmp_path).acceleration == {}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "cannot be read as JSON"),
        ("[]", "version None"),
        ('{"version": 1, "data_sets": {}}', "Another program"),
        (f'{{"version": {RUN_VERSION + 1}, "training": []}}', f"version {RUN_VERSION + 1}"),
        (f'{{"version": {RUN_VERSION}, "training": []}}', "damaged"),
        ("\udcff", "cannot be read"),
    ],
)
def test_what_is_no_run_is_refused_by_name(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / RUN_FILE
    file.write_bytes(text.encode("utf-8", errors="surrogateescape"))
    with pytest.raises(RunError, match=message) as caught:
        read_run(tmp_path)
    assert str(file) in str(caught.value)


@pytest.mark.parametrize("part", ["training", "held_out", "blocks", "name"])
def test_a_damaged_run_is_refused(report: Report, tmp_path: Path, part: str) -> None:
    file = tmp_path / RUN_FILE
    write_run(run_of(report), file)
    values = json.loads(file.read_text())
    values[part] = [{"density": 1.0}] if part != "name" else values.pop("name")[:0]
    if part == "name":
        del values["name"]
    file.write_text(json.dumps(values))
    with pytest.raises(RunError, match="damaged"):
        read_run(file)


def test_a_run_that_is_not_there_says_what_was_looked_for(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=f"expected a folder with {RUN_FILE}"):
        read_run(tmp_path)
    with pytest.raises(RunError, match="`steppe measure` wrote"):
        read_run(tmp_path / "nowhere.json")


def test_a_run_that_cannot_be_written_leaves_nothing(report: Report, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OutputError):
        write_run(run_of(report), tmp_path / "file" / "run.json")


@pytest.mark.parametrize(
    ("key", "value", "named"),
    [
        ("name", 1, "name"),
        ("steps", [1, "2"], "steps"),
        ("steps", [1], "1 steps of 2 reports"),
        ("quality", {"loss": 10**400}, "quality"),
        ("quality", {"loss": True}, "quality"),
        ("logs", [1], "logs"),
        ("speed", [{"case": "training"}], "speed has a dtype"),
        ("acceleration", {"kernels": "avx2", "blocks": []}, "acceleration has a not_accelerated"),
        ("acceleration", ACCELERATION | {"blocks": [{"name": "h.0"}, {}]}, "no numbers of calls"),
        (
            "acceleration",
            ACCELERATION | {"blocks": [{"name": "h.0", "calls": {"sparse": -1}}]},
            "no numbers of calls",
        ),
        ("acceleration", ACCELERATION | {"blocks": [{"name": "h.0", "calls": 1}]}, "values"),
        ("activations", "ReLU", "activations"),
        ("tokens_per_sample", "5", "tokens_per_sample"),
    ],
)
def test_a_value_of_another_kind_is_refused_when_it_is_read(
    report: Report, tmp_path: Path, key: str, value: object, named: str
) -> None:
    write_run(run_of(report), tmp_path / RUN_FILE)
    values = json.loads((tmp_path / RUN_FILE).read_text())
    (tmp_path / RUN_FILE).write_text(json.dumps(values | {key: value}))
    with pytest.raises(RunError, match=f"damaged.*{named}"):
        read_run(tmp_path)


def test_what_is_no_file_is_no_run(tmp_path: Path) -> None:
    (tmp_path / RUN_FILE).symlink_to("/dev/zero")
    with pytest.raises(RunError, match="got a device"):
        read_run(tmp_path)
