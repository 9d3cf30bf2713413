"""Training loops on a device: bounds, mixed precision, checkpointing, and no wait in a step."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import steppe
from gpu_models import (
    ARMS,
    STEPS,
    fused_adamw,
    gpt,
    loss_on,
    no_waits,
    token_ids,
    train,
    train_without_waits,
)
from gpu_steps.gpt import GPT, PATTERNS

each_arm = pytest.mark.parametrize("arm", list(ARMS))
each_sparse_arm = pytest.mark.parametrize("arm", [arm for arm in ARMS if arm != "vanilla"])


@pytest.mark.parametrize("autocast", [False, True])
@each_arm
def test_a_step_does_not_wait_for_the_device(device: str, arm: str, autocast: bool) -> None:
    model = gpt(device, arm)
    dtype = torch.bfloat16 if autocast else None
    assert train_without_waits(model, arm, device, dtype).isfinite().all()


def test_a_wait_is_seen(device: str) -> None:
    if device != "cuda":
        pytest.skip("the CPU waits for nothing")
    with pytest.raises(RuntimeError, match="synchronizing"), no_waits(device):
        torch.ones(1, device=device).item()


@each_arm
def test_the_losses_are_those_of_float64_on_the_cpu(device: str, arm: str) -> None:
    exact = gpt("cpu", arm, torch.float64)
    expected = train(exact, arm, "cpu")
    got = train(gpt(device, arm), arm, device)
    torch.testing.assert_close(torch.tensor(got), torch.tensor(expected), rtol=1e-3, atol=0)
    assert expected[-1] < expected[0]


def test_the_bounds_hold_after_fused_steps(device: str) -> None:
    model = gpt(device, "steppe")
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05, fused=True)
    steppe.constrain_(model, optimizer)
    for step in range(STEPS):
        loss_on(model, "steppe", token_ids(device, seed=step)).backward()
        for layer in model.layers:
            layer.norm2.weight.grad.abs_()  # so that the optimizer would take it below 1
        optimizer.step()
        optimizer.zero_grad()
        for layer in model.layers:
            scale, bias = layer.norm2.weight, layer.up.zeroth_bias
            assert scale.min() == 1.0
            assert (bias.abs() <= 0.1 * scale).all()
            assert bias.any()
    assert (model.layers[0].up.zeroth_bias.abs() == 0.1 * model.layers[0].norm2.weight).any()


@pytest.mark.parametrize("fused", [True, False])
@each_sparse_arm
def test_a_step_that_the_grad_scaler_skips_neither_counts_nor_moves(
    device: str, arm: str, fused: bool
) -> None:
    model = gpt(device, arm)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=fused)
    link = steppe.constrain_(model, optimizer, total_steps=STEPS)
    scaler = torch.amp.GradScaler(device, init_scale=2.0**8)
    half = torch.float16 if device == "cuda" else torch.bfloat16  # the CPU's autocast knows both

    def step(overflows: bool) -> None:
        with torch.autocast(device, half):
            loss = loss_on(model, arm, token_ids(device))
        scaler.scale(loss * (1e38 if overflows else 1.0)).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()

    step(overflows=False)
    assert link.state_dict() == {"step": 1}
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    scale = scaler.get_scale()
    step(overflows=True)
    assert scaler.get_scale() < scale  # the scaler did skip
    assert link.state_dict() == {"step": 1}
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]), name
    step(overflows=False)
    assert link.state_dict() == {"step": 2}
    assert not torch.equal(model.head.weight, before["head.weight"])


@pytest.mark.parametrize("reentrant", [True, False])
@each_arm
def test_checkpointed_layers_learn_the_same(device: str, arm: str, reentrant: bool) -> None:
    if arm in ("penalty", "all") and reentrant:
        pytest.skip("a penalty of blocks without a graph has no gradient, and is refused")
    plain, checkpointed = gpt(device, arm), gpt(device, arm)
    for layer in checkpointed.layers:
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=reentrant)
    expected, got = train(plain, arm, device), train(checkpointed, arm, device)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=0)
    for name, buffer in plain.named_buffers():
        found = checkpointed.get_buffer(name)
        torch.testing.assert_close(found, buffer, rtol=1e-3, atol=1e-5, msg=name)
        if name.endswith("deviation"):
            assert buffer.all()


@each_sparse_arm
def test_a_resumed_run_ends_where_an_uninterrupted_one_does(device: str, arm: str) -> None:
    def steps(model: GPT, optimizer: torch.optim.Optimizer, first: int, last: int) -> None:
        for step in range(first, last):
            loss_on(model, arm, token_ids(device, seed=step)).backward()
            optimizer.step()
            optimizer.zero_grad()

    whole = gpt(device, arm)
    optimizer = fused_adamw(whole)
    link = steppe.constrain_(whole, optimizer, total_steps=STEPS)
    steps(whole, optimizer, 0, STEPS // 2)
    kept = copy.deepcopy([whole.state_dict(), optimizer.state_dict(), link.state_dict()])
    resumed = gpt(device, arm)
    again = fused_adamw(resumed)
    link_again = steppe.constrain_(resumed, again, total_steps=STEPS)
    resumed.load_state_dict(kept[0])
    again.load_state_dict(kept[1])
    link_again.load_state_dict(kept[2])
    steps(whole, optimizer, STEPS // 2, STEPS)
    steps(resumed, again, STEPS // 2, STEPS)
    # On average: where a gradient is nothing but rounding, AdamW takes whole steps all the same.
    for name, tensor in whole.state_dict().items():
        assert (resumed.state_dict()[name] - tensor).abs().mean() < 1e-4, name
    assert (kept[0]["head.weight"] - whole.head.weight).abs().mean() > 1e-2


def test_every_other_step_of_a_run_is_watched(device: str) -> None:
    model = gpt(device, "all")
    optimizer = fused_adamw(model)
    with (
        steppe.constrain_(model, optimizer, total_steps=STEPS),
        steppe.watch(model, patterns=PATTERNS, gradients=True) as monitor,
    ):
        for step in range(STEPS):
            monitor.enabled = step % 2 == 0
            loss_on(model, "all", token_ids(device, seed=step)).backward()
            optimizer.step()
            optimizer.zero_grad()
        report = monitor.report()
    assert [block.samples for block in report.blocks] == [STEPS // 2 * 4] * 2
