"""Intervals against scipy's own tests, and by hand."""

from __future__ import annotations

import math
import random

import pytest
from scipy import stats

from steppe.study.statistics import mean_interval, paired_change, paired_difference


@pytest.mark.parametrize("n", [2, 3, 5, 20])
def test_paired_differences_have_the_interval_of_scipys_paired_t_test(n: int) -> None:
    generator = random.Random(n)
    baseline = [generator.gauss(5, 3) for _ in range(n)]
    values = [one + generator.gauss(0.5, 0.2) for one in baseline]
    ours = paired_difference(values, baseline)
    theirs = stats.ttest_rel(values, baseline).confidence_interval(0.95)
    assert ours.mean - ours.half == pytest.approx(theirs.low, rel=1e-9)
    assert ours.mean + ours.half == pytest.approx(theirs.high, rel=1e-9)
    unpaired = stats.ttest_ind(values, baseline).confidence_interval(0.95)
    assert abs(unpaired.high - unpaired.low) > 2 * ours.half, "pairs cancel what seeds share"


def test_the_interval_of_two_values_by_hand() -> None:
    interval = mean_interval([0.0, 2.0])  # s = √2, so s / √2 = 1, and t(1) = tan(0.475 π)
    assert interval.mean == 1.0
    assert interval.half == pytest.approx(math.tan(0.475 * math.pi), rel=1e-9)
    assert not interval.excludes_zero
    assert mean_interval([1.0, 1.0]).excludes_zero


def test_nineteen_of_twenty_intervals_hold_the_truth() -> None:
    generator = random.Random(0)
    several = [mean_interval([generator.gauss(3, 2) for _ in range(5)]) for _ in range(2000)]
    held = sum(abs(one.mean - 3) <= one.half for one in several) / 2000
    assert held == pytest.approx(0.95, abs=4 * math.sqrt(0.95 * 0.05 / 2000))


def test_one_seed_has_no_interval() -> None:
    assert math.isnan(mean_interval([4.0]).half)
    assert not mean_interval([4.0]).excludes_zero
    assert math.isnan(paired_change([1.0], [2.0])[1])


def test_a_change_is_that_of_the_geometric_means_and_the_interval_that_of_the_logs() -> None:
    values, baseline = [0.1, 0.2, 0.4], [0.2, 0.5, 0.7]
    change, low, high = paired_change(values, baseline)
    assert change == pytest.approx((0.1 * 0.2 * 0.4 / (0.2 * 0.5 * 0.7)) ** (1 / 3) - 1)
    logs = stats.ttest_rel([math.log(v) for v in values], [math.log(v) for v in baseline])
    ends = logs.confidence_interval(0.95)
    assert (low, high) == pytest.approx((math.exp(ends.low) - 1, math.exp(ends.high) - 1))


def test_pairs_must_be_pairs() -> None:
    with pytest.raises(ValueError, match="shorter"):
        paired_difference([1.0, 2.0], [1.0])
