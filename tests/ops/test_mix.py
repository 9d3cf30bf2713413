"""The blend of an activation is a tensor that no op reads: on a GPU that would wait for the device.

The bodies of the ops run under the mode too, which `TorchDispatchMode` alone does not see.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import steppe
from steppe.ops import mlp as mlp_op
from steppe.ops.cpu import native_ops as native_ops  # registers the kernels
from steppe.ops.cpu.library import kernels
from steppe.ops.cpu.scalar import read_scalar

native = pytest.mark.skipif(kernels().name != "native", reason=kernels().reason)
OPS = {
    torch.ops.steppe.mlp.default: mlp_op.mlp,
    torch.ops.steppe.mlp_backward.default: mlp_op.mlp_backward,
    torch.ops.steppe.support.default: mlp_op.support,
}


READS = (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.item.default)


class ScalarReadError(AssertionError):
    """An op read the blend."""


class NoReads(TorchDispatchMode):
    """Raises when an op copies a tensor's number to Python, and counts the ops of steppe."""

    def __init__(self, mix: Tensor) -> None:
        super().__init__()
        self.address, self.calls = mix.data_ptr(), 0

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if op in READS and args[0].data_ptr() == self.address:
            raise ScalarReadError
        if op in OPS:
            self.calls += 1
            with self:
                return OPS[op]._backend_fns["cpu"](*args, **(kwargs or {}))
        return op(*args, **(kwargs or {}))


def finetuned(hidden: int = 64) -> tuple[nn.Module, Tensor]:
    """A routed layer half way from ReLU to J-SquaredReLU, and its blend."""
    layer = nn.TransformerEncoderLayer(16, 2, hidden, dropout=0.0, batch_first=True)
    steppe.sparsify_(layer, [steppe.JumpingSquaredReLU(ramp=1.0)])
    steppe.advance_(layer, 0.5)
    steppe.accelerate_(layer, max_density=1.0)
    (mix,) = (buffer for name, buffer in layer.named_buffers() if name.endswith("mix"))
    assert mix.item() == 0.5
    return layer, mix


@native
def test_a_routed_training_step_never_reads_the_blend() -> None:
    layer, mix = finetuned()
    x = torch.randn(2, 20, 16)
    with NoReads(mix) as mode:
        layer(x).sum().backward()
    assert mode.calls == 2
    assert steppe.explain(layer).blocks[0].is_sparse


@native
@pytest.mark.parametrize("tokens", [1, 20])
def test_nor_does_inference(tokens: int) -> None:
    layer, mix = finetuned()
    layer.eval()
    x = torch.randn(1, tokens, 16)
    with torch.no_grad(), NoReads(mix):
        for _ in range(4):
            layer(x)
    assert steppe.explain(layer).blocks[0].is_sparse


@native
def test_nor_do_watched_and_dense_calls() -> None:
    layer, mix = finetuned()
    steppe.accelerate_(layer, max_density=0.0)
    with steppe.watch(layer), NoReads(mix) as mode:
        layer(torch.randn(2, 20, 16)).sum().backward()
    assert mode.calls == 3


@pytest.mark.parametrize("read", [Tensor.item, float])
def test_the_check_can_fail(read: Callable[[Tensor], float]) -> None:
    mix = torch.tensor(0.5)
    with NoReads(mix), pytest.raises(ScalarReadError):
        read(mix)


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64]
)
def test_a_number_is_read_as_item_reads_it(dtype: torch.dtype) -> None:
    numbers = torch.tensor([0.0, 1.0, -0.375, 1 / 3, 3e4, float("inf")]).to(dtype)
    for number in numbers:
        assert read_scalar(number) == number.item()
    assert read_scalar(nn.Parameter(torch.tensor(0.25))) == 0.25
