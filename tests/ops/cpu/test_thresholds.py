"""The built-in thresholds hold what they promise for any number of threads."""

from __future__ import annotations

import math

import pytest
import torch

from steppe.ops.cpu import dispatch, thresholds
from steppe.ops.cpu.calls import DECODE_ROWS
from steppe.ops.cpu.thresholds import (
    NEVER,
    candidate_tables,
    density_tables,
    family_of,
    overlaid,
    reached,
    tables_at,
)

FAMILIES = [
    *((torch.float32, family) for family in ("avx512", "zen4", "avx2", "portable")),
    *(
        (torch.bfloat16, family)
        for family in ("amx", "zen4", "avx512+bf16", "avx512", "avx2", "portable")
    ),
]
ROWS = (1, 2, 4, 8, 9, 32, 100, 256, 1000, 1024, 5000, 20_000, 10**6)
WIDTHS = (64, 127, 128, 255, 256, 512, 768, 1024, 2048, 4096, 8192)


def most(
    dtype: torch.dtype, family: str, threads: int, rows: int, width: int, trains: bool
) -> float:
    return reached(tables_at(density_tables(dtype, family, threads), width)[trains], rows)


def test_a_call_with_the_work_of_more_rows_pays_in_a_larger_team_too() -> None:
    """Width 384, as of a ViT-S, has twice the work of 256: two threads gain from as many rows."""
    one = most(torch.float32, "avx512", 1, 1024, 256, True)
    assert one > 0.0
    assert most(torch.float32, "avx512", 2, 1024, 256, True) == 0.0
    assert most(torch.float32, "avx512", 2, 2048, 256, True) == one
    assert most(torch.float32, "avx512", 2, 1024, 384, True) == one
    assert most(torch.float32, "avx512", 4, 1024, 384, True) == 0.0


@pytest.mark.parametrize(
    ("dtype", "isa", "has_amx", "family"),
    [
        (torch.float32, "avx512+bf16", True, "avx512"),
        (torch.float32, "avx512+vnni", False, "avx512"),
        (torch.float32, "avx2", False, "avx2"),
        (torch.bfloat16, "avx512+bf16", True, "amx"),
        (torch.bfloat16, "avx2", True, "amx"),  # the kernels are capped, dense torch is not
        (torch.bfloat16, "avx512+bf16", False, "avx512+bf16"),
        (torch.bfloat16, "avx512+vnni", False, "avx512"),
        (torch.bfloat16, "portable", False, "portable"),
        (torch.float32, "", False, ""),
    ],
)
def test_each_instruction_set_has_a_family(
    dtype: torch.dtype, isa: str, has_amx: bool, family: str
) -> None:
    assert family_of(dtype, isa, has_amx) == family
    halves = family_of(dtype, isa, has_amx, is_zen4=True)
    assert halves == ("zen4" if isa.startswith("avx512") and family != "amx" else family)


@pytest.mark.parametrize(("dtype", "family"), FAMILIES)
def test_all_thresholds_are_shares_at_sane_steps(dtype: torch.dtype, family: str) -> None:
    for threads in (1, 2, 3, 16, 64, 192):
        widths = density_tables(dtype, family, threads)
        for table in (*widths.values(), candidate_tables(dtype, family, threads)):
            assert table.keys() == {False, True}
            for steps in table.values():
                assert all(rows >= 1 and 0.0 <= share <= 1.0 for rows, share in steps.items())
                many = [steps[rows] for rows in sorted(steps) if rows > DECODE_ROWS]
                assert many == sorted(many)  # more rows only ever gain more


@pytest.mark.parametrize(("dtype", "family"), FAMILIES)
def test_with_few_rows_no_training_step_is_tried(dtype: torch.dtype, family: str) -> None:
    """Those that are too dense would pay for it again and again."""
    for threads in (1, 64):
        for width in WIDTHS:
            for rows in range(1, DECODE_ROWS + 1):
                assert most(dtype, family, threads, rows, width, trains=True) == 0.0


@pytest.mark.parametrize(("dtype", "family"), FAMILIES)
def test_with_more_threads_it_takes_the_more_work_in_proportion(
    dtype: torch.dtype, family: str
) -> None:
    for threads in (2, 7, 16, 64):
        for trains in (False, True):
            for width in WIDTHS:
                for rows in ROWS:
                    alone = most(dtype, family, 1, rows, width, trains)
                    together = most(dtype, family, threads, rows, width, trains)
                    assert together <= alone
                    if rows <= DECODE_ROWS:
                        assert together == alone
                        continue
                    assert most(dtype, family, threads, rows * threads, width, trains) >= alone
                    # A thread has the work that the same threshold has alone in a narrower block.
                    base = max(
                        (w for w in density_tables(dtype, family, 1) if w <= width), default=0
                    )
                    if together > 0.0:
                        factor = threads / 2 if base >= 512 else threads
                        work_rows = rows * (width / base) ** 2 / factor
                        assert together <= most(
                            dtype, family, 1, math.ceil(min(work_rows, rows)), base, trains
                        )


def test_a_kind_of_processor_without_measurements_runs_dense() -> None:
    assert density_tables(torch.float32, "", 1) == {}
    assert density_tables(torch.float64, "avx512", 4) == {}
    assert tables_at({}, 4096) == NEVER
    assert candidate_tables(torch.float64, "avx512", 4) == NEVER


def test_measured_steps_take_the_places_of_built_in_ones() -> None:
    built_in = {False: {1: 1.0, 2: 0.0, 32: 0.25, 128: 0.5, 512: 0.625}, True: {256: 0.5}}
    measured = {False: {1: 0.0, 64: 0.5625, 128: 0.125}, True: {}}
    assert overlaid(built_in, measured) == {
        False: {1: 0.0, 2: 0.0, 32: 0.25, 64: 0.5625, 128: 0.125, 512: 0.625},
        True: {256: 0.5},
    }
    # A built-in step at more rows never says less than what was measured at fewer.
    raised = overlaid(built_in, {False: {16: 0.75}, True: {1: 0.25}})
    assert raised[False] == {1: 1.0, 2: 0.0, 16: 0.75, 32: 0.75, 128: 0.75, 512: 0.75}
    assert raised[True] == {1: 0.25, 256: 0.5}
    assert overlaid(built_in, NEVER) == built_in


@pytest.mark.parametrize("threads", [1, 2, 16, 64])
def test_a_call_pays_from_work_that_grows_with_the_team(
    threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    weight = 256 * 1024
    least = dispatch._LEAST_WORK * threads // weight
    assert dispatch.pays(least, 256, 1024)
    assert not dispatch.pays(least - 1, 256, 1024)
    # Few rows: the weights have to take long to read, by no more threads than memory serves.
    large = dispatch._LARGE_WEIGHT * min(threads, 16)
    assert dispatch.pays(1, 1024, large // 1024)
    assert not dispatch.pays(1, 1024, large // 1024 - 1)


@pytest.mark.parametrize("name", ["_DENSITIES", "_CANDIDATES"])
def test_every_family_has_its_tables(name: str) -> None:
    assert set(getattr(thresholds, name)) <= set(FAMILIES)
