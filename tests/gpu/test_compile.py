"""Compiled models on a device; what keeps them from CUDA graphs is printed."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

import steppe
from gpu_models import ARMS, fused_adamw, gpt, loss_on, token_ids
from gpu_steps.gpt import PATTERNS

STEPS = 3
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # within the compiler


@contextmanager
def reasons_against_cudagraphs() -> Iterator[list[str]]:
    """What the compiler says of CUDA graphs; versions of torch say it in different logs."""
    lines: list[str] = []

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if "skipping cudagraphs" in record.getMessage():
                lines.append(" ".join(record.getMessage().split())[:200])

    handler = Handler()
    torch._logging.set_logs(perf_hints=True, cudagraphs=True)
    logs = [
        logging.getLogger(f"torch._inductor.{module}.__{log}")
        for module in ("cudagraph_utils", "cudagraph_trees", "compile_fx", "output_code")
        for log in ("perf_hints", "cudagraphs")
    ]
    for log in logs:
        log.addHandler(handler)
    try:
        yield lines
    finally:
        for log in logs:
            log.removeHandler(handler)
        torch._logging.set_logs()


def losses(device: str, arm: str, mode: str | None) -> list[float]:
    """Of a run; compiled if there is a mode, on the CPU without inductor, which takes too long."""
    model = gpt(device, arm)
    optimizer = fused_adamw(model)
    if arm != "vanilla":
        steppe.constrain_(model, optimizer, total_steps=STEPS)
    if mode is not None and device == "cuda":
        model.compile(mode=mode)
    elif mode is not None:
        model.compile(backend="aot_eager")
    found = []
    for step in range(STEPS):
        torch.compiler.cudagraph_mark_step_begin()
        loss = loss_on(model, arm, token_ids(device, seed=step))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.item())
    return found


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
@pytest.mark.parametrize("arm", list(ARMS))
def test_compiled_models_learn_the_same(device: str, arm: str, mode: str) -> None:
    if device == "cpu" and mode != "default":
        pytest.skip("a mode of inductor, for CUDA")
    torch.compiler.reset()
    with reasons_against_cudagraphs() as reasons:
        got = losses(device, arm, mode)
    torch.compiler.reset()
    for reason in dict.fromkeys(reasons):
        print(f"from the compiler, {arm}, {mode}: {reason}")
    expected = losses(device, arm, None)
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=0)


def test_what_the_compiler_says_of_cudagraphs_is_seen() -> None:
    from torch._inductor import cudagraph_utils  # slow

    with reasons_against_cudagraphs() as reasons:
        cudagraph_utils.log_cudagraph_skip_and_bump_counter("skipping cudagraphs due to a test")
    assert reasons == ["skipping cudagraphs due to a test"]


def test_a_watched_model_compiles_in_one_graph(device: str) -> None:
    torch.compiler.reset()
    model, ids = gpt(device, "steppe").eval(), token_ids(device)
    with steppe.watch(model, patterns=PATTERNS) as monitor, torch.no_grad():
        model(ids)
        expected = monitor.counts()
        monitor.reset()
        backend = "inductor" if device == "cuda" else "aot_eager"
        torch.compile(model, fullgraph=True, backend=backend)(ids)
        counts = monitor.counts()
    torch.compiler.reset()
    assert torch.equal(counts[:, 2:], expected[:, 2:])
    assert (counts[:, 0] - expected[:, 0]).abs().max() <= 2  # entries at rounding distance
    assert expected[:, 0].min() > 0
