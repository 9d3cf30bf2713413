"""Reads a number out of a tensor without an op.

The share k by which finetuning blends an activation is a 0-dim tensor, since it changes from step
to step and must not recompile a graph. ``tensor.item()`` is an op: it would show in every trace and
profile as the wait for a device that it is on a GPU. On the CPU the number is simply in memory.
"""

from __future__ import annotations

import ctypes
import struct
import sys

import torch
from torch import Tensor

_FORMATS = {torch.float32: "=f", torch.float64: "=d", torch.float16: "=e"}


def read_scalar(tensor: Tensor) -> float:
    """The number in a 0-dim tensor.

    Args:
        tensor: on the CPU, floating point; any other is read by ``item()``.

    Example:
        >>> read_scalar(torch.tensor(0.75, dtype=torch.bfloat16))
        0.75
    """
    dtype = tensor.dtype
    is_half = dtype == torch.bfloat16
    if type(tensor) is not Tensor or not tensor.is_cpu or not (is_half or dtype in _FORMATS):
        return float(tensor.item())
    stored = ctypes.string_at(tensor.data_ptr(), dtype.itemsize)
    if is_half:  # the upper half of a float32
        stored = struct.pack("=I", int.from_bytes(stored, sys.byteorder) << 16)
    (value,) = struct.unpack(_FORMATS.get(dtype, "=f"), stored)
    return float(value)
