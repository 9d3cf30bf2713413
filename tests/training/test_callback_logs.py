"""SteppeCallback's metrics: with every reporter, among an evaluation's metrics, on the console."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from mlflow import MlflowClient
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from transformers import (
    EarlyStoppingCallback,
    GPT2Config,
    GPT2LMHeadModel,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

import models
from steppe import watch
from steppe.training import SteppeCallback

TOKENS = 8
STEPS = 4
BLOCKS = ("transformer.h.0", "transformer.h.1")
# What a log has of an evaluation: densities, and what needs no backward pass.
OF_EVALUATION = {"density", "derivative_density", "dead_neurons"}


def dataset(items: int, seed: int) -> list[dict[str, torch.Tensor]]:
    return [{"input_ids": ids, "labels": ids} for ids in models.token_ids(items, TOKENS, seed)]


def gpt2() -> nn.Module:
    torch.manual_seed(0)
    return models.gpt2()


def make_trainer(
    folder: Path,
    model: nn.Module,
    *callbacks: TrainerCallback,
    eval_dataset: Any = None,
    **options: Any,
) -> Trainer:
    arguments: dict[str, Any] = {
        "output_dir": str(folder),
        "max_steps": STEPS,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "logging_steps": 2,
        "eval_strategy": "steps",
        "eval_steps": 2,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
        "dataloader_pin_memory": False,
    }
    return Trainer(
        model=model,
        args=TrainingArguments(**arguments | options),
        train_dataset=dataset(16, 0),
        eval_dataset=dataset(8, 1) if eval_dataset is None else eval_dataset,
        callbacks=list(callbacks),
    )


class Listener(TrainerCallback):
    """Keeps every log as it comes, as a reporter does."""

    def __init__(self) -> None:
        self.logs: list[dict[str, Any]] = []
        self.evaluations: list[dict[str, Any]] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any, **kwargs: Any) -> None:
        self.logs.append({**logs, "step": state.global_step})

    def on_evaluate(self, *args: Any, metrics: dict[str, Any], **kwargs: Any) -> None:
        self.evaluations.append(dict(metrics))


def density_of(model: nn.Module, data: list[dict[str, torch.Tensor]]) -> float:
    """The density on some data, by `watch`."""
    model.eval()
    with watch(model) as monitor, torch.no_grad():
        model(input_ids=torch.stack([row["input_ids"] for row in data]))
    return monitor.report().density


# ---- an evaluation's metrics


def test_an_evaluations_metrics_have_its_density(tmp_path: Path) -> None:
    model = gpt2()
    trainer = make_trainer(tmp_path, model, SteppeCallback(every=1))
    before = trainer.evaluate()
    assert before["eval_density"] == density_of(model, trainer.eval_dataset)
    trainer.train()
    after = trainer.evaluate()
    assert after["eval_density"] == density_of(model, trainer.eval_dataset)
    assert after["eval_density"] != before["eval_density"]
    assert {f"eval_{key}" for key in OF_EVALUATION} <= after.keys()
    assert not any("/" in key for key in after), "a block's are for reporters"
    assert trainer.predict(trainer.eval_dataset).metrics["test_density"] == after["eval_density"]


def test_each_evaluation_stands_in_the_history_of_logs_with_its_blocks(tmp_path: Path) -> None:
    callback = SteppeCallback(every=1)
    trainer = make_trainer(tmp_path, gpt2(), callback)
    trainer.train()
    logs = [log for log in trainer.state.log_history if "eval_loss" in log]
    assert [log["step"] for log in logs] == [2, 4]
    for log, entry in zip(logs, callback.held_out_history, strict=True):
        assert log["eval_density"] == entry["density"]
        for index, name in enumerate(BLOCKS):
            for key in OF_EVALUATION:
                blocks = entry[f"{key}_per_block"]
                assert log[f"eval_{key}_per_block/{name}"] == blocks[index]
        assert "density" not in log
    assert len({log["eval_density"] for log in logs}) == 2


def test_the_best_model_can_be_the_sparsest(tmp_path: Path) -> None:
    trainer = make_trainer(
        tmp_path,
        gpt2(),
        SteppeCallback(every=1),
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="eval_density",
        greater_is_better=False,
    )
    trainer.train()
    densities = [log["eval_density"] for log in trainer.state.log_history if "eval_loss" in log]
    assert trainer.state.best_metric == min(densities) < max(densities)
    assert trainer.evaluate()["eval_density"] == min(densities)


def test_training_can_stop_where_the_density_stops_falling(tmp_path: Path) -> None:
    trainer = make_trainer(
        tmp_path,
        gpt2(),
        SteppeCallback(every=1),
        EarlyStoppingCallback(early_stopping_patience=1, early_stopping_threshold=1.0),
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="eval_density",
        greater_is_better=False,
        max_steps=8,
    )
    trainer.train()
    assert trainer.state.global_step == 2, "no density falls by 1"


def test_several_data_sets_are_told_apart_and_make_one_entry_of_the_history(
    tmp_path: Path,
) -> None:
    callback, model = SteppeCallback(every=1), gpt2()
    sets = {"one": dataset(8, 1), "other": dataset(4, 2)}
    trainer = make_trainer(tmp_path, model, callback, eval_dataset=sets, max_steps=2)
    trainer.train()
    metrics = trainer.evaluate()
    for name, data in sets.items():
        assert metrics[f"eval_{name}_density"] == density_of(model, data)
    assert metrics["eval_one_density"] != metrics["eval_other_density"]
    (entry,) = callback.held_out_history
    assert entry["density"] == density_of(model, [*sets["one"], *sets["other"]])


def test_evaluations_at_the_start_and_by_other_callbacks_are_counted(tmp_path: Path) -> None:
    class Evaluates(TrainerCallback):
        trainer: Trainer

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 3:
                self.trainer.evaluate()

    callback, other = SteppeCallback(every=1), Evaluates()
    other.trainer = make_trainer(tmp_path, gpt2(), callback, other, eval_on_start=True)
    other.trainer.train()
    assert [entry["step"] for entry in callback.held_out_history] == [0, 2, 3, 4]
    assert [entry["step"] for entry in callback.history] == [1, 2, 3, 4]


# ---- reporters


def test_tensorboard_and_mlflow_have_all_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # MLflow's own files are what needs no server and no database.
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "mlflow").as_uri())
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "events"))
    reporters = ["tensorboard", "mlflow"]
    trainer = make_trainer(tmp_path, gpt2(), SteppeCallback(every=1), report_to=reporters)
    trainer.train()
    events = EventAccumulator(str(tmp_path / "events")).Reload()
    client = MlflowClient((tmp_path / "mlflow").as_uri())
    (run,) = client.search_runs([client.get_experiment_by_name("Default").experiment_id])
    parts = ("density", "derivative_density", "AF_up", "active_gain", "dead_neurons")
    keys = [*parts, "training_density", *(f"eval_{key}" for key in OF_EVALUATION)]
    keys += [f"{key}_per_block/{name}" for key in parts for name in BLOCKS]
    keys += [f"eval_{key}_per_block/{name}" for key in OF_EVALUATION for name in BLOCKS]
    for key in keys:
        logs = trainer.state.log_history
        want = [(log["step"], pytest.approx(log[key], rel=1e-6)) for log in logs if key in log]
        assert len(want) == 2
        part, name = ("eval", key[5:]) if key.startswith("eval_") else ("train", key)
        assert [(e.step, e.value) for e in events.Scalars(f"{part}/{name}")] == want
        assert [(m.step, m.value) for m in client.get_metric_history(run.info.run_id, key)] == want


@pytest.mark.parametrize("later", [False, True], ids=["in the constructor", "by add_callback"])
def test_every_callback_that_does_not_print_is_told_all(tmp_path: Path, later: bool) -> None:
    first, last, callback = Listener(), Listener(), SteppeCallback(every=1)
    trainer = make_trainer(tmp_path, gpt2(), *([first] if later else [first, callback]))
    if later:
        trainer.add_callback(callback)
    trainer.add_callback(last)
    trainer.train()
    assert first.logs == last.logs
    assert [log | {"step": 0} for log in first.logs] == [
        log | {"step": 0} for log in trainer.state.log_history
    ]
    assert f"density_per_block/{BLOCKS[1]}" in first.logs[0]
    assert f"eval_density_per_block/{BLOCKS[1]}" in first.logs[1]
    assert all("eval_density" in metrics for metrics in first.evaluations)
    assert len(first.evaluations) == 2


def test_the_order_of_the_callbacks_is_that_of_the_user(tmp_path: Path) -> None:
    ours = [Listener(), SteppeCallback(every=1), EarlyStoppingCallback()]
    trainer = make_trainer(tmp_path, gpt2(), *ours)
    order = [one for one in trainer.callback_handler.callbacks if one in ours]
    assert order == ours


def test_a_callback_that_was_taken_out_does_nothing(tmp_path: Path) -> None:
    callback = SteppeCallback(every=1)
    trainer = make_trainer(tmp_path, gpt2(), callback)
    trainer.remove_callback(callback)
    trainer.train()
    assert callback.history == []
    assert not any("density" in key for log in trainer.state.log_history for key in log)


def test_two_callbacks_and_two_runs_log_once(tmp_path: Path) -> None:
    callbacks = SteppeCallback(every=1), SteppeCallback(every=2, per_block=False)
    trainer = make_trainer(tmp_path, gpt2(), *callbacks)
    for _ in range(2):
        trainer.train()
    assert [entry["step"] for entry in callbacks[0].history] == [1, 2, 3, 4]
    assert [entry["step"] for entry in callbacks[1].history] == [1, 3]
    assert callbacks[0].history[::2] == callbacks[1].history


def test_a_copy_of_a_trainer_measures_its_own_model(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, gpt2(), SteppeCallback(every=1))
    twin = copy.deepcopy(trainer)
    twin.train()
    (ours,), (theirs,) = (
        [c for c in one.callback_handler.callbacks if isinstance(c, SteppeCallback)]
        for one in (trainer, twin)
    )
    assert len(theirs.history) == STEPS
    assert ours.history == []
    assert torch.equal(trainer.model.lm_head.weight, gpt2().lm_head.weight)


@pytest.fixture
def _no_garbage_collector() -> Iterator[None]:
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.mark.usefixtures("_no_garbage_collector")
def test_a_trainer_and_its_model_go_when_nobody_holds_them(tmp_path: Path) -> None:
    model = gpt2()
    trainer = make_trainer(tmp_path, model, SteppeCallback(every=1))
    trainer.train()
    gone = weakref.ref(trainer), weakref.ref(model)
    del trainer, model
    assert [one() for one in gone] == [None, None]


def test_a_trainer_stays_of_its_class_for_everybody_else(tmp_path: Path) -> None:
    class Mine(Trainer):
        steps = 0

        def training_step(self, *args: Any, **kwargs: Any) -> Any:
            self.steps += 1
            return super().training_step(*args, **kwargs)

    callback = SteppeCallback(every=1)
    arguments = make_trainer(tmp_path, gpt2()).args
    trainer = Mine(gpt2(), arguments, train_dataset=dataset(8, 0), eval_dataset=dataset(8, 1))
    trainer.add_callback(callback)
    trainer.train()
    assert isinstance(trainer, Mine)
    assert repr(type(trainer)) == repr(Mine)
    assert trainer.steps == STEPS
    assert len(callback.history) == STEPS


# ---- the console


def twelve_layers() -> nn.Module:
    sizes = {"vocab_size": models.VOCABULARY, "n_embd": 16, "n_layer": 12, "n_head": 2}
    config = GPT2Config(**sizes, **models.SPECIAL_TOKENS, activation_function="relu")
    return GPT2LMHeadModel(config)


@pytest.mark.parametrize("bar", [False, True], ids=["printed", "beside a bar"])
@pytest.mark.parametrize("later", [False, True], ids=["in the constructor", "by add_callback"])
def test_a_log_of_twelve_layers_is_one_line_on_the_console(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], bar: bool, later: bool
) -> None:
    callback = SteppeCallback(every=1)
    callbacks = [] if later else [callback]
    trainer = make_trainer(tmp_path, twelve_layers(), *callbacks, disable_tqdm=not bar, max_steps=2)
    if later:
        trainer.add_callback(callback)
    trainer.train()
    lines = [line for line in capsys.readouterr().out.splitlines() if "{" in line]
    training, evaluation = (
        next(line for line in lines if f"'{key}'" in line) for key in ("loss", "eval_loss")
    )
    for key in ("density", "derivative_density", "training_density"):
        assert f"'{key}'" in training
    for key in ("eval_density", "eval_derivative_density"):
        assert f"'{key}'" in evaluation
    assert max(map(len, lines)) < 220
    assert len(trainer.state.log_history[0]) > 12 * 8, "the log itself is short"
