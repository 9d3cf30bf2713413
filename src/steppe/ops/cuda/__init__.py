"""Kernels for NVIDIA GPUs, in Triton: to pack activations for training, and to decode a few tokens.

`steppe.ops.backend` imports those that pack, once they are needed, and `steppe.ops.graphs` those
that decode.
"""

from __future__ import annotations

from steppe.errors import MissingExtraError

try:
    import triton  # noqa: F401  (asked for here, so that each file below can do without a check)
except ModuleNotFoundError as error:
    if error.name != "triton":
        raise
    raise MissingExtraError(
        "steppe.ops.cuda: expected Triton, which comes with PyTorch's CUDA builds for Linux, and "
        "this Python has none. Install such a build of torch (https://pytorch.org), or use "
        "steppe.ops.bitmask, the same in plain torch"
    ) from None
