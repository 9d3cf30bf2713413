"""Packed activations on a device: the same training, less memory, no wait.

The CPU packs where it has no kernels, as in float64; a card packs the dtypes that it trains in.
"""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import steppe
from gpu_models import ARMS, STEPS, fused_adamw, gpt, loss_on, token_ids, train, train_without_waits
from gpu_steps.gpt import GPT, PATTERNS
from steppe.ops.outcome import OWN_MODULES, PACKED
from steppe.ops.packing import packed_mlp, packed_mlp_backward
from steppe.ops.room import NO_ROOM

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
each_arm = pytest.mark.parametrize("arm", list(ARMS))


def dtype_on(device: str) -> torch.dtype:
    """In which a model is packed."""
    return torch.float32 if device == "cuda" else torch.float64


def packed(device: str, arm: str = "vanilla") -> GPT:
    return steppe.accelerate_(gpt(device, arm, dtype_on(device)), patterns=PATTERNS, pack=True)


def ways(model: nn.Module) -> list[str]:
    """How each block ran last."""
    return [block.how for block in steppe.explain(model).blocks]


@each_arm
def test_a_packed_model_learns_the_same(device: str, arm: str) -> None:
    model = packed(device, arm)
    expected = train(gpt("cpu", arm, torch.float64), arm, "cpu")
    got = train(model, arm, device)
    torch.testing.assert_close(torch.tensor(got), torch.tensor(expected), rtol=1e-3, atol=0)
    assert expected[-1] < expected[0]
    assert ways(model) == [PACKED] * 2


@pytest.mark.parametrize("autocast", [None, torch.bfloat16, torch.float16])
@each_arm
def test_a_packed_step_does_not_wait_for_the_device(
    device: str, arm: str, autocast: torch.dtype | None
) -> None:
    if device == "cpu" and autocast == torch.bfloat16:
        pytest.skip("the CPU has kernels for it, and packs nothing")
    model = packed(device, arm)
    if autocast is not None:
        model.float()  # autocast leaves float64 as it is
    assert train_without_waits(model, arm, device, autocast).isfinite().all()
    assert ways(model) == [PACKED] * 2


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointed_layers_learn_the_same(device: str, reentrant: bool) -> None:
    plain, model = gpt(device, "steppe", dtype_on(device)), packed(device, "steppe")
    for layer in model.layers:
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=reentrant)
    expected, got = train(plain, "steppe", device), train(model, "steppe", device)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=0)
    assert all(block.calls[PACKED] >= STEPS for block in steppe.explain(model).blocks)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # within the compiler
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_a_compiled_packed_model_learns_the_same(device: str, mode: str) -> None:
    if device == "cpu" and mode != "default":
        pytest.skip("a mode of inductor, for CUDA")
    torch.compiler.reset()
    model = packed(device)
    if device == "cuda":
        model.compile(mode=mode, fullgraph=True)
    else:
        model.compile(backend="aot_eager", fullgraph=True)
    optimizer, got = fused_adamw(model), []
    for step in range(STEPS):
        torch.compiler.cudagraph_mark_step_begin()
        loss = loss_on(model, "vanilla", token_ids(device, seed=step))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        got.append(loss.item())
    torch.compiler.reset()
    expected = train(gpt(device, "vanilla", dtype_on(device)), "vanilla", device)
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=0)


def inputs(device: str, dtype: torch.dtype, rows: int = 200) -> list[Tensor]:
    """x, W, b, V and c: D 128, F 520, a third active."""
    torch.manual_seed(0)
    shapes = (rows, 128), (520, 128), (520,), (128, 520), (128,)
    x, up, bias, down, out = (torch.randn(shape) for shape in shapes)
    tensors = x, up / 128**0.5, bias / 4 - 0.5, down / 520**0.5, out
    x, up, bias, down, out = (tensor.to(device, dtype) for tensor in tensors)
    return [x, up, bias, down.T, out]


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("dtype", DTYPES)
def test_whatever_does_not_fit_gradients_are_those_of_float64(
    device: str, dtype: torch.dtype, share: float
) -> None:
    given = [tensor.requires_grad_() for tensor in inputs(device, dtype)]
    exact = [tensor.detach().double().requires_grad_() for tensor in given]
    x, up, bias, down, out = exact
    r = torch.relu(nn.functional.linear(x, up, bias))
    count = int((r > 0).sum())
    assert 0.1 < count / r.numel() < 0.5
    expected = nn.functional.linear(r + 0.5 * r * r, down.T, out)
    z, *_ = packed_mlp(*given, 1.0, 0.5, None, int(share * count), NO_ROOM)
    direction = torch.linspace(-1, 1, z.numel(), device=device).view(z.shape)
    pairs = [(z, expected)]
    pairs += zip(
        torch.autograd.grad(z, given, direction.to(dtype)),
        torch.autograd.grad(expected, exact, direction.double()),
        strict=True,
    )
    limit = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 4e-3}[dtype]
    for got, want in pairs:
        assert (got.double() - want).norm() <= limit * want.norm()
        assert want.norm() > 0


def test_a_cuda_graph_of_forward_and_backward_takes_other_inputs(device: str) -> None:
    if device != "cuda":
        pytest.skip("CUDA graphs")
    static, other = inputs(device, torch.bfloat16), inputs(device, torch.bfloat16)
    other[0].mul_(-2.0)

    def step(tensors: list[Tensor]) -> list[Tensor]:
        z, _, *pack = packed_mlp(*tensors, 1.0, 0.5, None, 9000, NO_ROOM)
        rule = 1.0, 0.5, None
        return [z, *packed_mlp_backward(z, None, *tensors, *rule, *pack, NO_ROOM, [True] * 5)]

    with torch.no_grad():
        step(static)
        graph, outputs = torch.cuda.CUDAGraph(), []
        with torch.cuda.graph(graph):
            outputs = step(static)
        static[0].copy_(other[0])
        graph.replay()
        for got, want in zip(outputs, step(other), strict=True):
            assert torch.equal(got, want)


def test_a_block_keeps_an_eighth_of_its_hidden_tensor_and_the_room_follows(device: str) -> None:
    dtype = torch.bfloat16 if device == "cuda" else torch.float64
    least = 1 / 16 if device == "cuda" else 1 / 64
    torch.manual_seed(0)
    model = nn.Sequential()
    model.add_module("up", nn.Linear(64, 2048))
    model.add_module("act", nn.ReLU())
    model.add_module("down", nn.Linear(2048, 64))
    model.to(device, dtype)
    x = torch.randn(512, 64, device=device, dtype=dtype)
    with torch.no_grad():
        p = model.up(x).float()
        model.up.bias -= p.flatten()[::8].quantile(0.95).to(dtype)
    pattern = steppe.BlockPattern(family="a block", up="up", act="act", down="down")
    steppe.accelerate_(model, patterns=(pattern,), pack=True)
    kept = []
    for _ in range(4):
        sizes: dict[int, int] = {}

        def note(tensor: Tensor, sizes: dict[int, int] = sizes) -> Tensor:
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            z = model(x)
        z.sum().backward()
        for tensor in (x, *model.parameters()):
            sizes.pop(tensor.untyped_storage().data_ptr(), None)
        kept.append(sum(sizes.values()) / (512 * 2048 * dtype.itemsize))
        if device == "cuda":
            torch.cuda.synchronize()  # so that the number is there
    assert ways(model) == [PACKED]
    assert kept[0] > 0.5
    assert least < kept[-1] <= 1 / 8


def test_without_a_gradient_nothing_is_packed(device: str) -> None:
    model, ids = packed(device), token_ids(device)
    expected = gpt(device, "vanilla", dtype_on(device))(ids)
    with torch.inference_mode():
        assert torch.equal(model(ids), expected)
    assert ways(model) == [OWN_MODULES] * 2
