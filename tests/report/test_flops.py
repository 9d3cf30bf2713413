"""FLOPs of the products follow the closed forms."""

from __future__ import annotations

import math

import pytest

from steppe.report import count_flops
from steppe.report.flops import sum_flops

D, F = 3, 10
DENSE = 2 * D * F


def test_each_of_six_products_has_its_own_density() -> None:
    flops = count_flops(D, F, density=0.5, derivative_density=0.25)
    assert [(p.name, p.backward, p.dense, p.sparse) for p in flops.products] == [
        ("up", False, DENSE, DENSE),
        ("down", False, DENSE, 0.5 * DENSE),
        ("∂a", True, DENSE, 0.25 * DENSE),
        ("∂W_down", True, DENSE, 0.5 * DENSE),
        ("∂x", True, DENSE, 0.25 * DENSE),
        ("∂W_up", True, DENSE, 0.25 * DENSE),
    ]
    assert (flops.dense_forward, flops.forward) == (2 * DENSE, 1.5 * DENSE)
    assert (flops.dense_training, flops.training) == (6 * DENSE, 2.75 * DENSE)


def test_a_gated_block_has_nine_products_and_only_the_gate_is_dense() -> None:
    flops = count_flops(D, F, density=0.25, derivative_density=0.5, gated=True)
    shares = {p.name: p.sparse / p.dense for p in flops.products}
    assert shares == {
        "gate": 1.0,
        "up": 0.25,
        "down": 0.25,
        "∂a": 0.5,
        "∂W_down": 0.25,
        "∂x of up": 0.25,
        "∂W_up": 0.25,
        "∂x of gate": 0.5,
        "∂W_gate": 0.5,
    }
    assert sum(p.backward for p in flops.products) == 6


@pytest.mark.parametrize("rho", [0.0, 0.03, 0.5, 1.0])
def test_the_bounds_are_those_of_the_design(rho: float) -> None:
    plain, gated = (count_flops(D, F, rho, rho, gated=gated) for gated in (False, True))
    assert plain.inference_bound == pytest.approx(2 / (1 + rho), rel=1e-12)
    assert plain.training_bound == pytest.approx(6 / (1 + 5 * rho), rel=1e-12)
    assert gated.inference_bound == pytest.approx(3 / (1 + 2 * rho), rel=1e-12)
    assert gated.training_bound == pytest.approx(9 / (1 + 8 * rho), rel=1e-12)


def test_blocks_add_up_by_name_also_of_two_kinds() -> None:
    both = sum_flops([count_flops(D, F, 0.5, 0.5), count_flops(2 * D, F, 0.1, 0.2, gated=True)])
    assert both.dense_training == 6 * DENSE + 9 * 2 * DENSE
    by_name = {product.name: product.sparse for product in both.products}
    assert by_name["down"] == pytest.approx(0.5 * DENSE + 0.1 * 2 * DENSE, rel=1e-12)
    assert len(by_name) == 10  # nine, and the ∂x of a block that has only one


def test_an_unknown_density_is_no_number_of_flops() -> None:
    assert math.isnan(count_flops(D, F, math.nan, math.nan).training)
