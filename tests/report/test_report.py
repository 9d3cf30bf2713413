"""Tables and plots say what the summary says."""

from __future__ import annotations

from pathlib import Path

import pytest
from rich.console import Console

from steppe.errors import OutputError
from steppe.report import (
    accelerated_sentence,
    demo_table,
    plot_training_density,
    speed_table,
)


def arm(quality: str, value: float, density: float, **more: object) -> dict:
    return {
        quality: value,
        "density": density,
        "training_density": density + 0.1,
        "derivative_density": density,
        "seconds": 12.3,
        "speed_up": {"training": 2.5, "prefill": 1.25},
        "runs": [
            {
                "history": [(0, 0.5), (10, density)],
                "speed": [
                    {"d": 48, "f": 192, "tokens": 1024, "candidates": 0.125, "dense_ms": 3.21}
                ],
            }
        ],
        **more,
    }


SUMMARY = {
    "seeds": 1,
    "data_sets": {
        "digits": {
            "quality": "accuracy",
            "arms": {"vanilla": arm("accuracy", 0.975, 0.2), "steppe": arm("accuracy", 0.98, 0.15)},
        },
        "pydoc": {
            "quality": "loss",
            "arms": {"vanilla": arm("loss", 1.9, 0.25), "steppe": arm("loss", 1.8, 0.3)},
        },
    },
}


def text_of(summary: dict) -> str:
    console = Console(width=140, record=True, file=None, quiet=True)
    with console.capture() as capture:
        console.quiet = False
        console.print(demo_table(summary))
    return capture.get()


def test_table_has_quality_percent_and_signed_change() -> None:
    text = text_of(SUMMARY)
    assert "97.5 %" in text
    assert "1.800" in text
    assert "-25%" in text  # 0.15 / 0.2
    assert "+20%" in text  # 0.3 / 0.25: a worse density is shown as it is


def test_table_fits_into_80_columns() -> None:
    console = Console(width=80)
    with console.capture() as capture:
        console.print(demo_table(SUMMARY))
    assert "…" not in capture.get()
    assert "15.0 (-25%)" in capture.get()


def test_speed_is_a_row_an_arm() -> None:
    console = Console(width=80)
    with console.capture() as capture:
        console.print(speed_table(SUMMARY))
    rows = [line.split() for line in capture.get().splitlines() if "1024" in line]
    assert [row[:-7] for row in rows] == [
        ["digits", "vanilla"],
        ["steppe"],
        ["pydoc", "vanilla"],
        ["steppe"],
    ]
    assert all(row[-7:] == ["48,", "192", "1024", "12.5", "2.50", "1.25", "3.2"] for row in rows)


TIMED = {"d": 256, "f": 4096, "tokens": 1024, "candidates": 0.04, "dense_ms": 100.0}
TWICE = {
    "recipe": "pydoc-wide",
    "arm": "threshold",
    "speed_up": 1.85,
    "runs": {
        "dense": {"quality": 2.312, "processor_seconds": 61.2, "speed": []},
        "accelerated": {
            "quality": 2.309,
            "processor_seconds": 33.1,
            "speed": [{**TIMED, "ratio": 3.125}, {**TIMED, "ratio": 1.5}],
        },
    },
}


def test_blocks_that_were_not_timed_have_no_row() -> None:
    untimed = arm("loss", 1.9, 0.25, speed_up={}, runs=[{"history": [], "speed": []}])
    arms = {"vanilla": untimed, "steppe": untimed}
    data_sets = {"pydoc": {"quality": "loss", "arms": arms}}
    console = Console(width=80)
    with console.capture() as capture:
        console.print(speed_table({"data_sets": data_sets, "accelerated": TWICE}))
    rows = [line.split() for line in capture.get().splitlines() if "1024" in line]
    assert rows == [
        ["pydoc-wide", "threshold", "256,", "4096", "1024", "4.0", "3.12", "1.50", "100.0"]
    ]
    assert "vanilla" not in capture.get()


def test_the_sentence_of_the_accelerated_run_is_computed_from_it() -> None:
    said = accelerated_sentence({"accelerated": TWICE})
    assert said == (
        "pydoc-wide, threshold, dense and accelerated: the same loss (2.31 and 2.31), 1.9× faster"
        " (61 s and 33 s of the processor)"
    )
    worse = {**TWICE["runs"], "dense": {**TWICE["runs"]["dense"], "quality": 2.2}}
    assert ": losses (2.20 and 2.31)" in accelerated_sentence(
        {"accelerated": {**TWICE, "runs": worse}}
    )
    assert accelerated_sentence(SUMMARY) == "", "a summary of version 1"


def test_several_seeds_show_their_spread() -> None:
    spread = arm("accuracy", 0.975, 0.2, std={"accuracy": 0.01, "density": 0.02})
    text = text_of(
        {"seeds": 3, "data_sets": {"digits": {"quality": "accuracy", "arms": {"vanilla": spread}}}}
    )
    assert "20.0" in text
    assert "± 2.0" in text
    assert "3 seeds" in text


def test_plot_is_a_png_and_an_unwritable_path_is_an_error(tmp_path: Path) -> None:
    path = plot_training_density(SUMMARY, tmp_path / "density.png")
    assert path.read_bytes().startswith(b"\x89PNG")
    with pytest.raises(OutputError, match="cannot write to"):
        plot_training_density(SUMMARY, tmp_path / "nowhere" / "density.png")
    assert [file.name for file in tmp_path.iterdir()] == ["density.png"]
