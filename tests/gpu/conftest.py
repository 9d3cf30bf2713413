"""Each test here runs on the CPU, and, marked ``gpu``, on a CUDA device: ``pytest -m gpu``."""

from __future__ import annotations

import pytest
import torch

_NO_DEVICE = f"no CUDA device (torch {torch.__version__})"


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip(_NO_DEVICE)
    return request.param


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    skipped = terminalreporter.stats.get("skipped", [])
    number = sum(_NO_DEVICE in str(report.longrepr) for report in skipped)
    if number:
        terminalreporter.write_line(f"skipped {number} tests marked gpu: {_NO_DEVICE}")
