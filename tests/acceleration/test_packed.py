"""`accelerate_(pack=True)`: the same training with less kept, where no kernels keep little."""

from __future__ import annotations

import copy
from collections import Counter
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import models
import steppe
from gpu_models import ARMS, STEPS, gpt, loss_on, token_ids, train
from gpu_steps.gpt import PATTERNS, loss_of
from steppe.acceleration.accelerate import acceleration_of
from steppe.ops.cpu.library import kernels
from steppe.ops.outcome import OWN_MODULES, PACKED

native = pytest.mark.skipif(kernels().name != "native", reason=kernels().reason)
pytestmark = [
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning"),
    pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning"),
]
FLOAT64 = torch.float64  # the CPU has no kernels for it, so it packs


def packed(arm: str = "vanilla", dtype: torch.dtype = FLOAT64, **settings: Any) -> nn.Module:
    return steppe.accelerate_(gpt("cpu", arm, dtype), patterns=PATTERNS, pack=True, **settings)


def ways(model: nn.Module) -> list[str]:
    """How each block ran last."""
    return [block.how for block in steppe.explain(model).blocks]


def grads_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("arm", list(ARMS))
def test_every_arm_learns_the_same(arm: str) -> None:
    dense, model = gpt("cpu", arm, FLOAT64), packed(arm)
    expected, got = train(dense, arm, "cpu"), train(model, arm, "cpu")
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=0)
    assert expected[-1] < expected[0]
    assert ways(model) == [PACKED] * 2
    for name, tensor in dense.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], tensor, rtol=1e-7, atol=1e-9, msg=name)
    for block in steppe.explain(model).blocks:
        assert block.calls == {PACKED: STEPS}
        assert block.unpacked == ""
        assert not block.is_sparse
        assert 0.0 < block.density < 1.0


@pytest.mark.parametrize("name", ["gpt2", "opt", "t5", "bert", "vit"])
def test_architectures_compute_and_learn_the_same(name: str) -> None:
    """Linear layers as nn.Linear has them and as Conv1D has them, with biases and without."""
    dense = {**models.LANGUAGE_MODELS, **models.VISION_MODELS}[name]().double().eval()
    inputs = {
        key: value.double() if value.is_floating_point() else value
        for key, value in models.inputs_for(dense).items()
    }
    model = steppe.accelerate_(copy.deepcopy(dense), pack=True)
    for one in (dense, model):
        one(**inputs).logits.square().mean().backward()
    expected, got = grads_of(dense), grads_of(model)
    assert got.keys() == expected.keys()
    largest = max(grad.abs().max() for grad in expected.values())
    for key, grad in expected.items():
        torch.testing.assert_close(got[key], grad, rtol=1e-9, atol=1e-12 * largest, msg=key)
    assert set(ways(model)) == {PACKED}


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointed_layers_learn_the_same(reentrant: bool) -> None:
    model = packed("steppe")
    for layer in model.layers:
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=reentrant)
    expected = train(gpt("cpu", "steppe", FLOAT64), "steppe", "cpu")
    torch.testing.assert_close(train(model, "steppe", "cpu"), expected, rtol=1e-9, atol=0)
    assert all(block.calls[PACKED] >= STEPS for block in steppe.explain(model).blocks)


def test_accumulated_gradients_are_the_same() -> None:
    dense, model = gpt("cpu", "steppe", FLOAT64), packed("steppe")
    for one in (dense, model):
        losses = [loss_on(one, "steppe", token_ids("cpu", seed, rows=seed + 1)) for seed in (0, 3)]
        (losses[0] + losses[1]).backward()  # two calls before a backward pass
        loss_on(one, "steppe", token_ids("cpu", 5)).backward()
    for name, grad in grads_of(dense).items():
        torch.testing.assert_close(grads_of(model)[name], grad, rtol=1e-9, atol=1e-12, msg=name)


class Twice(nn.Module):
    """A block that is used twice in a forward pass."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(self.layer(x))


def test_a_block_may_be_used_twice_and_frozen_in_parts() -> None:
    layer = models.torch_encoder(True).layers[0].double()
    dense = Twice(layer)
    model = steppe.accelerate_(copy.deepcopy(dense), pack=True)
    x = torch.randn(2, 5, models.D_MODEL, dtype=FLOAT64, requires_grad=True)
    for frozen in ("", "linear1", "linear2", "linear"):
        results = []
        for one in (dense, model):
            one.zero_grad()
            for name, parameter in one.named_parameters():
                parameter.requires_grad_(not (frozen and frozen in name))
            (of_x,) = torch.autograd.grad(one(x).square().sum(), x, retain_graph=True)
            one(x).square().sum().backward()
            results.append({"x": of_x, **grads_of(one)})
        assert results[0].keys() == results[1].keys()
        for name, grad in results[0].items():
            torch.testing.assert_close(results[1][name], grad, rtol=1e-9, atol=1e-11, msg=name)
    assert ways(model) == [PACKED]


@pytest.mark.parametrize("weights", [torch.float32, FLOAT64])
def test_autocast_decides_the_dtype(weights: torch.dtype) -> None:
    """Float16, for which the CPU has no kernels; float64 is not cast."""
    dense, model = gpt("cpu", "steppe", weights), packed("steppe", weights)
    for one in (dense, model):
        with torch.autocast("cpu", torch.float16):
            loss = loss_on(one, "steppe", token_ids("cpu"))
        loss.backward()
    assert ways(model) == [PACKED] * 2
    expected, got = grads_of(dense), grads_of(model)
    for name, grad in expected.items():
        assert got[name].dtype == weights
        limit = 1e-9 if weights == FLOAT64 else 1e-2
        assert (got[name] - grad).norm() <= limit * grad.norm() + 1e-12, name


def test_compiled_into_one_graph_and_not_again_for_each_room() -> None:
    compilations = Counter[str]()

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        from torch._dynamo.backends.debugging import aot_eager  # slow

        ops = {str(node.target) for node in graph.graph.nodes}
        assert any("packed_mlp" in op for op in ops)
        compilations["graphs"] += 1
        return aot_eager(graph, inputs)

    dense, model = gpt("cpu", "vanilla", FLOAT64), packed()
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    rooms = set()
    for step in range(10):
        ids = token_ids("cpu", seed=step)
        results = []
        for one in (dense, compiled):
            one.zero_grad()
            loss = loss_of(one(ids), ids)
            loss.backward()
            results.append(loss.item())
        assert results[1] == pytest.approx(results[0], rel=1e-12)
        for name, grad in grads_of(dense).items():
            torch.testing.assert_close(grads_of(model)[name], grad, rtol=1e-9, atol=1e-12, msg=name)
        rooms.add(acceleration_of(model).routes[0].computation._room.size.shape)
        with torch.no_grad():  # ever fewer units are active, as training has it
            for one in (dense, model):
                for number, layer in enumerate(one.layers):
                    layer.up.bias -= 0.05 * (1 + number)
    torch._dynamo.reset()
    assert len(rooms) >= 6
    assert compilations["graphs"] <= 3


def test_a_compiled_layer_may_be_checkpointed() -> None:
    torch._dynamo.reset()
    model = packed()
    for layer in model.layers:
        layer.compile(backend="aot_eager", fullgraph=True)
        whole = layer._compiled_call_impl
        layer._compiled_call_impl = partial(checkpoint, whole, use_reentrant=False)
    expected = train(gpt("cpu", "vanilla", FLOAT64), "vanilla", "cpu")
    torch.testing.assert_close(train(model, "vanilla", "cpu"), expected, rtol=1e-9, atol=0)
    torch._dynamo.reset()


def test_watch_counts_the_same() -> None:
    dense, model = gpt("cpu", "steppe", FLOAT64), packed("steppe")
    reports = []
    for one in (dense, model):
        with steppe.watch(one, patterns=PATTERNS) as monitor:
            loss_on(one, "steppe", token_ids("cpu")).backward()
        reports.append(monitor.report())
    assert ways(model) == [PACKED] * 2
    assert 0.0 < reports[0].density < 1.0
    assert reports[1].density == reports[0].density
    assert reports[1].derivative_density == reports[0].derivative_density
    with steppe.watch(model, patterns=PATTERNS, gradients=True):
        loss_on(model, "steppe", token_ids("cpu")).backward()
    assert ways(model) == [OWN_MODULES] * 2


def test_second_derivatives_are_those_of_dense() -> None:
    layer = models.torch_encoder(True).layers[0].double()
    x = torch.randn(1, 3, models.D_MODEL, dtype=FLOAT64, requires_grad=True)
    found = []
    for one in (layer, steppe.accelerate_(copy.deepcopy(layer), pack=True)):
        # Attention's own kernel has no second derivative.
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            (first,) = torch.autograd.grad(one(x).square().sum(), x, create_graph=True)
        found.append(torch.autograd.grad(first.square().sum(), x)[0])
    torch.testing.assert_close(found[1], found[0], rtol=1e-9, atol=1e-9)
    assert found[0].abs().max() > 0.1


def test_only_calls_that_train_are_packed() -> None:
    model, ids = packed(max_density=1.0), token_ids("cpu")
    expected = gpt("cpu", "vanilla", FLOAT64)(ids)
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            assert torch.equal(model(ids), expected)
        assert ways(model) == [OWN_MODULES] * 2
        assert "there are no kernels for torch.float64" in str(steppe.explain(model))
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    assert torch.equal(model(ids), expected)
    assert "nothing in it has a gradient" in str(steppe.explain(model))


def test_dropout_and_gates_run_on_the_blocks_own_modules() -> None:
    encoder = models.torch_encoder(True).double()
    layer = encoder.layers[0]
    layer.dropout.p = 0.5  # the one between the two linear layers
    model = steppe.accelerate_(copy.deepcopy(encoder), pack=True).train()
    model(torch.randn(2, 5, models.D_MODEL, dtype=FLOAT64)).sum().backward()
    assert ways(model)[0] == OWN_MODULES
    assert "packing has no dropout" in str(steppe.explain(model))
    model.eval()
    model(torch.randn(2, 5, models.D_MODEL, dtype=FLOAT64)).sum().backward()
    assert ways(model)[0] == PACKED

    gated = steppe.accelerate_(models.t5(gated=True).double(), pack=True)
    gated(**models.inputs_for(gated)).logits.sum().backward()
    assert set(ways(gated)) == {OWN_MODULES}
    assert "not packed: packing has no gate" in str(steppe.explain(gated))


@native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_where_kernels_keep_active_entries_only_nothing_is_packed(dtype: torch.dtype) -> None:
    """What they keep has its own test, in tests/ops/test_mlp.py."""
    model = packed("steppe", dtype, max_density=1.0)
    loss_on(model, "steppe", token_ids("cpu")).backward()
    assert ways(model) == ["sparse"] * 2
    text = str(steppe.explain(model))
    assert "not packed: the kernels of the cpu keep active entries only" in text
    assert "packing was not asked for" not in str(
        steppe.explain(steppe.accelerate_(gpt("cpu"), patterns=PATTERNS))
    )


def test_a_copy_packs_again_with_a_room_of_its_own() -> None:
    model = packed()
    loss_on(model, "vanilla", token_ids("cpu")).backward()
    replica = copy.deepcopy(model)
    assert ways(replica) == ["not yet"] * 2
    loss_on(replica, "vanilla", token_ids("cpu")).backward()
    assert ways(replica) == ["own modules"] * 2  # its wiring is looked at in its first call
    loss_on(replica, "vanilla", token_ids("cpu")).backward()
    assert ways(replica) == [PACKED] * 2
    numbers = {
        route.computation._room.number
        for one in (model, replica)
        for route in acceleration_of(one).routes
    }
    assert len(numbers) == 4


def test_what_flows_between_the_modules_is_checked_as_for_the_kernels() -> None:
    class Scaled(nn.Module):
        """Looks like a block, and doubles what comes out of its activation."""

        def __init__(self) -> None:
            super().__init__()
            self.up, self.act, self.down = nn.Linear(8, 24), nn.ReLU(), nn.Linear(24, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.down(2.0 * self.act(self.up(x)))

    pattern = steppe.BlockPattern(family="scaled", up="up", act="act", down="down")
    with pytest.raises(steppe.SteppeError, match="is not the block that the pattern"):
        steppe.accelerate_(Scaled().double(), patterns=(pattern,), pack=True)


def test_what_a_block_keeps_is_measured_on_the_model() -> None:
    """A block's own modules keep a, and so does the dense op; packed it is an eighth of that."""
    layer = nn.TransformerEncoderLayer(16, 2, 512, dropout=0.0, batch_first=True).double()
    with torch.no_grad():
        layer.linear1.bias -= 0.7
    model = steppe.accelerate_(copy.deepcopy(layer), pack=True)
    x = torch.randn(4, 32, 16, dtype=FLOAT64)
    kept = []
    for one in (layer, model, model):  # the second time the room is that of the first
        sizes: dict[int, int] = {}

        def pack(tensor: Tensor, sizes: dict[int, int] = sizes) -> Tensor:
            storage = tensor.untyped_storage()
            sizes[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            one(x).sum().backward()
        kept.append(sum(sizes.values()))
    hidden = 4 * 32 * 512 * 8
    density = steppe.explain(model).blocks[0].density
    assert density < 0.15
    assert kept[0] - kept[2] > (1 - 1.25 * density - 1 / 64 - 0.01) * hidden
    assert kept[2] < kept[1]
