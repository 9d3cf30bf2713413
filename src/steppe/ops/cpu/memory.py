"""Memory for the kernels: scratch buffers of a thread, and cached copies, on huge pages."""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence

import torch
from torch import Tensor

from steppe.ops.cpu.library import library
from steppe.ops.reference import ceil_div

_LARGE_PAGE = 2**21  # bytes


class _Scratch(threading.local):
    """Buffers of a thread, by name, each as large as it ever had to be."""

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}
        self._taken: dict[str, Tensor] = {}

    def take(self, name: str, shape: Sequence[int], like: Tensor) -> Tensor:
        """A contiguous tensor of a shape, uninitialised, with the dtype of another."""
        last = self._taken.get(name)
        if last is not None and last.shape == shape and last.dtype == like.dtype:
            return last
        size = math.prod(shape) * like.element_size()
        if name not in self._buffers or len(self._buffers[name]) < size:
            self._buffers[name] = lasting((size,), torch.uint8)
        with torch.inference_mode(False):  # the next call may be in another mode
            self._taken[name] = self._buffers[name][:size].view(like.dtype).view(shape)
        return self._taken[name]


_scratch = _Scratch()


def scratch(name: str, shape: Sequence[int], like: Tensor) -> Tensor:
    """A buffer of this thread, which the next call with the name overwrites.

    New memory has to be found by the system page by page: for the pre-activations of a block of
    width 768 and 1024 tokens that is 2 % of a forward pass.

    Args:
        name: of the buffer.
        shape: of the tensor.
        like: a tensor of the wanted dtype.

    Returns:
        A contiguous tensor, uninitialised.
    """
    return _scratch.take(name, shape, like)


def lasting(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """New memory for a cached copy, on huge pages where the system gives them.

    With small pages, TLB misses are a fifth of the time to read a copy that no cache holds.
    It is an ordinary tensor whatever mode the call is in, as calls in other modes write to it.

    Args:
        shape: of the tensor.
        dtype: of the tensor.
    """
    size = math.prod(shape) * dtype.itemsize
    with torch.inference_mode(False):
        if size < _LARGE_PAGE // 2:
            return torch.empty(shape, dtype=dtype, device="cpu")
        whole = ceil_div(size, _LARGE_PAGE) * _LARGE_PAGE
        memory = torch.empty(whole + _LARGE_PAGE, dtype=torch.uint8, device="cpu")
        start = -memory.data_ptr() % _LARGE_PAGE
        library().steppe_prefer_huge_pages(memory.data_ptr() + start, whole, False)
        return memory[start : start + size].view(dtype).view(shape)


def prefer_large_pages(matrix: Tensor) -> None:
    """Put a matrix in use on huge pages, at its address, where the system gives them.

    With fewer TLB misses, rows of weights that no cache holds are gathered faster by a twentieth.

    Args:
        matrix: without gaps.
    """
    library().steppe_prefer_huge_pages(matrix.data_ptr(), matrix.nbytes, True)
