"""Decoding in CUDA graphs on a device: what `accelerate_` runs there, and what a graph replays.

On the CPU the same calls are not captured, and run dense or on the CPU's kernels.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import steppe
from gpu_models import no_waits
from steppe.ops.outcome import SCREENED, SPARSE

PATTERNS = (
    steppe.BlockPattern(family="a gated block", gate="gate", up="up", act="act", down="down"),
    steppe.BlockPattern(family="a block", up="up", act="act", down="down"),
)
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
REPEATS = 50
# Of ‖z‖: one rounding of z, and of the sums.
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}


class Gated(nn.Module):
    """As `block_of`, with a gate."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gate = nn.Linear(width, 4 * width)
        self.up = nn.Linear(width, 4 * width, bias=False)
        self.act = nn.ReLU()
        self.down = nn.Linear(4 * width, width)
        nn.init.constant_(self.gate.bias, -1.645 * 3**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.act(self.gate(x)) * self.up(x))


def block_of(device: str, dtype: torch.dtype, width: int = 1024, gated: bool = False) -> nn.Module:
    """About a twentieth of its units is active for a standard normal input."""
    torch.manual_seed(0)
    if gated:
        return Gated(width).eval().to(device, dtype)
    block = nn.Sequential()
    block.add_module("up", nn.Linear(width, 4 * width))
    block.add_module("act", nn.ReLU())
    block.add_module("down", nn.Linear(4 * width, width))
    nn.init.constant_(block.up.bias, -1.645 * 3**-0.5)
    return block.eval().to(device, dtype)


def token(device: str, dtype: torch.dtype, seed: int = 1, rows: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, 1024, generator=generator).to(device, dtype)


def accelerated(model: nn.Module, **settings: Any) -> nn.Module:
    return steppe.accelerate_(
        copy.deepcopy(model), patterns=PATTERNS, weights_are_final=True, **settings
    )


def exact(block: nn.Module, x: Tensor) -> Tensor:
    return copy.deepcopy(block).double()(x.double())


def captured(
    call: Callable[[Tensor], Tensor], x: Tensor, device: str
) -> tuple[Callable[[], object], Tensor]:
    """What replays a call, and the output that it writes; on the CPU the call itself."""
    if device != "cuda":
        z = call(x)
        return lambda: z.copy_(call(x)), z
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call(x)
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()  # so that the numbers are there
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        z = call(x)
    return graph.replay, z


def is_close(z: Tensor, expected: Tensor) -> bool:
    return bool(torch.dist(z.double(), expected) <= TOLERANCES[z.dtype] * expected.norm())


@torch.no_grad()
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("screens", [False, True])
@pytest.mark.parametrize("rows", [1, 2, 16])
@pytest.mark.parametrize("gated", [False, True])
def test_a_graph_replays_the_kernels_with_other_inputs(
    device: str, dtype: torch.dtype, screens: bool, rows: int, gated: bool
) -> None:
    dense = block_of(device, dtype, gated=gated)
    fast = accelerated(dense, max_density=1.0, max_candidates=1.0 * screens)
    x = token(device, dtype, rows=rows)
    replay, z = captured(fast, x, device)
    if device == "cuda":
        (row,) = steppe.explain(fast).blocks
        assert row.in_graphs == row.how == (SCREENED if screens else SPARSE)
        assert 0.01 < row.density < {1: 0.1, 2: 0.2, 16: 0.8}[rows]
        assert not screens or row.density <= row.candidates <= 1.0
    for seed in range(5):
        x.copy_(token(device, dtype, seed, rows))
        replay()
        assert is_close(z, exact(dense, x))
    bits = z.clone()
    for _ in range(REPEATS):
        replay()
        assert torch.equal(z, bits)
    x.copy_(token(device, dtype, 9, rows))
    replay()
    assert not torch.equal(z, bits)


@torch.no_grad()
def test_the_limits_that_are_shipped_choose_the_kernels(device: str) -> None:
    if device == "cuda" and "H200" not in torch.cuda.get_device_name():
        pytest.skip("measured on an H200")
    dense = block_of(device, torch.bfloat16)
    fast = accelerated(dense)
    x = token(device, torch.bfloat16)
    replay, z = captured(fast, x, device)
    if device == "cuda":
        assert steppe.explain(fast).blocks[0].in_graphs == SPARSE  # no screen at that width
    replay()
    assert is_close(z, exact(dense, x))


@torch.no_grad()
@pytest.mark.parametrize(
    ("rows", "gated", "what"),
    [(4, False, "for 4 tokens"), (1, True, "with a gate"), (4, True, "for 4 tokens with a gate")],
)
def test_several_tokens_and_gates_were_not_measured(
    device: str, rows: int, gated: bool, what: str
) -> None:
    dtype = torch.bfloat16 if device == "cuda" else torch.float64
    dense = block_of(device, dtype, gated=gated)
    fast = accelerated(dense)
    x = token(device, dtype, rows=rows)
    own, expected = captured(dense, x, device)
    replay, z = captured(fast, x, device)
    own()
    replay()
    assert torch.equal(z, expected)
    if device == "cuda":
        assert f"{what}: give max_density" in steppe.explain(fast).blocks[0].in_graphs


@torch.no_grad()
@pytest.mark.parametrize("promised", [False, True])
def test_where_too_many_are_active_or_nothing_is_promised_the_bits_are_the_modules(
    device: str, promised: bool
) -> None:
    dtype = torch.bfloat16 if device == "cuda" else torch.float64
    dense = block_of(device, dtype)
    nn.init.zeros_(dense.up.bias)  # half of them
    fast = steppe.accelerate_(
        copy.deepcopy(dense), patterns=PATTERNS, max_density=0.3, weights_are_final=promised
    )
    x = token(device, dtype)
    for _ in range(3):
        assert torch.equal(fast(x), dense(x))
    own, expected = captured(dense, x, device)
    replay, z = captured(fast, x, device)
    for seed in range(3):
        x.copy_(token(device, dtype, seed))
        own()
        replay()
        assert torch.equal(z, expected)
    if device == "cuda":
        told = steppe.explain(fast).blocks[0].in_graphs
        assert ("it pays up to 30.0%" if promised else "weights_are_final=True") in told


@torch.no_grad()
@pytest.mark.parametrize("gated", [False, True])
def test_eager_calls_do_not_wait_for_the_device(device: str, gated: bool) -> None:
    dtype = torch.bfloat16 if device == "cuda" else torch.float64
    dense = block_of(device, dtype, gated=gated)
    fast = accelerated(dense, max_density=0.5)
    x = token(device, dtype)
    fast(x)  # makes the copies, and what lasts
    with no_waits(device):
        for _ in range(130):
            z = fast(x)
    assert torch.equal(z, dense(x))


@torch.no_grad()
def test_a_graph_outlives_the_acceleration(device: str) -> None:
    dense = block_of(device, torch.float32)
    fast = accelerated(dense, max_density=0.5, max_candidates=0.5)
    x = token(device, torch.float32)
    replay, z = captured(fast, x, device)
    steppe.restore_(fast)
    waste = [torch.full((2**20,), float("nan"), device=device) for _ in range(64)]
    x.copy_(token(device, torch.float32, 7))
    replay()
    assert is_close(z, exact(dense, x))
    assert torch.equal(fast(x), dense(x))
    del waste


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # within the compiler
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
@pytest.mark.parametrize(("rows", "gated"), [(1, False), (16, False), (16, True)])
def test_compiled_code_takes_the_kernels_where_it_makes_graphs(
    device: str, mode: str, rows: int, gated: bool
) -> None:
    if device == "cpu":
        pytest.skip("CUDA graphs")
    dense = block_of(device, torch.bfloat16, gated=gated)
    fast = accelerated(dense, max_density=1.0, max_candidates=1.0)
    torch.compiler.reset()
    with torch.no_grad():
        call = torch.compile(fast, mode=mode, fullgraph=True)
        for seed in range(6):
            x = token(device, torch.bfloat16, seed, rows)
            torch.compiler.cudagraph_mark_step_begin()
            assert is_close(call(x), exact(dense, x))
            torch.cuda.synchronize()
    torch.compiler.reset()
    told = steppe.explain(fast).blocks[0].in_graphs
    assert told == (SCREENED if mode == "reduce-overhead" else "not captured yet")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # within the compiler
@pytest.mark.parametrize(("kind", "batch"), [("gpt_neox", 1), ("llama", 2)])
def test_generate_with_a_static_cache_takes_them(device: str, kind: str, batch: int) -> None:
    pytest.importorskip("transformers")
    import models  # which needs transformers

    torch.manual_seed(0)
    dense = models.LANGUAGE_MODELS[kind]().eval().to(device)
    fast = steppe.accelerate_(
        copy.deepcopy(dense), max_density=1.0, max_candidates=1.0, weights_are_final=True
    )
    ids = torch.tensor([[2, 7, 9, 4], [5, 8, 3, 6]], device=device)[:batch]
    options: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    torch.compiler.reset()
    expected = dense.generate(ids, **options)
    got = fast.generate(ids, cache_implementation="static", **options)
    torch.compiler.reset()
    assert torch.equal(got, expected)
    if device == "cuda":
        assert {row.in_graphs for row in steppe.explain(fast).blocks} == {SCREENED}
