"""Every verb on a device without data: no mixed devices, and no wait inside a training loop."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily

import models
import steppe
from fake.device import NAME, Watchdog, fake_tensors, move_
from steppe.measures.density import count_
from steppe.ops import mlp as mlp_op
from steppe.ops import reference
from steppe.ops.outcome import OWN_MODULES
from steppe.plugins.moments import add_moments_, add_product_moments_

Batch = dict[str, Tensor]
STEPPE = [steppe.ZerothBias, steppe.RestrictedNorm, steppe.JumpingSquaredReLU]


def text(mask: bool = False) -> Batch:
    ids = torch.randint(0, models.VOCABULARY, (4, 16), device=NAME)
    batch = {"input_ids": ids, "labels": ids.clone()}
    if mask:
        batch["attention_mask"] = torch.ones(4, 16, dtype=torch.long, device=NAME)
    return batch


def images() -> Batch:
    labels = torch.zeros(2, dtype=torch.long, device=NAME)
    return {"pixel_values": torch.randn(2, 1, 8, 8, device=NAME), "labels": labels}


def train(
    watchdog: Watchdog,
    model: nn.Module,
    batch: Batch,
    plugins: list[steppe.Plugin] | None = None,
    watched: AbstractContextManager[Any] | None = None,
    dtype: torch.dtype | None = None,
    penalized: bool = False,
    optimizer: type[torch.optim.Optimizer] = torch.optim.AdamW,
) -> nn.Module:
    """Two optimizer steps; what the watchdog saw before them does not count."""
    move_(model).train()
    if plugins:
        steppe.sparsify_(model, plugins)
    updates = optimizer(model.parameters(), lr=1e-3)
    if plugins or steppe.added_parameters(model):
        steppe.constrain_(model, updates, total_steps=10)
    watchdog.events.clear()
    watchdog.called.clear()
    cast = torch.autocast(NAME, dtype=dtype) if dtype else nullcontext()
    with watched or nullcontext():
        for _ in range(2):
            with cast:
                loss = model(**batch).loss
            if penalized:
                loss = steppe.penalize(loss, model)
            loss.backward()
            updates.step()
            updates.zero_grad()
    return model


def accelerated(plugins: list[steppe.Plugin] | None = None) -> nn.Module:
    """A GPT-2 that was accelerated on the CPU; its activation is told by evaluating it."""
    with unset_fake_temporarily():
        model = models.gpt2()
        if plugins:
            steppe.sparsify_(model, plugins)
        return steppe.accelerate_(model, check=False) or model


def ramps() -> list[steppe.Plugin]:
    return [
        steppe.ZerothBias(),
        steppe.RestrictedNorm(ramp=0.3),
        steppe.JumpingSquaredReLU(ramp=0.3),
    ]


def three() -> list[steppe.Plugin]:
    return [kind() for kind in STEPPE]


ARMS: dict[str, Callable[[Watchdog], object]] = {
    "plain": lambda dog: train(dog, models.gpt2(), text()),
    "steppe": lambda dog: train(dog, models.gpt2(), text(), three()),
    "steppe, mask": lambda dog: train(dog, models.gpt2(), text(mask=True), three()),
    "steppe, ramps": lambda dog: train(dog, models.gpt2(), text(), ramps()),
    "steppe, bfloat16": lambda dog: train(
        dog, models.gpt2(), text(), three(), dtype=torch.bfloat16
    ),
    "threshold": lambda dog: train(dog, models.gpt2(), text(), [steppe.RisingThreshold()]),
    "threshold, mask": lambda dog: train(
        dog, models.llama(), text(mask=True), [steppe.RisingThreshold()]
    ),
    "threshold, bfloat16": lambda dog: train(
        dog, models.gpt2(), text(), [steppe.RisingThreshold()], dtype=torch.bfloat16
    ),
    "penalty": lambda dog: train(
        dog, models.gpt2(), text(), [steppe.ActivationPenalty(1e-4)], penalized=True
    ),
    "penalty, mask, ramp": lambda dog: train(
        dog,
        models.gpt2(),
        text(mask=True),
        [steppe.ActivationPenalty(1e-4, ramp=0.5)],
        penalized=True,
    ),
    "vit": lambda dog: train(dog, models.vit(), images(), three()),
    "t5": lambda dog: train(dog, models.t5(), text(), [steppe.RisingThreshold()]),
    "t5, gated": lambda dog: train(
        dog, models.t5(gated=True), text(), [steppe.JumpingSquaredReLU()]
    ),
    "opt, mask": lambda dog: train(dog, models.opt(), text(mask=True), three()),
    "bert": lambda dog: train(dog, models.bert(), text(), [steppe.RisingThreshold()]),
    "accelerated": lambda dog: train(dog, accelerated(), text()),
    "accelerated, threshold": lambda dog: train(
        dog, accelerated([steppe.RisingThreshold()]), text()
    ),
    "accelerated, ramps": lambda dog: train(dog, accelerated(ramps()), text()),
}
WATCHES: dict[str, Callable[[Watchdog, bool], object]] = {
    "gpt2": lambda dog, told: watched(dog, models.gpt2(), text(), told),
    "gpt2, mask": lambda dog, told: watched(dog, models.gpt2(), text(mask=True), told),
    "gpt2, bfloat16": lambda dog, told: watched(
        dog, models.gpt2(), text(), told, dtype=torch.bfloat16
    ),
    "llama": lambda dog, told: watched(dog, models.llama(), text(mask=True), told),
    "t5": lambda dog, told: watched(dog, models.t5(), text(), told),
    "vit": lambda dog, told: watched(dog, models.vit(), images(), told),
    "steppe": lambda dog, told: watched(dog, models.gpt2(), text(), told, plugins=three()),
    "threshold": lambda dog, told: watched(
        dog, models.gpt2(), text(), told, plugins=[steppe.RisingThreshold()]
    ),
    "accelerated": lambda dog, told: watched(dog, accelerated(), text(), told),
}


def watched(
    watchdog: Watchdog, model: nn.Module, batch: Batch, gradients: bool, **settings: Any
) -> None:
    move_(model)
    watch = steppe.watch(model, gradients=gradients)
    sgd = torch.optim.SGD  # AdamW has a third of the operations
    train(watchdog, model, batch, watched=watch, optimizer=sgd, **settings)


@pytest.mark.parametrize("arm", ARMS.values(), ids=ARMS)
def test_a_training_loop_never_waits_and_mixes_no_devices(
    arm: Callable[[Watchdog], object],
) -> None:
    with fake_tensors() as watchdog:
        arm(watchdog)
    assert watchdog.events == {}
    assert "aten._foreach_addcdiv_.Scalar" in watchdog.called or "aten.addcdiv_.default" in (
        watchdog.called
    )


@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("scenario", WATCHES.values(), ids=WATCHES)
def test_watching_never_waits(
    scenario: Callable[[Watchdog, bool], object], gradients: bool
) -> None:
    with fake_tensors() as watchdog:
        scenario(watchdog, gradients)
    assert watchdog.events == {}


def test_accelerate_leaves_a_model_off_the_cpu_to_its_own_modules() -> None:
    with fake_tensors() as watchdog:
        model = train(watchdog, accelerated(), text())
        model.eval()
        with torch.no_grad():
            for tokens in (1, 16):
                model(input_ids=text()["input_ids"][:, :tokens])
        explained = steppe.explain(model)
    assert not any("steppe::" in name or name.startswith("steppe.") for name in watchdog.called)
    for block in explained.blocks:
        assert block.how == OWN_MODULES
        assert NAME in block.reason


def test_blocks_are_found_folded_and_restored() -> None:
    with fake_tensors() as watchdog:
        model = train(watchdog, models.llama(), text(), [steppe.RisingThreshold()])
        assert len(steppe.find_blocks(model)) == 2
        assert {tensor.device.type for tensor in model.state_dict().values()} == {NAME}
        watchdog.truth = True  # the deviations are known
        steppe.fold_(model)
        watchdog.truth = False
        assert {tensor.device.type for tensor in model.state_dict().values()} == {NAME}
        assert model(**text()).loss.device.type == NAME
        steppe.sparsify_(model, [steppe.JumpingSquaredReLU(), steppe.ActivationPenalty(1e-4)])
        steppe.restore_(model)
        assert model(**text()).loss.device.type == NAME


def test_a_state_goes_into_another_model() -> None:
    with fake_tensors():
        one, other = (move_(models.gpt2()) for _ in range(2))
        for model in (one, other):
            steppe.sparsify_(model, [*three(), steppe.RisingThreshold()])
        other.load_state_dict(one.state_dict())
        assert other(**text()).loss.device.type == NAME


@pytest.mark.parametrize("masked", [False, True])
def test_the_bodies_of_the_custom_ops_mix_no_devices(masked: bool) -> None:
    """Fake tensors stop before them."""
    with fake_tensors() as watchdog:
        samples, tokens, width = 4, 16, 32
        mask = torch.ones(samples, tokens, dtype=torch.bool) if masked else None  # on the CPU
        support = torch.randn(samples, tokens, width, device=NAME) > 0
        count_._init_fn(
            torch.zeros(5, dtype=torch.int64, device=NAME),
            torch.zeros(width, dtype=torch.int64, device=NAME),
            torch.zeros(4, 4, dtype=torch.float64, device=NAME),
            support,
            support,
            mask,
        )
        counted = None if mask is None else mask.flatten()
        start = torch.zeros((), dtype=torch.int64, device=NAME)
        for dtype in (torch.bfloat16, torch.float32):
            sums = torch.zeros(3, width, dtype=torch.float64, device=NAME)
            p = torch.randn(samples, tokens, width, device=NAME, dtype=dtype)
            add_moments_._init_fn(sums, p, counted, start, 1 / 16)
            x = torch.randn(samples, tokens, 8, device=NAME, dtype=dtype)
            weight = torch.randn(width, 8, device=NAME, dtype=dtype)
            add_product_moments_._init_fn(sums, x, weight, weight[:, 0], counted, start, 1 / 16)
    assert not any(event.startswith("wait") for event in watchdog.events)


def test_the_reference_ops_never_wait() -> None:
    with fake_tensors() as watchdog:
        mix = torch.zeros((), device=NAME)
        x = torch.randn(32, 8, device=NAME)
        matrix, vector = torch.randn(24, 8, device=NAME), torch.randn(24, device=NAME)
        weights = reference.Weights(matrix, vector, None, None, matrix, x[0])
        rule = mlp_op.rule_of(1.0, 0.5, mix, 0.1)
        _, r, up, kept = reference.mlp(x, weights, rule)
        mlp_op.dense_backward(x, x[:, 0], x, weights, rule, r, up, kept, [True] * 7)
    assert watchdog.events == {}


def test_a_mask_may_be_on_another_device_than_the_gradient() -> None:
    """As of a model that ``device_map`` has spread."""
    with fake_tensors() as watchdog:
        batch = {**text(), "attention_mask": torch.ones(4, 16, dtype=torch.long)}
        model = move_(models.gpt2())
        model.forward = with_mask_moved(model.forward)
        train(watchdog, model, batch, watched=steppe.watch(model, gradients=True))
    assert not any(event.startswith("wait") for event in watchdog.events)


def with_mask_moved(forward: Callable[..., Any]) -> Callable[..., Any]:
    def moved(
        input_ids: Tensor, attention_mask: Tensor, labels: Tensor | None = None, **kwargs: Any
    ) -> Any:
        return forward(
            input_ids=input_ids, attention_mask=attention_mask.to(NAME), labels=labels, **kwargs
        )

    return moved


def test_save_and_load_of_a_whole_model_on_the_device(tmp_path: Path) -> None:
    """What is written has no data here, but names, shapes and devices are looked at."""
    with fake_tensors():
        model = move_(models.gpt2())
        steppe.sparsify_(model, three())
        state = {name: tensor.to("cpu") for name, tensor in model.state_dict().items()}
        assert all(isinstance(tensor, FakeTensor) for tensor in state.values())
        model.load_state_dict(state)
        assert {tensor.device.type for tensor in model.state_dict().values()} == {NAME}


def test_a_planted_wait_is_found_with_its_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("steppe.plugins.penalty.penalties_of", lambda model: [Waiting()])
    with fake_tensors() as watchdog:
        steppe.penalize(torch.zeros((), device=NAME), nn.Linear(1, 1))
    (event,) = watchdog.events
    assert event.startswith("wait: aten._local_scalar_dense")
    assert "plugins/penalty.py:" in event
    assert "add_to(loss)" in event


class Waiting:
    """Reads a number in the loop."""

    def add_to(self, loss: Tensor) -> Tensor:
        return loss * loss.item()


@pytest.mark.parametrize("how", ["bool", "copy", "mask"])
def test_other_planted_waits_and_copies_are_found(
    how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Planted:
        def add_to(self, loss: Tensor) -> Tensor:
            if how == "bool":
                return loss if loss.isfinite() else loss * 0
            return loss + loss.to("cpu").to(NAME) if how == "copy" else loss[loss > 0].sum()

    monkeypatch.setattr("steppe.plugins.penalty.penalties_of", lambda model: [Planted()])
    with fake_tensors() as watchdog:
        steppe.penalize(torch.zeros((), device=NAME), nn.Linear(1, 1))
    assert watchdog.events
    assert all("plugins/penalty.py" in event for event in watchdog.events)


def test_planted_mixed_devices_raise() -> None:
    with fake_tensors(), pytest.raises(RuntimeError, match="device"):
        torch.zeros(3, device=NAME) + torch.zeros(3)
