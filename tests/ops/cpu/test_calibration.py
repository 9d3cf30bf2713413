"""A calibration changes a threshold only where it is clear, and is kept, used and read again."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console

from steppe.errors import KernelError, OutputError
from steppe.ops.cpu import calibration, dispatch, remembered
from steppe.ops.cpu.calibration import CANDIDATES, DENSITY, Calibration, Effort, calibrate
from steppe.ops.cpu.library import kernels
from steppe.report import calibration_summary, calibration_table
from steppe.timing import LEAST_ROUNDS, Round

native = pytest.mark.skipif(kernels().name != "native", reason=kernels().reason)
TINY = Effort(seconds=1e9, point_seconds=0.0, shrink=8, cold_bytes=2**16)
Call = Callable[[], object]


def rounds(*ratios: float, switches: int = 0) -> calibration.Timed:
    """Rounds whose ratios are given, in turn, whatever the calls are."""
    turns = itertools.cycle(ratios)

    def timed(one: Call, other: Call, threads: int) -> Round:
        ratio = next(turns)
        return Round(0.01 * ratio, 0.01, own=0.01 * (1 + ratio), switches=switches)

    return timed


DISTURBED = {
    "by their switches": rounds(0.2, switches=100),
    "by what they say": rounds(0.2, 5.0),
    "but for too few": rounds(1.04),
}


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    as_another_process(monkeypatch)
    return tmp_path / "steppe"


def as_another_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is measured or read yet."""
    for name in ("_measured", "_screened", "_files"):
        monkeypatch.setattr(dispatch, name, {})
    monkeypatch.setattr(calibration, "_read", set())


@pytest.fixture(params=[1, 2, 16, 64])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def lookups(dtype: torch.dtype) -> list[float]:
    """All that dispatch can be asked."""
    return [
        look
        for rows in (1, 2, 8, 9, 31, 32, 100, 128, 300, 512, 1024, 10**5)
        for trains in (False, True)
        for look in (
            *(
                dispatch.max_density_for(rows, width, dtype, trains)
                for width in (64, 128, 300, 800)
            ),
            dispatch.max_candidates_for(rows, dtype, trains),
        )
    ]


@native
@pytest.mark.parametrize("how", DISTURBED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_others_disturbed_equals_the_built_in_thresholds_and_is_not_kept(
    threads: int, dtype: torch.dtype, how: str, cache: Path
) -> None:
    expected = lookups(dtype)
    measured = calibrate(dtype, effort=TINY, timed=DISTURBED[how])
    assert all(threshold.used == threshold.built_in for threshold in measured.thresholds)
    assert not any(threshold.is_measured for threshold in measured.thresholds)
    assert measured.path is None
    assert list(cache.iterdir()) == []
    assert lookups(dtype) == expected
    assert dispatch.source(dtype, threads) == "built-in"
    assert "nothing was clear enough" in calibration_summary(measured)


@native
@pytest.mark.parametrize("ratio", [2.0, 0.5])
def test_what_is_clear_is_used_kept_and_read_again(
    threads: int, ratio: float, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[tuple[int, int]] = []
    measured = calibrate(
        torch.float32, lambda *counts: done.append(counts), effort=TINY, timed=rounds(ratio)
    )
    total = len(measured.thresholds)
    assert done == [(number, total) for number in range(1, total + 1)]
    for threshold in measured.thresholds:
        is_few = threshold.kind == DENSITY and threshold.rows <= 8
        if ratio < 1.0:
            assert threshold.used == 0.0
        elif threshold.kind == DENSITY:
            # A call that tries in vain is as much faster here, so that it may be tried.
            assert threshold.used == max(threshold.built_in, 1.0 if is_few else 0.85)
        else:
            assert threshold.used >= threshold.built_in
    assert measured.path is not None
    assert list(cache.iterdir()) == [measured.path]
    for threshold in measured.thresholds:
        if threshold.kind == DENSITY:
            used = dispatch.max_density_for(
                threshold.rows, threshold.width, torch.float32, threshold.trains
            )
        else:
            used = dispatch.max_candidates_for(threshold.rows, torch.float32, threshold.trains)
        assert used == threshold.used
    said = dispatch.source(torch.float32, threads)
    assert said.startswith("measured on this machine by `steppe calibrate`")
    assert str(measured.path) in said
    assert dispatch.source(torch.bfloat16, threads) == "built-in"
    found = lookups(torch.float32)
    as_another_process(monkeypatch)
    assert lookups(torch.float32) != found
    calibration.use_remembered(torch.float32)
    assert lookups(torch.float32) == found
    assert dispatch.source(torch.float32, threads) == said


@native
def test_what_one_point_says_moves_only_that_threshold(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of all calls only the last of those with 128 rows of width 512 in inference are clear."""
    clear, unclear = rounds(2.0), rounds(2.0, 0.5)
    measure = calibration._measured

    def one_clear(threshold: calibration.Threshold, *others: object) -> calibration.Threshold:
        is_it = (threshold.kind, threshold.width, threshold.rows, threshold.trains) == (
            *(DENSITY, 512, 128),
            False,
        )
        return measure(threshold, *others[:-1], clear if is_it else unclear)

    monkeypatch.setattr(calibration, "_measured", one_clear)
    measured = calibrate(torch.float32, effort=TINY)
    (changed,) = [threshold for threshold in measured.thresholds if threshold.is_measured]
    assert (changed.kind, changed.width, changed.rows) == (DENSITY, 512, 128)
    assert changed.used == 0.85
    built_in, training = dispatch.defaults_for(torch.float32, 1)[512].values()
    look = dispatch.max_density_for
    assert look(127, 512, torch.float32, False) == calibration.reached(built_in, 127)
    assert look(128, 4096, torch.float32, False) == 0.85
    assert look(5000, 4096, torch.float32, False) == 0.85  # more rows only ever gain more
    assert look(128, 511, torch.float32, False) < 0.85
    assert look(128, 512, torch.float32, True) == calibration.reached(training, 128)
    said = calibration_summary(measured)
    assert said.startswith(f"1 of {len(measured.thresholds)} thresholds changed")
    console = Console(width=80, record=True)
    console.print(calibration_table(measured))
    (line,) = [line for line in console.export_text().splitlines() if "measured" in line]
    assert "0.85" in line
    assert "128+" in line


@native
def test_a_call_that_fails_dearly_is_not_tried_where_it_was_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Sparse gains twofold, but a training step that is too dense loses a tenth."""
    costs: list[float] = []
    point = calibration._point

    def pricey(blocks: object, one: Call, other: Call, density: float, *rest: object) -> object:
        is_missed = density == calibration._ALWAYS_DENSE
        costs.append(density)
        return point(blocks, one, other, density, rest[0], rounds(0.9 if is_missed else 2.0))

    monkeypatch.setattr(calibration, "_point", pricey)
    measured = calibrate(torch.float32, effort=TINY)
    trained = [t for t in measured.thresholds if t.kind == DENSITY and t.trains]
    assert trained
    assert {t.used for t in trained if not t.built_in} == {0.0}
    assert {t.used for t in trained if t.built_in} == {0.85}
    assert {t.used for t in measured.thresholds if t.kind == DENSITY and t.rows > 8} >= {0.85}
    assert calibration._ALWAYS_DENSE in costs


@native
def test_when_the_time_is_up_the_rest_is_built_in() -> None:
    measured = calibrate(torch.float32, effort=replace(TINY, seconds=0.0), timed=rounds(2.0))
    assert measured.missing == len(measured.thresholds)
    assert measured.path is None
    assert f"too short for {measured.missing} thresholds" in calibration_summary(measured)


@native
@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
def test_an_interrupted_calibration_leaves_the_old_file(
    error: type[BaseException], cache: Path
) -> None:
    old = calibrate(torch.float32, effort=TINY, timed=rounds(2.0))
    assert old.path is not None
    content, before = old.path.read_bytes(), lookups(torch.float32)
    made = itertools.count()
    slower = rounds(0.5)

    def interrupted(one: Call, other: Call, threads: int) -> Round:
        if next(made) == 5 * LEAST_ROUNDS:
            raise error
        return slower(one, other, threads)

    with pytest.raises(error):
        calibrate(torch.float32, effort=TINY, timed=interrupted)
    assert list(cache.iterdir()) == [old.path]
    assert old.path.read_bytes() == content
    assert lookups(torch.float32) == before


@native
def test_nothing_is_measured_unless_asked_for_and_a_file_is_read_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    reads: list[Path] = []
    read = remembered.read

    def reading(path: Path) -> object:
        reads.append(path)
        return read(path)

    monkeypatch.setattr(remembered, "read", reading)
    monkeypatch.setattr(calibration, "_measured", None)  # calling it is an error
    for dtype in (torch.float32, torch.float32, torch.bfloat16, torch.float64):
        calibration.use_remembered(dtype)
    torch.set_num_threads(2)
    calibration.use_remembered(torch.float32)
    assert len(set(reads)) == len(reads) == 3


@native
@pytest.mark.parametrize("content", ["", "{", "[]", "9" * 5000, '{"density": {"64": 1e999}}'])
def test_a_damaged_file_is_as_none(content: str, cache: Path) -> None:
    expected = lookups(torch.float32)
    cache.mkdir()
    remembered.path_of(torch.float32, 1).write_text(content)
    calibration.use_remembered(torch.float32)
    assert lookups(torch.float32) == expected
    assert dispatch.source(torch.float32, 1) == "built-in"


@native
def test_a_folder_that_cannot_be_written_is_found_out_before_measuring(cache: Path) -> None:
    cache.write_text("a file in the way")
    with pytest.raises(OutputError, match="cannot write"):
        calibrate(torch.float32, effort=TINY, timed=None)  # type: ignore[arg-type]


@native
def test_a_dtype_without_kernels_is_an_error() -> None:
    with pytest.raises(KernelError, match=r"float32 or bfloat16, got torch\.float64"):
        calibrate(torch.float64)


def test_a_machine_without_kernels_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    absent = replace(kernels(), name="reference", isa="", reason="no compiler")
    monkeypatch.setattr(calibration, "kernels", lambda: absent)
    with pytest.raises(KernelError, match="no compiler"):
        calibrate(torch.float32)
    calibration.use_remembered(torch.float32)  # which is no error


@native
def test_the_shares_of_a_screen_are_those_of_candidates_not_densities(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if kernels().unscreened:
        pytest.skip(kernels().unscreened)
    measured = calibrate(torch.float32, effort=TINY, timed=rounds(2.0))
    screened = [t for t in measured.thresholds if t.kind == CANDIDATES]
    assert screened
    for threshold in screened:
        shares = [point.share for point in threshold.points]
        assert len(shares) == len(TINY.screened_densities)
        assert shares == sorted(shares)
        assert all(0.0 <= share <= 1.0 for share in shares)
        if threshold.rows >= 128:
            # All active entries are candidates, and others too.
            for density, share in zip(TINY.screened_densities, shares, strict=True):
                assert 0.5 * density < share < 3 * density


@native
def test_without_vnni_nothing_is_measured_of_the_screen(monkeypatch: pytest.MonkeyPatch) -> None:
    unfit = replace(kernels(), unscreened="no VNNI")
    monkeypatch.setattr(calibration, "kernels", lambda: unfit)
    measured = calibrate(torch.float32, effort=TINY, timed=rounds(2.0))
    assert {threshold.kind for threshold in measured.thresholds} == {DENSITY}


@native
def test_measuring_leaves_the_random_numbers_and_the_clock_works(threads: int) -> None:
    """The one run here with the real clock: at any number of threads, and of any outcome."""
    state = torch.random.get_rng_state()
    measured: Calibration = calibrate(torch.float32, effort=replace(TINY, seconds=2.0))
    assert torch.equal(state, torch.random.get_rng_state())
    assert measured.threads == threads
    for threshold in measured.thresholds:
        assert 0.0 <= threshold.used <= 1.0
        assert threshold.is_measured == (threshold.used != threshold.built_in)
