"""Runs that start from the model of another run: their order, their hash, and what may go wrong."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from steppe.errors import StudyError
from steppe.study.plan import check_runs, model_folder, plan_runs, words_of
from steppe.study.planned import PlannedRun
from steppe.study.rows import read_rows
from steppe.study.running import run_in_processes
from steppe.study.study import StudyOutcome, run_study
from steppe.study.study_file import read_study
from study.fake_work import NUMBERS, row_of, work

CHAIN = """
recipes:
  digits:
    vary: {model_config.intermediate_size: [96, 192]}
    arms:
      first: {model_config.hidden_act: gelu}
      second: {learning_rate: 0.5}
arms:
  third: {after: second, arm: vanilla, vary: {ramp: [0.1, 0.2]}}
  second: {after: first, arm: vanilla, learning_rate: 0.1, max_steps: 5}
  first: {arm: vanilla}
  alone: {arm: control}
baseline: first
seeds: 1
"""
PAIR = """
recipes: {digits: }
arms:
  first: {arm: vanilla}
  second: {arm: vanilla, after: first}
seeds: 2
"""


def write(folder: Path, text: str) -> Path:
    path = folder / "mine.yaml"
    path.write_text(text)
    return path


def planned(file: Path, **options) -> list[PlannedRun]:
    return plan_runs(read_study(file), **options)


def run(file: Path, jobs: int = 2, **options) -> tuple[StudyOutcome, dict[str, list[str]]]:
    failures: dict[str, list[str]] = {}
    outcome = run_study(
        read_study(file),
        file.parent / "out",
        jobs,
        on_failure=lambda one, lines: failures.update({one: lines}),
        work=work,
        **options,
    )
    return outcome, failures


def starts(folder: Path) -> dict[str, int]:
    """How often each run was begun, by arm and seed."""
    return {
        f"{place.parents[1].name} {place.parent.name.partition('-')[2][0]}": len(place.read_text())
        for place in folder.rglob("starts")
    }


def test_a_run_stands_behind_the_one_whose_model_it_starts_from(tmp_path: Path) -> None:
    runs = planned(write(tmp_path, CHAIN))
    arms = ["first", "second", "third,ramp=0.1", "third,ramp=0.2", "alone"]
    assert [run.arm for run in runs] == arms + arms
    for one in runs:
        if one.after is not None:
            assert runs.index(one.after) < runs.index(one)
            assert (one.after.recipe, one.after.setting) == (one.recipe, one.setting)
    assert [run.after.arm for run in runs[:5] if run.after] == ["first", "second", "second"]


def test_it_is_given_that_model_and_no_key_of_a_new_one(tmp_path: Path) -> None:
    first, second = planned(write(tmp_path, CHAIN))[:2]
    assert f"--checkpoint={model_folder(first, tmp_path)}" in words_of(second, tmp_path)
    assert not [word for word in words_of(first, tmp_path) if word.startswith("--checkpoint")]
    assert first.flags["model_config"]["intermediate_size"] == 96
    assert not {"model_type", "model_config", "xavier"} & {*second.flags, *second.settings}
    assert {"model_type", "model_config", "xavier"} <= set(first.settings)
    study = read_study(tmp_path / "mine.yaml")
    check_runs(study, plan_runs(study), tmp_path)


def test_values_of_an_arm_in_one_recipe_stand_before_the_arms(tmp_path: Path) -> None:
    file = write(tmp_path, CHAIN.replace("  digits:", "  pydoc:\n  digits:"))
    by_recipe = {run.recipe_name: run for run in planned(file) if run.arm == "second"}
    assert by_recipe["digits"].flags["learning_rate"] == 0.5
    assert by_recipe["pydoc"].flags["learning_rate"] == 0.1
    first = next(run for run in planned(file) if (run.recipe_name, run.arm) == ("digits", "first"))
    assert first.flags["model_config"]["hidden_act"] == "gelu"
    assert first.flags["model_config"]["hidden_size"] == 48


def test_the_hash_is_of_all_runs_before_too(tmp_path: Path) -> None:
    before = {run.id: run.hash for run in planned(write(tmp_path, CHAIN))}
    after = {
        run.id: run.hash
        for run in planned(write(tmp_path, CHAIN.replace("hidden_act: gelu", "hidden_act: silu")))
    }
    changed = {name for name in before if before[name] != after[name]}
    assert changed == {name for name in before if "alone" not in name}
    other = {run.id: run.hash for run in planned(write(tmp_path, CHAIN.replace("0.5", "0.4")))}
    changed = {name for name in before if before[name] != other[name]}
    assert changed == {name for name in before if "second" in name or "third" in name}


def test_only_takes_the_arms_that_are_started_from_along(tmp_path: Path) -> None:
    runs = planned(write(tmp_path, CHAIN), only=["third"], quick=True)
    assert [run.arm for run in runs] == ["first", "second", "third,ramp=0.1"]
    assert {run.arm for run in planned(tmp_path / "mine.yaml", only=["alone"])} == {"alone"}


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ("after: first", "after: frist", "arms: second: after: expected one of the arms .*'frist'"),
        ("after: first", "after: second", "expected a first arm, .* second after second$"),
        ("first: {arm: vanilla}", "first: {after: third}", "expected an arm without `vary`.*third"),
        (
            "first: {arm: vanilla}",
            "first: {after: second}",
            "arms: expected a first arm, got a circle: second after first after second$",
        ),
        ("after: first", "after: [first]", "second: after: expected the name of an arm, got"),
        ("max_steps: 5", "xavier: true", "arms: second: xavier: the model is that of first; leave"),
        ("max_steps: 5", "model_config.x: 5", "second: model_config.x: the model is that of"),
        ("{learning_rate: 0.5}", "{checkpoint: x}", "arms: second: checkpoint: the model is that"),
        (
            "second: {learning_rate",
            "secnd: {learning_rate",
            "digits: arms: expected .* got 'secnd'",
        ),
        ("{learning_rate: 0.5}", "{vary: {ramp: [1]}}", "second: vary: expected it in the arm or"),
        ("{learning_rate: 0.5}", "{after: first}", "arms: second: unknown key 'after'"),
        ("{learning_rate: 0.5}", "[ramp]", "digits: arms: second: expected keys of a recipe"),
        ("    vary:", "    after: first\n    vary:", "recipes: digits: unknown key 'after'"),
        ("{arm: control}", "{arm: control, arms: {}}", "arms: alone: unknown key 'arms'"),
    ],
)
def test_a_wrong_start_is_one_error_that_names_the_place(
    tmp_path: Path, old: str, new: str, told: str
) -> None:
    assert old in CHAIN
    file = write(tmp_path, CHAIN.replace(old, new, 1))
    with pytest.raises(StudyError, match=told) as raised:
        planned(file)
    assert str(file) in str(raised.value)


def test_a_model_with_plugins_is_no_start(tmp_path: Path) -> None:
    study = read_study(
        write(tmp_path, CHAIN.replace("first: {arm: vanilla}", "first: {arm: steppe}"))
    )
    told = r"arms: second: after: expected an arm without plug-ins, first has zeroth_bias, "
    with pytest.raises(StudyError, match=told):
        check_runs(study, plan_runs(study, only=["second"])[1:2], tmp_path)


@pytest.mark.parametrize("jobs", [1, 4])
def test_runs_start_from_what_was_made_and_their_rows_say_so(tmp_path: Path, jobs: int) -> None:
    file = write(tmp_path, CHAIN)
    outcome, failures = run(file, jobs)
    assert failures == {}
    assert len(outcome.rows) == 10
    rows = {row["id"]: row for row in outcome.rows}
    assert {row["arm"]: row.get("after") for row in rows.values()} == {
        **{"first": None, "second": "first", "alone": None},
        **{"third,ramp=0.1": "second", "third,ramp=0.2": "second"},
    }
    assert not [row for row in rows.values() if row["arm"] == "alone" and "after" in row]
    started = {place.read_text() for place in tmp_path.rglob("start")}
    assert started == {name for name in rows if "/first/" in name or "/second/" in name}


def test_what_starts_from_a_run_that_fails_is_not_begun_and_is_reported(tmp_path: Path) -> None:
    names = (("first", "raises"), ("second", "next"), ("third", "last"))
    text = CHAIN
    for old, new in names:
        text = text.replace(old, new)
    outcome, failures = run(write(tmp_path, text))
    assert [row["arm"] for row in outcome.rows] == ["alone", "alone"]
    assert set(failures) == set(outcome.failed)
    assert len(failures) == 2 + 2 + 4
    setting = "model_config.intermediate_size=96/seed-0"
    assert failures[f"digits/next/{setting}"] == [
        f"not begun: it starts from digits/raises/{setting}, which failed"
    ]
    assert failures[f"digits/last,ramp=0.1/{setting}"] == [
        f"not begun: it starts from digits/next/{setting}, which failed"
    ]
    begun = {place.relative_to(tmp_path / "out").parts[1] for place in tmp_path.rglob("starts")}
    assert begun == {"raises", "alone"}


def test_the_study_ends_if_nothing_is_left_but_what_cannot_begin(tmp_path: Path) -> None:
    text = PAIR.replace("first", "raises").replace("seeds: 2", "seeds: 1")
    outcome, failures = run(write(tmp_path, text), jobs=1)
    assert outcome.failed == ["digits/raises/seed-0", "digits/second/seed-0"]
    assert "not begun" in failures["digits/second/seed-0"][0]


def test_what_is_done_stays_done_and_a_model_that_is_gone_is_made_again(tmp_path: Path) -> None:
    file = write(tmp_path, PAIR)
    run(file, only=["first"])
    assert starts(tmp_path) == {"first 0": 1, "first 1": 1}
    gone, _ = planned(file)[:2]
    shutil.rmtree(model_folder(gone, tmp_path / "out"))
    outcome, failures = run(file)
    assert (failures, len(outcome.rows)) == ({}, 4)
    assert starts(tmp_path) == {"first 0": 2, "first 1": 1, "second 0": 1, "second 1": 1}
    shutil.rmtree(model_folder(gone, tmp_path / "out"))
    assert len(run(file)[0].rows) == 4
    assert starts(tmp_path)["first 0"] == 2, "nobody starts from it any more"
    assert len(read_rows(outcome.file)) == 4


def test_a_task_waits_for_the_end_of_the_one_it_names(tmp_path: Path) -> None:
    tasks = []
    for index, (seed, after) in enumerate([(0, None), (1, 0), (2, None), (3, 1)]):
        place = tmp_path / str(index)
        place.mkdir()
        row = {**row_of(seed), "id": str(index)}
        start = [] if after is None else [f"--checkpoint={tmp_path / str(after) / 'model'}"]
        tasks.append({"folder": str(place), "row": row, "after": after, "flags": start})
    messages = list(run_in_processes(work, tasks, jobs=4))
    ends = [message.task for message in messages if not message.values]
    assert set(ends) == {0, 1, 2, 3}
    assert all(message.failure is None for message in messages)
    first_words = [next(i for i, m in enumerate(messages) if m.task == task) for task in range(4)]
    for index, after in ((1, 0), (3, 1)):
        end = next(i for i, m in enumerate(messages) if m.task == after and not m.values)
        assert end < first_words[index]
    rows = [message.values["row"] for message in messages if "row" in message.values]
    assert all(row | NUMBERS == row for row in rows)
