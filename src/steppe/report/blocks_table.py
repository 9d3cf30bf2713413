"""The table of the MLP blocks of a model."""

from __future__ import annotations

from itertools import groupby

from steppe.blocks.block import MLPBlock
from steppe.blocks.coverage import Coverage
from steppe.tables import FittingTable


def blocks_table(found: Coverage) -> FittingTable:
    """The blocks of a model, one line for those that are alike and follow each other.

    Args:
        found: of `steppe.blocks.coverage.coverage`.
    """
    table = FittingTable()
    table.add_texts("block")
    table.add_numbers("blocks", "D", "F")
    table.add_texts("gated", "activation", "norm", "pattern")
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
