"""Augmented flatness: against explicit copies of the weights, loops, and the identity."""

from __future__ import annotations

import functools
import math
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers import AlbertConfig, AlbertForMaskedLM

import models
import oracles
from steppe import (
    BlockReport,
    MLPBlock,
    Rectifier,
    Report,
    ZerothBias,
    find_blocks,
    measure,
    sparsify_,
    watch,
)
from steppe.errors import LossError
from steppe.measures.flatness import (
    _CHUNK,
    COLUMNS,
    new_probe,
    sample_rows,
    squared_weight_gradient,
    tap,
)
from steppe.measures.report import ratio_of_sums, report_from_dict
from steppe.tokens import Layout

pytestmark = [
    pytest.mark.filterwarnings(
        "ignore:.gradient_checkpointing_enable. is deprecated:FutureWarning"
    ),
    # What torch.compile does inside.
    pytest.mark.filterwarnings("ignore:<class 'torch.autograd.function.Function'> should not be"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning"),
    pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning"),
]

Batch = dict[str, Tensor]
ARCHITECTURES: dict[str, Callable[..., nn.Module]] = {
    **models.LANGUAGE_MODELS,
    **models.VISION_MODELS,
    "t5_gated": functools.partial(models.t5, gated=True),
    "opt_post_norm": functools.partial(models.opt, norm_first=False),
    "gpt_neox_sequential": functools.partial(models.gpt_neox, parallel=False),
}
ACTIVATIONS = {
    "relu": None,
    "j-squared-relu": (1.0, 0.5),
    "squared-relu": (0.0, 1.0),
}
PRECISE = 1e-6  # Transformers computes its losses in float32, also those of float64 models
each_architecture = pytest.mark.parametrize("name", ARCHITECTURES)


def build(name: str, activation: str = "relu", dtype: torch.dtype = torch.float64) -> nn.Module:
    """A tiny model, its pre-activations large enough that β matters."""
    model = ARCHITECTURES[name]().to(dtype).eval()
    coefficients = ACTIVATIONS[activation]
    for block in find_blocks(model):
        if coefficients is not None:
            replaced = Rectifier(*coefficients)
            block.act_slot.module._modules.pop(block.act_slot.name, None)
            setattr(block.act_slot.module, block.act_slot.name, replaced)
        with torch.no_grad():
            block.activated.weight.mul_(10.0)
    return model


def batch_for(name: str, dtype: torch.dtype = torch.float64, seed: int = 0) -> Batch:
    """Three samples; of text, of lengths 7, 5 and 2, padded on the right."""
    generator = torch.Generator().manual_seed(seed)
    if name in models.VISION_MODELS:
        labels = torch.randint(0, 10, (3,), generator=generator)
        return {"pixel_values": models.images(3, seed=seed).to(dtype), "labels": labels}
    ids = models.token_ids(3, 7, seed=seed)
    mask = (torch.arange(7) < torch.tensor([[7], [5], [2]])).long()
    labels = models.token_ids(3, 7, seed=seed + 1) if name == "bert" else ids
    return {"input_ids": ids, "attention_mask": mask, "labels": labels.masked_fill(mask == 0, -100)}


def row_of(batch: Batch, index: int) -> Batch:
    return {key: value[index : index + 1] for key, value in batch.items()}


def matrix_of(layer: nn.Module) -> Tensor:
    """The weight as ``[out, in]``; Conv1D keeps it the other way round."""
    return layer.weight if isinstance(layer, nn.Linear) else layer.weight.T


class Copies:
    """A forward hook that computes a layer with a copy of its weight for each token."""

    def __init__(self, layer: nn.Module) -> None:
        self.weights: Tensor | None = None
        self.handle = layer.register_forward_hook(self)

    def __call__(self, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        tokens = args[0].reshape(-1, args[0].shape[-1])
        matrix = matrix_of(module).detach()
        self.weights = matrix.expand(len(tokens), *matrix.shape).clone().requires_grad_()
        result = torch.einsum("tfd,td->tf", self.weights, tokens).reshape(output.shape)
        return output + (result - result.detach())  # the layer's own value, to the last bit


def squared_norms_by_copies(model: nn.Module, layer: nn.Module, batch: Batch) -> list[float]:
    """‖∂ℓ_s/∂(W_1 … W_T)‖² of each sample's own loss, each sample run alone."""
    norms = []
    for index in range(3):
        copies = Copies(layer)
        loss = model(**row_of(batch, index)).loss
        copies.handle.remove()
        assert copies.weights is not None
        (grad,) = torch.autograd.grad(loss, copies.weights)
        norms.append(grad.double().square().sum().item())
    return norms


def squared_norms_by_copies_in_the_batch(
    model: nn.Module, layer: nn.Module, batch: Batch, causal: bool
) -> list[float]:
    """The same from the gradient of the batch's mean loss, taken apart by hand."""
    copies = Copies(layer)
    loss = model(**batch).loss
    copies.handle.remove()
    assert copies.weights is not None
    (grad,) = torch.autograd.grad(loss, copies.weights)
    labels = batch["labels"].reshape(3, -1)
    terms = ((labels[:, 1:] if causal else labels) != -100).sum(-1)
    own = grad.double().square().reshape(3, -1).sum(-1) * (terms.sum() / terms) ** 2
    return own.tolist()


def squared_norms_tied(model: nn.Module, layer: nn.Module, batch: Batch) -> list[float]:
    """‖∂ℓ_s/∂W‖² of each sample's own loss, each sample run alone."""
    return [
        torch.autograd.grad(model(**row_of(batch, index)).loss, layer.weight)[0]
        .double()
        .square()
        .sum()
        .item()
        for index in range(3)
    ]


def layers_of(block: MLPBlock, report: BlockReport) -> Iterator[tuple[str, nn.Module, float]]:
    for part, layer in (("up", block.up), ("gate", block.gate), ("down", block.down)):
        if layer is not None:
            yield part, layer, getattr(report, f"AF_{part}")


def assert_close(got: dict[str, Any], want: dict[str, Any]) -> None:
    """Two reports: counts exactly, the rest up to rounding."""
    for key, value in want.items():
        if key.startswith(("AF", "active", "squared")):
            for one, two in zip(got[key], value, strict=True):
                assert one is two is None or one == pytest.approx(two, rel=PRECISE), key
        elif key != "standard_errors_per_block":
            assert got[key] == value, key


# ---- the identity


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-6)], ids=["f64", "f32"]
)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@each_architecture
def test_derivative_density_is_flatness_over_gain(
    name: str, activation: str, dtype: torch.dtype, tolerance: float
) -> None:
    model = build(name, activation, dtype)
    report = measure(model, [batch_for(name, dtype), batch_for(name, dtype, seed=1)])
    for block in report.blocks:
        assert 0.05 < block.derivative_density < 0.95
        assert block.derivative_density_by_identity == pytest.approx(
            block.derivative_density, rel=tolerance
        )
        if math.isnan(block.AF_gate):
            assert block.density == block.derivative_density
        # The three curves of the report: their quotient is the density.
        quotient = block.AF_per_entry / (
            block.squared_input_norm * block.weighted_activation_gradient
        )
        assert quotient == pytest.approx(block.derivative_density, rel=tolerance)


def test_the_identity_can_fail() -> None:
    """Where the activation that runs is not the one that is measured."""
    model = build("gpt2")
    with watch(model, gradients=True) as monitor:
        layer = find_blocks(model)[0].up
        x = torch.randn(1, 4, models.D_MODEL, dtype=torch.float64)
        torch.sin(layer(x)).square().sum().backward()
    block = monitor.report().blocks[0]
    assert abs(block.derivative_density_by_identity / block.derivative_density - 1) > 1e-3


def test_the_identity_holds_for_smooth_activations_too() -> None:
    model = models.gpt2("gelu").double().eval()
    (block, *_) = measure(model, [batch_for("gpt2")]).blocks
    assert block.derivative_density > 0.99
    assert block.derivative_density_by_identity == pytest.approx(
        block.derivative_density, rel=PRECISE
    )


# ---- explicit copies


@each_architecture
def test_augmented_flatness_is_the_squared_gradient_norm_of_a_copy_per_token(name: str) -> None:
    model = build(name)
    batch = batch_for(name)
    report = measure(model, [batch])
    for block, measured in zip(find_blocks(model), report.blocks, strict=True):
        for part, layer, flatness in layers_of(block, measured):
            norms = squared_norms_by_copies(model, layer, batch)
            assert flatness == pytest.approx(sum(norms) / 3, rel=PRECISE), part
            error = torch.tensor(norms).std() / math.sqrt(3)
            assert measured.standard_errors[f"AF_{part}"] == pytest.approx(error.item(), rel=1e-6)
            tied = squared_norms_tied(model, layer, batch)
            got = getattr(measured, f"squared_gradient_norm_{part}")
            assert got == pytest.approx(sum(tied) / 3, rel=PRECISE), part


@each_architecture
def test_the_same_in_float32_to_a_millionth(name: str) -> None:
    precise = measure(build_twin(name, torch.float64), [batch_for(name, torch.float32)])
    single = build_twin(name, torch.float32)
    kind = type(single).__name__
    batch = batch_for(name, torch.float32)
    report = measure(single, [batch])
    for block, measured, wanted in zip(
        find_blocks(single), report.blocks, precise.blocks, strict=True
    ):
        for part, layer, flatness in layers_of(block, measured):
            norms = squared_norms_by_copies_in_the_batch(
                single, layer, batch, causal="LMHead" in kind or "CausalLM" in kind
            )
            assert flatness == pytest.approx(sum(norms) / 3, rel=1e-6), part
            assert flatness == pytest.approx(getattr(wanted, f"AF_{part}"), rel=1e-4), part


def build_twin(name: str, dtype: torch.dtype) -> nn.Module:
    """The same float32 weights in either precision; pixels follow the model."""
    torch.manual_seed(0)
    model = build(name, dtype=torch.float32).to(dtype)
    model.register_forward_pre_hook(_cast_pixels, with_kwargs=True)
    return model


def _cast_pixels(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    dtype = next(module.parameters()).dtype
    return args, {
        key: value.to(dtype) if value.is_floating_point() else value
        for key, value in kwargs.items()
    }


# ---- loops


@settings(deadline=None, max_examples=40)
@given(
    samples=st.integers(0, 3),
    tokens=st.integers(1, 4),
    d_in=st.integers(1, 3),
    d_out=st.integers(1, 5),
    masked=st.booleans(),
    supported=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_sample_rows_are_the_loops(
    samples: int, tokens: int, d_in: int, d_out: int, masked: bool, supported: bool, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(samples, tokens, d_in, generator=generator, dtype=torch.float64)
    grad = torch.randn(samples, tokens, d_out, generator=generator, dtype=torch.float64)
    slope = torch.rand(grad.shape, generator=generator) > 0.5
    mask = torch.rand(samples, tokens, generator=generator) > 0.4
    scale = torch.rand(samples, generator=generator, dtype=torch.float64) + 0.5
    rows = sample_rows(x, grad, slope if supported else None, mask if masked else None, scale)
    assert rows.shape == (samples, len(COLUMNS))
    for s in range(samples):
        counted = mask[s] if masked else torch.ones(tokens, dtype=torch.bool)
        want = oracles.flatness_row(x[s], grad[s] * scale[s], slope[s], counted)
        if not supported:
            want[1] = want[4] = want[5] = 0.0
        assert rows[s, 0] == float(counted.any())
        assert rows[s, 1:].tolist() == pytest.approx(want, rel=1e-9, abs=1e-12)


def test_infinite_gradients_on_padding_count_nowhere() -> None:
    x, grad = torch.ones(1, 2, 3), torch.ones(1, 2, 4)
    x[0, 1], grad[0, 1] = math.inf, math.nan
    mask = torch.tensor([[True, False]])
    rows = sample_rows(x, grad, grad > 0, mask, torch.ones(1))
    assert rows[0].tolist() == [1, 1, 4, 3, 12, 12, 4, 12]


@pytest.mark.parametrize(("tokens", "d_in", "d_out"), [(5, 40, 30), (50, 4, 3), (1, 2, 2)])
def test_both_ways_to_the_shared_weights_gradient_agree(tokens: int, d_in: int, d_out: int) -> None:
    x = torch.randn(3, tokens, d_in, dtype=torch.float64)
    grad = torch.randn(3, tokens, d_out, dtype=torch.float64)
    want = torch.einsum("stf,std->sfd", grad, x).square().sum((1, 2))
    torch.testing.assert_close(squared_weight_gradient(x, grad), want, rtol=1e-12, atol=0.0)


def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    x, grad = torch.randn(7, 5, 3), torch.randn(7, 5, 4)
    mask = torch.rand(7, 5) > 0.3
    whole = sample_rows(x, grad, grad > 0, mask, torch.ones(7))
    assert x.numel() < _CHUNK
    monkeypatch.setattr("steppe.measures.flatness._CHUNK", 1)
    torch.testing.assert_close(sample_rows(x, grad, grad > 0, mask, torch.ones(7)), whole)


def test_half_precision_does_not_overflow() -> None:
    x = torch.full((1, 2, 3), 300.0, dtype=torch.float16)
    grad = torch.full((1, 2, 4), 300.0, dtype=torch.float16)
    rows = sample_rows(x, grad, grad > 0, None, torch.ones(1))
    assert rows[0, 4] == 2 * (4 * 300.0**2) * (3 * 300.0**2)


def test_a_ratio_of_sums_has_the_error_of_a_ratio_estimator() -> None:
    generator = torch.Generator().manual_seed(0)
    u, v = torch.rand(2, 50, generator=generator, dtype=torch.float64)
    rows = torch.stack([torch.ones_like(u), u, v], dim=1)
    ratio, error = ratio_of_sums(rows.T @ rows, [1], [2])
    assert ratio == pytest.approx((u.sum() / v.sum()).item())
    residual = u - ratio * v
    want = (residual.square().sum() / 49 / 50).sqrt() / v.mean()
    assert error == pytest.approx(want.item())
    mean, error_of_mean = ratio_of_sums(rows.T @ rows, [1], [0])
    assert mean == pytest.approx(u.mean().item())
    assert error_of_mean == pytest.approx((u.std() / math.sqrt(50)).item())


# ---- whose loss


@pytest.mark.parametrize("name", ["gpt2", "t5", "bert", "vit"])
def test_a_sum_is_of_each_samples_own_sum(name: str) -> None:
    model, batch = build(name), batch_for(name)
    summed = functools.partial(_summed, shifted=name == "gpt2")
    report = measure(model, [batch], loss=summed, reduction="sum")
    alone = [
        measure(model, [row_of(batch, index)], loss=summed, reduction="sum") for index in range(3)
    ]
    assert_same(report, alone)
    means = measure(model, [batch])
    if name != "vit":
        assert means.blocks[0].AF_up < 0.5 * report.blocks[0].AF_up


def _summed(output: Any, batch: Batch, shifted: bool) -> Tensor:
    logits, labels = output.logits, batch["labels"]
    if shifted:
        logits, labels = logits[:, :-1], labels[:, 1:]
    return F.cross_entropy(logits.flatten(0, -2), labels.flatten(), reduction="sum")


def assert_same(together: Report, alone: list[Report]) -> None:
    """The mean over samples, whichever batch they were in."""
    for index, block in enumerate(together.blocks):
        for key in ("AF_up", "AF_down", "squared_gradient_norm_up", "squared_gradient_norm_down"):
            values = [getattr(report.blocks[index], key) for report in alone]
            assert getattr(block, key) == pytest.approx(sum(values) / len(values), rel=PRECISE), key


@pytest.mark.parametrize("name", ["gpt2", "t5", "bert", "llama", "vit"])
def test_samples_weigh_the_same_in_any_batch(name: str) -> None:
    model, batch = build(name), batch_for(name)
    assert_same(measure(model, [batch]), [measure(model, [row_of(batch, i)]) for i in range(3)])
    uneven = [
        {key: value[:2] for key, value in batch.items()},
        {key: value[2:] for key, value in batch.items()},
    ]
    assert_same(measure(model, [batch]), [measure(model, uneven)])


@pytest.mark.parametrize("factor", [1.0, 1024.0, 0.25])
@pytest.mark.parametrize("name", ["gpt2", "vit"])
def test_what_a_loop_multiplies_the_models_loss_by_is_undone(name: str, factor: float) -> None:
    model, batch = build(name), batch_for(name)
    want = measure(model, [batch, batch]).blocks
    with watch(model, gradients=True) as monitor:
        for _ in range(2):
            (model(**batch).loss * factor).backward()
    for got, block in zip(monitor.report().blocks, want, strict=True):
        assert got.AF_up == pytest.approx(block.AF_up, rel=PRECISE)
        assert got.standard_errors == pytest.approx(block.standard_errors, rel=1e-6, nan_ok=True)


def test_the_number_of_terms_that_a_trainer_gives_is_used() -> None:
    model, batch = build("gpt2"), batch_for("gpt2")
    want = measure(model, [batch]).blocks[0].AF_up
    with watch(model, gradients=True) as monitor:
        model(**batch, num_items_in_batch=500).loss.backward()
    assert monitor.report().blocks[0].AF_up == pytest.approx(want, rel=PRECISE)


def test_a_loss_outside_the_model_is_a_mean_or_a_sum_by_what_is_said() -> None:
    model, batch = build("vit"), batch_for("vit")
    want = measure(model, [batch]).blocks[0].AF_up
    labels = batch.pop("labels")
    for reduction in ("mean", "sum"):
        with watch(model, gradients=True, reduction=reduction) as monitor:  # type: ignore[arg-type]
            loss = F.cross_entropy(model(**batch).logits, labels, reduction=reduction)
            monitor.loss_factor = 8.0
            (loss * 8.0).backward()
        assert monitor.report().blocks[0].AF_up == pytest.approx(want, rel=PRECISE)


def outside_loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """The loss of an image model, made outside of it, with gradients in half precision."""
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    with torch.autocast("cpu", torch.float16):
        return F.cross_entropy(model(**inputs).logits.float(), batch["labels"])


@pytest.mark.parametrize("bad_at", [[0], [1], [0, 3], []])
def test_passes_that_overflow_are_left_out_and_counted(bad_at: list[int]) -> None:
    model, batch = build("vit", dtype=torch.float32), batch_for("vit", torch.float32)
    reports = []
    for bad in (bad_at, []):
        with watch(model, gradients=True) as monitor:
            for step in range(4):
                if step in bad_at and step not in bad:
                    continue
                scale = 2.0**100 if step in bad else 2.0 ** (4 + step)
                monitor.loss_factor = scale
                (outside_loss(model, batch) * scale).backward()
        reports.append(monitor.report())
    for got, want in zip(reports[0].blocks, reports[1].blocks, strict=True):
        assert got.non_finite_passes == len(bad_at)
        assert want.non_finite_passes == 0
        assert got.samples == want.samples * 4 / (4 - len(bad_at)), "of the forward passes"
        for name in ("AF_up", "AF_down", "active_gain", "squared_gradient_norm_up"):
            assert getattr(got, name) == pytest.approx(getattr(want, name), rel=1e-9)
            assert 0 < getattr(got, name) < math.inf
    values = reports[0].to_dict()
    assert report_from_dict(values).to_dict() == values
    del values["non_finite_passes_per_block"]  # as of an older run
    assert report_from_dict(values).blocks[0].non_finite_passes == 0


def test_where_every_pass_overflows_there_is_no_flatness_but_a_count() -> None:
    model, batch = build("vit", dtype=torch.float32), batch_for("vit", torch.float32)
    with watch(model, gradients=True) as monitor:
        monitor.loss_factor = 2.0**100
        (outside_loss(model, batch) * 2.0**100).backward()
    report = monitor.report()
    assert [block.non_finite_passes for block in report.blocks] == [1] * len(report.blocks)
    assert all(math.isnan(block.AF_up) and block.density > 0 for block in report.blocks)


def test_a_factor_of_the_models_own_loss_that_changes_is_refused() -> None:
    model, batch = build("gpt2"), batch_for("gpt2")
    with watch(model, gradients=True) as monitor:
        for factor in (4.0, 2.0):
            (model(**batch).loss * factor).backward()
        with pytest.raises(LossError, match=r"monitor.report\(\); monitor.reset\(\)"):
            monitor.report()
        monitor.reset()  # what it says
        (model(**batch).loss * 2.0).backward()
        assert monitor.report().blocks[0].AF_up > 0


def test_a_factor_that_is_told_too_late_is_refused() -> None:
    model, batch = build("vit", dtype=torch.float32), batch_for("vit", torch.float32)
    with watch(model, gradients=True) as monitor:
        (outside_loss(model, batch) * 8.0).backward()
        with pytest.raises(LossError, match="before backward"):
            monitor.loss_factor = 8.0


# ---- what the loop does


@pytest.mark.parametrize("name", ["t5", "t5_gated", "gpt2", "vit", "bert", "opt"])
def test_outputs_and_gradients_stay_bit_identical(name: str) -> None:
    model = build(name, dtype=torch.float32).train()
    batch = batch_for(name, torch.float32)
    runs = []
    for watched in (False, True):
        model.zero_grad()
        torch.manual_seed(1)
        if watched:
            with watch(model, gradients=True):
                output = model(**batch)
                output.loss.backward()
        else:
            output = model(**batch)
            output.loss.backward()
        grads = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        runs.append([output.logits.detach(), output.loss.detach(), *grads])
    assert len(runs[0]) == len(runs[1])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_checkpointed_backward_passes_count_once(name: str, reentrant: bool) -> None:
    model, batch = build(name).train(), batch_for(name)
    with watch(model, gradients=True) as monitor:
        model(**batch).loss.backward()
        want = monitor.report().to_dict()
        monitor.reset()
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model(**batch, use_cache=False).loss.backward()
        got = monitor.report().to_dict()
    assert_close(got, want)


def albert() -> nn.Module:
    """Three calls of one layer."""
    torch.manual_seed(0)
    config = AlbertConfig(
        vocab_size=models.VOCABULARY,
        embedding_size=8,
        hidden_size=16,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=24,
        hidden_act="relu",
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    return AlbertForMaskedLM(config).to(torch.float64)


def test_a_block_that_is_called_several_times_has_the_tokens_of_all_calls() -> None:
    model, batch = albert(), batch_for("bert")
    block = find_blocks(model)[0]
    tied, copies, slopes = [], [], 0
    for index in range(3):
        seen: list[tuple[Tensor, Tensor]] = []
        handle = block.up.register_forward_hook(functools.partial(_keep_output, seen))
        model.zero_grad()
        model(**row_of(batch, index)).loss.backward()
        handle.remove()
        tied.append(block.up.weight.grad.square().sum().item())
        counted = row_of(batch, index)["attention_mask"].flatten() != 0
        products = [
            (p.grad.square().sum(-1) * x.square().sum(-1)).flatten()[counted].sum() for x, p in seen
        ]
        copies.append(sum(products).item())
        slopes += sum(int((p.flatten(0, -2)[counted] > 0).sum()) for _, p in seen)
    for _ in range(2):  # one pass knows nothing of the one before
        with watch(model, gradients=True) as monitor:
            first = model(**batch).loss
            first.backward(retain_graph=True)
        report = monitor.report().blocks[0]
        assert (report.samples, report.tokens) == (3, 3 * 14)
        assert report.derivative_density == slopes / (3 * 14 * 24)
        assert report.AF_up == pytest.approx(sum(copies) / 3, rel=PRECISE)
        assert report.squared_gradient_norm_up == pytest.approx(sum(tied) / 3, rel=PRECISE)
        assert report.derivative_density_by_identity == pytest.approx(
            report.derivative_density, rel=1e-12
        )
        first.backward()  # the same graph once more
        again = monitor.report().blocks[0]
        assert again.AF_up == pytest.approx(report.AF_up, rel=1e-12)


class Repeated(nn.Module):
    """One layer three times, each call perhaps in a checkpoint."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(8, 2, 24, dropout=0.0, batch_first=True)
        self.checkpoints = False

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(3):
            again = functools.partial(checkpoint, self.layer, use_reentrant=False)
            x = again(x) if self.checkpoints else self.layer(x)
        return x


def test_checkpoints_around_calls_of_one_block_change_nothing() -> None:
    torch.manual_seed(0)
    model, x = Repeated().double(), torch.randn(2, 5, 8, dtype=torch.float64)
    reports = []
    for model.checkpoints in (False, True):
        with watch(model, gradients=True, reduction="sum") as monitor:
            model(x).square().sum().backward()
        reports.append(monitor.report().blocks[0])
    assert (reports[0].samples, reports[0].tokens) == (2, 30)
    for name in ("AF_up", "squared_gradient_norm_up", "squared_gradient_norm_down", "density"):
        assert getattr(reports[1], name) == pytest.approx(getattr(reports[0], name), rel=1e-12)


def test_passes_that_run_backward_later_are_kept_apart() -> None:
    model, batch = albert(), batch_for("bert")
    with watch(model, gradients=True) as monitor:
        losses = [model(**batch).loss, model(**row_of(batch, 0)).loss]
        losses[0].backward()
        losses[1].backward()
        together = monitor.report().blocks[0]
        monitor.reset()
        for rows in (batch, row_of(batch, 0)):
            model(**rows).loss.backward()
        alone = monitor.report().blocks[0]
    assert together.AF_up == pytest.approx(alone.AF_up, rel=1e-12)
    assert together.squared_gradient_norm_up == pytest.approx(
        alone.squared_gradient_norm_up, rel=1e-12
    )


def _keep_output(seen: list[Any], module: nn.Module, args: tuple[Any, ...], p: Tensor) -> None:
    p.retain_grad()
    seen.append((args[0].detach(), p))


def test_autocast_measures_what_it_computes() -> None:
    model, batch = build("gpt2", dtype=torch.float32), batch_for("gpt2", torch.float32)
    want = measure(model, [batch]).blocks
    with watch(model, gradients=True) as monitor, torch.autocast("cpu", torch.bfloat16):
        model(**batch).loss.backward()
    for got, block in zip(monitor.report().blocks, want, strict=True):
        assert got.AF_up == pytest.approx(block.AF_up, rel=0.1)
        assert got.derivative_density_by_identity == pytest.approx(got.derivative_density, rel=1e-6)


@pytest.mark.parametrize("name", ["gpt2", "llama", "vit"])
def test_a_compiled_model_is_measured_as_an_eager_one(name: str) -> None:
    torch.compiler.reset()
    model, batch = models.one_layer_(build(name)), batch_for(name)
    compiled = torch.compile(model, backend="aot_eager")
    compiled(**batch).loss.backward()
    with watch(compiled, gradients=True) as monitor:
        compiled(**batch).loss.backward()
        compiled(**batch).loss.backward()
    want = measure(model, [batch, batch])
    for got, block in zip(monitor.report().blocks, want.blocks, strict=True):
        assert got.AF_up == pytest.approx(block.AF_up, rel=PRECISE)
        assert got.active_gain == pytest.approx(block.active_gain, rel=PRECISE)
        assert got.density == block.density
    torch.compiler.reset()


def test_a_block_compiles_in_one_graph() -> None:
    torch.compiler.reset()
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True).double()
    x = torch.randn(2, 5, 8, dtype=torch.float64)
    with watch(layer, gradients=True) as monitor:
        layer(x).square().mean().backward()
        want = monitor.report().blocks[0]
        monitor.reset()
        torch.compile(layer, backend="aot_eager", fullgraph=True)(x).square().mean().backward()
        got = monitor.report().blocks[0]
    assert got.AF_up == pytest.approx(want.AF_up, rel=PRECISE)
    assert got.tokens == want.tokens == 10
    torch.compiler.reset()


def test_an_activation_in_place_is_left_in_place() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    layer.activation = nn.ReLU(inplace=True)
    x = torch.randn(2, 5, 8)
    with watch(layer, gradients=True) as monitor:
        layer(x).square().mean().backward()
    block = monitor.report().blocks[0]
    assert block.derivative_density_by_identity == pytest.approx(block.derivative_density, rel=1e-6)


def test_the_input_is_what_the_layer_receives() -> None:
    """After the norm and after the zeroth bias."""
    model = build("opt", dtype=torch.float32)
    sparsify_(model, [ZerothBias(max_tokens=8)])
    block = find_blocks(model)[0]
    with torch.no_grad():
        block.up.zeroth_bias.normal_()
    seen: list[Tensor] = []
    handle = block.up.register_forward_hook(lambda m, args, out: seen.append(args[0].detach()))
    batch = row_of(batch_for("opt", torch.float32), 0)
    report = measure(model, [batch])
    handle.remove()
    want = seen[0].double().square().sum(-1).mean().item()
    assert report.blocks[0].squared_input_norm == pytest.approx(want, rel=1e-6)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_measuring_touches_no_gradient_and_needs_none(name: str) -> None:
    model, batch = build(name), batch_for(name)
    want = measure(model, [batch]).to_dict()
    assert all(parameter.grad is None for parameter in model.parameters())
    model.requires_grad_(False)
    with torch.no_grad():
        got = measure(model, [batch]).to_dict()
    assert_close(got, want)
    assert all(not parameter.requires_grad for parameter in model.parameters())


def test_no_hidden_tensor_outlives_its_blocks_backward() -> None:
    """When the gradient leaves a block, what the monitor kept of that block is gone."""
    model, batch = build("gpt2", dtype=torch.float32).train(), batch_for("gpt2", torch.float32)
    supports: list[weakref.ref[Any]] = []
    alive: list[list[bool]] = []
    with watch(model, gradients=True):
        for block in find_blocks(model):
            assert block.norm is not None
            block.up.register_forward_hook(functools.partial(_keep_support, supports))
            block.norm.register_forward_hook(functools.partial(_look_back, supports, alive))
        loss = model(**batch).loss
        assert [reference() is not None for reference in supports] == [True, True]
        loss.backward()
    assert alive == [[True, False], [False, False]]


def _keep_support(
    kept: list[weakref.ref[Any]], module: nn.Module, args: tuple[Any, ...], output: Tensor
) -> None:
    """Of the tap, which hangs before this hook."""
    assert output.grad_fn is not None
    saved = [tensor for tensor in output.grad_fn.saved_tensors if tensor is not None]
    (support,) = [t for t in saved if t.dtype == torch.bool and t.dim() == 3]
    kept.append(weakref.ref(support.untyped_storage()))


def _look_back(
    kept: list[weakref.ref[Any]],
    alive: list[list[bool]],
    module: nn.Module,
    args: tuple[Any, ...],
    output: Tensor,
) -> None:
    """When the gradient has come down to the block's norm."""
    output.register_hook(lambda grad: alive.append([ref() is not None for ref in kept]))


def test_a_tap_is_the_identity() -> None:
    p = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    q = p * 1.0
    out = tap(q, new_probe(p.device), torch.randn(2, 3, 5), Layout(2, False), q > 0, torch.ones(2))
    assert out.data_ptr() == q.data_ptr()
    assert not out._is_view()
    grad = torch.randn_like(p)
    assert torch.equal(torch.autograd.grad(out, p, grad)[0], grad)
