"""Parameters sharded by FSDP2, known by their methods: to import DTensor takes most of a second."""

from __future__ import annotations

from torch import Tensor


def is_sharded(tensor: Tensor) -> bool:
    """Whether a tensor is a DTensor."""
    return hasattr(tensor, "to_local") and hasattr(tensor, "placements")


def local_rows(tensor: Tensor) -> Tensor:
    """This process's rows of a parameter, sharing its memory; all of them if it is not sharded.

    Args:
        tensor: a parameter, plain or sharded over rows.

    Raises:
        ValueError: the parameter is sharded over another dimension.
    """
    if not is_sharded(tensor):
        return tensor
    placements = tensor.placements  # type: ignore[attr-defined]
    if not all(p.is_replicate() or p.is_shard(0) for p in placements):
        raise ValueError(
            f"expected a parameter sharded over its rows, as FSDP2 does, or replicated;"
            f" got {placements}"
        )
    local: Tensor = tensor.to_local()  # type: ignore[attr-defined]
    return local


def full(tensor: Tensor) -> Tensor:
    """The whole of a parameter; gathers it if it is sharded, so every process must call this."""
    if not is_sharded(tensor):
        return tensor
    whole: Tensor = tensor.full_tensor()  # type: ignore[attr-defined]
    return whole
