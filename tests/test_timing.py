"""What rounds of two calls say, and what is made of it, without a clock."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterable, Iterator

import pytest

from steppe import timing
from steppe.timing import (
    GAIN,
    LEAST_ROUNDS,
    Point,
    Round,
    Verdict,
    decide,
    measure_point,
    median_bounds,
    time_round,
)

FAST, SLOW = 1.25, 0.85
FASTER, SLOWER = (FAST,) * LEAST_ROUNDS, (SLOW,) * LEAST_ROUNDS
UNCLEAR = (FAST, SLOW) * LEAST_ROUNDS


def quiet(ratio: float = 1.0, seconds: float = 0.01) -> Round:
    return Round(ratio * seconds, seconds, own=(1 + ratio) * seconds, switches=0)


def disturbed(ratio: float) -> Round:
    return Round(ratio * 0.01, 0.01, own=0.004, switches=7)


def measured(rounds: Iterable[Round], seconds: float = 1e9, threads: int = 2) -> tuple[Point, int]:
    """The point that comes of rounds, which take a second each, and how many were made."""
    made = iter(rounds)
    taken: list[Round] = []

    def take() -> Round:
        taken.append(next(made))
        return taken[-1]

    point = measure_point(0.5, take, threads, seconds, clock=lambda: float(len(taken)))
    return point, len(taken)


@pytest.mark.parametrize("count", range(1, 40))
def test_the_median_is_outside_its_bounds_as_rarely_as_promised(count: int) -> None:
    values = [float(value) for value in range(count)]
    low, high = median_bounds(random.Random(0).sample(values, count))
    if low == 0.0 and math.isinf(high):
        assert 0.5**count > 1 / 64  # even the least of all is above the median too often
        return
    below = int(low)  # so many values are below the bound
    assert high == count - 1 - below
    # The bound is above the median if at most so many of the values are below the median.
    chance = sum(math.comb(count, heads) for heads in range(below + 1)) / 2**count
    assert chance <= 1 / 64
    assert chance + math.comb(count, below + 1) / 2**count > 1 / 64  # the next would not do


@pytest.mark.parametrize(
    ("ratios", "verdict"),
    [
        (FASTER, Verdict.FASTER),
        (SLOWER, Verdict.SLOWER),
        (UNCLEAR, Verdict.UNCLEAR),
        ((), Verdict.UNCLEAR),
        (FASTER[1:], Verdict.UNCLEAR),  # too few
        (SLOWER[1:], Verdict.UNCLEAR),
        ((GAIN - 0.01,) * 20, Verdict.UNCLEAR),  # faster, but by too little
        ((*FASTER, 0.99), Verdict.UNCLEAR),  # of seven none may be on the other side
        ((*FASTER * 2, 0.99), Verdict.FASTER),
    ],
)
def test_a_verdict_needs_an_interval_clear_of_one(
    ratios: tuple[float, ...], verdict: Verdict
) -> None:
    assert Point(0.5, ratios).verdict is verdict


@pytest.mark.parametrize(
    ("made", "threads", "is_disturbed"),
    [
        (Round(0.01, 0.01, own=0.02, switches=0), 1, False),
        (Round(0.01, 0.01, own=0.02, switches=1), 1, True),
        (Round(0.01, 0.01, own=0.019, switches=1), 2, False),
        (Round(0.01, 0.01, own=0.017, switches=0), 2, True),  # the caller had to wait
        (Round(0.5, 0.5, own=1.0, switches=25), 1, False),
        (Round(0.5, 0.5, own=1.0, switches=26), 1, True),
    ],
)
def test_a_round_is_disturbed_where_threads_had_to_wait(
    made: Round, threads: int, is_disturbed: bool
) -> None:
    assert made.is_disturbed(threads) is is_disturbed


def test_disturbed_rounds_are_made_again_and_never_counted() -> None:
    turns = itertools.cycle([disturbed(SLOW), quiet(FAST)])
    point, made = measured(turns)
    assert point.ratios == FASTER
    assert point.left_out == made - len(FASTER) == LEAST_ROUNDS


def test_where_all_rounds_are_disturbed_nothing_is_said_and_it_ends() -> None:
    point, made = measured(itertools.repeat(disturbed(SLOW)), seconds=30.0)
    assert point.ratios == ()
    assert point.verdict is Verdict.UNCLEAR
    assert point.left_out == made
    assert made == 30


def test_rounds_go_on_while_they_disagree_and_until_the_time_is_up() -> None:
    point, made = measured(itertools.cycle([quiet(FAST), quiet(SLOW)]), seconds=50.0)
    assert point.verdict is Verdict.UNCLEAR
    assert len(point.ratios) == made
    assert made == 50
    # As many as a verdict takes are made also where there is no time at all.
    assert measured(itertools.repeat(quiet(FAST)), seconds=0.0) == (Point(0.5, FASTER), 6)


def test_a_round_that_took_much_longer_than_most_does_not_count() -> None:
    rounds = [quiet(FAST)] * 5 + [quiet(SLOW, seconds=0.1)] + [quiet(FAST)] * 20
    point, _ = measured(rounds)
    assert SLOW not in [round(ratio, 6) for ratio in point.ratios]
    assert point.left_out == 1
    assert point.verdict is Verdict.FASTER


def verdicts(*given: tuple[float, tuple[float, ...]]) -> list[Point]:
    return [Point(share, ratios) for share, ratios in given]


@pytest.mark.parametrize("default", [0.0, 0.1, 0.3, 0.5, 1.0])
@pytest.mark.parametrize("ratios", [(), UNCLEAR, SLOWER[1:], (0.01,) * 5, (1.04,) * 50])
def test_without_a_clear_point_the_default_stands(
    default: float, ratios: tuple[float, ...]
) -> None:
    shares = (0.05, 0.2, 0.6)
    assert decide(default, [Point(share, ratios) for share in shares]) == default
    assert decide(default, []) == default


@pytest.mark.parametrize(
    ("points", "by_default"),
    [
        # A clear point moves the threshold to itself and no further.
        ([(0.2, UNCLEAR), (0.4, SLOWER)], {0.0: 0.0, 0.3: 0.3, 0.9: 0.4}),
        ([(0.2, FASTER), (0.4, UNCLEAR)], {0.0: 0.2, 0.3: 0.3, 0.9: 0.9}),
        ([(0.2, UNCLEAR), (0.4, FASTER)], {0.0: 0.4, 0.5: 0.5, 1.0: 1.0}),
        ([(0.1, FASTER), (0.2, UNCLEAR), (0.4, SLOWER)], {0.0: 0.1, 0.3: 0.3, 0.9: 0.4}),
        # Between neighbours it is where the medians cross GAIN, half way from 1.25 to 0.85.
        ([(0.2, FASTER), (0.4, SLOWER)], {0.0: 0.3, 0.25: 0.3, 1.0: 0.3}),
        ([(0.2, FASTER), (0.4, FASTER)], {0.0: 0.4, 0.3: 0.4, 1.0: 1.0}),
        # At 1 nothing is clear, and there is nothing beyond it.
        ([(0.5, FASTER), (1.0, (1.1, 0.9) * 6)], {0.0: 0.5, 0.7: 0.7, 1.0: 1.0}),
        ([(0.5, FASTER), (1.0, (1.2, 0.98) * 6)], {0.0: 0.5, 0.7: 0.7, 1.0: 1.0}),
        ([(0.2, SLOWER)], {0.0: 0.0, 0.3: 0.0, 1.0: 0.0}),
    ],
)
def test_clear_points_move_the_threshold(
    points: list[tuple[float, tuple[float, ...]]], by_default: dict[float, float]
) -> None:
    for default, threshold in by_default.items():
        assert decide(default, verdicts(*points)) == pytest.approx(threshold)


def true_ratio(density: float) -> float:
    """Of a machine on which sparse is faster up to density 0.5: T = 1 / (0.5 + ρ)."""
    return 1.0 / (0.5 + density)


def noisy(density: float, rng: random.Random, busy: float) -> Iterator[Round]:
    """Rounds of which a share is slowed down, and shows it; the others scatter by a fiftieth."""
    while True:
        scatter = rng.gauss(1.0, 0.02)
        if rng.random() < busy:
            late = rng.choice([0.2, 5.0])
            yield Round(0.01 * true_ratio(density) * late, 0.01, own=0.002, switches=3)
        else:
            yield quiet(true_ratio(density) * scatter)


@pytest.mark.parametrize("busy", [0.0, 0.3, 0.7, 0.95, 1.0])
@pytest.mark.parametrize("default", [0.1, 0.4, 0.7])
def test_beside_busy_programs_the_threshold_is_the_quiet_one_or_nearer_to_the_default(
    busy: float, default: float
) -> None:
    densities = (0.05, 0.2, 0.4, 0.6, 0.85)
    quiet_threshold = 1 / GAIN - 0.5  # where the true ratio is GAIN
    for seed in range(10):
        rng = random.Random(seed)
        points = []
        for density in densities:
            points.append(measured(noisy(density, rng, busy), seconds=60.0)[0])
            if points[-1].verdict is Verdict.SLOWER:
                break
        threshold = decide(default, points)
        nearest = min(quiet_threshold, default) - 0.05, max(quiet_threshold, default) + 0.05
        assert nearest[0] <= threshold <= nearest[1]
        assert threshold > 0.0
        if busy == 0.0:
            assert threshold == pytest.approx(quiet_threshold, abs=0.06)
        if busy == 1.0:
            assert threshold == default


@pytest.mark.parametrize("threads", [1, 2])
def test_a_round_calls_both_once_and_in_order(threads: int) -> None:
    called: list[str] = []
    made = time_round(lambda: called.append("one"), lambda: called.append("other"), threads)
    assert called == ["one", "other"]
    assert min(made.one, made.other, made.own, made.switches) >= 0


def test_one_thread_is_timed_by_the_processor_so_that_waiting_does_not_count(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clocks = {"process_time": iter([1.0, 1.5, 2.5]), "perf_counter": iter([])}
    for name, values in clocks.items():
        monkeypatch.setattr(timing.time, name, values.__next__)
    made = time_round(list, list, threads=1)
    assert (made.one, made.other) == (0.5, 1.0)
    assert not made.is_disturbed(1)


def test_a_team_is_timed_by_the_clock_and_what_it_waited_is_seen(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clocks = {"perf_counter": iter([1.0, 1.5, 2.5]), "thread_time": iter([7.0, 8.0])}
    for name, values in clocks.items():
        monkeypatch.setattr(timing.time, name, values.__next__)
    monkeypatch.setattr(timing, "_forced_switches", iter([10, 13]).__next__)
    made = time_round(list, list, threads=2)
    assert made == Round(0.5, 1.0, own=1.0, switches=3)
    assert made.is_disturbed(2)
