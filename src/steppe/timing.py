"""Which of two calls is faster, on a machine where other programs run too.

The two take turns in short rounds. A round in which the system took the processor away is left out
and made again while there is time; what is left has to agree: a call counts as faster only where
the median of the quotients is, beyond what chance allows. Else nothing is said.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from itertools import pairwise
from math import comb, inf

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
        """Of both."""
        return self.one + self.other

    def is_disturbed(self, threads: int) -> bool:
        """Whether other programs have had a part in its times.

        A thread of the team that has to wait shows as a forced switch. So does the calling one, and
        it loses time; it has the processor throughout otherwise, as it works or waits in a loop.

        Args:
            threads: that take part.
        """
        allowed = int(_MOST_SWITCHES * threads * self.seconds)
        return self.switches > allowed or self.own < _LEAST_SHARE * self.seconds


class Verdict(Enum):
    """What the rounds say."""

    FASTER = "faster"  # the other call is, by a twentieth or more
    SLOWER = "slower"
    UNCLEAR = "unclear"


@dataclass(frozen=True)
class Point:
    """What was measured at one density, or share of candidates.

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
        """Of the ratios; NaN of none."""
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
