"""Reads a number out of a tensor without an op.

The share k by which finetuning blends an activation is a 0-dim tensor, since it changes from step
to step and must not recompile a graph. ``tensor.item()`` is an op: it would show in every trace and
profile as the wait for a device that it is on a GPU. On the CPU the number is simply in memory.
"""

from __future__ import annotations

import ctypes
import struct

import torch
from torch import Tensor

_float32_at = ctypes.c_float.from_address
_float64_at = ctypes.c_double.from_address
_bits16_at = ctypes.c_uint16.from_address


def read_scalar(tensor: Tensor) -> float:
    """The number in a 0-dim tensor.

    Args:
        tensor: on the CPU, floating point; any other is read by ``item()``.

    Example:
        >>> read_scalar(torch.tensor(0.75, dtype=torch.bfloat16))
        0.75
    """
    dtype = tensor.dtype
    if type(tensor) is Tensor and tensor.is_cpu:  # a decoding step comes by here
        if dtype is torch.float32:
            return _float32_at(tensor.data_ptr()).value
        if dtype is torch.float64:
            return _float64_at(tensor.data_ptr()).value
        if dtype is torch.bfloat16:  # the upper half of a float32
            bits = _bits16_at(tensor.data_ptr()).value << 16
            return float(struct.unpack("=f", struct.pack("=I", bits))[0])
        if dtype is torch.float16:
            return float(struct.unpack("=e", ctypes.string_at(tensor.data_ptr(), 2))[0])
    return float(tensor.item())
