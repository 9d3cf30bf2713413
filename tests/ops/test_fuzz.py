"""Random blocks against float64: shapes, strides, dtypes, threads, gates, biases, activations.

A case is made of its seed alone: ``pytest "tests/ops/test_fuzz.py::test_a_random_block[17]"``.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from steppe.ops.cpu import native_ops as native_ops  # registers the kernels
from steppe.ops.cpu.library import kernels
from steppe.ops.reference import Weights, densify

native = pytest.mark.skipif(kernels().name != "native", reason=kernels().reason)
ROWS = (0, 1, 1, 1, 2, 3, 7, 8, 9, 20, 64, 97)
WIDTHS = (1, 2, 5, 16, 31, 63, 64, 65, 100, 129, 320)
HIDDEN = (1, 3, 16, 17, 63, 64, 65, 127, 200, 300, 700)
THREADS = (1, 1, 2, 3, 4, 5, 8, 9, 16, 17, 33, 64)
RULES = ((1.0, 0.0), (1.0, 0.5), (0.0, 1.0), (0.75, 0.25))
CASES, SLOW_CASES, SLOW_STEP = 240, 2400, 120
# Half the distance from 1 to the next number, and how many roundings a product goes through.
UNITS = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-9}
ROUNDINGS = 8


@dataclass
class Case:
    """A block, and how it is called."""

    x: Tensor
    weights: Weights
    rule: tuple[float, float]
    mix: float | None
    trains: bool
    max_candidates: float
    threads: int

    def __str__(self) -> str:
        """All but the values."""
        tensors = [
            "None" if t is None else f"{tuple(t.shape)} by {t.stride()} at {t.storage_offset()}"
            for t in (self.x, *self.weights)
        ]
        return (
            f"{self.x.dtype}, {self.threads} threads, rule {self.rule}, mix {self.mix},"
            f" trains {self.trains}, max_candidates {self.max_candidates}, " + ", ".join(tensors)
        )


def strided(draw: random.Random, values: Tensor) -> Tensor:
    """The same matrix in one of the ways that it can lie in memory."""
    rows, columns = values.shape
    # Torch's own bfloat16 product multiplies what lies around a row by zero on processors with AMX.
    around = 3e4 if values.dtype == torch.bfloat16 else torch.nan
    way = draw.choice(("plain", "plain", "transposed", "sliced", "offset", "stepped"))
    if way == "transposed":
        return values.T.contiguous().T
    if way == "sliced":
        wide = values.new_full((rows + 2, columns + 5), around)
        wide[1 : rows + 1, 2 : columns + 2] = values
        return wide[1 : rows + 1, 2 : columns + 2]
    if way == "offset":
        flat = values.new_full((rows * columns + 3,), around)
        flat[3:] = values.flatten()
        return flat[3:].view(rows, columns)
    if way == "stepped":
        apart = values.new_full((2 * rows, 3 * columns), around)
        apart[::2, ::3] = values
        return apart[::2, ::3]
    return values.contiguous()


def case_of(seed: int) -> Case:
    draw = random.Random(seed)
    torch.manual_seed(seed)
    rows, width, hidden = draw.choice(ROWS), draw.choice(WIDTHS), draw.choice(HIDDEN)
    dtype = draw.choice((torch.float32, torch.bfloat16))
    shift = draw.choice((-3.0, -1.0, -0.5, 0.0, 1.0))

    def matrix(first: int, second: int, scale: float) -> Tensor:
        # Of a mean: what is summed up does not cancel altogether.
        return strided(draw, ((torch.randn(first, second) + 0.5) * scale).to(dtype))

    def vector(length: int, mean: float = 0.0) -> Tensor | None:
        return None if draw.random() < 0.3 else (torch.randn(length) / 2 + mean).to(dtype)

    gated = draw.random() < 0.5
    weights = Weights(
        activated=matrix(hidden, width, width**-0.5),
        activated_bias=vector(hidden, shift),
        up=matrix(hidden, width, width**-0.5) if gated else None,
        up_bias=vector(hidden) if gated else None,
        down=matrix(hidden, width, hidden**-0.5),
        down_bias=vector(width),
    )
    return Case(
        x=matrix(rows, width, 1.0),
        weights=weights,
        rule=draw.choice(RULES),
        mix=draw.choice((None, None, 0.5)),
        trains=draw.random() < 0.6,
        max_candidates=draw.choice((0.0, 1.0)),
        threads=draw.choice(THREADS),
    )


def run(case: Case, seed: int) -> tuple[tuple[Tensor, ...], Tensor, list[Tensor | None]]:
    """The outputs of the op, a gradient of z, and the gradients of x and the weights."""
    leaves = [
        None if t is None else t.detach().requires_grad_(case.trains)
        for t in (case.x, *case.weights)
    ]
    mix = None if case.mix is None else torch.tensor(case.mix)
    arguments = (*leaves, *case.rule, mix, 0.0, case.trains, 1.0, case.max_candidates)
    before = torch.get_num_threads()
    torch.set_num_threads(case.threads)
    try:
        with torch.set_grad_enabled(case.trains):
            for _ in range(1 if case.trains else 2):  # the second time copies may be used
                z, _, *saved = torch.ops.steppe.mlp(*arguments)
        outputs = z, *saved
        torch.manual_seed(seed + 1)
        grad_z = (torch.randn_like(outputs[0]) + 0.5).to(outputs[0].dtype)
        grads: list[Tensor | None] = [None] * len(leaves)
        if case.trains:
            needed = [leaf for leaf in leaves if leaf is not None]
            found = iter(torch.autograd.grad(outputs[0], needed, grad_z))
            grads = [None if leaf is None else next(found) for leaf in leaves]
    finally:
        torch.set_num_threads(before)
    return tuple(t.detach() for t in outputs), grad_z, grads


def exact(
    x: Tensor, weights: Weights, r: Tensor, grad_z: Tensor, alpha: float, beta: float
) -> dict[str, Tensor | None]:
    """All that the op computes from r on, where r > 0; of absolute values, what is summed up.

    The tensors are float64; x is ``[T, D]``, r ``[T, F]``, grad_z ``[T, D]``.
    """
    gated = weights.up is not None
    zero = x.new_zeros(())
    bias_of = {name: zero if t is None else t for name, t in weights._asdict().items()}
    up = x @ bias_of["up"].T + bias_of["up_bias"] if gated else torch.ones_like(r)
    active = r > 0
    a = alpha * r + beta * r * r
    hidden = a * up
    grad_hidden = grad_z @ weights.down.T
    grad_p = torch.where(active, grad_hidden * up * (alpha + 2 * beta * r), zero)
    grad_up = grad_hidden * a
    grad_x = grad_p @ weights.activated
    return {
        "p": x @ weights.activated.T + bias_of["activated_bias"],
        "up values": up if gated else None,
        "z": hidden @ weights.down + bias_of["down_bias"],
        "x": grad_x + grad_up @ bias_of["up"] if gated else grad_x,
        "activated": grad_p.T @ x,
        "activated_bias": None if weights.activated_bias is None else grad_p.sum(0),
        "up": grad_up.T @ x if gated else None,
        "up_bias": grad_up.sum(0) if weights.up_bias is not None else None,
        "down": hidden.T @ grad_z,
        "down_bias": None if weights.down_bias is None else grad_z.sum(0),
    }


def check(seed: int) -> None:
    """A case, every output of it and every gradient."""
    case = case_of(seed)
    rows, hidden = case.x.shape[0], case.weights.down.shape[0]
    (z, r, up_values, _, index, offsets), grad_z, grads = run(case, seed)
    if offsets.numel():
        r = densify(r, index, offsets, rows, hidden)
        if case.weights.up is not None:
            up_values = densify(up_values, index, offsets, rows, hidden)
    r = r.view(rows, hidden).double()
    doubles = [None if t is None else t.detach().double() for t in (case.x, *case.weights, grad_z)]
    x, *rest, grad = doubles
    assert x is not None
    assert grad is not None
    alpha, beta = case.rule[0], case.rule[1] * (1.0 if case.mix is None else case.mix)
    expected = exact(x, Weights(*rest), r, grad, alpha, beta)
    absolute = Weights(*(None if t is None else t.abs() for t in rest))
    size = exact(x.abs(), absolute, r, grad.abs(), alpha, beta)
    terms = rows + hidden + x.shape[1]
    share = ROUNDINGS * UNITS[z.dtype] + 2 * terms**0.5 * 2.0**-24

    where = f"seed {seed}: {case}"
    p, slack = expected.pop("p"), share * size.pop("p")
    assert ((r - p.relu()).abs() <= slack).all(), f"r, {where}"
    assert not ((r > 0) != (p > 0))[p.abs() > slack].any(), f"active set, {where}"

    got = {"z": z, "up values": up_values.view(rows, hidden) if up_values.numel() else None}
    got |= dict(zip(("x", *Weights._fields), grads, strict=True))
    for name, value in got.items():
        want, limit = expected[name], size[name]
        if value is None or want is None or limit is None:
            assert value is None or name == "up values", f"{name} is there, {where}"
            continue
        assert value.shape == want.shape, f"{name}, {where}"
        assert value.dtype == z.dtype, f"{name}, {where}"
        if name == "up values":  # of the active entries alone
            want, limit, value = (torch.where(r > 0, t.double(), 0.0) for t in (want, limit, value))
        off = (value.double() - want).abs() > share * limit
        assert not off.any(), f"{name}: {int(off.sum())} of {off.numel()} off, {where}"
        blind = want.norm() <= (share * limit).norm()
        assert not blind or want.numel() < 10 or not want.any(), f"{name}: zeros pass, {where}"


@native
@pytest.mark.parametrize("seed", range(CASES))
def test_a_random_block(seed: int) -> None:
    check(seed)


@native
@pytest.mark.slow
@pytest.mark.parametrize("first", range(CASES, CASES + SLOW_CASES, SLOW_STEP))
def test_more_random_blocks(first: int) -> None:
    for seed in range(first, first + SLOW_STEP):
        check(seed)


@native
def test_the_cases_are_of_all_kinds() -> None:
    cases = [case_of(seed) for seed in range(CASES)]
    assert {case.x.dtype for case in cases} == set(UNITS)
    assert {case.threads for case in cases} == set(THREADS)
    assert {len(case.x) for case in cases} == set(ROWS)
    assert sum(len(case.x) == 1 and case.trains and case.threads > 4 for case in cases) >= 5
    assert sum(case.weights.up is not None for case in cases) > CASES / 4
