"""The backend of CUDA devices; see `steppe.ops.graphs`."""

from __future__ import annotations

import torch
from torch import Tensor

from steppe.ops.decoding import DTYPES, MOST_TOKENS
from steppe.ops.graphs import limits
from steppe.ops.graphs.block import GraphBlock
from steppe.ops.graphs.device import has_triton
from steppe.ops.plan import Limits, Plan, Shape


class CudaBackend:
    """Decoding in captured graphs; see `steppe.ops.plan.Backend`."""

    name = "cuda"
    dtypes = DTYPES
    decode_rows = MOST_TOKENS
    only_decodes = True

    def reason(self) -> str:
        """Why there are no kernels; empty if there are."""
        return "" if has_triton() else "decoding on a GPU needs Triton, which is not installed"

    def block(self, shape: Shape, limits: Limits) -> GraphBlock:
        """The kernels of a block."""
        return GraphBlock(shape, limits)

    def too_little(self, rows: int, shape: Shape, asked: Limits) -> str:
        """Why a call has not the work for which the kernels are; empty if it has."""
        if not 0 < rows <= MOST_TOKENS:
            return f"on a GPU the kernels take calls of 1 to {MOST_TOKENS} tokens"
        return limits.too_little(rows, shape, asked)

    def prepare(self, dtype: torch.dtype) -> None:
        """Nothing: the limits come with steppe."""

    def declare_final(self, weight: Tensor) -> None:
        """Nothing: a call that may be captured is asked whether its weights are."""

    def forget(self, weight: Tensor) -> None:
        """Nothing: copies belong to a block."""

    def limits(
        self, rows: int, shape: Shape, dtype: torch.dtype, trains: bool, asked: Limits
    ) -> Plan:
        """The limits that hold for such calls, on a card like the one that was measured."""
        return limits.limits_for(rows, shape, dtype, limits.CARD, asked)

    def source(self, dtype: torch.dtype) -> str:
        """Where the limits come from."""
        return "those of an H200, for one token without a gate in captured CUDA graphs"


CUDA = CudaBackend()
