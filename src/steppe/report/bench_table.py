"""The table of what `steppe bench` timed."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import Any

from steppe.tables import FittingTable


def bench_table(rows: Sequence[dict[str, Any]]) -> FittingTable:
    """Times of an MLP block dense and on the sparse kernels, one row a case and density.

    Args:
        rows: of `steppe.bench.time_blocks`.

    Returns:
        A table of 80 columns or less. ``ratio`` is dense time / sparse time, ``quartiles`` those of
        the rounds, ``unscreened`` the same ratio without screening.
    """
    widths = dict.fromkeys((row["d"], row["f"]) for row in rows)
    threads = " or ".join(dict.fromkeys(str(row["threads"]) for row in rows))
    title = ", ".join(f"d_model {d}, d_hidden {f}" for d, f in widths) + f"; threads: {threads}"
    table = FittingTable(title)
    table.add_texts("case")
    table.add_numbers(
        *("density\n%", "candi-\ndates %", "dense\nms", "sparse\nms"),
        *("ratio", "quartiles", "un-\nscreened", "bound"),
    )
    for name, group in groupby(rows, curve_name):
        curve, parts = list(group), name.split(", ")
        for index, row in enumerate(curve):
            low, high = row["quartiles"]
            table.add_row(
                "\n".join(parts[index:] if row is curve[-1] else parts[index : index + 1]),
                f"{100 * row['density']:.1f}",
                f"{100 * row['candidates']:.1f}",
                f"{row['dense_ms']:.3g}",
                f"{row['sparse_ms']:.3g}",
                f"{row['ratio']:.2f}",
                f"{low:.2f}–{high:.2f}",
                f"{row['unscreened_ratio']:.2f}",
                f"{row['bound']:.2f}",
            )
        table.add_section()
    return table


def curve_name(row: dict[str, Any]) -> str:
    """A description of rows that differ in the density alone.

    Args:
        row: of `steppe.bench.time_block`.

    Returns:
        Such as ``prefill, 1024 tokens, bfloat16``; float32 goes without saying.

    Example:
        >>> curve_name({"case": "decode", "tokens": 1, "dtype": "float32"})
        'decode, 1 token'
    """
    tokens = f"{row['tokens']} token{'s' if row['tokens'] > 1 else ''}"
    dtype = "" if row["dtype"] == "float32" else f", {row['dtype']}"
    return f"{row['case']}, {tokens}{dtype}"
