"""The surroundings that times depend on: versions, kernels and the processor."""

from __future__ import annotations

import os
import platform
from dataclasses import asdict
from pathlib import Path
from typing import Any

from steppe.ops.cpu.library import kernels
from steppe.runs import versions


def surroundings() -> dict[str, Any]:
    """The versions, kernels and processor that times depend on.

    Returns:
        JSON values: ``versions``, ``kernels``, ``cpu``, the model's name, and ``cores``.
    """
    return {
        "versions": versions(),
        "kernels": asdict(kernels()),
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
    }


def _cpu_name() -> str:
    """Model of the processor, as far as the system tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or platform.machine()
