"""The built-in thresholds: the densities up to which the kernels, and the screen, are faster.

They are below the crossovers that `benchmarks/crossover.py` measured on one core (its results are
in ``benchmarks/results/crossover*.json``), module against module, so that all the costs of a call
are in them. A threshold is 0 where nothing is gained, and also where a block that is always too
dense would lose more than a twentieth to counting in every training step. In inference a block that
was too dense is not counted for some calls (`steppe.ops.cpu.back_off`), so only the gain matters.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from itertools import pairwise
from typing import TypeAlias

import torch

from steppe.ops.cpu.calls import DECODE_ROWS

# From so many rows (tokens of a call) on, the kernels are faster up to such a density, or the
# screen up to such a share of candidates.
Thresholds: TypeAlias = dict[int, float]
Tables: TypeAlias = dict[bool, Thresholds]  # for inference, under False, and for training

_WIDE = 512  # from this width on two threads gain from as many rows on as one
NEVER: Tables = {False: {}, True: {}}
# By dtype and instruction set, then by the least width (d_model); narrower never.
_DENSITIES: dict[tuple[torch.dtype, str], dict[int, Tables]] = {
    (torch.float32, "avx512"): {
        128: {False: {512: 0.1, 1024: 0.15}, True: {}},
        256: {False: {128: 0.15, 256: 0.2, 512: 0.35}, True: {1024: 0.35}},
        512: {
            # Weights from memory, as in a whole model: from 16 rows on dense products are fast.
            False: {
                **{1: 1.0, 2: 0.4, 3: 0.3, 4: 1.0},
                **{9: 0.15, 64: 0.2, 128: 0.25, 256: 0.3, 512: 0.35, 1024: 0.45},
            },
            True: {256: 0.35, 512: 0.4},
        },
    },
    # Zen 4 takes an instruction of 512 bits in halves: dense products are half as fast beside what
    # gathering takes, so sparse ones pay up to higher densities. At width 768 what
    # mlp_cpu_zen4.json has, and less for fewer rows and narrower blocks.
    (torch.float32, "zen4"): {
        128: {False: {256: 0.1}, True: {256: 0.2}},
        256: {
            False: {1: 0.5, 9: 0.0, 32: 0.2, 128: 0.4, 256: 0.5},
            True: {64: 0.2, 128: 0.4, 256: 0.5},
        },
        512: {
            False: {1: 1.0, 2: 0.7, 5: 0.5, 9: 0.12, 32: 0.3, 128: 0.5, 256: 0.55},
            True: {64: 0.2, 128: 0.5, 256: 0.55},
        },
    },
    (torch.bfloat16, "zen4"): {
        512: {False: {1: 0.5, 9: 0.0, 128: 0.15, 512: 0.25}, True: {}},
    },
    (torch.float32, "avx2"): {
        128: {False: {512: 0.1, 1024: 0.15}, True: {}},
        256: {False: {128: 0.15, 256: 0.25, 512: 0.35}, True: {512: 0.35}},
        512: {
            False: {
                **{1: 1.0, 5: 0.3, 9: 0.0, 16: 0.08},
                **{32: 0.15, 128: 0.3, 256: 0.35, 512: 0.45},
            },
            True: {256: 0.4},
        },
    },
    # Dense products on tiles of AMX are so fast that only reading the weights is worth saving.
    (torch.bfloat16, "amx"): {512: {False: {1: 1.0, 2: 0.0}, True: {}}},
    (torch.bfloat16, "avx512+bf16"): {
        512: {
            False: {1: 1.0, 2: 0.0, 16: 0.2, 32: 0.3, 128: 0.4, 512: 0.45},
            True: {256: 0.4, 512: 0.45},
        },
    },
    (torch.bfloat16, "avx2"): {512: {False: {64: 0.35, 256: 0.4}, True: {64: 0.35, 256: 0.4}}},
}
# Of bfloat16 on AMX a screened first product is slower than the dense one.
_CANDIDATES: dict[tuple[torch.dtype, str], Tables] = {
    (torch.float32, "avx512"): {
        False: {1: 0.3, 5: 0.2, 9: 0.25, 512: 0.28},
        True: {512: 0.2, 1024: 0.25},
    },
    (torch.float32, "zen4"): {False: {1: 0.3, 9: 0.22, 32: 0.3}, True: {256: 0.3}},
    (torch.bfloat16, "zen4"): {False: {1: 0.3, 9: 0.0, 512: 0.25}, True: {}},
    # Zen 3. In training the weight is put on its grids in every step, so less is gained.
    (torch.float32, "avx2"): {
        False: {1: 0.3, 5: 0.15, 9: 0.2, 32: 0.25},
        True: {512: 0.1, 1024: 0.12},
    },
    (torch.bfloat16, "amx"): {False: {1: 0.3, 9: 0.0}, True: {}},
    (torch.bfloat16, "avx512+bf16"): {
        False: {1: 0.3, 9: 0.0, 64: 0.2, 128: 0.25},
        True: {256: 0.1, 512: 0.2},
    },
}


def family_of(dtype: torch.dtype, isa: str, has_amx: bool, is_zen4: bool = False) -> str:
    """The name of the tables that hold.

    Args:
        dtype: of the block.
        isa: of the native kernels, as of `steppe.kernels`; empty for none.
        has_amx: whether the processor has AMX for bfloat16, on which dense products are several
            times as fast as on vectors, and sparse ones are not.
        is_zen4: whether the processor takes instructions of 512 bits in halves.

    Example:
        >>> family_of(torch.bfloat16, "avx512+bf16", has_amx=True)
        'amx'
        >>> family_of(torch.float32, "avx512+vnni", has_amx=True)
        'avx512'
    """
    if dtype == torch.bfloat16 and has_amx:
        return "amx"
    if is_zen4 and isa.startswith("avx512"):
        return "zen4"
    if dtype == torch.bfloat16 and isa == "avx512+bf16":
        return isa
    return isa.partition("+")[0]


@lru_cache(maxsize=256)
def density_tables(dtype: torch.dtype, family: str, threads: int) -> dict[int, Tables]:
    """The built-in thresholds of the density, for a number of threads.

    The tables are measured with one thread. With t threads the products take a t-th of the time at
    best, but the Python of a call takes as long as before (about 0.05 ms in inference, 0.5 ms in a
    training step), so its share is t times as large. The share is that of the table again if the
    call has t times the work: t times the rows, or fewer in a wider block, since the work of a row
    grows with the square of the width. So each step above `DECODE_ROWS` moves up by this
    factor; from a width of 512 on by half of it, since with two threads the steps were measured to
    be where they are with one. The steps up to `DECODE_ROWS` hold for any t: there the size of the
    weights alone decides whether to call the kernels, see `steppe.ops.cpu.dispatch.pays`.

    Args:
        dtype: of the block.
        family: see `family_of`.
        threads: t.

    Returns:
        The tables from each width on; none where the kernels never pay. Not to be changed.
    """
    widths = _DENSITIES.get((dtype, family), {})
    tables: dict[int, Tables] = {}
    for width, end in pairwise([*sorted(widths), None]):
        assert width is not None
        wide, factor = width, threads / (2 if width >= _WIDE else 1)
        tables[wide] = _for_team(widths[width], factor)
        while factor > 1.0 and (end is None or wide * 3 // 2 < end):
            wide, factor = wide * 3 // 2, factor / 1.5**2
            tables[wide] = _for_team(widths[width], factor)
    return tables


@lru_cache(maxsize=256)
def candidate_tables(dtype: torch.dtype, family: str, threads: int) -> Tables:
    """The built-in thresholds of the share of candidates, for a number of threads.

    Args:
        dtype: of the block.
        family: see `family_of`.
        threads: as of `density_tables`.

    Returns:
        The tables. Not to be changed.
    """
    return _for_team(_CANDIDATES.get((dtype, family), NEVER), threads / 2)


def tables_at(widths: Mapping[int, Tables], width: int) -> Tables:
    """The tables of the last width that is not above one; `NEVER` below the first.

    Args:
        widths: tables by the width from which on they hold.
        width: d_model of a block.
    """
    least = max((step for step in widths if step <= width), default=None)
    return NEVER if least is None else widths[least]


def reached(steps: Thresholds, rows: int) -> float:
    """The threshold of the last step that is not above a number of rows; 0 below the first.

    Args:
        steps: by rows.
        rows: of a call.

    Example:
        >>> reached({1: 0.5, 9: 0.0, 64: 0.25}, 100)
        0.25
    """
    least = max((step for step in steps if step <= rows), default=None)
    return 0.0 if least is None else steps[least]


def overlaid(built_in: Tables, measured: Tables) -> Tables:
    """Tables with some steps as they were measured.

    More rows only ever gain more, once they are more than few. So a built-in step at more rows is
    raised to the threshold measured at fewer.

    Args:
        built_in: the tables.
        measured: thresholds by rows, any of them or none.

    Example:
        >>> overlaid({False: {1: 0.5, 64: 0.1}, True: {}}, {False: {16: 0.3}, True: {}})[False]
        {1: 0.5, 16: 0.3, 64: 0.3}
    """
    tables: Tables = {}
    for trains in (False, True):
        own = measured[trains]
        table = dict(sorted({**built_in[trains], **own}.items()))
        least = 0.0
        for rows in table:
            if rows > DECODE_ROWS:
                if rows not in own:
                    table[rows] = max(table[rows], least)
                else:
                    least = own[rows]
        tables[trains] = table
    return tables


def _for_team(tables: Tables, factor: float) -> Tables:
    """Tables with each step above `DECODE_ROWS` at `factor` times as many."""
    if factor <= 1.0:
        return tables
    moved: Tables = {}
    for trains, steps in tables.items():
        moved[trains] = {rows: most for rows, most in steps.items() if rows <= DECODE_ROWS}
        if steps:
            moved[trains][DECODE_ROWS + 1] = 0.0
        for rows, most in steps.items():
            if rows > DECODE_ROWS and most > 0.0:
                moved[trains][int(rows * factor)] = most
    return moved
