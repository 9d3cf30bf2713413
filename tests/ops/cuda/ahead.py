"""Compiles a kernel to the machine code of a GPU that is not there, and says what it needs.

Triton's compiler and NVIDIA's ptxas, cuobjdump and nvdisasm come with the triton wheel; no driver
is asked for. Wrong results, races, and how fast a kernel is are not to be seen in this way.
"""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

ARCHITECTURES = (80, 89, 90, 100)  # A100; L4 and RTX 40; H100 and H200; B200
SHARED_LIMIT = {80: 163, 89: 99, 90: 227, 100: 227}  # KB a program; CUDA C guide, table 27
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


class Compiled(NamedTuple):
    """A kernel as machine code.

    Attributes:
        registers: of a thread.
        stack: bytes of a thread, where registers spill to.
        shared: bytes of a program.
        opcodes: of its instructions in order, with their modifiers: ``LDG.E.128``.
    """

    registers: int
    stack: int
    shared: int
    opcodes: tuple[str, ...]

    def count(self, pattern: str) -> int:
        """Instructions whose opcode matches a regular expression from its start to its end."""
        return sum(re.fullmatch(pattern, opcode) is not None for opcode in self.opcodes)


class StandIn:
    """The driver of a GPU that is not there: the launcher asks it what to compile for."""

    def __init__(self, architecture: int) -> None:
        self.architecture = architecture

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.architecture, 32)

    def get_current_device(self) -> int:
        return self.architecture  # compiled kernels are kept by device

    def get_current_stream(self, device: int) -> int:
        return 0


def compile_ahead(
    kernel: Any, arguments: tuple[Any, ...], architecture: int, folder: Path, **options: Any
) -> Compiled:
    """Compiles a kernel as the launch with these arguments would.

    Args:
        kernel: what `triton.jit` made.
        arguments: of the kernel; tensors may be on the CPU.
        architecture: compute capability, 90 for 9.0.
        folder: for the machine code.
        options: constants of the kernel, and what else a launch takes.

    Returns:
        What it needs, and its instructions.
    """
    with mock.patch.object(driver, "_active", StandIn(architecture)):
        compiled = kernel.warmup(*arguments, grid=(1,), **options)
    path = folder / "kernel.cubin"
    path.write_bytes(compiled.asm["cubin"])
    usage = _run("cuobjdump", "--dump-resource-usage", path)
    needs = {name: int(number) for name, number in re.findall(r"([A-Z]+):(\d+)", usage)}
    code = _run("nvdisasm", path)
    return Compiled(needs["REG"], needs["STACK"], compiled.metadata.shared, _opcodes(code))


def _opcodes(code: str) -> tuple[str, ...]:
    """From lines such as ``/*0010*/  @!P0 LDG.E.128 R4, desc[UR4][R2.64] ;``."""
    line = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)[^;]*;")
    return tuple(line.findall(code))


def _run(tool: str, *arguments: object) -> str:
    command = [str(TOOLS / tool), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout
