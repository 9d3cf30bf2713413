"""What the launches of the decode kernels have in common."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from steppe.ops.cuda.decode_kernels import find_active

# Under TRITON_INTERPRET=1 the kernels take tensors of any device.
INTERPRETED = not isinstance(find_active, triton.JITFunction)


class Lists(NamedTuple):
    """The active units, in a list for each program of the first product.

    Attributes:
        counts: int32 ``[lists]``.
        units: int32 ``[lists, rows]``, ascending.
        values: float32 ``[lists, rows]``, their activations; of several tokens
            ``[lists, rows, 16]``.
    """

    counts: Tensor
    units: Tensor
    values: Tensor

    @classmethod
    def empty(cls, x: Tensor, programs: int, rows: int, *tokens: int) -> Lists:
        """Lists on x's device that a kernel is to fill.

        Args:
            x: any tensor.
            programs: number of lists.
            rows: places of a list.
            tokens: 16 for several, nothing for one.
        """
        return cls(
            x.new_empty(programs, dtype=torch.int32),
            x.new_empty(programs, rows, dtype=torch.int32),
            x.new_empty(programs, rows, *tokens, dtype=torch.float32),
        )


def pdl_of(pdl: bool) -> dict[str, Any]:
    """Constants and options of a kernel for programmatic dependent launch, or without it."""
    return {"PDL": True, "launch_pdl": True} if pdl else {"PDL": False}


def has_pdl(device: torch.device) -> bool:
    """Whether a kernel can start while the one before it ends: programmatic dependent launch."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)
