"""The tables of `steppe measure` say what the reports say, in 100 columns."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from rich.console import Console
from rich.table import Table

from steppe.measures.report import FREQUENCY_EDGES, BlockReport, Report
from steppe.report.measure_table import curve_table, measure_table
from steppe.runs import Run

NAN = math.nan
# AF / (T̄ F · gain) = 4 / (5 · 32 · 0.05) = 0.5, the derivative density: no deviation.
BLOCK = BlockReport(
    name="model.layers.0.mlp",
    d_model=16,
    d_hidden=32,
    gated=False,
    samples=10,
    tokens=50,
    density=0.25,
    derivative_density=0.5,
    dead_neurons=3,
    neuron_frequency=(3,) + (0,) * (len(FREQUENCY_EDGES) - 1) + (29,),
    AF_up=4.0,
    AF_gate=NAN,
    AF_down=0.00012,
    active_gain=0.05,
    squared_input_norm=123456.0,
    squared_activation_gradient=0.007,
    squared_gradient_norm_up=1.0,
    squared_gradient_norm_gate=NAN,
    squared_gradient_norm_down=1.0,
    standard_errors={"density": 0.0125, "AF_up": 0.75},
)
UNMEASURED = dict.fromkeys(
    ("AF_up", "AF_gate", "AF_down", "active_gain", "squared_activation_gradient"), NAN
)


def report(*blocks: BlockReport) -> Report:
    return Report(density=0.25, derivative_density=0.5, blocks=blocks)


def text_of(table: Table, width: int = 100) -> str:
    console = Console(width=width)
    with console.capture() as capture:
        console.print(table)
    return capture.get()


def row_with(text: str, start: str) -> list[str]:
    return next(line.split() for line in text.splitlines() if line.split()[:1] == [start])


def test_a_part_of_a_model_is_said_to_be_one() -> None:
    part = replace(report(BLOCK), coverage=0.167)
    assert "17% of the MLP parameters" in " ".join(text_of(measure_table(part)).split())
    assert "MLP parameters" not in text_of(measure_table(replace(part, coverage=1.0)))


def test_each_tower_has_a_density() -> None:
    vision = replace(BLOCK, name="vision.layers.0", density=0.5, tokens=10, d_hidden=4)
    other = replace(vision, name="vision.layers.1", density=0.25, tokens=30)
    text = replace(BLOCK, name="text.layers.0", density=0.125)
    towers = report(vision, other, text).density_by_tower
    assert towers == {"vision.layers": (0.5 * 40 + 0.25 * 120) / 160, "text.layers": 0.125}


def test_a_block_has_its_measures_and_standard_errors() -> None:
    blocks = (BLOCK, replace(BLOCK, name="model.layers.1.mlp", density=0.125))
    text = text_of(measure_table(report(*blocks)))
    row = ["0", "25.00", "50.00", "4", "1.2e-04", "0.05", "1.2e+05", "0.007", "3", "0"]
    assert row_with(text, "0") == row
    assert row_with(text, "1")[1] == "12.50"
    assert "±1.25" in text
    assert "±0.75" in text
    assert "of 32" in text
    assert "10 samples, 50 tokens" in text
    assert "AF gate" not in text


def test_a_broken_identity_is_seen() -> None:
    text = text_of(measure_table(report(BLOCK, replace(BLOCK, name="b.1.c.d", AF_up=4.04))))
    assert row_with(text, "b.1.c.d")[-1] == "1e-02"


def test_gated_blocks_are_told_by_their_gate() -> None:
    # The identity is the gate's: half of its AF halves the density that follows from it.
    gated = replace(BLOCK, AF_gate=2.0, gated=True)
    text = text_of(measure_table(report(gated)))
    assert "AF gate" in text
    assert "5e-01" in text


def test_what_was_not_measured_has_no_column() -> None:
    text = text_of(measure_table(report(replace(BLOCK, **UNMEASURED))))
    assert "AF" not in text
    assert "gain" not in text
    assert "nan" not in text
    assert "iden" not in text
    assert "1.2e+05" in text


def test_a_missing_number_among_others_is_a_dash() -> None:
    text = text_of(measure_table(report(BLOCK, replace(BLOCK, name="b.1.c.d", **UNMEASURED))))
    assert row_with(text, "b.1.c.d")[3:6] == ["–"] * 3
    assert "nan" not in text


def test_the_widest_table_fits_into_100_columns() -> None:
    errors = dict.fromkeys(BLOCK.standard_errors, 1.0) | dict.fromkeys(
        ("AF_up", "AF_gate", "AF_down", "active_gain", "squared_input_norm"), 1.2345e-5
    )
    wide = replace(
        BLOCK,
        density=1.0,
        derivative_density=1.0,
        AF_gate=1.2345e-20,
        AF_up=1.2345e20,
        d_hidden=114688,
        dead_neurons=114000,
        standard_errors={**errors, "squared_activation_gradient": 1e-9},
    )
    blocks = [replace(wide, name=f"{s}.{i}.mlp") for s in ("encoder", "decoder") for i in (0, 47)]
    text = text_of(measure_table(report(*blocks)))
    whole = text_of(measure_table(report(*blocks)), width=300)
    assert sorted(text.split()) == sorted(whole.split())
    assert max(len(line.rstrip()) for line in text.splitlines()) <= 100
    assert "decoder.47" in text


@pytest.mark.parametrize(
    ("names", "shown"),
    [
        (["a.encoder.block.0.x", "a.decoder.block.1.x"], ["encoder.0", "decoder.1"]),
        (["only.one.block"], ["only.one.block"]),
        (["x.0.mlp", "y.z.0.mlp"], ["x.0.mlp", "y.z.0.mlp"]),
        ([f"a_very_long_name_of_a_block_{i}" for i in (0, 1)], ["…_of_a_block_0"]),
    ],
)
def test_names_are_as_short_as_they_can_be(names: list[str], shown: list[str]) -> None:
    text = text_of(measure_table(report(*(replace(BLOCK, name=name) for name in names))))
    for name in shown:
        assert row_with(text, name)


def test_a_curve_has_one_row_a_checkpoint_with_means_over_the_blocks() -> None:
    second = replace(BLOCK, AF_up=6.0, squared_input_norm=123.0)
    run = Run(
        name="pilot",
        model="Model",
        tokens_per_sample=5.0,
        held_out_steps=[1000, 2000],
        held_out=[report(BLOCK, BLOCK), report(replace(BLOCK, squared_input_norm=1.0), second)],
    )
    text = text_of(curve_table(run))
    assert "pilot" in text
    assert row_with(text, "1,000") == [
        *("1,000", "25.00", "50.00", "4", "1.2e-04", "0.05", "1.2e+05", "0.007")
    ]
    assert row_with(text, "2,000")[3] == "5"  # (4 + 6) / 2
    assert row_with(text, "2,000")[6] == "62"  # (1 + 123) / 2


def test_a_curve_without_gradients_has_dashes() -> None:
    run = Run("a", "M", 5.0, held_out_steps=[0], held_out=[report(replace(BLOCK, **UNMEASURED))])
    assert row_with(text_of(curve_table(run)), "0")[3:6] == ["–"] * 3


def test_the_experts_of_a_layer_are_one_row_where_there_are_many() -> None:
    first = replace(BLOCK, name="layers.1.experts.0", tokens=30, samples=6, density=0.2, AF_up=1.0)
    second = replace(BLOCK, name="layers.1.experts.1", tokens=10, samples=2, density=0.6, AF_up=3.0)
    unreached = replace(
        first, tokens=0, samples=0, **dict.fromkeys(("density", "derivative_density"), NAN)
    )
    others = [replace(unreached, name=f"layers.1.experts.{number}") for number in range(2, 64)]
    few = text_of(measure_table(report(first, second, *others)))
    assert row_with(few, "0")[1] == "20.00"
    many = report(BLOCK, first, second, *others)
    assert len(repr(many)) < 6_000 < len(repr(report(first, second, *others)))
    assert "63 more" in repr(many)
    text = text_of(measure_table(many))
    assert len(text.splitlines()) < 14
    row = next(line.split() for line in text.splitlines() if "experts" in line)
    assert row[1:4] == ["30.00", "50.00", "1.5"]  # (30 · 20 + 10 · 60) / 40, (6 · 1 + 2 · 3) / 8
    assert f"of {64 * 32}" in text
