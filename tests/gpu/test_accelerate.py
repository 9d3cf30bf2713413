"""`accelerate_` off the CPU: the block's own modules run, by the shortest way."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import steppe
from gpu_models import ARMS, gpt, loss_on, token_ids
from gpu_steps.gpt import PATTERNS


class CalledOps(TorchDispatchMode):
    """Notes the names of the operators that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        self.names.add(str(func.name()))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("arm", list(ARMS))
def test_an_accelerated_model_computes_the_same(device: str, arm: str, dtype: torch.dtype) -> None:
    dense = gpt(device, arm, dtype)
    fast = steppe.accelerate_(copy.deepcopy(dense), patterns=PATTERNS)
    ids = token_ids(device)
    losses = []
    for model in (dense, fast):
        with CalledOps() as ops:
            losses.append(loss_on(model, arm, ids))
            losses[-1].backward()
    if device == "cuda":
        assert not [name for name in ops.names if name.startswith("steppe::mlp")]
        assert torch.equal(*losses)
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
    torch.testing.assert_close(losses[1], losses[0], rtol=tolerance, atol=0)
    for (name, one), other in zip(dense.named_parameters(), fast.parameters(), strict=True):
        if not one.requires_grad:  # the bias of a restricted norm
            continue
        scale = one.grad.abs().max().item()
        torch.testing.assert_close(
            other.grad, one.grad, rtol=0, atol=tolerance * scale + 1e-12, msg=name
        )
    if device == "cuda":
        assert not any(block.is_sparse for block in steppe.explain(fast).blocks)


def test_an_accelerated_model_runs_under_inference_mode(device: str) -> None:
    dense = gpt(device, "all").eval()
    fast = steppe.accelerate_(copy.deepcopy(dense), patterns=PATTERNS)
    with torch.inference_mode():
        for rows in (1, 4):
            ids = token_ids(device, rows=rows)
            torch.testing.assert_close(fast(ids), dense(ids), rtol=1e-4, atol=1e-5)
