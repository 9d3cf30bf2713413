"""The kernels with any number of threads, grad mode and number of callers, and after a fork."""

from __future__ import annotations

import contextlib
import itertools
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from steppe.ops import products
from steppe.ops.cpu import calls
from steppe.ops.cpu import native_ops as native_ops  # registers the kernels
from steppe.ops.cpu.library import kernels
from steppe.ops.reference import Weights

pytestmark = pytest.mark.skipif(kernels().name != "native", reason=kernels().reason)
TEAMS = (1, 3, 17)  # 17: more than the processors, the panels and the tiles of these blocks
DTYPES = [torch.float32, torch.bfloat16]
ROWS = (1, 3, 8, 9, 70)
J_SQUARED_RELU = (1.0, 0.5)
MODES: dict[str, Callable[[], Any]] = {
    "inference_mode": torch.inference_mode,
    "no_grad": torch.no_grad,
    "training": contextlib.nullcontext,
}


@pytest.fixture(params=TEAMS)
def team(request: pytest.FixtureRequest) -> Iterator[int]:
    """A number of threads, which torch has during the test."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def with_threads(number: int, call: Callable[[], list[Tensor]]) -> list[Tensor]:
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        return call()
    finally:
        torch.set_num_threads(before)


def same_bits(got: list[Tensor], expected: list[Tensor]) -> bool:
    return len(got) == len(expected) and all(map(torch.equal, got, expected))


def integers(*shape: int, most: int = 3) -> Tensor:
    """Whose products are exact in any order, as a dense product may take them."""
    return torch.randint(-most, most + 1, shape).float()


def block_of(rows: int, gated: bool, dtype: torch.dtype, width: int = 65) -> tuple[Tensor, Weights]:
    """x ``[T, D]`` and the weights of 300 units, of which about a third are active."""
    hidden = 300
    x, activated, bias = integers(rows, width), integers(hidden, width), integers(hidden) - 15
    weights = Weights(
        activated=activated,
        activated_bias=bias,
        up=torch.randn(hidden, width) / width**0.5 if gated else None,
        up_bias=torch.randn(hidden) if gated else None,
        down=torch.randn(hidden, width) / hidden**0.5,
        down_bias=torch.randn(width),
    )
    return x.to(dtype), Weights(*(None if w is None else w.to(dtype) for w in weights))


def forward(x: Tensor, weights: Weights, candidates: float, trains: bool) -> tuple[Tensor, ...]:
    arguments = (*J_SQUARED_RELU, None, 0.0, trains, 1.0, candidates)
    z, _, *saved = torch.ops.steppe.mlp(x, *weights, *arguments)
    return z, *saved


def leaves_of(x: Tensor, weights: Weights) -> tuple[Tensor, Weights, list[Tensor]]:
    """The same as leaves that need gradients, and those that there are."""
    first, *rest = (None if t is None else t.detach().requires_grad_() for t in (x, *weights))
    assert first is not None
    return first, Weights(*rest), [t for t in (first, *rest) if t is not None]


def train(x: Tensor, weights: Weights, candidates: float) -> list[Tensor]:
    """z, the list and all gradients."""
    x, weights, leaves = leaves_of(x, weights)
    z, *saved = forward(x, weights, candidates, True)
    grads = torch.autograd.grad(z, leaves, torch.ones_like(z).cumsum(1) / 64)
    return [z.detach(), *(t.detach() for t in saved), *grads]


@torch.no_grad()
def infer(x: Tensor, weights: Weights, candidates: float) -> list[Tensor]:
    """What a second call gives, which may use copies of the weights."""
    forward(x, weights, candidates, False)
    return list(forward(x, weights, candidates, False))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [0, *ROWS])
def test_every_op_gives_the_bits_of_one_thread(rows: int, dtype: torch.dtype, team: int) -> None:
    p = torch.randn(rows, 300).to(dtype)
    matrices = [torch.randn(300, width).to(dtype) for width in (1, 65, 1100)]
    matrices.append(matrices[1].T.contiguous().T)
    left = torch.randn(rows, 65).to(dtype)

    def ops() -> list[Tensor]:
        values, index, offsets = products.compact(p)
        entries = products.sddmm(index, offsets, left, matrices[1])
        results = [values, index, offsets, entries]
        results += [products.spmm(values, index, offsets, rows, matrix) for matrix in matrices]
        results.append(products.spmm_t(entries, index, offsets, left, 300))
        return results

    assert same_bits(ops(), with_threads(1, ops))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("candidates", [0.0, 1.0])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("rows", ROWS)
def test_a_block_gives_the_bits_of_one_thread(
    rows: int, gated: bool, candidates: float, dtype: torch.dtype, team: int
) -> None:
    block = block_of(rows, gated, dtype)
    for run in (train, infer):
        got = run(*block, candidates)
        assert got[1].count_nonzero() > 30 * rows
        assert same_bits(got, with_threads(1, lambda run=run: run(*block, candidates)))


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_training_token_of_blocks_of_many_and_of_one_panel(
    dtype: torch.dtype, team: int
) -> None:
    for width in (768, 64, 1):
        block = block_of(1, False, dtype, width)
        expected = with_threads(1, lambda block=block: train(*block, 0.0))
        assert same_bits(train(*block, 0.0), expected)


@pytest.mark.parametrize(("before", "after"), [(1, 17), (17, 1), (3, 2)])
@pytest.mark.parametrize("rows", [1, 70])
def test_the_number_of_threads_may_change_before_the_backward_pass(
    rows: int, before: int, after: int
) -> None:
    block = block_of(rows, True, torch.float32)
    expected = train(*block, 1.0)
    x, weights, leaves = leaves_of(*block)
    torch.set_num_threads(before)
    z, *saved = forward(x, weights, 1.0, True)
    torch.set_num_threads(after)
    grads = torch.autograd.grad(z, leaves, torch.ones_like(z).cumsum(1) / 64)
    assert same_bits([z, *saved, *grads], expected)


def in_new_thread(call: Callable[[], Any]) -> Any:
    """What a call gives or raises in a thread that has no buffers yet."""
    outcome: list[Any] = []

    def run() -> None:
        try:
            outcome.append(call())
        except BaseException as error:
            outcome.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if isinstance(outcome[0], BaseException):
        raise outcome[0]
    return outcome[0]


@pytest.mark.parametrize("candidates", [0.0, 1.0])
@pytest.mark.parametrize("order", list(itertools.permutations(MODES)), ids="-".join)
def test_buffers_of_one_grad_mode_serve_calls_in_the_others(
    order: tuple[str, ...], candidates: float
) -> None:
    # Wider and with more tokens than any test, so that buffers and samples are new.
    rows = 1000 + len(order[0]) + 7 * len(order[1]) + int(candidates)
    block = block_of(rows, True, torch.float32, 80)
    expected = train(*block, candidates)

    def calls_in_order() -> None:
        for mode in order:
            with MODES[mode]():
                if mode == "training":
                    assert same_bits(train(*block, candidates), expected)
                else:
                    for _ in range(2):
                        z = forward(*block, candidates, False)[0]
                    assert torch.equal(z, expected[0])

    in_new_thread(calls_in_order)


@pytest.mark.parametrize("candidates", [0.0, 1.0])
def test_weights_made_in_inference_mode_are_used_outside_of_it(candidates: float) -> None:
    with torch.inference_mode():
        block = block_of(70, True, torch.float32)
        expected = forward(*block, candidates, False)[0].clone()
    with torch.no_grad():
        for _ in range(3):
            assert torch.equal(forward(*block, candidates, False)[0], expected)


def test_memory_of_the_kernels_is_on_the_cpu_whatever_the_default_device_is() -> None:
    p = torch.randn(20, 300)
    block = block_of(70, True, torch.float32)
    expected = [calls.compact(p)[0], calls.pack(p).data.clone(), *infer(*block, 1.0)]

    def call() -> list[Tensor]:
        with torch.device("meta"):
            listed, packed = calls.compact(p), calls.pack(p, "a buffer")
            return [listed[0], packed.data, *infer(*block, 1.0)]

    assert same_bits(in_new_thread(call), expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_several_callers_get_the_bits_of_one(dtype: torch.dtype) -> None:
    torch.set_num_threads(3)
    blocks = [block_of(rows, gated, dtype) for rows in (1, 8, 70) for gated in (False, True)]
    shared = [(block_of(len(x), False, dtype)[0], weights) for x, weights in blocks]
    tasks = [
        (run, block, candidates)
        for run in (train, infer)
        for block in (*blocks, *shared)
        for candidates in (0.0, 1.0)
    ]
    expected = [run(*block, candidates) for run, block, candidates in tasks]
    start = threading.Barrier(8)
    wrong: list[int] = []

    def caller(number: int) -> None:
        start.wait()
        for i in range(3 * len(tasks)):
            task = (i + 5 * number) % len(tasks)
            run, block, candidates = tasks[task]
            try:
                right = same_bits(run(*block, candidates), expected[task])
            except Exception:
                right = False
            if not right:
                wrong.append(task)

    threads = [threading.Thread(target=caller, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


PROCESSES = """
import multiprocessing, signal, sys, torch
from ops.test_threads import block_of, infer, same_bits, train

def results():
    torch.manual_seed(0)
    block = block_of(70, True, torch.float32)
    few = block_of(5, False, torch.float32)
    return [*train(*block, 1.0), *infer(*block, 1.0), *infer(*few, 0.0), *infer(*few, 1.0)]

def child(expected):
    signal.alarm(60)  # ends a child that waits for threads which it does not have
    torch.set_num_threads(4)
    assert same_bits(results(), expected)

def grandchild(expected):
    child(expected)
    start(child, "fork", expected)

def start(target, method, expected):
    process = multiprocessing.get_context(method).Process(target=target, args=(expected,))
    process.start()
    process.join()
    assert process.exitcode == 0, (method, process.exitcode)

if __name__ == "__main__":
    torch.set_num_threads(4)
    expected = results()
    target = grandchild if sys.argv[1] == "fork" else child
    start(target, sys.argv[1], [t.clone() for t in expected])
    assert same_bits(results(), expected)
    print("same bits")
"""
RSS = """
import gc, torch
from pathlib import Path
from ops.test_threads import block_of, forward, train

def resident():
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 2**20

blocks = [block_of(rows, rows % 2 == 0, torch.float32) for rows in (1, 2, 3, 4)]
torch.set_num_threads(1)

def calls(count):
    for i in range(count):
        block, candidates = blocks[i // 2 % 4], float(i // 8 % 2)
        if i % 2:
            train(*block, candidates)
        else:
            with torch.no_grad():
                forward(*block, candidates, False)

calls(2000)
before = resident()
calls(10_000)
print(resident() - before)
"""


def run_script(tmp_path: Path, script: str, *arguments: str) -> str:
    """What a script prints in a process of its own."""
    path = tmp_path / "script.py"
    path.write_text(script)
    tests = str(Path(__file__).parents[1])
    result = subprocess.run(
        [sys.executable, str(path), *arguments],
        env={**os.environ, "PYTHONPATH": tests},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_processes_that_are_started_after_use_compute_the_same(method: str, tmp_path: Path) -> None:
    assert "same bits" in run_script(tmp_path, PROCESSES, method)


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="no /proc on this system")
def test_ten_thousand_calls_keep_no_memory(tmp_path: Path) -> None:
    assert float(run_script(tmp_path, RSS)) < 4.0  # MB; a kept x of each call alone would be 6
