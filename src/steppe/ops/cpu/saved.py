"""The form of `saved` on the CPU: the active entries as column-tiled CSR, or all entries.

See `steppe.ops.mlp` for who may read it: the kernels of this package alone.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from steppe.ops.cpu.calls import Support
from steppe.ops.mlp import Five
from steppe.ops.reference import densify


class Saved(NamedTuple):
    """The tensors that a call of a block saves for its backward pass.

    A call that ran sparse keeps the nnz entries of its support, as column-tiled CSR (see
    `steppe.ops.reference`). A call that ran dense keeps all T · F entries, and `indices` and
    `offsets` are empty.

    Attributes:
        r: max(p, 0), ``[nnz]`` or ``[T · F]``.
        up: of a gated block, the factor of σ(r), the same shape; else empty.
        kept: the entries that dropout has kept, bool, the same shape; empty without dropout.
        indices: int16 ``[nnz]``.
        offsets: int64 ``[tiles · T + 1]``.
    """

    r: Tensor
    up: Tensor
    kept: Tensor
    indices: Tensor
    offsets: Tensor

    @property
    def is_sparse(self) -> bool:
        """Whether it is the support alone."""
        return self.offsets.numel() > 0

    def dense(self, part: Tensor, rows: int, columns: int) -> Tensor:
        """All T · F entries of something that stands beside `r`, ``[T · F]``; 0 off the support."""
        if not self.is_sparse:
            return part
        return densify(part, self.indices, self.offsets, rows, columns).flatten()


def saved_dense(r: Tensor, up: Tensor, kept: Tensor) -> Saved:
    """The form of a call that ran dense; arguments as the attributes of `Saved`."""
    index = torch.empty(0, dtype=torch.int16, device="cpu")
    offsets = torch.empty(0, dtype=torch.int64, device="cpu")
    return Saved(r, up, kept, index, offsets)


def saved_sparse(r: Tensor, up: Tensor, kept: Tensor, support: Support) -> Saved:
    """The form of a call that ran sparse; arguments as the attributes of `Saved`."""
    return Saved(r, up, kept, support.index, support.offsets)


def fake_saved(x: Tensor, hidden: int, gated: bool, dropout: float) -> Five:
    """Fake tensors of the form; their lengths depend on the data; see `steppe.ops.mlp.FakeSaved`.

    Args:
        x: ``[T, D]``.
        hidden: F.
        gated: whether the block is.
        dropout: of the hidden entries.
    """
    context = torch.library.get_ctx()
    entries = context.new_dynamic_size()
    return (
        x.new_empty(entries),
        x.new_empty(entries if gated else 0),
        x.new_empty(entries if dropout else 0, dtype=torch.bool),
        x.new_empty(context.new_dynamic_size(), dtype=torch.int16),
        x.new_empty(context.new_dynamic_size(), dtype=torch.int64),
    )
