"""Means over seeds and paired differences between arms, with 95 % intervals."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from scipy import stats

LEVEL = 0.95


@dataclass(frozen=True)
class Interval:
    """A mean and its 95 % interval.

    Attributes:
        mean: of the values.
        half: half the interval's width; NaN of fewer than two values.
        n: number of values.
    """

    mean: float
    half: float
    n: int

    @property
    def excludes_zero(self) -> bool:
        """Whether zero is outside of the interval; False where there is none."""
        return abs(self.mean) > self.half


def mean_interval(values: Sequence[float]) -> Interval:
    """The mean of independent values with Student's t interval, mean ± t · s / √n.

    Args:
        values: one a seed, at least one.

    Example:
        >>> mean_interval([1.0])
        Interval(mean=1.0, half=nan, n=1)
        >>> round(mean_interval([1.0, 2.0, 3.0]).half, 3)
        2.484
    """
    n = len(values)
    mean = math.fsum(values) / n
    if n < 2:
        return Interval(mean, math.nan, n)
    variance = math.fsum((value - mean) ** 2 for value in values) / (n - 1)
    t = float(stats.t.ppf((1 + LEVEL) / 2, n - 1))
    return Interval(mean, t * math.sqrt(variance / n), n)


def paired_difference(values: Sequence[float], baseline: Sequence[float]) -> Interval:
    """The mean of value − baseline over pairs with one seed, with its t interval.

    Args:
        values: of an arm, one a seed.
        baseline: of the baseline, in the same order of seeds.

    Example:
        >>> paired_difference([1.0, 2.0], [0.5, 1.5])
        Interval(mean=0.5, half=0.0, n=2)
    """
    return mean_interval([one - other for one, other in zip(values, baseline, strict=True)])


def paired_change(values: Sequence[float], baseline: Sequence[float]) -> tuple[float, float, float]:
    """The relative change value / baseline − 1, with its 95 % interval.

    The t interval of the mean of log value − log baseline, taken back by exp: the ratio of the
    geometric means, whose interval cannot go below −1.

    Args:
        values: of an arm, one a seed, more than 0.
        baseline: of the baseline, in the same order of seeds, more than 0.

    Returns:
        The change, and both ends of the interval; NaN for ends that there are not.

    Example:
        >>> paired_change([0.5, 1.0], [1.0, 2.0])
        (-0.5, -0.5, -0.5)
    """
    logs = paired_difference([math.log(v) for v in values], [math.log(v) for v in baseline])
    ends = (logs.mean, logs.mean - logs.half, logs.mean + logs.half)
    change, low, high = (math.expm1(end) for end in ends)
    return change, low, high
