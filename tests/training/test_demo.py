"""The demo's arms: what differs between them, and what does not."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from steppe.data.embedded import load_digits_split, load_pydoc_split
from steppe.errors import NonFiniteLossError
from steppe.runs import read_run
from steppe.training import demo
from steppe.training.recipe import read_recipe
from steppe.training.recipe_arguments import model_settings
from steppe.training.recipe_file import RECIPES


def test_digits_are_all_there_once() -> None:
    split = load_digits_split()
    assert len(split.train) + len(split.held_out) == 1797
    image = split.train[0]["pixel_values"]
    assert image.shape == (1, 8, 8)
    seen = {tuple(split.train[i]["pixel_values"].flatten().tolist()) for i in range(1437)}
    held_out = [
        tuple(split.held_out[i]["pixel_values"].flatten().tolist())
        for i in range(len(split.held_out))
    ]
    assert not seen.intersection(held_out)


def test_pydoc_is_text_in_disjoint_windows() -> None:
    split = load_pydoc_split(context=64)
    ids = split.train[100]["input_ids"]
    assert ids.shape == (64,)
    assert torch.equal(ids, split.train[100]["labels"])
    assert bytes(ids.tolist()).decode("utf-8", errors="replace").isprintable() or b"\n" in bytes(
        ids.tolist()
    )
    share = len(split.held_out) / (len(split.train) + len(split.held_out))
    assert 0.1 <= share < 0.25


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("demo")


@pytest.fixture(scope="module")
def summary(folder: Path) -> dict:
    """The demo with little held-out data and short timing."""
    torch.set_num_threads(1)
    tasks = []
    for task in demo.TASKS:
        text = (RECIPES / f"{task.name}.yaml").read_text(encoding="utf-8")
        cheap = folder / f"{task.name}.yaml"
        cheap.write_text(f"{text}held_out_samples: 64\n")
        tasks.append(replace(task, recipe=cheap))
    text = (RECIPES / "pydoc-wide.yaml").read_text(encoding="utf-8")
    narrow = folder / "pydoc-wide.yaml"  # an eighth as wide
    for old, new in (
        *(("n_embd: 256", "n_embd: 64"), ("n_inner: 4096", "n_inner: 512")),
        *(
            ("held_out_samples: 128", "held_out_samples: 64"),
            ("time_blocks: 0.5", "time_blocks: 0.02"),
        ),
        *(("measure_every: 25", "measure_every: 10"),),
    ):
        assert old in text
        text = text.replace(old, new)
    narrow.write_text(text)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo, "TASKS", tuple(tasks))
        patch.setattr(demo, "WIDE", replace(demo.WIDE, recipe=narrow))
        return demo.run_demo(folder, seeds=2, max_steps=11)


def test_all_arms_start_from_the_same_weights_and_batches(summary: dict) -> None:
    for data_set in summary["data_sets"].values():
        for seed in range(2):
            # The first step is counted before any update, so it differs by the activation alone:
            # J-SquaredReLU of the first block has the support of ReLU.
            firsts = [arm["runs"][seed]["history"][0] for arm in data_set["arms"].values()]
            assert list(data_set["arms"]) == ["vanilla", "control", "steppe", "best"]
            assert firsts[0] == firsts[1]
            assert firsts[2] == firsts[3], "the threshold is 0 yet"
            assert firsts[0][0] == 1
        seeds = {tuple(run["history"][0]) for run in data_set["arms"]["vanilla"]["runs"]}
        assert len(seeds) == 2


def test_the_threshold_has_risen_over_the_first_half(summary: dict) -> None:
    for data_set in summary["data_sets"].values():
        arms = data_set["arms"]
        for seed in range(2):
            control, threshold = (arms[arm]["runs"][seed]["history"] for arm in ("control", "best"))
            assert [step for step, _ in threshold] == [1, 11]
            assert threshold[1][1] < 0.75 * control[1][1]


def test_the_wide_model_is_trained_twice_from_the_same_weights(summary: dict, folder: Path) -> None:
    twice = summary["accelerated"]
    dense, ours = (twice["runs"][way] for way in ("dense", "accelerated"))
    assert (twice["recipe"], twice["arm"], twice["steps"]) == ("pydoc-wide", "threshold", 11)
    assert dense["history"][0] == ours["history"][0]
    assert ours["quality"] == pytest.approx(dense["quality"], rel=1e-3)
    assert ours["density"] == pytest.approx(dense["density"], abs=0.01)
    seconds = [run["processor_seconds"] for run in (dense, ours)]
    assert twice["speed_up"] == pytest.approx(seconds[0] / seconds[1])
    runs = [read_run(folder / label) for label in demo.labels_of_runs(2)[-2:]]
    assert [len(run.acceleration.get("blocks", ())) for run in runs] == [0, 1]


def test_the_speed_of_the_trained_blocks_is_in_the_summary(summary: dict) -> None:
    run = summary["accelerated"]["runs"]["accelerated"]
    assert [row["case"] for row in run["speed"]] == ["training", "prefill"]
    for row in run["speed"]:
        assert row["ratio"] > 0
        # As many tokens as a step has; enough for the kernels to be called.
        assert row["tokens"] == 1024
        # What is timed has the threshold in its biases; without, half as much again is active.
        assert row["density"] == pytest.approx(run["density"], rel=0.2)
    assert summary["accelerated"]["runs"]["dense"]["speed"] == []
    for data_set in summary["data_sets"].values():
        assert all(not one["speed"] for arm in data_set["arms"].values() for one in arm["runs"])


def test_the_wide_model_is_wide_enough_to_gain() -> None:
    settings = model_settings(read_recipe("pydoc-wide").model)
    assert settings["n_embd"] >= 256
    assert settings["n_inner"] >= 1024


def test_means_and_deviations_are_those_of_the_runs(summary: dict) -> None:
    arm = summary["data_sets"]["digits"]["arms"]["steppe"]
    values = torch.tensor([run["density"] for run in arm["runs"]], dtype=torch.float64)
    assert arm["density"] == pytest.approx(values.mean().item(), rel=1e-12)
    assert arm["std"]["density"] == pytest.approx(values.std().item(), rel=1e-9)
    assert set(arm["std"]) >= {"accuracy", "density", "training_density", "derivative_density"}


def test_a_run_that_diverges_is_an_error_and_leaves_no_summary(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = (RECIPES / "digits.yaml").read_text(encoding="utf-8")
    broken = tmp_path / "digits.yaml"
    broken.write_text(text.replace("learning_rate: 1.0e-2", "learning_rate: 1.0e+30"))
    monkeypatch.setattr(demo, "TASKS", (demo.Task(broken, "accuracy", "top1"),))
    with pytest.raises(NonFiniteLossError, match="nan"):
        demo.run_demo(tmp_path, max_steps=2)
    assert not (tmp_path / "summary.json").exists()


@pytest.mark.parametrize("arguments", [{"seeds": 0}, {"max_steps": 0}])
def test_nothing_to_do_is_an_error(tmp_path: Path, arguments: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="at least one"):
        demo.run_demo(tmp_path, **arguments)
