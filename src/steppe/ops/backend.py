"""The one door between a model and the kernels: the backend of a tensor's device.

A new device is a package beside `steppe.ops.cpu` and a line here. What packs activations for
training is asked for here too: it is no backend, as it has no kernels for inference.
"""

from __future__ import annotations

import torch
from torch import Tensor

from steppe.ops import bitmask
from steppe.ops.cpu.backend import CPU
from steppe.ops.graphs.backend import CUDA
from steppe.ops.graphs.device import has_triton
from steppe.ops.plan import Backend, Packer

_BACKENDS: dict[str, Backend] = {CPU.name: CPU, CUDA.name: CUDA}
_CUDA_PACKS = (torch.float32, torch.bfloat16, torch.float16)


def backend_of(tensor: Tensor) -> Backend | None:
    """The backend of a tensor's device, or None if there are no kernels for it."""
    return _BACKENDS.get(tensor.device.type)


def why_not_packed(device: str, dtype: torch.dtype) -> str:
    """Why `steppe.ops.packing` is not for the blocks of a device; empty if it is.

    Args:
        device: type of the device.
        dtype: that they compute in.
    """
    backend = _BACKENDS.get(device)
    if (
        backend is not None
        and not backend.only_decodes
        and dtype in backend.dtypes
        and not backend.reason()
    ):
        return f"the kernels of the {device} keep active entries only, without a pack"
    if device == "cpu":
        return ""
    if device != "cuda":
        return f"nothing packs on {device}"
    if not has_triton():
        return "packing on cuda needs Triton"
    return "" if dtype in _CUDA_PACKS else f"nothing packs {dtype} on cuda"


# torch.compile runs it while it traces, and takes the answer for a constant: it depends on what is
# installed.
why_not_packed._dynamo_marked_constant = True  # type: ignore[attr-defined]


def packer_of(tensor: Tensor) -> Packer:
    """What packs activations on a tensor's device."""
    if tensor.is_cuda:
        from steppe.ops.cuda import pack  # Triton takes long to load

        return pack
    return bitmask
