"""The table of the MLP blocks of a model."""

from __future__ import annotations

from itertools import groupby

from rich import box
from rich.table import Table

from steppe.blocks import Coverage, MLPBlock


def blocks_table(found: Coverage) -> Table:
    """The blocks of a model, one line for those that are alike and follow each other.

    Args:
        found: of `steppe.blocks.coverage`.
    """
    table = Table(box=box.SIMPLE_HEAD, collapse_padding=True, pad_edge=False)
    table.add_column("block", overflow="fold")
    table.add_column("blocks", justify="right")
    table.add_column("D", justify="right")
    table.add_column("F", justify="right")
    for heading in ("gated", "activation", "norm", "pattern"):
        table.add_column(heading)
    for alike, group in groupby(found.blocks, _kind):
        blocks = list(group)
        first, last = blocks[0].name, blocks[-1].name
        name = first if first == last else f"{first}\n… {last}"
        table.add_row(name, str(len(blocks)), *alike)
    return table


def _kind(block: MLPBlock) -> tuple[str, ...]:
    return (
        str(block.d_model),
        str(block.d_hidden),
        "yes" if block.gate is not None else "no",
        getattr(block.act, "__name__", type(block.act).__name__),
        "none" if block.norm is None else "shared" if block.norm_is_shared else "its own",
        block.family,
    )
