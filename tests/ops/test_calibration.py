"""Thresholds are measured once, kept, read again, and what is kept wrongly is measured anew."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from steppe.ops import calibration, dispatch
from steppe.ops.native import kernels

native = pytest.mark.skipif(kernels().name != "native", reason=kernels().reason)
TABLES = {False: {1: 0.5, 16: 0.25}, True: {1: 0.0, 16: 0.75}}


@pytest.fixture
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(dispatch, "_measured", {})
    return tmp_path / "steppe"


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[torch.dtype]:
    """The dtypes that were measured."""
    seen: list[torch.dtype] = []

    def measure(dtype: torch.dtype) -> dict[bool, dispatch.Thresholds]:
        seen.append(dtype)
        return TABLES

    monkeypatch.setattr(calibration, "measure_thresholds", measure)
    return seen


@native
def test_measured_once_a_machine_and_dtype(
    cache: Path, measured: list[torch.dtype], monkeypatch: pytest.MonkeyPatch
) -> None:
    for dtype in (torch.float32, torch.float32, torch.bfloat16, torch.float64):
        calibration.calibrate(dtype)
    assert measured == [torch.float32, torch.bfloat16]
    assert len(list(cache.glob("*.json"))) == 2
    monkeypatch.setattr(dispatch, "_measured", {})  # another process
    calibration.calibrate(torch.float32)
    assert len(measured) == 2
    assert dispatch.max_density_for(20, torch.float32, trains=True) == 0.75
    assert dispatch.max_density_for(15, torch.float32, trains=True) == 0.0
    assert dispatch.max_density_for(8, torch.float32, trains=False) == 0.5


@native
@pytest.mark.parametrize("content", ["", "{}", "[]", '{"inference": {"a": 1}, "training": {}}'])
def test_a_damaged_file_is_measured_anew(
    cache: Path, measured: list[torch.dtype], content: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    calibration.calibrate(torch.float32)
    (path,) = cache.glob("*.json")
    kept = path.read_text()
    path.write_text(content)
    monkeypatch.setattr(dispatch, "_measured", {})
    calibration.calibrate(torch.float32)
    assert len(measured) == 2
    assert json.loads(path.read_text()) == json.loads(kept)


@native
def test_a_folder_that_cannot_be_written_is_a_warning(
    cache: Path, measured: list[torch.dtype]
) -> None:
    cache.write_text("a file in the way")
    with pytest.warns(UserWarning, match="not remembered"):
        calibration.calibrate(torch.float32)
    assert dispatch.is_measured(torch.float32, torch.get_num_threads())


@native
def test_what_is_measured_is_a_density_for_each_number_of_rows() -> None:
    state = torch.random.get_rng_state()
    tables = calibration.measure_thresholds(torch.float32, (1, 20), 64, 128, rounds=1)
    assert torch.equal(state, torch.random.get_rng_state())
    for trains in (False, True):
        assert tables[trains].keys() == {1, 20}
        assert all(0 <= density <= 1 for density in tables[trains].values())


@pytest.mark.parametrize(
    ("ratios", "density"),
    [([2.0, 1.5, 1.25], 0.6), ([1.0, 2.0, 2.0], 0.0), ([1.25, 0.85, 0.5], 0.3)],
)
def test_the_crossover_is_where_the_gain_ends(ratios: list[float], density: float) -> None:
    assert calibration.crossover([0.2, 0.4, 0.6], ratios) == density


def test_without_a_measurement_the_defaults_hold() -> None:
    assert dispatch.max_density_for(1024, torch.float64, trains=True) == 0.7
    assert dispatch.max_density_for(1, torch.float64, trains=True) == 0.0
