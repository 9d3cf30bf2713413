"""Step: what the card is, and what it can do."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from importlib import metadata
from typing import Any

import torch

from gpu_steps.stand_ins import left_out
from gpu_steps.step import Context
from gpu_steps.timing import graph_of, time_one

_SMI = "name,driver_version,memory.total,clocks.max.sm,clocks.max.mem,power.limit,temperature.gpu"


def run(context: Context) -> None:
    """Measure it."""
    context.keep(
        versions=versions(), cores=os.cpu_count(), cpu=cpu_name(), missing_packages=left_out()
    )
    context.attempt("nvidia_smi", nvidia_smi)
    if context.device == "cuda":
        context.attempt("properties", properties)
    context.attempt("copy_gb_per_s", lambda: copy_speed(context))
    shapes = [(64, 64, 64)] if context.is_dry else [(8192, 8192, 8192), (4096, 2048, 8192)]
    for shape in shapes:
        name = f"gemm_tflop_per_s_{'x'.join(map(str, shape))}"
        context.attempt(name, lambda shape=shape: gemm_speed(context, *shape))
    if context.device == "cuda":
        context.attempt("l2_read_gb_per_s", l2_read_speed)
        context.attempt("launch_in_graph_us", launch_times)


def versions() -> dict[str, Any]:
    """Of Python, torch, CUDA and Triton."""
    found = {"python": platform.python_version(), "torch": torch.__version__}
    found["cuda"] = torch.version.cuda or "none"
    for name in ("triton", "numpy", "transformers"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "none"
    return found


def cpu_name() -> str:
    """The processor's model."""
    with open("/proc/cpuinfo", encoding="utf-8") as file:  # noqa: PTH123
        names = [line.partition(":")[2].strip() for line in file if line.startswith("model name")]
    return names[0] if names else platform.machine()


def nvidia_smi() -> str:
    """What nvidia-smi says, one line a card."""
    if shutil.which("nvidia-smi") is None:
        return "no nvidia-smi"
    command = ["nvidia-smi", f"--query-gpu={_SMI}", "--format=csv"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def properties() -> dict[str, Any]:
    """What torch says."""
    found = torch.cuda.get_device_properties(0)
    names = ("name", "major", "minor", "total_memory", "multi_processor_count", "L2_cache_size")
    return {name: getattr(found, name, None) for name in names}


def copy_speed(context: Context) -> float:
    """Bytes read and written by a copy of 1 GiB, GB/s."""
    size = 2**16 if context.is_dry else 2**30
    source = torch.ones(size, dtype=torch.int8, device=context.device)
    target = torch.empty_like(source)
    return 2 * size / time_one(lambda: target.copy_(source), context.device, 1.0) / 1e3


def gemm_speed(context: Context, m: int, n: int, k: int) -> float:
    """A ``[m, k]`` bfloat16 matrix times a ``[k, n]`` one, TFLOP/s."""
    a = torch.randn(m, k, device=context.device, dtype=torch.bfloat16)
    b = torch.randn(n, k, device=context.device, dtype=torch.bfloat16)
    out = torch.empty(m, n, device=context.device, dtype=torch.bfloat16)
    return 2 * m * n * k / time_one(lambda: torch.mm(a, b.T, out=out), context.device, 1.0) / 1e6


def l2_read_speed() -> dict[str, Any]:
    """Reads of 60 % of the L2 cache, again and again, GB/s; of 32 times as much, from memory."""
    from gpu_steps import card_kernels  # needs Triton, which not every machine has

    found = torch.cuda.get_device_properties(0)
    cache = found.L2_cache_size
    speeds = {}
    for name, size in (("cache", int(0.6 * cache)), ("memory", 32 * cache)):
        speeds[name] = card_kernels.read_speed(size, found.multi_processor_count)
        speeds[f"{name}_bytes"] = size
    return speeds


def launch_times() -> dict[str, float]:
    """Microseconds a kernel in a graph of 1000 small ones that wait for each other."""
    x = torch.zeros(32, device="cuda")
    times = {"torch add_": _in_graph(lambda: x.add_(1))}
    try:
        from gpu_steps import card_kernels  # needs Triton
    except ImportError as error:
        return {**times, f"triton: {error}": 0.0}
    return {**times, "triton, empty": _in_graph(lambda: card_kernels.empty[(1,)](x))}


def _in_graph(launch: Any) -> float:
    def launches() -> None:
        for _ in range(1000):
            launch()

    graph = graph_of(launches)
    return time_one(graph.replay, "cuda", 1.0) / 1000
