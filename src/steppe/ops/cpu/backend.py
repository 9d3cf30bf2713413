"""The backend of the CPU: the native kernels for MLP blocks."""

from __future__ import annotations

import torch
from torch import Tensor

from steppe.ops.cpu import copies, dispatch
from steppe.ops.cpu.block import CpuBlock
from steppe.ops.cpu.calibration import use_remembered
from steppe.ops.cpu.calls import DECODE_ROWS, DTYPES
from steppe.ops.cpu.library import kernels
from steppe.ops.cpu.native_ops import plan_for
from steppe.ops.plan import Limits, Plan, Shape

_TOO_LITTLE = "these are too few tokens for so small a block"


class CpuBackend:
    """The native kernels; see `steppe.ops.plan.Backend`."""

    name = "cpu"
    dtypes = tuple(DTYPES)
    decode_rows = DECODE_ROWS
    only_decodes = False

    def reason(self) -> str:
        """Why there are no kernels; empty if there are."""
        return kernels().reason

    def block(self, shape: Shape, limits: Limits) -> CpuBlock:
        """The kernels of a block."""
        return CpuBlock(shape, limits)

    def too_little(self, rows: int, shape: Shape, asked: Limits) -> str:
        """Why a call has not the work for which the kernels pay; empty if it has, or is forced."""
        if asked.max_density is not None or dispatch.pays(rows, shape.width, shape.hidden):
            return ""
        return _TOO_LITTLE

    def prepare(self, dtype: torch.dtype) -> None:
        """Read the thresholds that `steppe calibrate` has measured on this machine."""
        use_remembered(dtype)

    def declare_final(self, weight: Tensor) -> None:
        """Cache copies of a weight wherever its memory is, until they are forgotten."""
        copies.declare_final(weight)

    def forget(self, weight: Tensor) -> None:
        """Free the copies of a weight."""
        copies.forget(weight)

    def limits(
        self, rows: int, shape: Shape, dtype: torch.dtype, trains: bool, asked: Limits
    ) -> Plan:
        """The limits that hold for such calls."""
        return plan_for(rows, shape.width, dtype, trains, asked)

    def source(self, dtype: torch.dtype) -> str:
        """Whether the thresholds are built in or measured, and the file."""
        return dispatch.source(dtype, torch.get_num_threads())


CPU = CpuBackend()
