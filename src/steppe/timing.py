"""Which of several calls is faster, on a machine where other programs run too.

Calls take turns in short rounds, and the ratio of two is the median over the rounds of the quotient
of their times. A round in which the system took the processor away is left out, see
`is_disturbed`. A benchmark times its calls for a while (`time_turns`). A calibration goes on until
the rounds agree (`measure_point`): a call counts as faster only where the median of the quotients
is, beyond chance. Otherwise the verdict is that nothing is clear.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from itertools import pairwise
from math import comb, inf
from typing import Any

try:
    import resource
except ImportError:  # there is none on Windows
    resource = None  # type: ignore[assignment]

GAIN = 1.05  # dense time / sparse time from which on sparse is preferred
# How often a second a thread is made to wait for others. Measured: 3 to 25 times where nothing else
# runs, 85 times and more where programs share its core.
_MOST_SWITCHES = 25
_LEAST_SHARE = 0.9  # of a round, that the calling thread has the processor
_OUTLIER = 1.5  # times as long as the median round
_CHANCE = 1 / 64  # that the median lies below the lower bound; the same above the upper
LEAST_ROUNDS = 6  # from which on there are bounds: the least and the largest of six quotients
LEAST_TURNS = 5  # rounds of a benchmark


def is_disturbed(seconds: float, own: float, switches: int, threads: int) -> bool:
    """Whether other programs have had a part in a round's times.

    A thread of the team that has to wait shows as a forced switch. So does the calling one, and it
    loses time; otherwise it has the processor throughout, as it works or waits in a loop.

    Args:
        seconds: of the round, by the clock.
        own: seconds of them in which the calling thread had a processor.
        switches: how often a thread of this process had to give its processor up.
        threads: that take part.
    """
    return switches > int(_MOST_SWITCHES * threads * seconds) or own < _LEAST_SHARE * seconds


@dataclass(frozen=True)
class Round:
    """Two calls, one after the other.

    Attributes:
        one: seconds of the one, by the clock.
        other: seconds of the other.
        own: seconds of both in which the calling thread had a processor.
        switches: how often a thread of this process had to give its processor up.
    """

    one: float
    other: float
    own: float
    switches: int

    @property
    def seconds(self) -> float:
        """The sum of both."""
        return self.one + self.other

    def is_disturbed(self, threads: int) -> bool:
        """See the function of this name.

        Args:
            threads: that take part.
        """
        return is_disturbed(self.seconds, self.own, self.switches, threads)


class Verdict(Enum):
    """The conclusion from the rounds."""

    FASTER = "faster"  # the other call is, by a twentieth or more
    SLOWER = "slower"
    UNCLEAR = "unclear"


@dataclass(frozen=True)
class Point:
    """The measurement at one density, or share of candidates.

    Attributes:
        share: the density, or the share.
        ratios: time of the one call / time of the other, of each round that counts.
        left_out: number of disturbed rounds.
    """

    share: float
    ratios: tuple[float, ...]
    left_out: int = 0

    @property
    def median(self) -> float:
        """The median of the ratios; NaN without any."""
        return statistics.median(self.ratios) if self.ratios else float("nan")

    @property
    def bounds(self) -> tuple[float, float]:
        """See `median_bounds`."""
        return median_bounds(self.ratios)

    @property
    def verdict(self) -> Verdict:
        """Whether the other call is faster, slower, or neither is clear."""
        low, high = self.bounds
        if low > 1.0 and self.median >= GAIN:
            return Verdict.FASTER
        return Verdict.SLOWER if high < 1.0 else Verdict.UNCLEAR


def median_bounds(ratios: Sequence[float], chance: float = _CHANCE) -> tuple[float, float]:
    """Bounds of the median by the sign test, whatever the distribution.

    Of n values the (k + 1)-th least is above the true median with the probability that of n tosses
    of a coin at most k are heads, Σ_{i ≤ k} C(n, i) / 2ⁿ. k is the largest for which this is at
    most `chance`.

    Args:
        ratios: of independent rounds, in any order.
        chance: see above, on each side.

    Returns:
        The lower and the upper bound; 0 and infinity where the values are too few for any.

    Example:
        >>> median_bounds([1.1, 1.5, 1.2, 1.3, 1.4, 1.6])
        (1.1, 1.6)
        >>> median_bounds([1.1, 1.5, 1.2])
        (0.0, inf)
    """
    count, below = len(ratios), 0
    outside = -1
    for heads in range(count):
        below += comb(count, heads)
        if below > chance * 2**count:
            break
        outside = heads
    if outside < 0:
        return 0.0, inf
    ordered = sorted(ratios)
    return ordered[outside], ordered[count - 1 - outside]


def measure_point(
    share: float,
    take: Callable[[], Round],
    threads: int,
    seconds: float,
    clock: Callable[[], float] = time.perf_counter,
) -> Point:
    """Make rounds until they say something, or the time is up.

    Whether they do is looked at when their number has doubled: looking after each would multiply
    the chance of being wrong.

    Args:
        share: of the point.
        take: makes a round.
        threads: that take part in the calls.
        seconds: after which no round begins, once as many were made as a verdict takes.
        clock: tells the time.
    """
    end = clock() + seconds
    rounds: list[Round] = []
    left_out, next_look = 0, LEAST_ROUNDS
    while True:
        made = take()
        if made.is_disturbed(threads):
            left_out += 1
        else:
            rounds.append(made)
        time_is_up = len(rounds) + left_out >= LEAST_ROUNDS and clock() >= end
        if len(rounds) < next_look and not time_is_up:
            continue
        next_look = 2 * len(rounds)
        usual = _without_outliers(rounds)
        ratios = tuple(one.one / one.other for one in usual)
        point = Point(share, ratios, left_out + len(rounds) - len(usual))
        if time_is_up or point.verdict is not Verdict.UNCLEAR:
            return point


def time_round(one: Callable[[], object], other: Callable[[], object], threads: int) -> Round:
    """Make a round of two calls.

    With one thread it is the processor's time that is taken, so that waiting for other programs
    does not count and nothing has to be left out. A team of more waits for the last of it, which
    the processor's time does not show.

    Args:
        one: the one call.
        other: the other.
        threads: that take part.
    """
    if threads == 1:
        start = time.process_time()
        one()
        middle = time.process_time()
        other()
        end = time.process_time()
        return Round(middle - start, end - middle, end - start, 0)
    switches, own, start = _forced_switches(), time.thread_time(), time.perf_counter()
    one()
    middle = time.perf_counter()
    other()
    end = time.perf_counter()
    return Round(
        middle - start,
        end - middle,
        time.thread_time() - own,
        _forced_switches() - switches,
    )


@dataclass(frozen=True)
class PairedTimes:
    """Times of rounds in which two took turns.

    Attributes:
        dense: seconds of each round.
        sparse: seconds of what is compared with it, in the same rounds.
    """

    dense: list[float]
    sparse: list[float]

    def summary(self) -> dict[str, Any]:
        """The medians.

        Returns:
            ``ratio``, the median of dense time / sparse time; its ``quartiles``; the median
            ``dense_ms`` and ``sparse_ms``; the number of ``rounds``.

        Example:
            >>> PairedTimes([0.1, 0.3, 0.4], [0.1, 0.1, 0.2]).summary()["ratio"]
            2.0
        """
        ratio, quartiles = median_ratio(self.dense, self.sparse)
        return {
            "ratio": ratio,
            "quartiles": quartiles,
            "dense_ms": 1e3 * statistics.median(self.dense),
            "sparse_ms": 1e3 * statistics.median(self.sparse),
            "rounds": len(self.dense),
        }


def median_ratio(numerators: Sequence[float], denominators: Sequence[float]) -> tuple[float, Any]:
    """The median of the quotients of each round, and their quartiles.

    Args:
        numerators: seconds of each round.
        denominators: the same.

    Returns:
        The median, and a list of the two quartiles.

    Example:
        >>> median_ratio([1.0, 4.0, 9.0], [1.0, 2.0, 3.0])
        (2.0, [1.5, 2.5])
    """
    ratios = [one / other for one, other in zip(numerators, denominators, strict=True)]
    return statistics.median(ratios), statistics.quantiles(ratios, n=4, method="inclusive")[::2]


def time_pair(
    dense: Callable[[], float],
    sparse: Callable[[], float],
    seconds: float,
    least_rounds: int = LEAST_TURNS,
    threads: int = 1,
) -> PairedTimes:
    """Let two functions take turns, see `time_turns`.

    Args:
        dense: runs once and returns its time in seconds.
        sparse: the same, of the one that is compared with it.
        seconds: how long to go on.
        least_rounds: rounds to make also when that takes longer, at least two.
        threads: that take part.

    Returns:
        The times of each round.
    """
    return PairedTimes(*time_turns([dense, sparse], seconds, least_rounds, threads))


def time_turns(
    runs: Sequence[Callable[[], float]],
    seconds: float,
    least_rounds: int = LEAST_TURNS,
    threads: int = 1,
) -> list[list[float]]:
    """Let functions take turns, after a call of each that does not count.

    Their order is reversed each round. Disturbed rounds are left out if enough are left without
    them; on a machine that is busy throughout, all rounds count.

    Args:
        runs: each runs once and returns its time in seconds.
        seconds: how long to go on.
        least_rounds: rounds to make also when that takes longer, at least two.
        threads: that take part.

    Returns:
        The times of each in each round.
    """
    for run in runs:
        run()
    least = max(least_rounds, 2)
    rounds: list[list[float]] = []
    undisturbed: list[list[float]] = []
    order = list(range(len(runs)))
    end = time.perf_counter() + seconds
    while len(rounds) < least or time.perf_counter() < end:
        switches, own, start = _forced_switches(), time.thread_time(), time.perf_counter()
        times = {place: runs[place]() for place in order}
        taken = time.perf_counter() - start
        own, switches = time.thread_time() - own, _forced_switches() - switches
        rounds.append([times[place] for place in range(len(runs))])
        if not is_disturbed(taken, own, switches, threads):
            undisturbed.append(rounds[-1])
        order.reverse()
    kept = undisturbed if len(undisturbed) >= least else rounds
    return [list(of_one) for of_one in zip(*kept, strict=True)]


def decide(default: float, points: Sequence[Point]) -> float:
    """The threshold that measurements at several points make of a default.

    Where a point says nothing clear, the default's decision stands: the threshold moves no further
    than to the nearest point that speaks against it. Between two neighbours of which one is clearly
    faster and one slower, it is where a straight line between their medians reaches `GAIN`.

    Args:
        default: the threshold if nothing were measured.
        points: at ascending shares.

    Returns:
        A share; 0 where the first point is slower.

    Example:
        >>> faster, slower = Point(0.2, (1.25,) * 6), Point(0.4, (0.85,) * 6)
        >>> decide(0.5, [faster, slower])
        0.3
        >>> decide(0.5, [Point(0.2, ()), slower])
        0.4
        >>> decide(0.5, [Point(0.2, ()), Point(0.4, ())])
        0.5
    """
    if not points:
        return default
    if points[0].verdict is Verdict.SLOWER:
        return 0.0
    low, high = 0.0, 1.0
    for point in points:
        if point.verdict is Verdict.SLOWER:
            high = point.share
            break
        if point.verdict is Verdict.FASTER:
            low = point.share
    else:
        if low == points[-1].share:
            return max(min(default, 1.0), low)
    for left, right in pairwise(points):
        is_crossed = left.verdict is Verdict.FASTER and right.verdict is Verdict.SLOWER
        if is_crossed and right.share == high:
            part = (left.median - GAIN) / (left.median - right.median)
            return round(low + part * (high - low), 3)
    return min(max(default, low), high)


def _without_outliers(rounds: Sequence[Round]) -> list[Round]:
    """The rounds that took about as long as most."""
    if not rounds:
        return []
    usual = _OUTLIER * statistics.median(made.seconds for made in rounds)
    return [made for made in rounds if made.seconds <= usual]


def _forced_switches() -> int:
    """How often threads of this process had to wait for others so far; 0 where nobody counts."""
    if resource is None:
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw
