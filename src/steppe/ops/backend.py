"""The one door between a model and the kernels: the backend of a tensor's device.

A new device is a package beside `steppe.ops.cpu` and a line here.
"""

from __future__ import annotations

from torch import Tensor

from steppe.ops.cpu.backend import CPU
from steppe.ops.plan import Backend

_BACKENDS: dict[str, Backend] = {CPU.name: CPU}


def backend_of(tensor: Tensor) -> Backend | None:
    """The backend of a tensor's device, or None if there are no kernels for it."""
    return _BACKENDS.get(tensor.device.type)
