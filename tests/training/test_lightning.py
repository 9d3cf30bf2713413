"""LightningCallback in Lightning's Trainer, against loops of our own; nothing stays behind."""

from __future__ import annotations

import copy
import importlib
import pickle
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback, EarlyStopping, ModelCheckpoint
from pytorch_lightning.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

import models
import steppe
from steppe import (
    ActivationPenalty,
    JumpingSquaredReLU,
    Plugin,
    RestrictedNorm,
    ZerothBias,
    constrain_,
    sparsify_,
    watch,
)
from steppe.errors import MissingExtraError, NonFiniteLossError, ScheduleError
from steppe.plugins.applied import require_sparsification
from steppe.runs import read_run
from steppe.training import accelerated
from steppe.training.lightning import LightningCallback
from steppe.wiring.first_pass import stop_looking

pytestmark = [
    # Advice on loaders and loggers.
    pytest.mark.filterwarnings("ignore::pytorch_lightning.utilities.warnings.PossibleUserWarning"),
    # What Lightning uses of torch.
    pytest.mark.filterwarnings(
        "ignore:.isinstance.treespec, LeafSpec.. is deprecated:FutureWarning"
    ),
]

STEPS = 6
TOKENS = 7
BLOCKS = ("model.transformer.h.0", "model.transformer.h.1")
LEARNING_RATE = 0.05
ALL_THREE = (ZerothBias(), RestrictedNorm(), JumpingSquaredReLU(ramp=0.5))


def batches(number: int, seed: int = 0) -> list[dict[str, Tensor]]:
    """Batches of 3 sequences with unequal numbers of labels."""
    ids = models.token_ids(3 * number, TOKENS, seed)
    labels = ids.masked_fill(torch.arange(TOKENS) > 2 + torch.arange(len(ids))[:, None] % 5, -100)
    return [
        {"input_ids": i, "labels": y} for i, y in zip(ids.split(3), labels.split(3), strict=True)
    ]


def gpt2(*plugins: Plugin) -> nn.Module:
    torch.manual_seed(0)
    model = models.gpt2()
    with torch.no_grad():
        model.transformer.wte.weight.mul_(5.0)
    return sparsify_(model, plugins) if plugins else model


class Module(pl.LightningModule):
    """A language model in Lightning; its own loss, or one that is made of its logits."""

    def __init__(self, model: nn.Module, outside: bool = False) -> None:
        super().__init__()
        self.model = model
        self.outside = outside

    def loss_of(self, batch: dict[str, Tensor]) -> Tensor:
        if not self.outside:
            return self.model(**batch).loss
        logits = self.model(batch["input_ids"]).logits[:, :-1]
        return F.cross_entropy(logits.flatten(0, 1), batch["input_ids"][:, 1:].flatten())

    def training_step(self, batch: dict[str, Tensor], index: int) -> Tensor:
        return self.loss_of(batch)

    def validation_step(self, batch: dict[str, Tensor], index: int) -> None:
        self.log("val_loss", self.loss_of(batch))

    def test_step(self, batch: dict[str, Tensor], index: int) -> None:
        self.log("test_loss", self.loss_of(batch))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), LEARNING_RATE)


def loader(data: list[dict[str, Tensor]]) -> DataLoader[Any]:
    return DataLoader(data, batch_size=None)  # type: ignore[arg-type]


def make_trainer(folder: Path, *callbacks: Callback, **options: Any) -> pl.Trainer:
    arguments: dict[str, Any] = {
        "max_steps": STEPS,
        "log_every_n_steps": 2,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "accelerator": "cpu",
        "num_sanity_val_steps": 0,
    }
    return pl.Trainer(default_root_dir=folder, callbacks=list(callbacks), **arguments | options)


def fit(
    folder: Path, model: nn.Module, *callbacks: Callback, outside: bool = False, **options: Any
) -> tuple[Module, pl.Trainer]:
    module, trainer = Module(model, outside), make_trainer(folder, *callbacks, **options)
    data = batches(STEPS * options.get("accumulate_grad_batches", 1))
    trainer.fit(module, loader(data), loader(batches(2, seed=1)))
    return module, trainer


def by_hand(
    model: nn.Module, accumulate: int = 1, every: int = 1, penalty: bool = False
) -> list[dict[str, Any]]:
    """The same training in a plain loop with `constrain_` and `watch`: a history."""
    optimizer = torch.optim.SGD(model.parameters(), LEARNING_RATE)
    if steppe.added_parameters(model) or penalty:
        constrain_(model, optimizer, STEPS)
    data, history = batches(STEPS * accumulate), []
    for step in range(STEPS):
        with watch(model.train(), gradients=True) as monitor:
            for batch in data[step * accumulate : (step + 1) * accumulate]:
                loss = model(**batch).loss
                if penalty:
                    loss = steppe.penalize(loss, model)
                (loss / accumulate).backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % every == 0:
            history.append({"step": step + 1, **monitor.report().to_dict()})
    return history


def assert_same_history(got: list[dict[str, Any]], want: list[dict[str, Any]]) -> None:
    assert [entry["step"] for entry in got] == [entry["step"] for entry in want]
    for ours, theirs in zip(got, want, strict=True):
        assert ours["density_per_block"] == theirs["density_per_block"]
        for key in ("AF_up", "AF_down", "active_gain", "squared_input_norm"):
            assert ours[f"{key}_per_block"] == pytest.approx(theirs[f"{key}_per_block"], rel=1e-5)


def assert_same_weights(first: nn.Module, second: nn.Module) -> None:
    for (name, ours), theirs in zip(
        first.state_dict().items(), second.state_dict().values(), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7, msg=name)


def assert_clean(model: nn.Module, like: nn.Module) -> None:
    """No hook and no class beyond those of a model that was never trained."""
    for one in (model, like):
        stop_looking(one)  # what waits for a first pass is sparsify_'s
    for (name, module), (_, other) in zip(model.named_modules(), like.named_modules(), strict=True):
        assert type(module) is type(other), name
        assert len(module._forward_hooks) == len(other._forward_hooks), name
        assert len(module._forward_pre_hooks) == len(other._forward_pre_hooks), name


# ---- what is measured, and what is trained


@pytest.mark.parametrize(("every", "accumulate"), [(1, 2), (4, 1)])
@pytest.mark.parametrize("plugins", [(), ALL_THREE], ids=["plain", "plug-ins"])
def test_it_trains_and_measures_as_a_loop_of_ones_own(
    tmp_path: Path, accumulate: int, every: int, plugins: tuple[Plugin, ...]
) -> None:
    callback = LightningCallback(every=every)
    module, _ = fit(tmp_path, gpt2(*plugins), callback, accumulate_grad_batches=accumulate)
    twin = gpt2(*plugins)
    want = by_hand(twin, accumulate, every)
    assert_same_history(callback.history, want)
    assert len({entry["AF_up_per_block"][0] for entry in want}) == len(want)
    assert_same_weights(module.model, twin)
    assert_clean(module.model, gpt2(*plugins))
    if plugins:
        assert require_sparsification(module.model).progress == 1.0
        scale = module.model.transformer.h[0].ln_2.weight
        assert scale.min() >= 1.0


def test_a_penalty_is_in_the_loss(tmp_path: Path) -> None:
    plugins = [ActivationPenalty(0.05, ramp=0.5)]
    module, _ = fit(tmp_path, gpt2(*plugins), LightningCallback(), accumulate_grad_batches=2)
    twin, free = gpt2(*plugins), gpt2()
    by_hand(twin, 2, penalty=True)
    by_hand(free, 2)
    assert_same_weights(module.model, twin)
    assert not torch.allclose(module.model.lm_head.weight, free.lm_head.weight, rtol=1e-4)


def test_a_loss_outside_the_model_is_undivided(tmp_path: Path) -> None:
    callbacks = LightningCallback(every=STEPS), LightningCallback(every=STEPS)
    for callback, accumulate in zip(callbacks, (1, 3), strict=True):
        fit(
            *(tmp_path, gpt2(), callback),
            outside=True,
            max_steps=1,
            accumulate_grad_batches=accumulate,
        )
    first, third = (callback.history[0]["AF_up_per_block"] for callback in callbacks)
    assert third == pytest.approx(first, rel=0.5), "9 times or a ninth without the factor"


# ---- logs


def test_loggers_and_callbacks_have_all_of_it(tmp_path: Path) -> None:
    callback = LightningCallback(every=1)
    best = ModelCheckpoint(tmp_path / "best", monitor="val_density", mode="min", save_top_k=1)
    logger = TensorBoardLogger(tmp_path, version="one")
    _, trainer = fit(
        *(tmp_path, gpt2(), callback, best),
        logger=logger,
        enable_checkpointing=True,
        val_check_interval=2,
    )
    events = EventAccumulator(logger.log_dir).Reload()
    steps = [2, 4, 6]
    for key in ("density", "AF_up", "dead_neurons"):
        for index, name in enumerate(BLOCKS):
            block = name.removeprefix("model.")
            logged = [e.value for e in events.Scalars(f"{key}_per_block/{block}")]
            want = [
                sum(e[f"{key}_per_block"][index] for e in callback.history[s - 2 : s]) / 2
                for s in steps
            ]
            assert logged == pytest.approx(want, rel=1e-6)
    for key in ("density", "training_density", "derivative_density", "active_gain"):
        assert len(events.Scalars(key)) == len(steps)
    held_out = callback.held_out_history
    assert [entry["step"] for entry in held_out] == steps
    densities = [entry["density"] for entry in held_out]
    assert [e.value for e in events.Scalars("val_density")] == pytest.approx(densities, rel=1e-6)
    assert float(trainer.callback_metrics["val_density"]) == pytest.approx(densities[-1])
    assert float(best.best_model_score) == pytest.approx(min(densities))
    assert len(set(densities)) > 1


def test_training_can_stop_where_the_density_stops_falling(tmp_path: Path) -> None:
    stop = EarlyStopping("val_density", patience=1, min_delta=1.0)
    _, trainer = fit(tmp_path, gpt2(), LightningCallback(), stop, limit_train_batches=1)
    assert trainer.global_step == 2


def test_validate_and_test_have_their_density(tmp_path: Path) -> None:
    model, data = gpt2(), batches(2, seed=1)
    callback = LightningCallback()
    trainer = make_trainer(tmp_path, callback)
    (validated,) = trainer.validate(Module(model), loader(data), verbose=False)
    (tested,) = trainer.test(Module(model), loader(data), verbose=False)
    with watch(model.eval()) as monitor, torch.no_grad():
        for batch in data:
            model(**batch)
    assert validated["val_density"] == pytest.approx(monitor.report().density)
    assert tested["test_density"] == pytest.approx(monitor.report().density)
    assert callback.held_out_history == []
    assert_clean(model, gpt2())


def test_the_sanity_check_counts_nowhere(tmp_path: Path) -> None:
    callback = LightningCallback(every=1)
    fit(tmp_path, gpt2(), callback, num_sanity_val_steps=2)
    assert [entry["step"] for entry in callback.held_out_history] == [STEPS]


def test_the_record_of_the_run_stands_in_its_folder(tmp_path: Path) -> None:
    callback = LightningCallback(every=2)
    fit(tmp_path, gpt2(*ALL_THREE), callback, max_steps=5)
    run = read_run(tmp_path)
    assert run.name == tmp_path.name
    assert run.model == "GPT2LMHeadModel"
    assert run.steps == [1, 3, 5]
    assert [report.density for report in run.training] == [e["density"] for e in callback.history]
    assert run.training_density == callback.training_density
    assert run.settings["learning_rate"] == LEARNING_RATE
    assert len(run.plugins) == 3
    assert [log["step"] for log in run.logs if "loss" in log] == [2, 4]
    assert run.logs[-1]["training_density"] == callback.training_density
    assert run.versions["lightning"] == pl.__version__
    assert not any("/" in key for log in run.logs for key in log)


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists:UserWarning")
def test_a_resumed_run_ends_where_an_uninterrupted_one_does(tmp_path: Path) -> None:
    kept = {"save_top_k": -1, "filename": "{step}", "save_on_train_epoch_end": True}
    options = {"enable_checkpointing": True, "limit_train_batches": 3}  # Lightning skips no batch
    whole, resumed = LightningCallback(every=2), LightningCallback(every=2)
    keep, keep_again = ModelCheckpoint(tmp_path, **kept), ModelCheckpoint(tmp_path, **kept)
    module, _ = fit(tmp_path, gpt2(*ALL_THREE), whole, keep, **options)
    again = Module(gpt2(*ALL_THREE))
    data = loader(batches(STEPS)), loader(batches(2, seed=1))
    trainer = make_trainer(tmp_path / "b", resumed, keep_again, **options)
    checkpoint = str(tmp_path / "step=3.ckpt")
    trainer.fit(again, *data, ckpt_path=checkpoint, weights_only=True)
    assert resumed.history == whole.history
    assert resumed.held_out_history == whole.held_out_history
    assert [entry["step"] for entry in whole.held_out_history] == [3, 6]
    assert [log["step"] for log in resumed._logs] == [log["step"] for log in whole._logs]
    assert_same_weights(again, module)


# ---- on the sparse kernels


@pytest.fixture
def _at_any_density(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks this small run on the kernels only where they are forced to."""
    forced = partial(steppe.accelerate_, max_density=1.0)
    monkeypatch.setattr(accelerated, "accelerate_", forced)


@pytest.mark.usefixtures("_at_any_density")
@pytest.mark.parametrize("accumulate", [1, 2])
def test_an_accelerated_run_trains_and_measures_as_a_dense_one(
    tmp_path: Path, accumulate: int
) -> None:
    callback = LightningCallback(every=3, accelerate=True)
    module, _ = fit(tmp_path, gpt2(*ALL_THREE), callback, accumulate_grad_batches=accumulate)
    twin = gpt2(*ALL_THREE)
    want = by_hand(twin, accumulate, every=3)
    assert_same_weights(module.model, twin)
    assert_clean(module.model, gpt2(*ALL_THREE))
    for ours, theirs in zip(callback.history, want, strict=True):
        assert ours["density"] == pytest.approx(theirs["density"], abs=2e-3)
        assert ours["AF_up_per_block"] == pytest.approx(theirs["AF_up_per_block"], rel=1e-3)
    record = read_run(tmp_path).acceleration
    assert record == callback.acceleration.record
    assert [block["calls"]["sparse"] > 0 for block in record["blocks"]] == [True, True]


@pytest.mark.usefixtures("_at_any_density")
@pytest.mark.parametrize("error", [ValueError("in the middle"), KeyboardInterrupt()])
def test_an_error_in_the_middle_leaves_the_model_restored(
    tmp_path: Path, error: BaseException
) -> None:
    module = Module(gpt2(*ALL_THREE))
    callback = LightningCallback(accelerate=True)
    trainer = make_trainer(tmp_path, callback, Raises("on_train_batch_end", error))
    with pytest.raises((type(error), SystemExit)):
        trainer.fit(module, loader(batches(STEPS)))
    assert callback.acceleration.record["blocks"]
    assert_clean(module.model, gpt2(*ALL_THREE))


# ---- nothing stays behind


class StopError(Exception):
    """Any exception."""


class Raises(Callback):
    """Raises at an event of the second step."""

    def __init__(self, event: str, error: BaseException) -> None:
        if event.startswith("on_"):
            setattr(self, event, self._raise)
        self._error = error

    def _raise(self, trainer: pl.Trainer, *args: Any, **kwargs: Any) -> None:
        if trainer.global_step >= 1:
            raise self._error


class Breaks(Module):
    """A module whose third micro-batch raises, forward, backward or in validation."""

    def __init__(self, model: nn.Module, place: str, error: BaseException) -> None:
        super().__init__(model)
        self.place, self.error, self.calls = place, error, 0

    def training_step(self, batch: dict[str, Tensor], index: int) -> Tensor:
        loss = super().training_step(batch, index)
        self.calls += 1
        if self.calls > 2 and self.place == "forward":
            raise self.error
        if self.calls > 2 and self.place == "backward":
            loss.register_hook(self.refuse)
        return loss

    def validation_step(self, batch: dict[str, Tensor], index: int) -> None:
        super().validation_step(batch, index)
        if self.place == "validation":
            raise self.error

    def configure_optimizers(self) -> torch.optim.Optimizer:
        optimizer = super().configure_optimizers()
        if self.place == "optimizer":
            optimizer.register_step_post_hook(self.refuse)
        return optimizer

    def refuse(self, *args: Any) -> None:
        raise self.error


@pytest.mark.parametrize(
    ("place", "interrupted"),
    [
        ("forward", False),
        ("backward", True),
        ("optimizer", False),
        ("validation", True),
        ("on_train_batch_start", False),
        ("on_before_backward", True),
        ("on_before_zero_grad", False),
        ("on_train_batch_end", True),
        ("on_validation_batch_end", False),
        ("on_validation_end", True),
        ("on_train_end", False),
    ],
)
def test_nothing_stays_whatever_raises_where(tmp_path: Path, place: str, interrupted: bool) -> None:
    plugins = (ZerothBias(), ActivationPenalty(1e-3))
    model, callback = gpt2(*plugins), LightningCallback(every=1)
    error = KeyboardInterrupt() if interrupted else StopError()
    module = Breaks(model, place, error)
    trainer = make_trainer(
        *(tmp_path, callback, Raises(place, error)),
        accumulate_grad_batches=2,
        val_check_interval=4,
        max_steps=4,
    )
    with pytest.raises(SystemExit if interrupted else StopError):
        trainer.fit(module, loader(batches(8)), loader(batches(2)))
    assert_clean(model, gpt2(*plugins))
    pickle.dumps(model)
    (optimizer,) = trainer.optimizers
    own = 1 if place == "optimizer" else 0
    assert len(optimizer._optimizer_step_post_hooks) == own
    again = LightningCallback(every=1)
    module.place = ""
    make_trainer(tmp_path, again, max_steps=2).fit(module, loader(batches(8)), loader(batches(2)))
    assert [entry["step"] for entry in again.history] == [1, 2]


# ---- what is refused


def test_a_ramp_in_a_run_without_an_end_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ScheduleError, match=r"length of the run: Trainer\(max_steps"):
        fit(tmp_path, gpt2(*ALL_THREE), LightningCallback(), max_steps=-1, max_epochs=-1)


def test_several_optimizers_are_refused_for_plug_ins(tmp_path: Path) -> None:
    class Two(Module):
        automatic_optimization = False

        def configure_optimizers(self) -> Any:
            return [super().configure_optimizers(), super().configure_optimizers()]

    with pytest.raises(ScheduleError, match="expected one optimizer, got 2"):
        make_trainer(tmp_path, LightningCallback()).fit(
            Two(gpt2(ZerothBias())), loader(batches(2)), loader(batches(1))
        )


def test_a_loss_that_is_no_number_ends_the_run(tmp_path: Path) -> None:
    model = gpt2()
    nn.init.constant_(model.transformer.ln_f.weight, float("nan"))
    with pytest.raises(NonFiniteLossError, match="loss is nan at step 2"):
        fit(tmp_path, model, LightningCallback())
    assert_clean(model, gpt2())


def test_measuring_no_step_is_refused() -> None:
    with pytest.raises(ValueError, match="every ≥ 1, got 0"):
        LightningCallback(every=0)


def test_without_lightning_the_module_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    module = sys.modules["steppe.training.lightning"]
    monkeypatch.setitem(sys.modules, "pytorch_lightning", None)
    monkeypatch.delitem(sys.modules, "steppe.training.lightning")
    with pytest.raises(MissingExtraError, match=r"pip install 'steppe\[lightning\]'"):
        importlib.import_module("steppe.training.lightning")
    monkeypatch.setitem(sys.modules, "steppe.training.lightning", module)


def test_a_copy_of_a_callback_is_its_own() -> None:
    callback = LightningCallback(every=3)
    twin = copy.deepcopy(callback)
    twin.history.append({"step": 1})
    assert callback.history == []
    assert twin.every == 3
