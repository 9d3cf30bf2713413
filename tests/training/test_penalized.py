"""The activation penalty and the rising threshold in a stock Trainer."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import SequentialSampler
from transformers import PrinterCallback, Trainer, TrainingArguments, default_data_collator

import models
import steppe
from steppe import ActivationPenalty, JumpingSquaredReLU, Plugin, RisingThreshold, ZerothBias
from steppe.errors import LossError, ScheduleError
from steppe.training import SteppeCallback

pytestmark = [
    pytest.mark.filterwarnings("ignore:.gradient_checkpointing. is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),
]
STRENGTH = 2.0**-5
STEPS = 4
TOKENS = 8


class InOrder(Trainer):
    """Takes the data as it lies."""

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        return SequentialSampler(self.train_dataset)


def dataset(lengths: tuple[int, ...] = (TOKENS,), items: int = 32) -> list[dict[str, Tensor]]:
    ids = models.token_ids(items, TOKENS)
    last = torch.tensor([lengths[item % len(lengths)] for item in range(items)])
    mask = torch.arange(TOKENS) < last.unsqueeze(1)
    labels = ids.masked_fill(~mask, -100)
    return [
        {"input_ids": i, "attention_mask": m.long(), "labels": y}
        for i, m, y in zip(ids, mask, labels, strict=True)
    ]


def gpt2(*plugins: Plugin) -> nn.Module:
    torch.manual_seed(0)
    return steppe.sparsify_(models.gpt2(), plugins)


def train(folder: Path, model: nn.Module, *callbacks: Any, **options: Any) -> Trainer:
    data = options.pop("data", None) or dataset()
    arguments: dict[str, Any] = {
        "output_dir": str(folder),
        "max_steps": STEPS,
        "per_device_train_batch_size": 4,
        "learning_rate": 0.5,
        "max_grad_norm": 0.0,
        "optim": "sgd",
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "logging_nan_inf_filter": False,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
        "dataloader_pin_memory": False,
    }
    more = {key: options.pop(key) for key in ("compute_loss_func",) if key in options}
    trainer = InOrder(
        model=model,
        args=TrainingArguments(**arguments | options),
        train_dataset=data,
        eval_dataset=data[:8],
        data_collator=default_data_collator,
        callbacks=list(callbacks) or [SteppeCallback(every=1)],
        **more,
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return trainer


def by_hand(
    model: nn.Module, data: list[dict[str, Tensor]], batch: int, is_told: bool = True
) -> list[float]:
    """The same in a loop; the losses."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    steppe.constrain_(model, optimizer, total_steps=STEPS)
    losses = []
    for step in range(STEPS):
        inputs = default_data_collator(data[step * batch : (step + 1) * batch])
        # The Trainer counts all labels of a GPT-2, also the first, which nothing predicts.
        counted = (inputs["labels"] != -100).sum()
        told = {"num_items_in_batch": counted} if is_told else {}
        loss = steppe.penalize(model(**inputs, **told).loss, model)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def assert_near(one: nn.Module, two: nn.Module, tolerance: float = 1e-5) -> None:
    want = two.state_dict()
    for key, tensor in one.state_dict().items():
        assert torch.allclose(tensor, want[key], rtol=tolerance, atol=tolerance), key


PLUGINS = (ActivationPenalty(STRENGTH, ramp=0.5), RisingThreshold(), JumpingSquaredReLU())


FULL, PADDED = (8,), (8, 2, 5, 3)
MICRO_BATCHES = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4}


@pytest.mark.parametrize(
    ("lengths", "options"),
    [
        pytest.param(FULL, {}, id="full"),
        pytest.param(PADDED, {}, id="padded"),
        # Micro-batches have equal parts in the penalty: of equal numbers of tokens, the same.
        pytest.param(FULL, MICRO_BATCHES, id="accumulation"),
        pytest.param(PADDED, {"gradient_checkpointing": True}, id="checkpointing"),
        pytest.param(PADDED, {"eval_strategy": "steps", "eval_steps": 1}, id="evaluations between"),
    ],
)
def test_the_trainer_does_what_a_loop_does(
    options: dict[str, Any], lengths: tuple[int, ...], tmp_path: Path
) -> None:
    model, other, plain = gpt2(*PLUGINS), gpt2(*PLUGINS), gpt2(*PLUGINS[1:])
    trainer = train(tmp_path, model, data=dataset(lengths), **options)
    losses = by_hand(other, dataset(lengths), 4)
    assert_near(model, other)
    logged = [log["loss"] for log in trainer.state.log_history if "loss" in log]
    assert logged == pytest.approx(losses, rel=1e-4)
    train(tmp_path, plain, data=dataset(lengths), **options)
    moved = plain.transformer.h[1].mlp.c_fc.bias - other.transformer.h[1].mlp.c_fc.bias
    assert moved.abs().max() > 1e-4  # the comparison can fail


def test_a_model_that_does_not_take_the_number_of_labels(tmp_path: Path) -> None:
    model, other = gpt2(*PLUGINS), gpt2(*PLUGINS)
    model.accepts_loss_kwargs = False  # the Trainer then divides the loss itself
    train(tmp_path, model, **MICRO_BATCHES)
    by_hand(other, dataset(), 4, is_told=False)
    assert_near(model, other)


@pytest.fixture
def _fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.usefixtures("_fresh_compiler")
def test_compiled_it_does_the_same(tmp_path: Path) -> None:
    made = [models.one_layer_(models.gpt2()) for _ in range(2)]
    made[1].load_state_dict(made[0].state_dict())
    for model, options in zip(
        made, ({}, {"torch_compile": True, "torch_compile_backend": "aot_eager"}), strict=True
    ):
        steppe.sparsify_(model, [ActivationPenalty(STRENGTH, ramp=1.0), RisingThreshold()])
        train(tmp_path, model, SteppeCallback(every=2), **options)
    assert_near(*made)


def test_a_wrapped_model_gets_it_too(tmp_path: Path) -> None:
    trained = []
    for strength in (STRENGTH, 0.0):
        torch.manual_seed(0)
        config = LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True)
        model = get_peft_model(models.gpt2(), config)
        steppe.sparsify_(model, [ActivationPenalty(strength), ZerothBias()])
        train(tmp_path, model)
        trained.append(list(steppe.added_parameters(model).values()))
    assert not any(map(torch.equal, *trained))


def test_no_hook_is_left(tmp_path: Path) -> None:
    model = gpt2(*PLUGINS)
    trainer = train(tmp_path, model)
    assert not model._forward_hooks
    trainer.train()
    steppe.restore_(model)
    assert not any(module._forward_hooks for module in model.modules())


def test_a_loss_outside_of_the_model_is_told(tmp_path: Path) -> None:
    with pytest.raises(LossError, match=r"returned no loss.*label_smoothing_factor"):
        train(tmp_path, gpt2(ActivationPenalty(STRENGTH)), label_smoothing_factor=0.1)

    def loss_of(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
        return F.cross_entropy(outputs.logits.flatten(0, 1), labels.flatten())

    with pytest.raises(LossError, match="compute_loss_func"):
        train(tmp_path, gpt2(ActivationPenalty(STRENGTH)), compute_loss_func=loss_of)


def test_a_trainer_without_the_callback_is_told() -> None:
    model = gpt2(ActivationPenalty(STRENGTH))
    model(**default_data_collator(dataset()[:2])).loss.backward()
    with pytest.raises(ScheduleError, match=r"callbacks=\[SteppeCallback\(\)\]"):
        steppe.project_(model)


@pytest.mark.parametrize("stop", [1, 3])
def test_a_resumed_run_ends_where_an_uninterrupted_one_does(stop: int, tmp_path: Path) -> None:
    saving = {"save_strategy": "steps", "save_steps": stop, "optim": "adamw_torch"}
    whole = gpt2(*PLUGINS)
    train(tmp_path / "a", whole, **saving, learning_rate=1e-2)
    fresh = gpt2(*PLUGINS)
    with torch.no_grad():
        for parameter in fresh.parameters():
            parameter.add_(1.0)
    trainer = InOrder(
        model=fresh,
        args=TrainingArguments(
            output_dir=str(tmp_path / "b"),
            max_steps=STEPS,
            per_device_train_batch_size=4,
            learning_rate=1e-2,
            max_grad_norm=0.0,
            lr_scheduler_type="constant",
            logging_nan_inf_filter=False,
            report_to=[],
            disable_tqdm=True,
            use_cpu=True,
            dataloader_pin_memory=False,
            save_strategy="no",
        ),
        train_dataset=dataset(),
        data_collator=default_data_collator,
        callbacks=[SteppeCallback(every=1)],
    )
    trainer.train(resume_from_checkpoint=str(tmp_path / "a" / f"checkpoint-{stop}"))
    assert all(
        torch.equal(tensor, whole.state_dict()[key]) for key, tensor in fresh.state_dict().items()
    )
