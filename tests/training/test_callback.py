"""SteppeCallback in a stock Trainer: metrics, constraints, schedules, resuming."""

from __future__ import annotations

import copy
import itertools
import json
import math
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    AutoModelForCausalLM,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    default_data_collator,
)
from transformers.training_args import ParallelMode

import models
import steppe
from steppe import (
    JumpingSquaredReLU,
    Plugin,
    RestrictedNorm,
    ZerothBias,
    find_blocks,
    load_pretrained,
    sparsify_,
    watch,
)
from steppe.errors import NonFiniteLossError, ScheduleError
from steppe.plugins.applied import require_sparsification
from steppe.runs import RUN_FILE, read_run
from steppe.training import SteppeCallback
from steppe.wiring.first_pass import stop_looking

pytestmark = [
    # Deprecated in Transformers 5, but the only name that the oldest supported version has.
    pytest.mark.filterwarnings("ignore:.gradient_checkpointing. is deprecated:FutureWarning"),
    # What torch.compile does inside.
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),
]

TOKENS = 8
BATCH = 4
STEPS = 8
# Transformers' own numbers that differ after resuming.
NOT_RESUMED = ("runtime", "per_second", "train_loss")
BLOCKS = ("transformer.h.0", "transformer.h.1")


def dataset(items: int = 24, seed: int = 0) -> list[dict[str, Tensor]]:
    """Sequences of different lengths, padded on the right."""
    ids = models.token_ids(items, TOKENS, seed)
    mask = torch.arange(TOKENS) < 2 + torch.arange(items).unsqueeze(1) % (TOKENS - 1)
    labels = ids.masked_fill(~mask, -100)
    return [
        {"input_ids": i, "attention_mask": m.long(), "labels": y}
        for i, m, y in zip(ids, mask, labels, strict=True)
    ]


def gpt2(*plugins: Plugin) -> nn.Module:
    torch.manual_seed(0)
    model = models.gpt2()
    return sparsify_(model, plugins) if plugins else model


def all_three(ramp: float = 0.5) -> nn.Module:
    return gpt2(ZerothBias(), RestrictedNorm(), JumpingSquaredReLU(ramp=ramp))


class Batches:
    """A collator that keeps what it made."""

    def __init__(self) -> None:
        self.made: list[dict[str, Tensor]] = []

    def __call__(self, items: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        self.made.append(default_data_collator(items))
        return self.made[-1]


class Snapshots(TrainerCallback):
    """Keeps the state dict that each step runs with, and the one it leaves."""

    def __init__(self) -> None:
        self.before: list[dict[str, Tensor]] = []
        self.after: list[dict[str, Tensor]] = []

    def on_step_begin(self, *args: Any, model: nn.Module, **kwargs: Any) -> None:
        self.before.append(copy.deepcopy(model.state_dict()))

    def on_step_end(self, *args: Any, model: nn.Module, **kwargs: Any) -> None:
        self.after.append(copy.deepcopy(model.state_dict()))


def make_trainer(
    folder: Path,
    model: nn.Module,
    *callbacks: TrainerCallback,
    collator: Any = None,
    compute_metrics: Any = None,
    **options: Any,
) -> Trainer:
    arguments: dict[str, Any] = {
        "output_dir": str(folder),
        "max_steps": STEPS,
        "per_device_train_batch_size": BATCH,
        "learning_rate": 1e-2,
        "logging_steps": 2,
        "logging_nan_inf_filter": False,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
        "dataloader_pin_memory": False,
    }
    trainer = Trainer(
        model=model,
        args=TrainingArguments(**arguments | options),
        train_dataset=dataset(),
        eval_dataset=dataset(8, seed=1),
        data_collator=collator,
        compute_metrics=compute_metrics,
        callbacks=list(callbacks),
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def train(
    folder: Path,
    model: nn.Module,
    *callbacks: TrainerCallback,
    resume: Path | None = None,
    **options: Any,
) -> Trainer:
    trainer = make_trainer(folder, model, *callbacks, **options)
    trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
    return trainer


def training_logs(trainer: Trainer) -> list[dict[str, Any]]:
    return [log for log in trainer.state.log_history if "loss" in log]


def resumable(logs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [
        {key: log[key] for key in log if not any(part in key for part in NOT_RESUMED)}
        for log in logs
    ]


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def assert_clean(model: nn.Module, like: nn.Module) -> None:
    """No hook and no class beyond those of a model that was never trained."""
    for one in (model, like):
        stop_looking(one)  # what waits for a first pass is sparsify_'s
    for (name, module), (_, other) in zip(model.named_modules(), like.named_modules(), strict=True):
        assert type(module) is type(other), name
        assert len(module._forward_hooks) == len(other._forward_hooks), name
        assert len(module._forward_pre_hooks) == len(other._forward_pre_hooks), name


def assert_equal_states(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    assert list(first) == list(second)
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name


# ---- metrics


@pytest.mark.parametrize("every", [1, 3])
def test_each_log_has_the_densities_of_the_steps_since_the_last_one(
    tmp_path: Path, every: int
) -> None:
    callback = SteppeCallback(every=every)
    trainer = train(tmp_path, all_three(), callback, logging_steps=4)
    counted = list(range(1, STEPS + 1, every))
    assert [entry["step"] for entry in callback.history] == counted
    logs = training_logs(trainer)
    assert [log["step"] for log in logs] == [4, 8]
    for log in logs:
        so_far = [e for e in callback.history if e["step"] <= log["step"]]
        since = [e for e in so_far if e["step"] > log["step"] - 4]
        assert log["training_density"] == mean([e["density"] for e in so_far])
        for key in ("density", "derivative_density"):
            assert log[key] == mean([e[key] for e in since])
            for index, name in enumerate(BLOCKS):
                assert log[f"{key}_per_block/{name}"] == mean(
                    [e[f"{key}_per_block"][index] for e in since]
                )
    assert callback.training_density == logs[-1]["training_density"]
    assert callback.training_density_per_block == [
        mean([e["density_per_block"][index] for e in callback.history]) for index in (0, 1)
    ]
    assert len({entry["density"] for entry in callback.history}) > 1, "nothing moved"


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_counted_step_is_what_watch_counts_on_its_batches(
    tmp_path: Path, accumulate: int
) -> None:
    callback, snapshots, batches = SteppeCallback(every=2), Snapshots(), Batches()
    train(
        tmp_path,
        all_three(),
        callback,
        snapshots,
        collator=batches,
        max_steps=4,
        gradient_accumulation_steps=accumulate,
    )
    twin = all_three().train()
    assert [entry["step"] for entry in callback.history] == [1, 3]
    for entry in callback.history:
        first = (entry["step"] - 1) * accumulate
        twin.load_state_dict(snapshots.before[entry["step"] - 1])
        with watch(twin) as monitor:
            alone = []
            for batch in batches.made[first : first + accumulate]:
                before = monitor.counts()
                twin(**batch)
                alone.append((monitor.counts() - before)[:, 3].tolist())
        report = monitor.report()
        assert entry["density"] == report.density
        assert entry["derivative_density"] == report.derivative_density
        assert entry["density_per_block"] == [block.density for block in report.blocks]
        assert entry["derivative_density_per_block"] == [
            block.derivative_density for block in report.blocks
        ]
        assert accumulate == 1 or alone[0] != alone[1], "pooling and averaging would be the same"


def test_the_last_log_has_the_steps_after_the_last_regular_one(tmp_path: Path) -> None:
    callback = SteppeCallback(every=1)
    trainer = train(tmp_path, gpt2(), callback, max_steps=3)
    assert [entry["step"] for entry in callback.history] == [1, 2, 3]
    last = trainer.state.log_history[-1]
    assert last["density"] == callback.history[-1]["density"]
    assert last["training_density"] == callback.training_density


def test_a_run_shorter_than_the_logging_interval_logs_its_density(tmp_path: Path) -> None:
    callback = SteppeCallback()
    trainer = train(tmp_path, gpt2(), callback, max_steps=2, logging_steps=500)
    logged = [log["training_density"] for log in trainer.state.log_history if "density" in log]
    assert logged == [callback.training_density]


def test_blocks_are_left_out_of_the_log_if_asked(tmp_path: Path) -> None:
    trainer = train(tmp_path, gpt2(), SteppeCallback(per_block=False), max_steps=2)
    (log,) = training_logs(trainer)
    assert {"density", "derivative_density", "training_density"} <= set(log)
    assert not [key for key in log if "transformer.h" in key]


def test_evaluation_during_training_is_counted_apart(tmp_path: Path) -> None:
    callbacks = SteppeCallback(every=1), SteppeCallback(every=1)
    train(tmp_path / "without", all_three(), callbacks[0])
    trainer = train(
        tmp_path / "with", all_three(), callbacks[1], eval_strategy="steps", eval_steps=1
    )
    assert sum("eval_loss" in log for log in trainer.state.log_history) == STEPS
    assert callbacks[0].history == callbacks[1].history
    assert [entry["step"] for entry in callbacks[1].held_out_history] == list(range(1, STEPS + 1))
    assert callbacks[0].held_out_history == []


def test_saving_between_two_logs_loses_no_step(tmp_path: Path) -> None:
    options = {"logging_steps": 4, "save_steps": 3}
    plain = train(tmp_path / "a", all_three(), SteppeCallback(every=1), **options)
    saved = train(
        tmp_path / "b", all_three(), SteppeCallback(every=1), save_strategy="steps", **options
    )
    assert resumable(training_logs(saved)) == resumable(training_logs(plain))


def test_a_callback_that_has_counted_nothing_says_nan() -> None:
    callback = SteppeCallback()
    assert math.isnan(callback.training_density)
    assert callback.training_density_per_block == []


@pytest.mark.parametrize("every", [0, -1])
def test_counting_less_than_every_step_is_refused(every: int) -> None:
    with pytest.raises(ValueError, match=f"every ≥ 1, got {every}"):
        SteppeCallback(every=every)


# ---- TensorBoard


@pytest.mark.parametrize("named", [False, True], ids=["default folder", "TENSORBOARD_LOGGING_DIR"])
def test_tensorboard_gets_the_metrics_in_the_run_folder_of_transformers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, named: bool
) -> None:
    monkeypatch.delenv("TENSORBOARD_LOGGING_DIR", raising=False)
    if named:
        monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "events"))
    old = tmp_path / "out" / "runs" / "an older run"
    old.mkdir(parents=True)
    (old / "events.out.tfevents.0.host").touch()
    trainer = train(
        tmp_path / "out", all_three(), SteppeCallback(every=1), report_to=["tensorboard"]
    )
    files = [file for file in tmp_path.rglob("events.out.tfevents.*") if file.parent != old]
    (folder,) = {file.parent for file in files}
    assert folder == tmp_path / "events" if named else folder.parent == old.parent
    assert len(list(old.iterdir())) == 1
    events = EventAccumulator(str(folder)).Reload()
    keys = ["loss", "density", "derivative_density", "training_density"]
    keys += [
        f"{key}_per_block/{name}" for key in ("density", "derivative_density") for name in BLOCKS
    ]
    for key in keys:
        written = [(event.step, event.value) for event in events.Scalars(f"train/{key}")]
        logged = [(log["step"], log[key]) for log in training_logs(trainer)]
        assert [step for step, _ in written] == [step for step, _ in logged]
        assert [value for _, value in written] == pytest.approx(
            [value for _, value in logged], rel=1e-6
        )


def test_without_tensorboard_nothing_is_written(tmp_path: Path) -> None:
    train(tmp_path, all_three(), SteppeCallback(), max_steps=2)
    assert not list(tmp_path.rglob("events.out.tfevents.*"))


# ---- constraints


def test_the_constraints_hold_after_every_step(tmp_path: Path) -> None:
    options = {"learning_rate": 0.1, "weight_decay": 1.0, "lr_scheduler_type": "constant"}
    snapshots, free = Snapshots(), Snapshots()
    train(tmp_path / "a", all_three(), SteppeCallback(), snapshots, **options)
    train(tmp_path / "b", all_three(), free, **options)
    for state in snapshots.after:
        for name in BLOCKS:
            scale = state[f"{name}.ln_2.weight"]
            bias = state[f"{name}.mlp.c_fc.zeroth_bias"]
            assert scale.min() >= 1.0
            assert (bias.abs() <= 0.1 * scale.abs()).all()
            assert bias.any()
    last = free.after[-1]
    assert last[f"{BLOCKS[0]}.ln_2.weight"].min() < 1.0, "the floor was never reached"
    assert last[f"{BLOCKS[0]}.mlp.c_fc.zeroth_bias"].abs().max() > 0.1, "the clip was not needed"


def test_a_model_without_plug_ins_is_measured_and_trained_as_without_the_callback(
    tmp_path: Path,
) -> None:
    callback = SteppeCallback(every=1)
    watched = train(tmp_path / "a", gpt2(), callback)
    plain = train(tmp_path / "b", gpt2())
    assert_equal_states(watched.model.state_dict(), plain.model.state_dict())
    assert len(callback.history) == STEPS
    assert all("density" in log for log in training_logs(watched))
    assert [log["loss"] for log in training_logs(watched)] == [
        log["loss"] for log in training_logs(plain)
    ]


# ---- schedules


@pytest.mark.parametrize("ramp", [0.5, 1.0])
def test_the_mix_follows_the_share_of_the_run_that_is_done(tmp_path: Path, ramp: float) -> None:
    snapshots = Snapshots()
    trainer = train(tmp_path, gpt2(JumpingSquaredReLU(ramp=ramp)), SteppeCallback(), snapshots)
    for name in BLOCKS:
        mixes = [float(state[f"{name}.mlp.act.mix"]) for state in snapshots.before]
        want = [min(1.0, step / STEPS / ramp) for step in range(STEPS)]
        assert mixes == pytest.approx(want, rel=1e-6)
    assert all(float(block.act.mix) == 1.0 for block in find_blocks(trainer.model))
    assert require_sparsification(trainer.model).progress == 1.0


def test_the_floor_rises_with_the_run(tmp_path: Path) -> None:
    model = gpt2(RestrictedNorm(ramp=0.5))
    for layer in model.transformer.h:
        layer.ln_2.weight.data.fill_(-0.01)
    snapshots = Snapshots()
    train(tmp_path, model, SteppeCallback(), snapshots, learning_rate=1e-6)
    for step, state in enumerate(snapshots.after, start=1):
        floor = min(1.0, step / STEPS / 0.5)
        scale = state[f"{BLOCKS[0]}.ln_2.weight"]
        assert scale.abs().min() >= floor
        assert scale.abs().max() == pytest.approx(max(floor, 0.01), rel=1e-2)
        assert (scale < 0).all(), "signs are kept"


def test_the_best_model_keeps_the_mix_it_was_evaluated_with(tmp_path: Path) -> None:
    evaluations = itertools.count()
    trainer = train(
        tmp_path,
        gpt2(JumpingSquaredReLU(ramp=1.0)),
        SteppeCallback(),
        eval_strategy="steps",
        eval_steps=2,
        save_strategy="steps",
        save_steps=2,
        load_best_model_at_end=True,
        compute_metrics=lambda prediction: {"age": next(evaluations)},
        metric_for_best_model="age",
        greater_is_better=False,
    )
    best = Path(str(trainer.state.best_model_checkpoint))
    assert best.name == "checkpoint-2"
    saved = load_pretrained(AutoModelForCausalLM.from_pretrained, best)
    assert_equal_states(trainer.model.state_dict(), saved.state_dict())
    assert require_sparsification(trainer.model).progress < 0.5


# ---- resuming


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"save_steps": 4}, id="saved at a log"),
        pytest.param({"save_steps": 5, "logging_steps": 4}, id="saved between logs"),
        pytest.param({"save_steps": 4, "gradient_accumulation_steps": 2}, id="accumulation"),
    ],
)
@pytest.mark.parametrize("every", [1, 3])
def test_a_resumed_run_ends_where_an_uninterrupted_one_does(
    tmp_path: Path, every: int, options: dict[str, Any]
) -> None:
    options = {"save_strategy": "steps", "learning_rate": 0.05, "weight_decay": 1.0, **options}
    callbacks = SteppeCallback(every=every), SteppeCallback(every=every)
    whole = train(tmp_path / "a", all_three(), callbacks[0], **options)
    checkpoint = tmp_path / "a" / f"checkpoint-{options['save_steps']}"
    torch.manual_seed(123)
    fresh = sparsify_(models.gpt2(), [ZerothBias(), RestrictedNorm(), JumpingSquaredReLU(ramp=0.5)])
    resumed = train(tmp_path / "b", fresh, callbacks[1], resume=checkpoint, **options)
    assert_equal_states(resumed.model.state_dict(), whole.model.state_dict())
    assert callbacks[1].history == callbacks[0].history
    assert callbacks[1].training_density == callbacks[0].training_density
    logs = [resumable(trainer.state.log_history) for trainer in (resumed, whole)]
    # Transformers forgets the loss since the last log when it resumes.
    if options["save_steps"] % resumed.args.logging_steps:
        for log in [*logs[0], *logs[1]]:
            log.pop("loss", None)
    assert logs[0] == logs[1]


def test_a_trainer_checkpoint_loads_with_what_steppe_did(tmp_path: Path) -> None:
    trainer = train(
        tmp_path, all_three(), SteppeCallback(), save_strategy="steps", save_steps=STEPS
    )
    loaded = load_pretrained(AutoModelForCausalLM.from_pretrained, tmp_path / f"checkpoint-{STEPS}")
    assert_equal_states(loaded.state_dict(), trainer.model.state_dict())


def test_the_history_stands_in_the_trainer_state_as_json(tmp_path: Path) -> None:
    callback = SteppeCallback(every=2)
    train(tmp_path, all_three(), callback, save_strategy="steps", save_steps=STEPS)
    path = tmp_path / f"checkpoint-{STEPS}" / "trainer_state.json"
    saved = json.loads(path.read_text())["stateful_callbacks"]["SteppeCallback"]
    assert saved["args"] == {"every": 2, "per_block": True, "flatness": True}
    assert saved["attributes"]["history"] == callback.history


def test_transformers_can_restore_the_callback_by_itself(tmp_path: Path) -> None:
    options = {"save_strategy": "steps", "save_steps": 4}
    callback = SteppeCallback(every=2)
    train(tmp_path / "a", all_three(), callback, **options)
    trainer = train(
        tmp_path / "b",
        all_three(),
        SteppeCallback(every=1),
        resume=tmp_path / "a" / "checkpoint-4",
        restore_callback_states_from_checkpoint=True,
        **options,
    )
    (restored,) = (c for c in trainer.callback_handler.callbacks if isinstance(c, SteppeCallback))
    assert restored.every == 2
    assert restored.history == callback.history


@pytest.mark.parametrize(
    "changed", [{"every": 2}, {"per_block": False}, {"flatness": False}, {"every": 3}]
)
def test_resuming_with_other_settings_keeps_the_history(
    tmp_path: Path, changed: dict[str, Any]
) -> None:
    options = {"save_strategy": "steps", "save_steps": 4}
    train(tmp_path, gpt2(), SteppeCallback(every=1), max_steps=4, **options)
    callback = SteppeCallback(**{"every": 1, **changed})
    train(tmp_path, gpt2(), callback, resume=tmp_path / "checkpoint-4", **options)
    every = changed.get("every", 1)
    steps = [1, 2, 3, 4, *(step + 1 for step in range(4, STEPS) if step % every == 0)]
    assert [entry["step"] for entry in callback.history] == steps
    assert json.loads((tmp_path / "steppe.json").read_text())["steps"] == steps
    assert 0 < callback.training_density < 1


def test_each_trial_of_a_search_has_its_own_record(tmp_path: Path) -> None:
    optuna = pytest.importorskip("optuna")
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    callback = SteppeCallback(every=1)
    trainer = make_trainer(tmp_path, gpt2(), callback, max_steps=2, save_strategy="steps")
    trainer.model_init, trainer.eval_dataset = lambda: gpt2(), dataset(4)
    trainer.hyperparameter_search(
        hp_space=lambda trial: {"learning_rate": trial.suggest_float("learning_rate", 1e-3, 1e-2)},
        backend="optuna",
        n_trials=2,
        compute_objective=lambda metrics: metrics["eval_density"],
    )
    rates = [
        json.loads((tmp_path / f"run-{trial}" / "steppe.json").read_text())["settings"][
            "learning_rate"
        ]
        for trial in range(2)
    ]
    assert rates[0] != rates[1]
    assert not (tmp_path / "steppe.json").exists()


def test_a_resumed_vit_has_all_its_weights(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def vit(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        return sparsify_(models.vit(), [ZerothBias()])

    pictures = models.images(24)
    data = [{"pixel_values": one, "labels": i % 10} for i, one in enumerate(pictures)]
    options = {"save_strategy": "steps", "save_steps": 4, "learning_rate": 0.05}
    states = []
    for name, resume in (("whole", None), ("resumed", tmp_path / "whole" / "checkpoint-4")):
        trainer = make_trainer(
            tmp_path / name, vit(0 if resume is None else 1), SteppeCallback(), **options
        )
        trainer.train_dataset, trainer.data_collator = data, default_data_collator
        trainer.train(resume_from_checkpoint=resume and str(resume))
        states.append(trainer.model.state_dict())
        assert ("resumed without" in caplog.text) == (resume is not None)
    assert_equal_states(states[1], states[0])


# ---- a loss that is no number


@pytest.mark.parametrize("plugged", [False, True])
def test_a_diverged_run_ends_with_one_clear_error(tmp_path: Path, plugged: bool) -> None:
    model = all_three() if plugged else gpt2()
    with pytest.raises(NonFiniteLossError, match=r"loss is (nan|inf) at step \d.*learning rate"):
        train(tmp_path, model, SteppeCallback(), learning_rate=1e30, logging_steps=1)
    assert issubclass(NonFiniteLossError, ArithmeticError)


def test_a_model_that_returns_nan_ends_the_run_at_the_first_log(tmp_path: Path) -> None:
    model = gpt2()
    nn.init.constant_(model.transformer.ln_f.weight, math.nan)
    with pytest.raises(NonFiniteLossError, match="loss is nan at step 2"):
        train(tmp_path, model, SteppeCallback())


def test_after_a_diverged_run_the_model_is_clean_and_trains_again(tmp_path: Path) -> None:
    model = gpt2()
    callback = SteppeCallback(every=1)
    start = copy.deepcopy(model.state_dict())
    trainer = make_trainer(tmp_path, model, callback, learning_rate=1e30)
    with pytest.raises(NonFiniteLossError):
        trainer.train()
    assert_clean(model, gpt2())
    model.load_state_dict(start)
    again = SteppeCallback(every=1)
    train(tmp_path, model, again)
    assert len(again.history) == STEPS
    assert_clean(model, gpt2())


# ---- nothing stays behind


def test_no_hook_and_no_class_is_left_and_a_second_run_starts_anew(tmp_path: Path) -> None:
    model = all_three()
    callback = SteppeCallback(every=1)
    trainer = make_trainer(tmp_path, model, callback)
    trainer.train()
    assert_clean(model, all_three())
    first = callback.history
    trainer.train()
    assert_clean(model, all_three())
    assert [entry["step"] for entry in callback.history] == list(range(1, STEPS + 1))
    assert callback.history != first
    assert callback.training_density == mean([entry["density"] for entry in callback.history])


def test_a_callback_can_serve_another_trainer(tmp_path: Path) -> None:
    callback = SteppeCallback(every=1)
    train(tmp_path / "a", all_three(), callback)
    first = callback.history
    model = all_three()
    train(tmp_path / "b", model, callback)
    assert callback.history == first
    assert_clean(model, all_three())


def test_an_outer_watch_counts_beside_the_callback(tmp_path: Path) -> None:
    model = gpt2()
    callback = SteppeCallback(every=1)
    with watch(model) as monitor:
        train(tmp_path, model, callback, max_steps=1)
    assert monitor.report().density == callback.history[0]["density"]
    assert_clean(model, gpt2())


# ---- checkpointing and compilation


def test_gradient_checkpointing_counts_each_step_once(tmp_path: Path) -> None:
    callbacks = SteppeCallback(every=1), SteppeCallback(every=1)
    train(tmp_path / "a", all_three(), callbacks[0])
    train(tmp_path / "b", all_three(), callbacks[1], gradient_checkpointing=True)
    assert callbacks[1].history == callbacks[0].history


@pytest.fixture
def _fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.usefixtures("_fresh_compiler")
def test_a_compiled_model_is_counted_as_an_eager_one(tmp_path: Path) -> None:
    options = {"max_steps": 3, "logging_steps": 1}
    callbacks = SteppeCallback(every=2), SteppeCallback(every=2)
    train(tmp_path / "eager", one_layer(), callbacks[0], **options)
    compiled = {"torch_compile": True, "torch_compile_backend": "aot_eager"}
    model = one_layer()
    train(tmp_path / "compiled", model, callbacks[1], **options, **compiled)
    assert [entry["step"] for entry in callbacks[1].history] == [1, 3]
    assert callbacks[1].history[0] == callbacks[0].history[0]
    # Compiled gradients round otherwise, which may carry a unit over zero.
    for ours, want in zip(callbacks[1].history, callbacks[0].history, strict=True):
        assert ours["density"] == pytest.approx(want["density"], abs=0.01)
    assert_clean(model, one_layer())


def one_layer() -> nn.Module:
    return sparsify_(models.one_layer_(gpt2()), [ZerothBias(), JumpingSquaredReLU(ramp=1.0)])


def test_several_gpus_in_one_process_are_refused() -> None:
    arguments = SimpleNamespace(parallel_mode=ParallelMode.NOT_DISTRIBUTED, n_gpu=2)
    with pytest.raises(ScheduleError, match="torchrun --nproc_per_node 2"):
        SteppeCallback().on_train_begin(arguments, None, None, model=gpt2())


# ---- why it is sparse, and the record of the run


def rough_gpt2() -> nn.Module:
    """Weights large enough that a step's AF differs from the next one's."""
    model = gpt2()
    with torch.no_grad():
        model.transformer.wte.weight.mul_(5.0)
    return model


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2},
        {"gradient_checkpointing": True},
    ],
    ids=["plain", "accumulation", "checkpointing"],
)
def test_the_first_step_is_what_measure_says_of_its_batch(
    tmp_path: Path, options: dict[str, Any]
) -> None:
    """One step of the whole batch, however the Trainer cuts it up."""
    callback, collator, model = SteppeCallback(every=STEPS), Batches(), rough_gpt2()
    want_of = copy.deepcopy(model)
    make_trainer(tmp_path, model, callback, collator=collator, **options).train()
    parts = collator.made[: options.get("gradient_accumulation_steps", 1)]
    assert sum(len(part["input_ids"]) for part in parts) == BATCH
    want = steppe.measure(want_of, parts).to_dict()
    (got,) = callback.history
    for key, value in want.items():
        if key.startswith(("AF", "active_gain", "squared")):
            for one, two in zip(got[key], value, strict=True):
                assert one is two is None or one == pytest.approx(two, rel=1e-4), key
        elif key in got and key != "standard_errors_per_block":
            assert got[key] == value, key


def test_each_log_has_the_factors_of_the_ratio(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, rough_gpt2(), SteppeCallback(every=1), logging_steps=1)
    trainer.train()
    log = next(log for log in trainer.state.log_history if "density" in log)
    for key in ("AF_up", "AF_down", "active_gain", "squared_input_norm", "dead_neurons"):
        assert log[key] == pytest.approx(sum(log[f"{key}_per_block/{name}"] for name in BLOCKS) / 2)
    assert "AF_gate" not in log


def test_densities_alone_hang_nothing_into_the_backward_pass(tmp_path: Path) -> None:
    callback = SteppeCallback(every=1, flatness=False)
    trainer = make_trainer(tmp_path, rough_gpt2(), callback)
    trainer.train()
    assert all(entry["AF_up_per_block"] == [None, None] for entry in callback.history)
    assert "AF_up" not in trainer.state.log_history[0]
    assert callback.training_density > 0


class Outside(Trainer):
    """A Trainer whose user makes the loss himself."""

    def compute_loss(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        labels = inputs.pop("labels")
        logits = model(**inputs).logits[:, :-1].flatten(0, 1)
        return F.cross_entropy(logits, labels[:, 1:].flatten())


def summed_loss(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
    logits = outputs.logits[:, :-1].flatten(0, 1)
    return F.cross_entropy(logits, labels[:, 1:].flatten(), reduction="sum") / num_items_in_batch


@pytest.mark.parametrize("how", ["label_smoothing_factor", "compute_loss_func", "compute_loss"])
@pytest.mark.parametrize(("size", "pieces"), [(4, 1), (2, 2), (1, 4)])
def test_a_loss_outside_the_model_gives_the_flatness_of_the_one_inside(
    tmp_path: Path, how: str, size: int, pieces: int
) -> None:
    # As many labels in each, so that a mean over means is one over all.
    items = [{**one, "labels": one["input_ids"]} for one in dataset(4)]
    found = []
    for kind in ("inside", how):
        callbacks = [SteppeCallback(every=1), SteppeCallback(every=1)]
        options: dict[str, Any] = {} if kind != "label_smoothing_factor" else {kind: 1e-9}
        args = TrainingArguments(
            str(tmp_path / kind),
            max_steps=1,
            per_device_train_batch_size=4 if kind == "inside" else size,
            gradient_accumulation_steps=1 if kind == "inside" else pieces,
            use_cpu=True,
            report_to=[],
            save_strategy="no",
            **options,
        )
        trainer = (Outside if kind == "compute_loss" else Trainer)(
            model=rough_gpt2(),
            args=args,
            train_dataset=items,
            callbacks=callbacks,
            compute_loss_func=summed_loss if kind == "compute_loss_func" else None,
        )
        made = dict(vars(trainer))
        trainer.train()
        assert {key: vars(trainer)[key] for key in ("compute_loss_func", "label_smoother")} == {
            key: made[key] for key in ("compute_loss_func", "label_smoother")
        }
        assert "compute_loss" not in vars(trainer)
        found.append([callback.history[0]["AF_up_per_block"] for callback in callbacks])
    for outside in found[1]:
        assert outside == pytest.approx(found[0][0], rel=1e-4)


def test_the_record_of_the_run_stands_in_its_folder(tmp_path: Path) -> None:
    callback, model = SteppeCallback(every=2), all_three()
    trainer = make_trainer(
        tmp_path, model, callback, eval_strategy="steps", eval_steps=4, weight_decay=0.25
    )
    trainer.train()
    run = read_run(tmp_path / RUN_FILE)
    assert run.name == tmp_path.name
    assert run.model == "GPT2LMHeadModel"
    assert run.block_names == BLOCKS
    assert run.steps == [entry["step"] for entry in callback.history] == [1, 3, 5, 7]
    assert [report.density for report in run.training] == [e["density"] for e in callback.history]
    assert run.training_density == callback.training_density
    assert run.held_out_steps == [4, 8]
    assert all(report.blocks[0].AF_up != report.blocks[0].AF_up for report in run.held_out)
    assert run.settings["weight_decay"] == 0.25
    assert [plugin["plugin"] for plugin in run.plugins] == [
        "zeroth_bias",
        "restricted_norm",
        "jumping_squared_relu",
    ]
    assert [log["eval_loss"] for log in run.logs if "eval_loss" in log]
    assert not any("/" in key for log in run.logs for key in log)
    tokens = sum(report.blocks[0].tokens for report in run.training)
    assert run.tokens_per_sample == tokens / sum(r.blocks[0].samples for r in run.training)
    for report in run.training:
        for block in report.blocks:
            assert block.derivative_density_by_identity == pytest.approx(
                block.derivative_density, rel=1e-6
            )


def test_the_record_is_there_from_the_first_save_on(tmp_path: Path) -> None:
    class Interrupt(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 5:
                raise KeyboardInterrupt

    trainer = make_trainer(
        tmp_path,
        gpt2(),
        SteppeCallback(every=1),
        Interrupt(),
        save_strategy="steps",
        save_steps=4,
    )
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert read_run(tmp_path).steps == [1, 2, 3, 4]
