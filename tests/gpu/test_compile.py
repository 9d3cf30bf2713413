"""Compiled models on a device; what keeps them from CUDA graphs is printed."""

from __future__ import annotations

import logging

import pytest
import torch

import steppe
from gpu_models import ARMS, fused_adamw, gpt, loss_on, token_ids
from gpu_steps.gpt import PATTERNS

STEPS = 3
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # within the compiler


class Kept(logging.Handler):
    """Keeps what is logged."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


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
    handler = Kept()
    hints = logging.getLogger("torch._inductor.cudagraph_utils.__perf_hints")
    torch._logging.set_logs(perf_hints=True)
    hints.addHandler(handler)
    try:
        got = losses(device, arm, mode)
    finally:
        hints.removeHandler(handler)
        torch._logging.set_logs()
        torch.compiler.reset()
    for line in handler.lines:
        print(f"{arm}, {mode}: {' '.join(line.split())[:200]}")
    expected = losses(device, arm, None)
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=0)


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
