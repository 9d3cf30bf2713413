"""Every verb but training, on a device."""

from __future__ import annotations

import copy
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import steppe
from gpu_models import ARMS, SIZES, STEPS, gpt, loss_on, padding, token_ids, train
from gpu_steps.gpt import GPT, PATTERNS, loss_of
from steppe.measures.report import Report

each_arm = pytest.mark.parametrize("arm", [arm for arm in ARMS if arm != "vanilla"])


def activations(model: GPT, ids: Tensor, mask: Tensor | None = None) -> list[Tensor]:
    """What the second layer of each block receives, ``[B, T, F]``."""
    seen: list[Tensor] = []
    hooks = [
        layer.down.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach()))
        for layer in model.layers
    ]
    model(ids, mask)
    for hook in hooks:
        hook.remove()
    return seen


def identity_holds(report: Report, tolerance: float) -> None:
    for block in report.blocks:
        assert 0.0 < block.derivative_density < 1.0
        ratio = block.derivative_density_by_identity / block.derivative_density
        assert abs(ratio - 1.0) < tolerance, ratio


def test_find_blocks_gives_the_parts_on_the_device(device: str) -> None:
    blocks = steppe.find_blocks(gpt(device), patterns=PATTERNS)
    assert [(block.d_model, block.d_hidden) for block in blocks] == [(32, 96)] * 2
    for block in blocks:
        assert {p.device.type for p in (*block.up.parameters(), *block.down.parameters())} == {
            device
        }


@each_arm
def test_restore_is_the_inverse_of_sparsify(device: str, arm: str) -> None:
    ids = token_ids(device)
    model = gpt(device)
    keys, before = list(model.state_dict()), model(ids)
    steppe.sparsify_(model, ARMS[arm], patterns=PATTERNS)
    tensors = [*model.parameters(), *model.buffers()]
    assert {tensor.device.type for tensor in tensors} == {device}
    model(ids)
    steppe.restore_(model)
    assert list(model.state_dict()) == keys
    assert torch.equal(model(ids), before)


@each_arm
def test_a_trained_model_moves_between_devices(device: str, arm: str) -> None:
    model = gpt(device, arm)
    train(model, arm, device)
    model.eval()
    expected = model(token_ids(device)).cpu()
    moved = copy.deepcopy(model).cpu()
    torch.testing.assert_close(moved(token_ids("cpu")), expected, rtol=1e-3, atol=1e-4)
    moved.to(device)
    assert torch.equal(moved(token_ids(device)).cpu(), expected)
    assert {buffer.device.type for buffer in moved.buffers()} <= {device}
    moved.train()
    loss_on(moved, arm, token_ids(device)).backward()
    steppe.project_(moved)
    assert {buffer.device.type for buffer in moved.buffers()} <= {device}


@pytest.mark.parametrize("padded", [False, True])
def test_watch_counts_the_active_entries(device: str, padded: bool) -> None:
    model, ids = gpt(device), token_ids(device)
    mask = padding(device) if padded else None
    counted = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
    wanted = [int((a[counted] != 0).sum()) for a in activations(model, ids, mask)]
    with steppe.watch(model, patterns=PATTERNS) as monitor:
        model(ids, mask)
    counts = monitor.counts()
    assert counts[:, 0].tolist() == wanted
    assert counts[:, 3].tolist() == [int(counted.sum())] * SIZES.layers
    assert 0 < wanted[0] < counts[0, 2]


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("arm", list(ARMS))
def test_the_identity_holds_while_training_with_padding(
    device: str, arm: str, autocast: bool
) -> None:
    model, ids, mask = gpt(device, arm), token_ids(device), padding(device)
    with steppe.watch(model, patterns=PATTERNS, gradients=True) as monitor:
        with torch.autocast(device, torch.bfloat16, enabled=autocast):
            loss = loss_on(model, arm, ids, mask)
        loss.backward()
        report = monitor.report()
    assert [block.tokens for block in report.blocks] == [int(mask.sum())] * SIZES.layers
    identity_holds(report, 1e-3 if autocast else 1e-5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_identity_holds_in_every_dtype(device: str, dtype: torch.dtype) -> None:
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-3}[dtype]
    batch = (token_ids(device), token_ids(device))
    report = steppe.measure(
        gpt(device, dtype=dtype),
        [batch],
        loss=lambda logits, batch: loss_of(logits, batch[1].to(logits.device)),
        patterns=PATTERNS,
    )
    identity_holds(report, tolerance)


def test_measure_with_labels_of_the_model_or_none(device: str) -> None:
    model = gpt(device)
    batches = [(token_ids("cpu", seed=seed),) for seed in range(3)]
    drawn = steppe.measure(model, batches, labels="model", patterns=PATTERNS)
    identity_holds(drawn, 1e-5)
    densities = steppe.measure(model, batches, labels=None, patterns=PATTERNS)
    assert [b.density for b in densities.blocks] == [b.density for b in drawn.blocks]
    on_cpu = steppe.measure(gpt("cpu"), batches, labels=None, patterns=PATTERNS)
    for one, other in zip(densities.blocks, on_cpu.blocks, strict=True):
        assert abs(one.density - other.density) < 1e-3  # entries at rounding distance from zero


def test_measure_gives_on_the_device_what_it_gives_on_the_cpu(device: str) -> None:
    batches = [(token_ids("cpu", seed=seed), token_ids("cpu", seed=seed + 1)) for seed in range(2)]

    def measured(on: str, dtype: torch.dtype) -> list[tuple[float, ...]]:
        report = steppe.measure(
            gpt(on, dtype=dtype),
            batches,
            loss=lambda logits, batch: loss_of(logits, batch[1].to(logits.device)),
            patterns=PATTERNS,
        )
        return [(block.AF_up, block.AF_down, block.active_gain) for block in report.blocks]

    exact = torch.tensor(measured("cpu", torch.float64))
    assert (exact > 0).all()
    torch.testing.assert_close(
        torch.tensor(measured(device, torch.float32)), exact, rtol=2e-3, atol=0
    )


@pytest.mark.parametrize("arm", ["threshold", "all"])
def test_folded_thresholds_compute_the_same(device: str, arm: str) -> None:
    model = gpt(device, arm)
    train(model, arm, device)
    model.eval()
    ids = token_ids(device)
    expected, plain = model(ids), gpt(device)(ids)
    steppe.fold_(model)
    assert not any(name.endswith("threshold") for name, _ in model.named_modules())
    torch.testing.assert_close(model(ids), expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(expected, plain, atol=1e-3)


def test_the_penalty_is_the_mean_norm_of_the_activations(device: str) -> None:
    model, ids, mask = gpt(device, "penalty"), token_ids(device), padding(device)
    steppe.advance_(model, 1.0)
    seen = activations(model, ids, mask)
    penalty = steppe.penalize(torch.zeros((), device=device), model)
    wanted = sum(a[mask.bool()].double().abs().sum(-1).mean().item() for a in seen)
    assert math.isclose(penalty.item(), 1e-3 * wanted, rel_tol=1e-5)


@each_arm
def test_a_saved_model_is_loaded(device: str, arm: str, tmp_path: Path) -> None:
    model = gpt(device, arm)
    train(model, arm, device, last=STEPS // 2)
    torch.save(model.state_dict(), tmp_path / "model.pt")
    loaded = gpt(device, arm)
    assert not torch.equal(loaded(token_ids(device)), model(token_ids(device)))
    loaded.load_state_dict(
        torch.load(tmp_path / "model.pt", map_location=device, weights_only=True)
    )
    steppe.advance_(loaded, 0.5)
    assert torch.equal(loaded.eval()(token_ids(device)), model.eval()(token_ids(device)))


def test_a_saved_hugging_face_model_is_loaded(device: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    import models  # needs transformers

    model: nn.Module = models.gpt2().to(device)
    steppe.sparsify_(model, ARMS["all"][:4])
    with torch.no_grad():
        for added in steppe.added_parameters(model).values():
            added.normal_(std=0.1)
    model(models.token_ids().to(device))
    steppe.project_(steppe.advance_(model, 0.5))
    model.save_pretrained(tmp_path)
    loaded = steppe.load_pretrained(transformers.AutoModelForCausalLM.from_pretrained, tmp_path)
    ids = models.token_ids().to(device)
    assert torch.equal(loaded.to(device).eval()(ids).logits, model.eval()(ids).logits)


@pytest.mark.parametrize("name", ["t5", "opt", "gpt2", "gpt_neox", "llama", "qwen2", "bert", "vit"])
def test_hugging_face_models_are_watched(device: str, name: str) -> None:
    pytest.importorskip("transformers")
    import models  # needs transformers

    model = {**models.LANGUAGE_MODELS, **models.VISION_MODELS}[name]().to(device)
    inputs = {key: value.to(device) for key, value in models.inputs_for(model).items()}
    with steppe.watch(model, gradients=True) as monitor:
        model(**inputs).logits.float().square().mean().backward()
        identity_holds(monitor.report(), 1e-4)
