"""`accelerate_` with the kernels in the interpreter: what runs them, and what a graph would replay.

The CPU stands in for a card: its backend is the one of CUDA devices, and the question whether a
graph is being captured is answered by the test.
"""

from __future__ import annotations

import copy
import gc
import re
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import models
import steppe
from ops.cuda import interpreter
from steppe.acceleration.accelerate import acceleration_of
from steppe.ops import backend, decoding
from steppe.ops.arrival import Arrival
from steppe.ops.cuda import decode, decode_tokens
from steppe.ops.graphs import block as graph_block
from steppe.ops.graphs import limits
from steppe.ops.graphs.backend import CUDA
from steppe.ops.graphs.block import EVERY, OUTSIDE
from steppe.ops.outcome import DENSE, OWN_MODULES, SCREENED, SPARSE

pytestmark = [interpreter.NEEDED, pytest.mark.usefixtures("poisoned")]

PATTERNS = (
    steppe.BlockPattern(family="a gated block", gate="gate", up="up", act="act", down="down"),
    steppe.BlockPattern(family="a block", up="up", act="act", down="down"),
)
WIDTH, HIDDEN = 48, 80
ROWS = [1, 2, 16]
TOLERANCES = {torch.float32: 2e-6, torch.bfloat16: 2.0**-7}


class Card:
    """The device that the CPU stands in for.

    Attributes:
        captures: whether a graph is being captured.
        calls: of `decode_token` in captures, with their outputs.
    """

    def __init__(self) -> None:
        self.captures = False
        self.calls: list[tuple[tuple[Any, ...], Tensor]] = []

    @contextmanager
    def capture(self) -> Iterator[None]:
        self.calls.clear()
        self.captures = True
        try:
            yield
        finally:
            self.captures = False

    def replay(self) -> None:
        """What a graph does: the same kernels on the same memory."""
        for arguments, z in self.calls:
            z.copy_(_decode_token(*arguments))


_decode_token = decode.decode_token


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> Card:
    card = Card()

    def decode_token(*arguments: Any) -> Tensor:
        z = _decode_token(*arguments)
        if card.captures:
            card.calls.append((arguments, z))
        return z

    monkeypatch.setitem(backend._BACKENDS, "cpu", CUDA)
    monkeypatch.setattr(decode, "decode_token", decode_token)
    monkeypatch.setattr(graph_block, "is_capturing", lambda: card.captures)
    monkeypatch.setattr(graph_block, "card_of", lambda _: limits.CARD)
    return card


class Gated(nn.Module):
    """A gated block, of which about a tenth is active."""

    def __init__(self, biases: bool) -> None:
        super().__init__()
        self.gate = nn.Linear(WIDTH, HIDDEN, bias=biases)
        self.up = nn.Linear(WIDTH, HIDDEN, bias=biases)
        self.act = nn.ReLU()
        self.down = nn.Linear(HIDDEN, WIDTH, bias=biases)
        if biases:
            nn.init.constant_(self.gate.bias, -1.28 * 3**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.act(self.gate(x)) * self.up(x))


def block_of(
    dtype: torch.dtype = torch.float32, biases: bool = True, gated: bool = False
) -> nn.Module:
    """Of which about a tenth is active for a standard normal input."""
    torch.manual_seed(0)
    if gated:
        return Gated(biases).eval().to(dtype)
    block = nn.Sequential()
    block.add_module("up", nn.Linear(WIDTH, HIDDEN, bias=biases))
    block.add_module("act", nn.ReLU())
    block.add_module("down", nn.Linear(HIDDEN, WIDTH, bias=biases))
    if biases:
        nn.init.constant_(block.up.bias, -1.28 * 3**-0.5)
    return block.eval().to(dtype)


def token(seed: int = 1, dtype: torch.dtype = torch.float32, rows: int = 1) -> Tensor:
    return torch.randn(rows, WIDTH, generator=torch.Generator().manual_seed(seed)).to(dtype)


def accelerated(block: nn.Module, **settings: Any) -> nn.Module:
    """A copy; the limits are given, as so narrow a block was not measured."""
    settings = {
        "max_density": 0.5, "max_candidates": 0.5, "weights_are_final": True, **settings
    }  # fmt: skip
    return steppe.accelerate_(copy.deepcopy(block), patterns=PATTERNS, **settings)


def exact(block: nn.Module, x: Tensor) -> Tensor:
    return copy.deepcopy(block).double()(x.double())


def in_graphs(model: nn.Module) -> str:
    (row,) = steppe.explain(model).blocks
    return row.in_graphs


def is_close(z: Tensor, expected: Tensor) -> bool:
    return bool(torch.dist(z.double(), expected) <= TOLERANCES[z.dtype] * expected.norm())


@torch.no_grad()
def test_outside_of_a_capture_the_bits_are_those_of_the_modules(card: Card) -> None:
    dense = block_of()
    fast = accelerated(dense)
    for seed in range(5):
        assert torch.equal(fast(token(seed)), dense(token(seed)))
    (row,) = steppe.explain(fast).blocks
    assert row.calls == {DENSE: 1, OWN_MODULES: 4}
    assert (row.how, row.reason) == (OWN_MODULES, OUTSIDE)
    assert row.in_graphs == "not captured yet"
    assert "in a CUDA graph" in str(steppe.explain(fast))
    assert not card.calls


@torch.no_grad()
@pytest.mark.parametrize("dtype", list(TOLERANCES))
@pytest.mark.parametrize("biases", [True, False])
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("gated", [False, True])
def test_a_graph_replays_the_kernels_with_other_inputs(
    card: Card, dtype: torch.dtype, biases: bool, rows: int, gated: bool
) -> None:
    dense = block_of(dtype, biases, gated)
    fast = accelerated(dense, max_density=1.0, max_candidates=1.0)
    x = token(dtype=dtype, rows=rows)
    fast(x)
    with card.capture():
        z = fast(x)
    (row,) = steppe.explain(fast).blocks
    assert (row.how, row.in_graphs, row.is_few) == (SCREENED, SCREENED, True)
    active = ((dense.gate if gated else dense.up)(x) > 0).any(0).double().mean().item()
    assert row.density == pytest.approx(active)
    assert 0 < row.density <= row.candidates <= 1.0
    assert len(card.calls) == 1
    assert is_close(z, exact(dense, x))
    for seed in (2, 3):
        x.copy_(token(seed, dtype, rows))
        card.replay()
        assert is_close(z, exact(dense, x))
    assert not is_close(z, exact(dense, token(dtype=dtype, rows=rows)))


@torch.no_grad()
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("gated", [False, True])
def test_candidates_are_counted_as_the_kernel_finds_them(
    card: Card, monkeypatch: pytest.MonkeyPatch, rows: int, gated: bool
) -> None:
    launches: list[object] = []
    for module in (decode, decode_tokens):
        launch = module.launch_find
        monkeypatch.setattr(
            module, "launch_find", lambda *a, own=launch: launches.append(own) or own(*a)
        )
    dense = block_of(gated=gated)
    fast = accelerated(dense)
    x = token(rows=rows)
    fast(x)
    monkeypatch.undo()
    (row,) = steppe.explain(fast).blocks
    # Twice the block, with a screen and without, and its candidates.
    assert launches == 3 * [launch_of(rows, gated)]
    layer = dense.gate if gated else dense.up
    weight, bias = layer.weight, torch.full_like(layer.bias, float("inf"))
    screen, coefficients = decode.screen_of(weight, layer.bias), (1.0, 0.0)
    if rows == 1 and not gated:
        config = decode.config_of(WIDTH, True)
        lists = decode.launch_find(x, weight, bias, screen, coefficients, config)
    else:
        of_tokens = decode_tokens.config_of(WIDTH, x.dtype)
        lists = decode_tokens.launch_find(
            x, weight, bias, None, None, screen, coefficients, of_tokens
        )
    assert row.candidates == pytest.approx(lists.counts.sum() / HIDDEN)
    assert row.density <= row.candidates


def launch_of(rows: int, gated: bool) -> object:
    return (decode if rows == 1 and not gated else decode_tokens).launch_find


@torch.no_grad()
def test_each_number_of_tokens_goes_by_its_own_numbers(card: Card) -> None:
    dense = block_of()
    fast = accelerated(dense, max_density=0.3, max_candidates=0.0)
    one, many = token(), token(rows=16)
    fast(one)
    with card.capture():
        assert torch.equal(fast(many), dense(many))
    assert "no call of 16 tokens" in in_graphs(fast)
    fast(many)
    with card.capture():
        z = fast(one)
        assert torch.equal(fast(many), dense(many))
    assert is_close(z, exact(dense, one))
    assert len(card.calls) == 1
    told = in_graphs(fast)
    share = (dense.up(many) > 0).any(0).double().mean().item()
    assert share > 0.3 > (dense.up(one) > 0).double().mean()
    assert told.startswith("1 token: sparse; 16 tokens: dense: ")
    assert f"{share:.1%} of the units are active for any of 16 tokens" in told


@torch.no_grad()
@pytest.mark.parametrize("rows", ROWS[1:])
def test_the_screens_limit_was_measured_for_one_token(
    card: Card, monkeypatch: pytest.MonkeyPatch, rows: int
) -> None:
    monkeypatch.setattr(limits, "TABLE", [limits.TABLE[-1]._replace(width=WIDTH)])
    monkeypatch.setattr(limits, "DTYPES", (torch.float32,))
    dense = block_of()
    nn.init.constant_(dense.up.bias, -10.0)  # no candidates
    fast = accelerated(dense, max_density=1.0, max_candidates=None)
    for x in (token(), token(rows=rows)):
        fast(x)
        with card.capture():
            assert is_close(fast(x), exact(dense, x))
    assert in_graphs(fast) == f"1 token: screened; {rows} tokens: sparse"


@torch.no_grad()
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize(
    ("settings", "way", "reason"),
    [
        ({"max_density": 0.01}, DENSE, r"of the units are active, and it pays up to 1\.0%"),
        ({"max_candidates": 0.01}, SPARSE, ""),
        ({"max_candidates": 0.0}, SPARSE, ""),
        ({"weights_are_final": False}, DENSE, "weights_are_final=True"),
        ({"max_density": None}, DENSE, "it is 48 wide, and the narrowest that was measured is 768"),
    ],
)
def test_limits_and_the_promise_decide(
    card: Card, settings: dict[str, Any], way: str, reason: str, gated: bool
) -> None:
    if gated and settings == {"max_density": None}:
        reason = "on a GPU it was not measured with a gate: give max_density"
    dense = block_of(gated=gated)
    fast = accelerated(dense, **settings)
    x = token()
    assert torch.equal(fast(x), dense(x))
    with card.capture():
        z = fast(x)
    told = in_graphs(fast)
    if way == DENSE:
        assert torch.equal(z, dense(x))
        assert not card.calls
        assert told.startswith("dense: ")
        assert re.search(reason, told)
    else:
        assert is_close(z, exact(dense, x))
        assert told == way
        ((arguments, _),) = card.calls
        assert arguments[5] is None  # no screen


@torch.no_grad()
def test_a_number_that_has_not_arrived_is_not_waited_for(
    card: Card, monkeypatch: pytest.MonkeyPatch
) -> None:
    dense = block_of()
    fast = accelerated(dense)
    x = token()
    monkeypatch.setattr(Arrival, "send", lambda self, number: None)
    fast(x)
    with card.capture():
        assert torch.equal(fast(x), dense(x))
    assert "had not arrived" in in_graphs(fast)
    monkeypatch.undo()


@torch.no_grad()
def test_without_a_call_before_the_capture_it_is_dense(card: Card) -> None:
    dense = block_of()
    fast = accelerated(dense)
    with card.capture():
        assert torch.equal(fast(token()), dense(token()))
    assert "no call came before the capture" in in_graphs(fast)


@torch.no_grad()
@pytest.mark.parametrize("gated", [False, True])
def test_a_changed_weight_is_copied_again_in_the_next_call(card: Card, gated: bool) -> None:
    dense = block_of(gated=gated)
    fast = accelerated(dense)
    x = token()
    fast(x)
    for changed in fast.parameters():
        changed.mul_(1.25)
        dense.load_state_dict(fast.state_dict())
        with card.capture():
            assert torch.equal(fast(x), dense(x))
        assert "a weight has changed" in in_graphs(fast)
        assert torch.equal(fast(x), dense(x))
        with card.capture():
            z = fast(x)
        assert len(card.calls) == 1
        assert is_close(z, exact(dense, x))


@torch.no_grad()
def test_another_parameter_and_another_dtype_are_copied_again(card: Card) -> None:
    fast = accelerated(block_of())
    fast(token())
    fast.down.weight = nn.Parameter(2.0 * fast.down.weight)
    with card.capture():
        fast(token())
    assert "a weight has changed" in in_graphs(fast)
    fast.bfloat16()
    x = token(dtype=torch.bfloat16)
    with card.capture():
        fast(x)
    assert "a weight has changed" in in_graphs(fast)
    fast(x)
    with card.capture():
        z = fast(x)
    assert in_graphs(fast) == SCREENED
    dense = block_of()
    dense.down.weight.mul_(2.0)
    assert is_close(z, exact(dense.bfloat16(), x))


def tensors_of(card: Card) -> list[weakref.ref[Tensor]]:
    """V and the words of the last capture."""
    ((arguments, _),) = card.calls
    return [weakref.ref(arguments[3]), weakref.ref(arguments[5].words)]


@torch.no_grad()
def test_restore_frees_the_copies_unless_a_graph_reads_them(card: Card) -> None:
    dense = block_of()
    fast = accelerated(dense)
    fast(token())
    kernels = acceleration_of(fast).routes[0].computation._kernels
    never_captured = weakref.ref(kernels._copies.down)
    assert never_captured() is not None
    steppe.restore_(fast)
    gc.collect()
    assert never_captured() is None
    del kernels

    steppe.accelerate_(
        fast, patterns=PATTERNS, max_density=0.5, max_candidates=0.5, weights_are_final=True
    )
    x = token()
    fast(x)
    with card.capture():
        z = fast(x)
    captured = tensors_of(card)
    steppe.restore_(fast)
    assert torch.equal(fast(x), dense(x))
    card.replay()
    assert is_close(z, exact(dense, x))
    card.calls.clear()
    gc.collect()
    assert all(one() is not None for one in captured)
    del fast
    gc.collect()
    assert all(one() is None for one in captured)


def hooked(model: nn.Module) -> object:
    return model.up.register_forward_hook(lambda *_: None)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda model: model.train(), "only decode"),
        (hooked, "hook"),
        (lambda model: nn.utils.parametrizations.weight_norm(model.up), "parametriz"),
    ],
    ids=["training", "a hook", "a parametrization"],
)
def test_blocks_that_do_something_else_are_not_copied(
    card: Card, change: Callable[[nn.Module], object], reason: str
) -> None:
    dense = block_of()
    fast = accelerated(dense)
    change(fast)
    change(dense)
    x = token()
    with torch.no_grad():
        for _ in range(2):
            assert torch.equal(fast(x), dense(x))
        with card.capture():
            assert torch.equal(fast(x), dense(x))
    assert not card.calls
    (row,) = steppe.explain(fast).blocks
    assert reason in f"{row.reason} {row.in_graphs}"


@pytest.mark.parametrize("rows", [0, 17])
def test_more_tokens_run_their_own_modules(card: Card, rows: int) -> None:
    dense = block_of()
    fast = accelerated(dense)
    x = torch.randn(rows, WIDTH)
    with torch.no_grad():
        fast(x)
        with card.capture():
            assert torch.equal(fast(x), dense(x))
    (row,) = steppe.explain(fast).blocks
    assert row.how == OWN_MODULES
    assert "calls of 1 to 16 tokens" in row.reason


@pytest.mark.parametrize("rows", ROWS[1:])
def test_several_tokens_need_a_density_as_none_was_measured(
    card: Card, monkeypatch: pytest.MonkeyPatch, rows: int
) -> None:
    monkeypatch.setattr(limits, "TABLE", [limits.TABLE[-1]._replace(width=WIDTH)])
    monkeypatch.setattr(limits, "DTYPES", (torch.float32,))
    monkeypatch.setattr(limits, "LEAST_HIDDEN", 1)
    dense = block_of()
    nn.init.constant_(dense.up.bias, -10.0)  # none active
    fast = accelerated(dense, max_density=None, max_candidates=None)
    x = token(rows=rows)
    reason = f"on a GPU it was not measured for {rows} tokens: give max_density"
    with torch.no_grad():
        fast(x)
        with card.capture():
            assert torch.equal(fast(x), dense(x))
        (row,) = steppe.explain(fast).blocks
        assert (row.how, row.reason, row.in_graphs) == (OWN_MODULES, reason, f"dense: {reason}")
        assert "for one token" in row.source
        assert not card.calls
        fast(x[:1])
        with card.capture():
            fast(x[:1])
    assert len(card.calls) == 1


def test_gradients_and_watches_run_its_own_modules(card: Card) -> None:
    dense = block_of()
    fast = accelerated(dense)
    x = token().requires_grad_()
    fast(x).sum().backward()
    own = token().requires_grad_()
    dense(own).sum().backward()
    assert torch.equal(x.grad, own.grad)
    assert torch.equal(fast.up.weight.grad, dense.up.weight.grad)
    with torch.no_grad(), steppe.watch(fast, patterns=PATTERNS) as monitor:
        for _ in range(2):
            assert torch.equal(fast(token()), dense(token()))
            assert steppe.explain(fast).blocks[0].reason == "it is watched"
        with card.capture():
            assert torch.equal(fast(token()), dense(token()))
        assert monitor.counts()[0, 0] == 3 * int((dense.up(token()) > 0).sum())
    assert not card.calls


@torch.no_grad()
def test_one_call_in_sixty_four_counts(card: Card) -> None:
    fast = accelerated(block_of(gated=True))
    for _ in range(2 * EVERY + 1):
        fast(token())
    (row,) = steppe.explain(fast).blocks
    assert row.calls == {DENSE: 3, OWN_MODULES: 2 * EVERY - 2}


@torch.no_grad()
@pytest.mark.parametrize("plugins", [(), (steppe.RisingThreshold(),)])
def test_a_model_of_several_blocks_with_conv1d(
    card: Card, plugins: tuple[steppe.Plugin, ...]
) -> None:
    dense = models.gpt2("relu").eval()
    if plugins:
        steppe.sparsify_(dense, plugins)
    fast = steppe.accelerate_(
        copy.deepcopy(dense), max_density=1.0, max_candidates=1.0, weights_are_final=True
    )
    ids = torch.tensor([[5]])
    expected = dense(ids).logits
    torch.testing.assert_close(fast(ids).logits, expected)
    with card.capture():
        got = fast(ids).logits
    assert len(card.calls) == len(steppe.find_blocks(dense)) > 1
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6)
    assert {row.in_graphs for row in steppe.explain(fast).blocks} == {SCREENED}


class Reshaping(nn.Module):
    """An owner that hands its tensors on as new ones."""

    def __init__(self, block: nn.Sequential) -> None:
        super().__init__()
        self.up, self.act, self.down = block

    def forward(self, x: Tensor) -> Tensor:
        a = self.act(self.up(x).view(1, -1))
        return self.down(a.reshape(1, 1, -1).flatten(0, 1))


@torch.no_grad()
@pytest.mark.parametrize("gated", [False, True])
def test_a_tensor_that_was_only_reshaped_or_multiplied_is_not_read(
    card: Card, monkeypatch: pytest.MonkeyPatch, gated: bool
) -> None:
    dense = block_of(gated=True) if gated else Reshaping(block_of())
    fast = accelerated(dense)
    x = token()
    fast(x)

    def equal(*_: Tensor) -> bool:
        raise AssertionError("a capture must not wait for the device")

    with card.capture(), monkeypatch.context() as patch:
        patch.setattr(torch, "equal", equal)
        z = fast(x)
    assert len(card.calls) == 1
    assert is_close(z, exact(dense, x))


class Fused(nn.Module):
    """Gate and up in one layer."""

    def __init__(self) -> None:
        super().__init__()
        self.both = nn.Linear(WIDTH, 2 * HIDDEN)
        self.act = nn.ReLU()
        self.down = nn.Linear(HIDDEN, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.both(x).chunk(2, dim=-1)
        return self.down(self.act(gate) * up)


@torch.no_grad()
def test_gate_and_up_in_one_layer_run_their_own_modules(card: Card) -> None:
    dense = Fused().eval()
    fused = steppe.BlockPattern(family="fused", gate_up="both", act="act", down="down")
    fast = steppe.accelerate_(
        copy.deepcopy(dense), patterns=(fused,), max_density=1.0, weights_are_final=True
    )
    for _ in range(2):
        fast(token())
    with card.capture():
        assert torch.equal(fast(token()), dense(token()))
    assert not card.calls
    assert "gate and up are one layer" in in_graphs(fast)


@contextmanager
def compiled(model: nn.Module, backend: Any) -> Iterator[Callable[[Tensor], Tensor]]:
    torch.compiler.reset()
    try:
        yield torch.compile(model, backend=backend, fullgraph=True)
    finally:
        torch.compiler.reset()


class Ops:
    """A backend of torch.compile that notes the operators of what it is given."""

    def __init__(self) -> None:
        self.names: set[str] = set()

    def __call__(self, graph: Any, inputs: list[Tensor]) -> Any:
        from torch._dynamo.backends.common import aot_autograd

        def note(graph: Any, inputs: list[Tensor]) -> Any:
            self.names |= {str(node.target) for node in graph.graph.nodes}
            return graph.forward

        return aot_autograd(fw_compiler=note)(graph, inputs)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # within the compiler
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize(("rows", "gated"), [(1, False), (2, False), (16, False), (2, True)])
def test_compiled_code_decides_when_it_runs(
    card: Card, monkeypatch: pytest.MonkeyPatch, mode: Callable[[], Any], rows: int, gated: bool
) -> None:
    monkeypatch.setattr(decoding, "makes_cuda_graphs", lambda: True)
    dense = block_of(gated=gated)
    fast = accelerated(dense, max_density=1.0, max_candidates=1.0)
    ops = Ops()
    x = token(rows=rows)
    with mode(), compiled(fast, ops) as call:
        assert torch.equal(call(x), dense(x))  # the warm-up
        assert {name for name in ops.names if "steppe" in name} == {
            "steppe.decode_in_graph.default"
        }
        with card.capture():
            z = call(x)
        assert in_graphs(fast) == SCREENED
        assert len(card.calls) == 1
        assert is_close(z, exact(dense, x))
        read = card.calls[0][0][0]  # x; this backend has not removed the product with one
        assert gated or read.data_ptr() == x.data_ptr()
        read.copy_(token(2, rows=rows))
        card.replay()
        assert is_close(card.calls[0][1], exact(dense, read))
        if mode is torch.no_grad:
            fast.up.weight.mul_(0.5)
        dense.load_state_dict(fast.state_dict())
        with card.capture():
            z = call(x)
        assert torch.equal(z, dense(x)) == (mode is torch.no_grad)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # within the compiler
@pytest.mark.parametrize(("kind", "batch"), [(models.gpt_neox, 1), (models.llama, 2)])
def test_generate_with_a_static_cache_takes_the_kernels(
    card: Card, kind: Callable[[], nn.Module], batch: int
) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    dense = kind().eval()
    fast = steppe.accelerate_(
        copy.deepcopy(dense), max_density=1.0, max_candidates=1.0, weights_are_final=True
    )
    # As `generate` compiles on a card by itself.
    config = transformers.CompileConfig(mode="reduce-overhead")
    config._compile_all_devices = True

    class CapturesFrom(transformers.LogitsProcessor):
        """From the second decoding step on, as the compiler's graphs do."""

        calls = 0

        def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
            self.calls += 1
            card.captures = self.calls > 2
            return scores

    ids = torch.tensor([[2, 7, 9, 4], [5, 8, 3, 6]])[:batch]
    options: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    expected = dense.generate(ids, **options)
    torch.compiler.reset()
    options |= {"compile_config": config, "cache_implementation": "static"}
    got = fast.generate(ids, logits_processor=[CapturesFrom()], **options)
    torch.compiler.reset()
    assert torch.equal(got, expected)
    assert {row.in_graphs for row in steppe.explain(fast).blocks} == {SCREENED}
    assert len(card.calls) == 3 * len(steppe.find_blocks(dense)) > 3


@torch.no_grad()
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # within the compiler
@pytest.mark.parametrize(("rows", "gated"), [(1, False), (16, False), (16, True)])
def test_the_compilers_mode_tells_that_it_makes_graphs(card: Card, rows: int, gated: bool) -> None:
    dense = block_of(gated=gated)
    fast = accelerated(dense, max_density=1.0)
    x = token(rows=rows)
    torch.compiler.reset()
    call = torch.compile(fast, mode="reduce-overhead", fullgraph=True)
    assert torch.equal(call(x), dense(x))
    with card.capture():
        z = call(x)
    torch.compiler.reset()
    assert len(card.calls) == 1
    assert card.calls[0][0][0].data_ptr() == x.data_ptr()  # also where a gate's factor is one
    assert is_close(z, exact(dense, x))


@torch.no_grad()
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # within the compiler
def test_compiled_code_without_graphs_is_dense_and_has_no_op_of_steppe(card: Card) -> None:
    dense = block_of()
    fast = accelerated(dense)
    ops = Ops()
    with compiled(fast, ops) as call:
        assert torch.equal(call(token()), dense(token()))
    assert ops.names
    assert not [name for name in ops.names if "steppe" in name]


@torch.no_grad()
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # within the compiler
@pytest.mark.parametrize("most", [None, 1.0])
def test_code_compiled_for_any_number_of_tokens(
    card: Card, monkeypatch: pytest.MonkeyPatch, most: float | None
) -> None:
    monkeypatch.setattr(decoding, "makes_cuda_graphs", lambda: True)
    dense = block_of()
    fast = accelerated(dense, max_density=most)
    fast(token())
    torch.compiler.reset()
    call = torch.compile(fast, backend="aot_eager", fullgraph=True, dynamic=True)
    for rows in (5, 16, 17):
        x = token(rows=rows)
        assert torch.equal(call(x), dense(x))
        with card.capture():
            z = call(x)
        assert len(card.calls) == (most is not None and rows <= 16)
        assert is_close(z, exact(dense, x))
    torch.compiler.reset()


@torch.no_grad()
def test_the_op_is_dense_once_the_model_is_restored(card: Card) -> None:
    dense = block_of()
    fast = accelerated(dense)
    computation = acceleration_of(fast).routes[0].computation
    assert computation.prepare() == ""
    x, number = token(), computation._number
    up, down = fast.up, fast.down
    arguments = up.weight, up.bias, None, None, down.weight.T, down.bias, 1.0, 0.0, number

    def run() -> Tensor:
        return torch.ops.steppe.decode_in_graph(x, *arguments)

    assert torch.equal(run(), dense(x))
    with card.capture():
        assert is_close(run(), exact(dense, x))
    assert len(card.calls) == 1
    del computation
    steppe.restore_(fast)
    gc.collect()
    with card.capture():
        assert torch.equal(run(), dense(x))
    assert not card.calls
