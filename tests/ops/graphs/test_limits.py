"""The limits of the GPU decode follow from what an H200 has measured, and are on the safe side."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path

import pytest
import torch

from steppe.ops.graphs.device import Card
from steppe.ops.graphs.limits import (
    CARD,
    LEAST_SPEEDUP,
    SPEED,
    TABLE,
    Measured,
    limits_for,
    too_little,
)
from steppe.ops.plan import Limits, Shape

RESULTS = Path(__file__).parents[3] / "benchmarks" / "results" / "gpu-h200-decode.json"
NOTHING_ASKED = Limits()


def of_width(width: int) -> Shape:
    """A block as those that were measured."""
    return Shape(width, 4 * width, False)


def shipped(rows: list[dict[str, object]], width: int, screened: bool) -> dict[str, object]:
    """The block that ran as steppe launches it: all lists, dependent launch; the fastest."""
    found = [
        row
        for row in rows
        if row["what"] == "block"
        and row["D"] == width
        and row["screened"] is screened
        and row["dependent_launch"]
        and row["down"]["kind"] == "all lists"  # type: ignore[index]
    ]
    return min(found, key=lambda row: row["us"])  # type: ignore[arg-type,return-value]


def test_the_table_is_what_was_measured() -> None:
    rows = json.loads(RESULTS.read_text())["rows"]
    assert len(TABLE) == 4
    for measured in TABLE:
        dense = next(row for row in rows if row["what"] == "dense" and row["D"] == measured.width)
        without, screened = (shipped(rows, measured.width, way) for way in (False, True))
        assert dense["F"] == 4 * measured.width
        assert measured == Measured(
            dense["D"],
            dense["us"],
            without["us"],
            screened["us"],
            dense["density"],
            dense["candidates"],
        )


def test_a_limit_is_where_the_worst_case_is_as_slow_as_it_may_be() -> None:
    for row in TABLE:
        grows = row.unscreened - row.reading
        assert 0 < grows < row.unscreened
        time = row.unscreened + grows * (row.max_density / row.density - 1.0)
        assert time == pytest.approx(row.dense / LEAST_SPEEDUP)
        assert row.density < row.max_density < 0.2
        if row.max_candidates:
            grows = row.screened - row.reading / 2
            time = row.screened + grows * (row.max_candidates / row.candidates - 1.0)
            assert time == pytest.approx(LEAST_SPEEDUP * row.unscreened)
    # The screen is no faster for certain at the two narrow widths.
    assert [bool(row.max_candidates) for row in TABLE] == [False, False, True, True]


def test_what_was_measured_at_another_density_is_within_the_bound() -> None:
    """Blocks with another second kernel, which ran at three densities."""
    rows = json.loads(RESULTS.read_text())["rows"]
    for width in (2048, 4096):
        times = {
            row["density"]: row["us"]
            for row in rows
            if row["what"] == "block"
            and row["D"] == width
            and not row["screened"]
            and row["dependent_launch"]
            and row["find"]["rows"] == {2048: 8, 4096: 16}[width]
            and row["down"]["kind"] == "splits of the lists"
        }
        (_, first), (_, middle), (most, last) = sorted(times.items())
        assert first <= middle <= last
        reading = 2 * 4 * width**2 / SPEED
        assert last <= middle + (middle - reading) * (most / 0.0503 - 1.0)


def test_between_two_widths_the_smaller_limits_hold() -> None:
    dtype = torch.bfloat16
    for low, high in itertools.pairwise(TABLE):
        between = limits_for(1, of_width((low.width + high.width) // 2), dtype, CARD, NOTHING_ASKED)
        assert not between.reason
        assert between.max_density == min(low.max_density, high.max_density)
        assert between.max_candidates == min(low.max_candidates, high.max_candidates)
    for row in TABLE:
        own = limits_for(1, of_width(row.width), dtype, CARD, NOTHING_ASKED)
        assert (own.max_density, own.max_candidates) == (row.max_density, row.max_candidates)


def test_what_was_not_measured_is_dense_unless_a_density_is_given() -> None:
    assert "float32" in limits_for(1, of_width(2048), torch.float32, CARD, NOTHING_ASKED).reason
    for other in (Card((8, 0), 132), Card((10, 0), 148), Card((9, 0), 78)):
        assert "H200" in limits_for(1, of_width(2048), torch.bfloat16, other, NOTHING_ASKED).reason
        asked = limits_for(1, of_width(2048), torch.bfloat16, other, Limits(0.3))
        assert (asked.reason, asked.max_density, asked.max_candidates) == ("", 0.3, 0.0)
    asked = limits_for(1, of_width(64), torch.float32, CARD, Limits(0.3))
    assert (asked.reason, asked.max_density, asked.max_candidates) == ("", 0.3, 0.0)
    asked = limits_for(1, of_width(2048), torch.bfloat16, CARD, Limits(0.3, 0.4))
    assert (asked.max_density, asked.max_candidates) == (0.3, 0.4)
    assert "768" in too_little(1, Shape(512, 2048, False), NOTHING_ASKED)
    assert "F / D" in too_little(1, Shape(1024, 2048, False), NOTHING_ASKED)
    assert not too_little(1, of_width(768), NOTHING_ASKED)
    assert not too_little(1, Shape(512, 1024, False), Limits(0.3))
    assert "4096" in too_little(1, of_width(5120), Limits(0.3))
    for rows in (2, 16):
        assert f"for {rows} tokens" in too_little(rows, of_width(2048), NOTHING_ASKED)
        assert not too_little(rows, of_width(2048), Limits(0.3))
        asked = limits_for(rows, of_width(2048), torch.bfloat16, CARD, Limits(0.3))
        assert (asked.reason, asked.max_density, asked.max_candidates) == ("", 0.3, 0.0)
        asked = limits_for(rows, of_width(2048), torch.bfloat16, CARD, Limits(0.3, 0.4))
        assert (asked.max_density, asked.max_candidates) == (0.3, 0.4)
    gated = of_width(2048)._replace(is_gated=True)
    assert "measured with a gate" in too_little(1, gated, NOTHING_ASKED)
    assert "for 4 tokens with a gate" in too_little(4, gated, NOTHING_ASKED)
    assert not too_little(4, gated, Limits(0.3))
    assert limits_for(1, gated, torch.bfloat16, CARD, Limits(0.3)).max_candidates == 0.0
    assert all(map(math.isfinite, (row.max_density for row in TABLE)))
