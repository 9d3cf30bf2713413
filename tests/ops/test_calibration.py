"""Thresholds are measured once, kept, read again, and what is kept wrongly is measured anew."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from steppe.ops import calibration, dispatch
from steppe.ops.native import kernels

native = pytest.mark.skipif(kernels().name != "native", reason=kernels().reason)
TABLES = {False: {1: 0.5, 16: 0.25}, True: {1: 0.0, 16: 0.75}}
DENSITIES = calibration._SCREENED_DENSITIES
NOTHING = {False: {1: 0.0}, True: {1: 0.0}}
SHARES = {False: {1: 0.375, 16: 0.0}, True: {1: 0.0, 16: 0.125}}


@pytest.fixture
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    as_another_process(monkeypatch)
    return tmp_path / "steppe"


@pytest.fixture
def warm(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of few rows need not be more than fit into a cache, which would be thousands here."""
    monkeypatch.setattr(calibration, "_COLD_BYTES", 2**18)


def as_another_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is measured or read yet."""
    monkeypatch.setattr(dispatch, "_measured", {})
    monkeypatch.setattr(dispatch, "_screened", {})


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, torch.dtype]]:
    """What was measured, and of which dtype."""
    seen: list[tuple[str, torch.dtype]] = []

    def give(kind: str, tables: dispatch.Tables) -> Callable[..., dispatch.Tables]:
        def measure(
            dtype: torch.dtype, rows: Sequence[int] = (), width: int = 512, hidden: int = 2048
        ) -> dispatch.Tables:
            assert hidden == 4 * width
            seen.append((kind if width == 512 else f"{kind} {width}", dtype))
            return tables if width > 64 else NOTHING

        return measure

    monkeypatch.setattr(calibration, "measure_thresholds", give("density", TABLES))
    monkeypatch.setattr(calibration, "measure_candidates", give("candidates", SHARES))
    return seen


@native
def test_measured_once_a_machine_and_dtype(
    cache: Path, measured: list[tuple[str, torch.dtype]], monkeypatch: pytest.MonkeyPatch
) -> None:
    for dtype in (torch.float32, torch.float32, torch.bfloat16, torch.float64):
        calibration.calibrate(dtype)
    assert measured == [
        (kind, dtype)
        for dtype in (torch.float32, torch.bfloat16)
        for kind in ("density 64", "density 128", "density", "candidates")
    ]
    assert len(list(cache.glob("*.json"))) == 2
    as_another_process(monkeypatch)
    calibration.calibrate(torch.float32)
    assert len(measured) == 8
    for width in (128, 255, 256, 4096):
        assert dispatch.max_density_for(20, width, torch.float32, trains=True) == 0.75
        assert dispatch.max_density_for(15, width, torch.float32, trains=True) == 0.0
        assert dispatch.max_density_for(8, width, torch.float32, trains=False) == 0.5
    for width in (1, 63, 64, 127):
        assert dispatch.max_density_for(20, width, torch.float32, trains=True) == 0.0
    monkeypatch.setattr(dispatch, "kernels", lambda: replace(kernels(), unscreened=""))
    assert dispatch.max_candidates_for(20, torch.float32, trains=True) == 0.125
    assert dispatch.max_candidates_for(15, torch.float32, trains=True) == 0.0
    assert dispatch.max_candidates_for(8, torch.float32, trains=False) == 0.375
    assert dispatch.max_candidates_for(0, torch.float32, trains=False) == 0.0


@native
def test_the_file_has_both_kinds_of_thresholds_by_name(
    cache: Path, measured: list[tuple[str, torch.dtype]]
) -> None:
    calibration.calibrate(torch.float32)
    (path,) = cache.glob("thresholds-*-float32-1.json")
    assert json.loads(path.read_text()) == {
        "density": {
            "64": {"inference": {"1": 0.0}, "training": {"1": 0.0}},
            **{
                width: {
                    "inference": {"1": 0.5, "16": 0.25},
                    "training": {"1": 0.0, "16": 0.75},
                }
                for width in ("128", "256")
            },
        },
        "candidates": {
            "inference": {"1": 0.375, "16": 0.0},
            "training": {"1": 0.0, "16": 0.125},
        },
    }


@native
@pytest.mark.parametrize(
    "content",
    [
        "",
        "{}",
        "[]",
        '{"inference": {"1": 0.5}, "training": {"1": 0.5}}',  # as of the first version
        '{"density": {"64": {"inference": {}, "training": {}}}}',
        '{"density": [], "candidates": 3}',
        '{"density": {"inference": {"1": 0.5}, "training": {}},'  # as of the second
        ' "candidates": {"inference": {}, "training": {}}}',
        '{"density": {"64": {"inference": {"a": 1}, "training": {}}},'
        ' "candidates": {"inference": {}, "training": {}}}',
    ],
)
def test_a_damaged_file_is_measured_anew(
    cache: Path,
    measured: list[tuple[str, torch.dtype]],
    content: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calibration.calibrate(torch.float32)
    (path,) = cache.glob("*.json")
    kept = path.read_text()
    path.write_text(content)
    as_another_process(monkeypatch)
    calibration.calibrate(torch.float32)
    assert len(measured) == 8
    assert json.loads(path.read_text()) == json.loads(kept)


@native
@pytest.mark.parametrize(("switches", "is_kept"), [(40, True), (60, False)])
def test_what_other_programs_disturbed_is_used_but_not_kept(
    cache: Path,
    measured: list[tuple[str, torch.dtype]],
    switches: int,
    is_kept: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    torch.set_num_threads(1)
    monkeypatch.setattr(calibration, "_forced_switches", iter([1000, 1000 + 2 * switches]).__next__)
    monkeypatch.setattr(calibration.time, "perf_counter", iter([7.0, 9.0]).__next__)
    calibration.calibrate(torch.float32)
    assert dispatch.is_measured(torch.float32, 1)
    assert bool(list(cache.glob("*.json"))) == is_kept


def test_forced_switches_are_counted() -> None:
    before = calibration._forced_switches()
    assert isinstance(before, int)
    assert calibration._forced_switches() >= before


@native
def test_a_folder_that_cannot_be_written_is_a_warning(
    cache: Path, measured: list[tuple[str, torch.dtype]]
) -> None:
    cache.write_text("a file in the way")
    with pytest.warns(UserWarning, match="not remembered"):
        calibration.calibrate(torch.float32)
    assert dispatch.is_measured(torch.float32, torch.get_num_threads())


@native
def test_what_is_measured_is_a_density_for_each_number_of_rows(warm: None) -> None:
    state = torch.random.get_rng_state()
    for measure in (calibration.measure_thresholds, calibration.measure_candidates):
        tables = measure(torch.float32, (1, 20), 64, 128, rounds=1)
        assert torch.equal(state, torch.random.get_rng_state())
        for trains in (False, True):
            assert tables[trains].keys() == {1, 20}
            assert all(0 <= share <= 1 for share in tables[trains].values())


@native
def test_screening_is_measured_against_shares_of_candidates_not_densities(
    warm: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[list[float]] = []

    def crossover(shares: list[float], ratios: list[float]) -> float:
        given.append(shares)
        return 0.25

    ratio = calibration._ratio

    def gaining(*arguments: Any) -> float:
        return max(ratio(*arguments), 2.0)  # so that no density is left out

    monkeypatch.setattr(calibration, "_ratio", gaining)
    monkeypatch.setattr(calibration, "crossover", crossover)
    monkeypatch.setattr(calibration, "kernels", lambda: replace(kernels(), unscreened=""))
    tables = calibration.measure_candidates(torch.float32, (1, 200), 64, 128, rounds=1)
    assert tables == {trains: {1: 0.25, 200: 0.25} for trains in (False, True)}
    few, many, few_trained, many_trained = given
    assert all(0 <= share <= 1 for share in few + few_trained)
    for shares in (many, many_trained):
        # All active entries are candidates, and others too.
        for density, share in zip(DENSITIES, shares, strict=True):
            assert density < share < 2 * density


@native
def test_without_vnni_nothing_is_measured_and_nothing_screened(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    unfit = replace(kernels(), unscreened="no VNNI")
    monkeypatch.setattr(calibration, "kernels", lambda: unfit)
    monkeypatch.setattr(calibration, "_ratio", None)  # calling it is an error
    tables = calibration.measure_candidates(torch.float32, (1, 20))
    assert tables == {trains: {1: 0.0, 20: 0.0} for trains in (False, True)}


@pytest.mark.parametrize(
    ("ratios", "density"),
    [([2.0, 1.5, 1.25], 0.6), ([1.0, 2.0, 2.0], 0.0), ([1.25, 0.85, 0.5], 0.3)],
)
def test_the_crossover_is_where_the_gain_ends(ratios: list[float], density: float) -> None:
    assert calibration.crossover([0.2, 0.4, 0.6], ratios) == density


def test_without_a_measurement_the_defaults_hold() -> None:
    density = dispatch.max_density_for
    assert density(1024, 256, torch.float64, trains=True) == 0.7
    assert density(1, 256, torch.float64, trains=True) == 0.0
    assert density(1024, 255, torch.float64, trains=True) == 0.2
    assert density(1024, 127, torch.float64, trains=True) == 0.0
