"""FSDP2 with one process, on a device."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import steppe
from gpu_models import ARMS, STEPS, gpt, loss_on, token_ids, train
from gpu_steps.gpt import PATTERNS


@contextmanager
def one_process(device: str) -> Iterator[None]:
    dist.init_process_group(
        "nccl" if device == "cuda" else "gloo", store=dist.HashStore(), rank=0, world_size=1
    )
    try:
        yield
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("accelerated", [False, True])
@pytest.mark.parametrize("arm", list(ARMS))
def test_a_sharded_model_learns_what_a_whole_one_does(
    device: str, arm: str, accelerated: bool
) -> None:
    whole = gpt(device, arm)
    expected = train(whole, arm, device)
    with one_process(device):
        mesh = init_device_mesh(device, (1,))
        model = gpt(device, arm)
        if accelerated:
            steppe.accelerate_(model, patterns=PATTERNS, max_density=1.0)
        for layer in model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        if arm != "vanilla":
            steppe.constrain_(model, optimizer, total_steps=STEPS)
        got = []
        for step in range(STEPS):
            loss = loss_on(model, arm, token_ids(device, seed=step))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            got.append(loss.item())
        torch.testing.assert_close(got, expected, rtol=1e-3, atol=0)
        if accelerated and device == "cpu" and steppe.kernels().name == "native":
            assert all(block.how == "sparse" for block in steppe.explain(model).blocks)
        for name, parameter in model.named_parameters():
            # On average: where a gradient is only rounding, AdamW takes whole steps all the same.
            wanted = whole.get_parameter(name)
            assert (parameter.full_tensor() - wanted).abs().mean() < 1e-4, name
