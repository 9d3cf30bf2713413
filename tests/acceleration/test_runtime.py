"""`accelerate_` changes no result: any architecture, with plug-ins, watched, compiled, trained."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import GenerationConfig

import models
import steppe
from steppe.bench import PATTERNS, Block
from steppe.errors import AccelerationError, SparsificationError
from steppe.ops.cpu import copies, dispatch
from steppe.ops.cpu.library import kernels

native = pytest.mark.skipif(kernels().name != "native", reason=kernels().reason)
pytestmark = [
    pytest.mark.filterwarnings(
        "ignore:.gradient_checkpointing_enable. is deprecated:FutureWarning"
    ),
    pytest.mark.filterwarnings("ignore:<class 'torch.autograd.function.Function'> should not be"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning"),
    pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning"),
]
PLUGINS = [steppe.ZerothBias(), steppe.RestrictedNorm(), steppe.JumpingSquaredReLU()]
MODELS: dict[str, Callable[[], nn.Module]] = {
    **models.LANGUAGE_MODELS,
    **models.VISION_MODELS,
    "t5 gated": lambda: models.t5(gated=True),
}


def routed_calls(model: nn.Module) -> int:
    """How often the blocks went by the op so far, sparse or dense."""
    counts = [block.calls for block in steppe.explain(model).blocks]
    return sum(n for each in counts for how, n in each.items() if how != "own modules")


def ran_sparse(model: nn.Module) -> bool:
    """Whether each block ran on the sparse kernels last, with something to do."""
    blocks = steppe.explain(model).blocks
    return all(block.is_sparse and block.density > 0.0 for block in blocks)


def loss_and_gradients(
    model: nn.Module, inputs: dict[str, Tensor]
) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    loss = model(**inputs).logits.square().mean()
    loss.backward()
    named = model.named_parameters()
    return loss.detach(), {n: p.grad.clone() for n, p in named if p.grad is not None}


def assert_same(
    got: tuple[Tensor, dict[str, Tensor]], expected: tuple[Tensor, dict[str, Tensor]]
) -> None:
    assert torch.allclose(got[0], expected[0], rtol=1e-5)
    assert got[1].keys() == expected[1].keys()
    largest = max(gradient.abs().max().item() for gradient in expected[1].values())
    for name, gradient in expected[1].items():
        assert torch.allclose(got[1][name], gradient, rtol=1e-4, atol=1e-6 * largest), name


@pytest.mark.parametrize(
    "plugins",
    [[], [steppe.ZerothBias(max_tokens=32), steppe.JumpingSquaredReLU()]],
    ids=["plain", "sparsified"],
)
@pytest.mark.parametrize("name", MODELS)
def test_every_architecture_computes_and_learns_the_same(name: str, plugins: list) -> None:
    model = MODELS[name]().eval()
    if plugins:
        steppe.sparsify_(model, plugins)
    inputs = models.inputs_for(model)
    expected = loss_and_gradients(model, inputs)
    keys, parameters = list(model.state_dict()), list(map(id, model.parameters()))
    blocks = len(steppe.find_blocks(model))
    steppe.accelerate_(model, max_density=1.0)
    assert_same(loss_and_gradients(model, inputs), expected)
    assert list(model.state_dict()) == keys
    assert list(map(id, model.parameters())) == parameters
    if kernels().name == "native":
        assert routed_calls(model) == blocks
        assert ran_sparse(model)
    steppe.restore_(model)
    assert len(steppe.find_blocks(model)) == blocks
    if not plugins:
        again = loss_and_gradients(model, inputs)
        assert torch.equal(again[0], expected[0])


@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_torchs_own_encoder(norm_first: bool, training: bool) -> None:
    encoder = models.torch_encoder(norm_first).train(training)
    x = torch.randn(2, 5, models.D_MODEL)
    with torch.set_grad_enabled(training):
        expected = encoder(x)
        got = steppe.accelerate_(encoder, max_density=1.0)(x)
    assert torch.allclose(got, expected, atol=1e-5)
    assert routed_calls(encoder) == 2 * (kernels().name == "native")
    steppe.restore_(encoder)
    assert encoder.layers[0].activation is F.relu


@pytest.mark.parametrize("name", ["opt", "gpt2", "t5"])
def test_generation_is_the_same_token_by_token(name: str) -> None:
    model = MODELS[name]().eval()
    steppe.sparsify_(model, [steppe.ZerothBias(max_tokens=32)])
    for parameter in steppe.added_parameters(model).values():
        nn.init.normal_(parameter, std=0.05)
    settings = GenerationConfig(
        max_new_tokens=8, do_sample=False, pad_token_id=0, eos_token_id=None
    )
    ids = models.token_ids()
    expected = model.generate(ids, generation_config=settings)
    steppe.accelerate_(model, max_density=1.0)
    assert torch.equal(model.generate(ids, generation_config=settings), expected)
    if kernels().name == "native":
        assert routed_calls(model) >= 8


def test_fifty_steps_end_with_the_same_losses() -> None:
    torch.manual_seed(0)
    model = steppe.sparsify_(models.gpt2(), PLUGINS)
    other = copy.deepcopy(model)
    steppe.accelerate_(other, max_density=1.0)
    losses: list[list[float]] = []
    for each in (model, other):
        torch.manual_seed(1)
        optimizer = torch.optim.AdamW(each.parameters(), lr=1e-3)
        steppe.constrain_(each, optimizer)
        losses.append([])
        for step in range(50):
            ids = models.token_ids(4, 16, seed=step % 5)
            loss = each(input_ids=ids, labels=ids).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses[-1].append(loss.item())
    assert losses[0][-1] < losses[0][0] - 0.1
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


@pytest.mark.parametrize("mode", ["plain", "checkpointing", "autocast"])
@pytest.mark.parametrize("name", ["gpt2", "t5 gated", "llama"])
def test_a_threshold_rises_as_without(name: str, mode: str) -> None:
    torch.manual_seed(0)
    model = steppe.sparsify_(MODELS[name](), [steppe.RisingThreshold(), PLUGINS[2]])
    model.train()
    if hasattr(model.config, "dropout_rate"):
        assert model.config.dropout_rate == 0.0
    if mode == "checkpointing":
        model.gradient_checkpointing_enable({"use_reentrant": False})
    other = steppe.accelerate_(copy.deepcopy(model), max_density=1.0)
    inputs = {**models.inputs_for(model), "use_cache": False}
    mask = torch.ones_like(inputs["input_ids"])
    mask[0, 5:] = 0
    inputs["attention_mask"] = mask
    densities, states = [], []
    for each in (model, other):
        optimizer = torch.optim.SGD(each.parameters(), lr=1.0)
        steppe.constrain_(each, optimizer, total_steps=6)
        with steppe.watch(each) as monitor:
            for _ in range(4):
                with torch.autocast("cpu", torch.bfloat16, enabled=mode == "autocast"):
                    loss = each(**inputs).logits.float().square().mean()
                loss.backward()
                first = steppe.find_blocks(each)[0].activated
                assert first.threshold.sums[0, 0] == mask.sum()  # also where it runs twice
                optimizer.step()
                optimizer.zero_grad()
                densities.append(monitor.report().density)
        states.append(each.state_dict())
    tolerance = 5e-2 if mode == "autocast" else 1e-4
    assert densities[4:] == pytest.approx(densities[:4], abs=1e-2 * (mode == "autocast") + 1e-9)
    assert densities[3] < 0.8 * densities[0]
    for key, want in states[0].items():
        assert (states[1][key] - want).norm() <= tolerance * want.norm() + 1e-7, key
        if key.endswith("deviation"):
            assert want.all()
            assert torch.allclose(states[1][key], want, rtol=tolerance)
    if kernels().name == "native":
        assert routed_calls(other) >= 4 * len(steppe.find_blocks(model))
    # The bias is learnt through the threshold.
    bias = next((b.activated.bias for b in steppe.find_blocks(other)), None)
    assert bias is None or bias.requires_grad


@pytest.mark.parametrize("name", ["t5", "gpt2", "t5 gated"])
def test_watching_counts_what_it_counts_without(name: str) -> None:
    model = steppe.sparsify_(MODELS[name]().eval(), [steppe.JumpingSquaredReLU()])
    inputs = models.inputs_for(model)
    mask = torch.ones_like(inputs["input_ids"])
    mask[0, 5:] = 0
    inputs["attention_mask"] = mask

    def counts() -> Any:
        with torch.no_grad(), steppe.watch(model) as monitor:
            model(**inputs)
        return monitor.report()

    expected = counts()
    steppe.accelerate_(model, max_density=1.0)
    assert str(counts()) == str(expected)
    if kernels().name == "native":
        assert routed_calls(model) == len(steppe.find_blocks(model))
    route = steppe.routing.route.route_of(steppe.find_blocks(model)[0].down)
    assert route is not None
    assert route.observers == []


def test_gradients_are_measured_on_the_blocks_own_modules() -> None:
    model = models.gpt2().eval()
    ids = models.token_ids()
    batch = {"input_ids": ids, "labels": ids}
    expected = steppe.measure(model, [batch], curvature=True)
    steppe.accelerate_(model, max_density=1.0)
    assert str(steppe.measure(model, [batch], curvature=True)) == str(expected)
    assert routed_calls(model) == 0
    model(**batch)
    assert routed_calls(model) == 2 * (kernels().name == "native")


@pytest.mark.parametrize("gated", [False, True])
def test_dropout_between_activation_and_second_layer(gated: bool) -> None:
    model = models.t5(gated=gated, dropout=0.5).train()
    block = steppe.find_blocks(model)[0]
    x = torch.randn(400, models.D_MODEL)
    feed_forward = model.encoder.block[0].layer[1].DenseReluDense
    with torch.no_grad():
        expected = torch.stack([feed_forward(x) for _ in range(60)])
        steppe.accelerate_(model, max_density=1.0)
        got = torch.stack([feed_forward(x) for _ in range(60)])
    if kernels().name == "native":
        assert steppe.explain(model).blocks[0].calls == {"sparse": 60}
    error = expected.std() / 60**0.5
    assert (got.mean(0) - expected.mean(0)).abs().mean() < 2 * error
    assert got.std(0).mean().item() == pytest.approx(expected.std(0).mean().item(), rel=0.05)
    model.eval()
    with torch.no_grad():
        assert torch.equal(feed_forward(x), feed_forward(x))
    assert block.dropout is not None


def test_a_schedule_goes_on_while_accelerated() -> None:
    model = steppe.sparsify_(models.gpt2().eval(), [steppe.JumpingSquaredReLU(ramp=0.5)])
    inputs = models.inputs_for(model)
    other = steppe.accelerate_(copy.deepcopy(model), max_density=1.0)
    outputs = []
    for progress in (0.0, 0.25, 1.0):
        for each in (model, other):
            steppe.advance_(each, progress)
        outputs.append(model(**inputs).logits)
        assert torch.allclose(other(**inputs).logits, outputs[-1], atol=1e-5)
    assert not torch.equal(outputs[0], outputs[-1])


def test_checkpointing_gives_the_same_gradients() -> None:
    model = models.gpt2().train()  # its dropouts are 0
    inputs = {**models.inputs_for(model), "use_cache": False}
    expected = loss_and_gradients(model, inputs)
    steppe.accelerate_(model, max_density=1.0)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    assert_same(loss_and_gradients(model, inputs), expected)
    # Each block twice; the second time it is left as soon as all is there that backward needs.
    assert routed_calls(model) >= 2 * (kernels().name == "native")


@pytest.mark.parametrize("name", ["opt", pytest.param("t5 gated", marks=pytest.mark.slow)])
def test_compiled_into_one_graph(name: str) -> None:
    model = models.one_layer_(MODELS[name]()).eval()
    steppe.accelerate_(model, max_density=1.0)
    inputs = models.inputs_for(model)
    expected = loss_and_gradients(model, inputs)
    block = model.model.decoder.layers[0] if name == "opt" else model.encoder.block[0].layer[1]
    x = torch.randn(2, 7, models.D_MODEL)
    if name != "opt":  # a layer of OPT needs its attention's mask; its whole model is below
        compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
        assert torch.allclose(compiled(x), block(x), atol=1e-5)
    whole = torch.compile(model, backend="aot_eager")
    loss = whole(**inputs).logits.square().mean()
    assert torch.allclose(loss, expected[0], rtol=1e-5)


def test_compiled_into_one_graph_with_the_built_in_limits() -> None:
    layer = nn.TransformerEncoderLayer(models.D_MODEL, 2, models.D_HIDDEN, batch_first=True).eval()
    x = torch.randn(3, 5, models.D_MODEL)
    expected = layer(x)
    steppe.accelerate_(layer)  # whether a call has enough to do depends on the threads
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert torch.allclose(compiled(x), expected, atol=1e-5)


@pytest.mark.skipif(kernels().name != "native", reason=kernels().reason)
@pytest.mark.parametrize("gradients", [False, True])
def test_accelerated_and_watched_in_one_graph(gradients: bool) -> None:
    layer = nn.TransformerEncoderLayer(models.D_MODEL, 2, models.D_HIDDEN, batch_first=True)
    layer.eval()
    x = torch.randn(3, 5, models.D_MODEL, requires_grad=True)
    with steppe.watch(layer, gradients=gradients) as monitor:
        layer(x).square().mean().backward()
    expected, wanted = monitor.report(), x.grad
    x.grad = None
    steppe.accelerate_(layer, max_density=1.0)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    with steppe.watch(layer, gradients=gradients) as monitor:
        compiled(x).square().mean().backward()
    report = monitor.report()
    assert 0.0 < report.density < 1.0
    assert (report.density, report.derivative_density) == (
        expected.density,
        expected.derivative_density,
    )
    if gradients:
        assert report.blocks[0].AF_up == pytest.approx(expected.blocks[0].AF_up, rel=1e-5)
    torch.testing.assert_close(x.grad, wanted, rtol=1e-4, atol=1e-7)


@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning")
def test_what_statistics_write_to_does_not_keep_compiled_graphs_from_cuda_graphs() -> None:
    """Inductor takes no CUDA graph where an input is written to that may be another next time."""
    from torch._functorch._aot_autograd.utils import make_boxed_func
    from torch._inductor.compile_fx import compile_fx

    written: list[int] = []

    def see(graph: torch.fx.GraphModule, inputs: Any, **settings: Any) -> Any:
        places = [node for node in graph.graph.nodes if node.op == "placeholder"]
        fixed = set(settings.get("static_input_idxs") or ())
        for node in graph.graph.nodes:
            if node.target is torch.ops.aten.copy_.default and node.args[0] in places:
                place = places.index(node.args[0])
                written.append(place)
                assert place in fixed, places[place]
        return make_boxed_func(graph.forward)

    model = steppe.sparsify_(models.one_layer_(models.gpt2()), [steppe.RisingThreshold()])
    backend = functools.partial(compile_fx, inner_compile=see)
    compiled = torch.compile(model, backend=backend)
    ids = models.token_ids(2, 8)
    with steppe.watch(model):
        compiled(input_ids=ids, labels=ids).loss.backward()
    assert len(written) >= 4  # sums, counts, units, moments


def test_autocast_runs_in_the_lower_precision() -> None:
    model = models.gpt2().eval()
    inputs = models.inputs_for(model)
    with torch.autocast("cpu", torch.bfloat16):
        expected = model(**inputs).logits
        steppe.accelerate_(model, max_density=1.0)
        got = model(**inputs).logits
    assert got.dtype == expected.dtype
    assert torch.allclose(got, expected, atol=2e-2)
    assert not torch.equal(got, model(**inputs).logits)
    assert routed_calls(model) == 4 * (kernels().name == "native")


@native
def test_a_weight_that_has_changed_is_never_served_stale() -> None:
    model = steppe.accelerate_(models.gpt2().eval(), max_density=1.0)
    inputs = {"input_ids": models.token_ids(4, 16)}
    plain = copy.deepcopy(model)
    steppe.restore_(plain)
    down = steppe.find_blocks(model)[0].down.weight
    plain_down = steppe.find_blocks(plain)[0].down.weight
    changes: list[Callable[[nn.Parameter], object]] = [
        lambda w: w.mul_(2.0),
        lambda w: w.data.add_(0.1),
        lambda w: setattr(w, "data", w.data * 3.0),
        lambda w: w.copy_(torch.ones_like(w)),
    ]
    with torch.no_grad():
        for change in changes:
            model(**inputs)
            change(down)
            change(plain_down)
            expected = plain(**inputs).logits
            assert torch.allclose(model(**inputs).logits, expected, rtol=1e-4, atol=1e-5)


@native
def test_copies_of_weights_go_with_the_model_and_with_restore() -> None:
    copies._entries.clear()
    model = steppe.accelerate_(models.gpt2().eval(), max_density=1.0)
    assert copies._entries == {}  # the copies of the dry run are gone
    with torch.no_grad():
        for _ in range(2):
            model(input_ids=models.token_ids())
    assert len(copies._entries) == 2
    steppe.restore_(model)
    assert copies._entries == {}


@native
def test_a_block_with_little_to_do_runs_its_own_modules() -> None:
    model = steppe.accelerate_(models.gpt2().eval())
    model(**models.inputs_for(model))
    blocks = steppe.explain(model).blocks
    assert [block.calls for block in blocks] == 2 * [{"own modules": 1}]
    assert all("too few tokens" in block.reason for block in blocks)


@native
def test_accelerating_twice_starts_over() -> None:
    model = models.gpt2().eval()
    steppe.accelerate_(model, max_density=1.0)
    steppe.accelerate_(model, max_density=0.0, where=lambda block: block.name.endswith("1"))
    model(**models.inputs_for(model))
    assert [(b.name, b.calls) for b in steppe.explain(model).blocks] == [
        ("transformer.h.1", {"dense": 1})
    ]
    kinds = {type(module).__name__ for module in model.modules()}
    steppe.restore_(model)
    assert kinds == {type(module).__name__ for module in model.modules()}
    with pytest.raises(SparsificationError, match="carries no plug-in"):
        steppe.restore_(model)


def test_both_are_taken_back_at_once() -> None:
    model = models.gpt2().eval()
    inputs = models.inputs_for(model)
    expected = model(**inputs).logits
    steppe.accelerate_(steppe.sparsify_(model, PLUGINS), max_density=1.0)
    steppe.restore_(model)
    assert torch.equal(model(**inputs).logits, expected)


def break_dtype(model: nn.Module) -> None:
    block = steppe.find_blocks(model)[1]
    block.down.to(torch.float64)


def break_weight(model: nn.Module) -> None:
    with torch.no_grad():
        steppe.find_blocks(model)[1].up.weight[0, 0] = float("nan")


@pytest.mark.parametrize(
    ("make", "spoil", "message"),
    [
        (lambda: models.gpt2("gelu"), None, "h.0.*ReLU.*GELU.*where="),
        (models.gpt2, break_dtype, "h.1.*one dtype"),
        (models.gpt2, break_weight, "h.1.*NaN or infinite"),
    ],
)
def test_a_block_that_does_not_fit_is_one_error_and_nothing_is_changed(
    make: Callable[[], nn.Module], spoil: Callable[[nn.Module], None] | None, message: str
) -> None:
    model = make()
    if spoil is not None:
        spoil(model)
    kinds = [type(module) for module in model.modules()]
    with pytest.raises(AccelerationError, match=message):
        steppe.accelerate_(model)
    assert [type(module) for module in model.modules()] == kinds


def test_wrong_calls_are_errors() -> None:
    model = models.gpt2()
    with pytest.raises(ValueError, match="max_density"):
        steppe.accelerate_(model, max_density=1.5)
    steppe.accelerate_(model)
    with pytest.raises(SparsificationError, match="is accelerated"):
        steppe.sparsify_(model, PLUGINS)


def test_adapters_are_asked_to_be_merged() -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["c_fc"], fan_in_fan_out=True)
    model = peft.get_peft_model(models.gpt2(), config)
    with pytest.raises(AccelerationError, match="merge_and_unload"):
        steppe.accelerate_(model)
    config = peft.LoraConfig(target_modules=["c_attn"], fan_in_fan_out=True)
    model = peft.get_peft_model(models.gpt2(), config)
    inputs = {"input_ids": models.token_ids()}
    model.eval()
    expected = model(**inputs).logits
    got = steppe.accelerate_(model, max_density=1.0)(**inputs).logits
    assert torch.allclose(got, expected, atol=1e-5)


def half_dense_block(gated: bool = False) -> Block:
    """A block with each unit active on half of the tokens."""
    block = Block(16, 64, gated=gated)
    with torch.no_grad():
        for bias in (block.up.bias, block.down.bias):
            bias.zero_()
        if block.gate is not None:
            block.gate.bias.zero_()
    return block


@pytest.fixture
def low_threshold(monkeypatch: pytest.MonkeyPatch) -> None:
    """Up to density .25 the kernels pay below 64 rows, from there on at any."""
    monkeypatch.setattr(dispatch, "_LEAST_WORK", 0)
    monkeypatch.setattr(dispatch, "_measured", {})
    monkeypatch.setattr(dispatch, "_screened", {})
    table = {1: 0.0, 12: 0.25, 64: 1.0}
    tables = {False: table, True: table}
    dispatch.use(torch.float32, torch.get_num_threads(), {0: tables}, {False: {}, True: {}})


def how_each_ran(model: nn.Module, rows: int, calls: int) -> list[str]:
    """How the one block of a model runs in some calls."""
    return [how_it_ran(model, rows) for _ in range(calls)]


def how_it_ran(model: nn.Module, rows: int) -> str:
    model(torch.randn(rows, 16))
    (block,) = steppe.explain(model).blocks
    assert block.tokens == rows
    return block.how


OWN, DENSE, SPARSE = "own modules", "dense", "sparse"


@native
@pytest.mark.parametrize("gated", [False, True])
def test_a_block_that_is_too_dense_in_inference_runs_its_own_modules_for_a_while(
    gated: bool, low_threshold: None
) -> None:
    expected = half_dense_block(gated)
    block = steppe.accelerate_(copy.deepcopy(expected), patterns=PATTERNS)
    with torch.no_grad():
        assert how_each_ran(block, 12, 18) == [DENSE] + 16 * [OWN] + [DENSE]
        # Calls of another threshold have a habit of their own.
        assert how_each_ran(block, 64, 3) == 3 * [SPARSE]
        assert how_each_ran(block, 12, 33) == 32 * [OWN] + [DENSE]
        for each in (block, expected):
            (each.up if each.gate is None else each.gate).bias -= 3.0  # nothing is active now
        assert how_each_ran(block, 12, 67) == 64 * [OWN] + 3 * [SPARSE]
        assert steppe.explain(block).blocks[0].density == 0.0
        x = torch.randn(12, 16)
        assert torch.allclose(block(x), expected(x), atol=1e-6)


@native
@pytest.mark.parametrize("gated", [False, True])
def test_training_steps_are_always_tried(gated: bool, low_threshold: None) -> None:
    block = steppe.accelerate_(half_dense_block(gated), patterns=PATTERNS)
    assert how_each_ran(block, 12, 3) == 3 * [DENSE]


@native
def test_where_no_density_pays_a_call_is_not_routed(low_threshold: None) -> None:
    block = steppe.accelerate_(half_dense_block(), patterns=PATTERNS)
    assert how_each_ran(block, 11, 2) == 2 * [OWN]
    block.requires_grad_(False)
    assert how_each_ran(block, 11, 2) == 2 * [OWN]
    with torch.no_grad():
        assert how_each_ran(block, 11, 2) == 2 * [OWN]


@native
def test_a_first_call_before_copies_are_kept_does_not_count_as_too_dense(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(dispatch, "_LEAST_WORK", 0)
    monkeypatch.setattr(dispatch, "_measured", {})
    table = {False: {1: 1.0}, True: {}}
    dispatch.use(torch.float32, torch.get_num_threads(), {0: table}, {False: {}, True: {}})
    block = steppe.accelerate_(half_dense_block(), patterns=PATTERNS)
    with torch.no_grad():
        assert how_each_ran(block, 12, 4)[1:] == 3 * [SPARSE]
