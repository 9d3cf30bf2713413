"""What measure refuses, each with one clear message and the cure."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import models
from steppe import BlockPattern, find_blocks, measure, watch
from steppe.errors import (
    DeviceError,
    EmptyLoaderError,
    LossError,
    NonFiniteLossError,
    SteppeError,
)

ENCODER = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)


def pairs() -> list[tuple[Tensor, Tensor]]:
    return [(torch.randn(3, 5, 8), torch.randn(3, 5, 8))]


def text(**changes: Any) -> list[dict[str, Tensor]]:
    ids = models.token_ids(2, 5)
    return [{"input_ids": ids, "labels": ids, **changes}]


def squared_error(output: Tensor, batch: tuple[Tensor, Tensor]) -> Tensor:
    return (output - batch[1]).square().mean()


def leaves_no_trace(model: nn.Module) -> bool:
    return not any(
        module._forward_hooks or module._forward_pre_hooks for module in model.modules()
    ) and all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize(
    ("loss", "got"),
    [
        (lambda output, batch: (output - batch[1]).square(), r"\[3, 5, 8\]"),
        (lambda output, batch: (output - batch[1]).square().mean((1, 2)), r"\[3\]"),
        (lambda output, batch: 0.5, "float"),
        (lambda output, batch: None, "NoneType"),
    ],
    ids=["elementwise", "per sample", "float", "none"],
)
def test_a_loss_that_is_no_scalar_is_named_with_its_shape(loss: Any, got: str) -> None:
    with pytest.raises(LossError, match=rf"batch 0: .* scalar tensor, got {got}.*\.mean\(\)"):
        measure(ENCODER, pairs(), loss=loss)
    assert leaves_no_trace(ENCODER)


def test_a_loss_without_a_gradient_says_why() -> None:
    with pytest.raises(LossError, match=r"no gradient.*no_grad.*labels=None"):
        measure(ENCODER, pairs(), loss=lambda output, batch: output.detach().mean())


def test_a_model_that_returns_no_loss_says_how_to_give_one() -> None:
    with pytest.raises(LossError, match=r"TransformerEncoderLayer returned no loss\..*loss=lambda"):
        measure(ENCODER, pairs())


def test_missing_labels_are_named() -> None:
    with pytest.raises(LossError, match=r"no loss and the batch has no labels.*labels='model'"):
        measure(models.gpt2(), [{"input_ids": models.token_ids()}])


@pytest.mark.parametrize("labels", ["data", "model"])
def test_a_batch_without_a_label_that_counts_is_an_error(labels: Any) -> None:
    ignored = torch.full((2, 5), -100)
    with pytest.raises(EmptyLoaderError, match="batch 1: no label that counts"):
        measure(models.gpt2(), text() + text(labels=ignored), labels=labels)


def test_an_all_padding_batch_is_an_error() -> None:
    batch = text(attention_mask=torch.zeros(2, 5, dtype=torch.int64))[0]
    batch["labels"] = batch["labels"].masked_fill(batch["attention_mask"] == 0, -100)
    with pytest.raises(EmptyLoaderError, match="every token is padding"):
        measure(models.gpt2(), [batch])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_stops_the_measurement(value: float) -> None:
    with pytest.raises(NonFiniteLossError, match=f"batch 0: the loss is {value}"):
        measure(ENCODER, pairs(), loss=lambda output, batch: output.square().mean() * value)


def test_logits_that_are_not_finite_cannot_be_sampled_from() -> None:
    model = models.gpt2()
    with torch.no_grad():
        model.transformer.wte.weight.fill_(float("nan"))
    with pytest.raises(LossError, match=r"NaN or infinite.*diverged"):
        measure(model, text(), labels="model")


def test_a_model_without_a_distribution_over_classes_is_refused() -> None:
    with pytest.raises(LossError, match=r"labels='model': expected logits .*got Tensor|got \["):
        measure(ENCODER, [torch.randn(2, 3, 5, 8)[0]], labels="model", forward=_twice)
    model = models.vit()
    model.config.problem_type = "regression"
    with pytest.raises(LossError, match=r"of a regression model.*labels='data'"):
        measure(model, [{"pixel_values": models.images()}], labels="model")


def _twice(model: nn.Module, batch: Tensor) -> Tensor:
    return model(batch).unsqueeze(0)


def test_settings_that_are_none_are_refused_by_name() -> None:
    for wrong in (
        {"labels": "modell"},
        {"reduction": "avg"},
        {"labels": "model", "loss": squared_error},
        {"labels": "model", "curvature": True},
    ):
        with pytest.raises(ValueError, match="measure: "):
            measure(ENCODER, pairs(), **wrong)  # type: ignore[arg-type]


def test_mixed_devices_are_named() -> None:
    model = models.gpt2()
    model.transformer.h[1].to("meta")
    with pytest.raises(DeviceError, match=r"mixed devices \(cpu, meta\).*model\.to\("):
        measure(model, text())


def test_parameters_made_in_inference_mode_are_refused_for_gradients_only() -> None:
    with torch.inference_mode():
        model = models.gpt2()
    with pytest.raises(DeviceError, match="inference_mode"):
        measure(model, text())
    assert measure(model, text(), labels=None).density > 0


def test_measuring_inside_inference_mode_works_for_an_ordinary_model() -> None:
    model, batches = models.gpt2(), text()
    want = measure(model, batches).blocks[0].AF_up
    with torch.inference_mode():
        got = measure(model, batches).blocks[0].AF_up
    assert got == pytest.approx(want, rel=1e-6)


def test_labels_of_another_number_of_samples_are_named() -> None:
    with pytest.raises(LossError, match="got 3 samples, the labels are of 2"):
        measure(
            ENCODER,
            [(torch.randn(3, 5, 8), torch.zeros(2, dtype=torch.int64))],
            loss=lambda output, batch: output.mean(),
        )


def test_a_monitor_that_saw_no_backward_pass_says_so() -> None:
    with watch(ENCODER, gradients=True) as monitor, torch.no_grad():
        ENCODER(torch.randn(2, 3, 8))
    with pytest.raises(LossError, match=r"no gradient came.*loss\.backward\(\)"):
        monitor.report()
    with watch(ENCODER) as monitor, torch.no_grad():
        ENCODER(torch.randn(2, 3, 8))
    assert monitor.report().blocks[0].AF_up != monitor.report().blocks[0].AF_up


def test_every_error_is_steppes_own() -> None:
    assert all(issubclass(kind, SteppeError) for kind in (LossError, DeviceError))
    assert issubclass(LossError, ValueError)


def test_tuple_batches_with_a_loss_of_ones_own() -> None:
    class Classifier(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
            self.head = nn.Linear(8, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.layer(x).mean(1))

    model = Classifier().double()
    batches = [(torch.randn(4, 3, 8, dtype=torch.float64), torch.tensor([0, 3, 1, 1]))]
    together = measure(model, batches, loss=lambda out, batch: F.cross_entropy(out, batch[1]))
    alone = measure(
        model,
        [(x.unsqueeze(0), y.unsqueeze(0)) for x, y in zip(*batches[0], strict=True)],
        loss=lambda out, batch: F.cross_entropy(out, batch[1]),
    )
    assert together.blocks[0].AF_up == pytest.approx(alone.blocks[0].AF_up, rel=1e-12)
    assert measure(model, batches, labels="model").blocks[0].AF_up > 0


def test_curvature_comes_with_the_report() -> None:
    model = models.gpt2().double()
    report = measure(
        model, text() + text(), curvature=True, where=lambda block: block.name.endswith("0")
    )
    (curvature,) = report.curvature
    assert curvature.name == report.blocks[0].name == find_blocks(model)[0].name
    assert curvature.top_eigenvalue_up > 0
    assert leaves_no_trace(model)


def test_where_and_patterns_reach_the_curvature() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.act, self.two = nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.two(self.act(self.one(x)))

    pattern = BlockPattern(family="mine", up="one", act="act", down="two")
    x = torch.randn(5, 4, dtype=torch.float64)
    report = measure(
        Block().double(), [(x, x)], loss=squared_error, patterns=[pattern], curvature=True
    )
    assert report.curvature[0].trace_down > 0
