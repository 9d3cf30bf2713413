"""Whatever ends a training run, nothing of steppe stays on the model."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments

import models
from steppe import ActivationPenalty, ZerothBias, sparsify_
from steppe.errors import ScheduleError
from steppe.training import SteppeCallback
from steppe.wiring.first_pass import stop_looking

EVENTS = (
    "on_train_begin",
    "on_epoch_begin",
    "on_step_begin",
    "on_substep_end",
    "on_pre_optimizer_step",
    "on_optimizer_step",
    "on_step_end",
    "on_log",
    "on_prediction_step",
    "on_evaluate",
    "on_save",
    "on_epoch_end",
    "on_train_end",
)
PLACES = ("data", "forward", "backward", "optimizer", "evaluation")


class StopError(Exception):
    """Any exception."""


def gpt2(plugged: bool) -> nn.Module:
    torch.manual_seed(0)
    model = models.gpt2()
    return sparsify_(model, [ZerothBias(), ActivationPenalty(1e-3)]) if plugged else model


class Raises(TrainerCallback):
    """Raises at an event, once a step is done if there are any before it."""

    def __init__(self, event: str, error: BaseException) -> None:
        if event in EVENTS:
            setattr(self, event, self._raise)
        self._error = error
        self._at_once = event in ("on_train_begin", "on_epoch_begin")

    def _raise(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step >= 1 or self._at_once:
            raise self._error


class Data(list):
    """A data set that raises at its last item."""

    def __init__(self, error: BaseException | None) -> None:
        super().__init__(
            {"input_ids": ids, "labels": ids} for ids in models.token_ids(16, tokens=6)
        )
        self._error = error
        self._asked = 0

    def __getitem__(self, index: Any) -> Any:
        self._asked += 1
        if self._error is not None and self._asked > 9:
            raise self._error
        return super().__getitem__(index)


def make_trainer(
    folder: Path, model: nn.Module, place: str, error: BaseException, *callbacks: TrainerCallback
) -> Trainer:
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=4,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        logging_steps=1,
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        save_total_limit=1,
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        dataloader_pin_memory=False,
    )
    return Trainer(
        model=model,
        args=arguments,
        train_dataset=Data(error if place == "data" else None),
        eval_dataset=Data(error if place == "evaluation" else None),
        callbacks=[*callbacks, Raises(place, error)],
    )


def raise_in(model: nn.Module, trainer: Trainer, place: str, error: BaseException) -> list[Any]:
    """Let something of the user's raise in the third micro-batch; handles to take out."""
    calls = {"forward": 0, "backward": 0}

    def count(kind: str) -> None:
        calls[kind] += model.training
        if calls[kind] > 2:
            raise error

    if place == "forward":
        return [model.lm_head.register_forward_hook(lambda *_: count("forward"))]
    if place == "backward":
        return [model.lm_head.register_full_backward_hook(lambda *_: count("backward"))]
    if place == "optimizer":
        trainer.create_optimizer()

        def refuse(*_: Any) -> None:
            raise error

        trainer.optimizer.register_step_pre_hook(refuse)
    return []


def assert_clean(model: nn.Module, like: nn.Module) -> None:
    """No hook, no class and no attribute beyond those of a model that was never trained."""
    for one in (model, like):
        stop_looking(one)  # what waits for a first pass is sparsify_'s
    for (name, module), (_, other) in zip(model.named_modules(), like.named_modules(), strict=True):
        assert type(module) is type(other), name
        assert len(module._forward_hooks) == len(other._forward_hooks), name
        assert len(module._forward_pre_hooks) == len(other._forward_pre_hooks), name
        assert [k for k in vars(module) if "steppe" in k] == [
            k for k in vars(other) if "steppe" in k
        ], name


@pytest.mark.parametrize(
    ("plugged", "accelerate"),
    [(False, False), (True, False), (True, True)],
    ids=["plain", "plug-ins", "accelerated"],
)
@pytest.mark.parametrize("place", [*EVENTS, *PLACES])
def test_nothing_stays_on_the_model_whatever_raises_where(
    tmp_path: Path, place: str, plugged: bool, accelerate: bool
) -> None:
    model = gpt2(plugged)
    error = KeyboardInterrupt() if plugged else StopError()
    callback = SteppeCallback(every=1, accelerate=accelerate)
    trainer = make_trainer(tmp_path, model, place, error, callback)
    handles = raise_in(model, trainer, place, error)
    with pytest.raises(type(error)) as caught:
        trainer.train()
    for handle in handles:
        handle.remove()
    assert_clean(model, gpt2(plugged))
    assert caught.value is error, "the traceback is kept, and with it all frames of the Trainer"
    pickle.dumps(model)
    so_far = list(callback.history)
    ids = models.token_ids(2, tokens=6)
    model.train()(input_ids=ids, labels=ids).loss.backward()
    callback._settle()
    assert callback.history == so_far, "a later loop is not measured"


@pytest.mark.parametrize("place", ["forward", "evaluation", "on_log", "on_step_end"])
def test_the_same_trainer_trains_again_and_measures_every_step_once(
    tmp_path: Path, place: str
) -> None:
    model, error, callback = gpt2(plugged=True), StopError(), SteppeCallback(every=1)
    trainer = make_trainer(tmp_path, model, place, error, callback)
    handles = raise_in(model, trainer, place, error)
    with pytest.raises(StopError):
        trainer.train()
    for handle in handles:
        handle.remove()
    trainer.remove_callback(Raises)
    trainer.eval_dataset = Data(None)
    trainer.train()
    assert [entry["step"] for entry in callback.history] == [1, 2, 3, 4]
    assert [entry["step"] for entry in callback.held_out_history] == [1, 2, 3, 4]
    tokens = [entry["tokens_per_block"] for entry in callback.history]
    assert tokens == [[4 * 6, 4 * 6]] * 4
    assert_clean(model, gpt2(plugged=True))


def test_in_between_two_steps_nothing_is_on_the_model(tmp_path: Path) -> None:
    model = gpt2(plugged=False)
    seen = []

    class Looks(TrainerCallback):
        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            assert_clean(model, gpt2(plugged=False))
            seen.append("begin")

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            assert_clean(model, gpt2(plugged=False))
            seen.append("end")

    make_trainer(tmp_path, model, "", StopError(), SteppeCallback(every=1), Looks()).train()
    assert seen == ["begin", "end"] * 4


def test_outside_of_a_trainer_the_callback_says_where_it_belongs() -> None:
    with pytest.raises(ScheduleError, match=r"expected to be called by the transformers\.Trainer"):
        SteppeCallback().on_init_end(None, None, None)
