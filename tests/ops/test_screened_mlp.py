"""A screened block is the block: the same active set, values and gradients as unscreened."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ops.screening_cases import CASES, Make
from steppe.ops import mlp as mlp_op
from steppe.ops.cpu import copies, memory, native_ops, screen
from steppe.ops.cpu.library import kernels
from steppe.ops.reference import Rule, Weights, densify
from steppe.ops.reference import mlp as dense_mlp
from steppe.ops.reference import mlp_backward as dense_backward

native = pytest.mark.skipif(kernels().name != "native", reason=kernels().reason)
DTYPES = [torch.float32, torch.bfloat16]
UNITS = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-9}
RULES = [(1.0, 0.0), (1.0, 0.5), (0.0, 1.0)]


def weights_for(width: int, hidden: int, gated: bool, dtype: torch.dtype, shift: float) -> Weights:
    """Random weights; `shift` moves the pre-activations."""

    def random(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(*shape) * scale).to(dtype)

    return Weights(
        activated=random(hidden, width, scale=width**-0.5),
        activated_bias=(torch.randn(hidden) / 4 + shift).to(dtype),
        up=random(hidden, width, scale=width**-0.5) if gated else None,
        up_bias=random(hidden) if gated else None,
        down=random(hidden, width, scale=hidden**-0.5),
        down_bias=random(width),
    )


def run(
    x: Tensor,
    weights: Weights,
    max_candidates: float,
    trains: bool = True,
    rule: tuple[float, float] = (1.0, 0.0),
    max_density: float = 1.0,
) -> Any:
    arguments = (x, *weights, *rule, None, 0.0, trains, max_density, max_candidates)
    z, _, *saved = mlp_op.mlp(*arguments)
    return z, *saved


def r_of(output: Any, rows: int, hidden: int) -> Tensor:
    """r ``[T, F]`` of an op's outputs."""
    _, r, _, _, index, offsets = output  # as `steppe.ops.cpu.saved.Saved` has them
    if not offsets.numel():
        return r.detach().view(rows, hidden)
    return densify(r.detach(), index, offsets, rows, hidden)


def error(got: Tensor, expected: Tensor) -> float:
    """Relative to the whole tensor; zeros for anything else are 1."""
    scale = expected.double().norm().item()
    difference = (got.double() - expected.double()).norm().item()
    return difference / scale if scale else difference


@pytest.fixture
def screens(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether each call of `find_candidates` has found few enough."""
    seen: list[bool] = []

    def finding(*arguments: Any) -> Any:
        found = screen.find_candidates(*arguments)
        seen.append(found is not None)
        return found

    monkeypatch.setattr(native_ops, "find_candidates", finding)
    return seen


@native
@settings(max_examples=80, deadline=None)
@given(
    rows=st.sampled_from([0, 1, 5, 6, 7, 8, 9, 40, 97, 130]),
    width=st.integers(8, 300),  # in one number all that is summed may cancel
    hidden=st.integers(8, 300),
    shift=st.sampled_from([-9.0, -2.0, -1.0, 0.0, 9.0]),
    gated=st.booleans(),
    rule=st.sampled_from(RULES),
    dtype=st.sampled_from(DTYPES),
    trains=st.booleans(),
    transposed=st.booleans(),
    with_bias=st.booleans(),
    threads=st.sampled_from([1, 3, 17]),
    seed=st.integers(0, 999),
)
def test_the_same_active_set_values_and_gradients(
    rows: int,
    width: int,
    hidden: int,
    shift: float,
    gated: bool,
    rule: tuple[float, float],
    dtype: torch.dtype,
    trains: bool,
    transposed: bool,
    with_bias: bool,
    threads: int,
    seed: int,
) -> None:
    torch.manual_seed(seed)
    torch.set_num_threads(threads)
    weights = weights_for(width, hidden, gated, dtype, shift)
    if not with_bias:
        weights = weights._replace(activated_bias=None, up_bias=None, down_bias=None)
    if transposed:
        weights = weights._replace(activated=weights.activated.T.contiguous().T)
    x = torch.randn(rows, width + 3).to(dtype)[:, 1 : width + 1]
    leaves = [t.detach().requires_grad_() for t in (x, *weights) if t is not None]
    given_ = iter(leaves)
    x, *rest = (None if t is None else next(given_) for t in (x, *weights))
    weights = Weights(*rest)
    with torch.set_grad_enabled(trains):
        for _ in range(2):  # a weight is screened for few rows when it is met again
            got = run(x, weights, 1.0, trains, rule)
        plain = run(x, weights, 0.0, trains, rule)
    r, plain_r = (r_of(output, rows, hidden) for output in (got, plain))
    unsure = near_zero(x, weights)
    assert not (((r != 0) != (plain_r != 0)) & ~unsure).any()
    size = magnitude(x, weights)
    assert bool(((r - plain_r).abs() <= 1e-6 * size + 4 * UNITS[dtype] * plain_r.abs()).all())
    # Sums in another order differ by rounding, which grows as the root of the number of terms.
    rounding = (width + hidden) ** 0.5 * 2.0**-24
    limit = 1e-6 + rounding if dtype == torch.float32 else 2e-2
    assert error(got[0], plain[0]) < limit
    if not trains or not rows:
        return
    # On the support that it has found, the gradients are those of float64.
    grad_z = torch.randn_like(got[0])
    exact = Weights(*[None if w is None else w.detach().double() for w in weights])
    up = plain[2].detach().double()
    if gated:
        up = (x.detach().double() @ exact.up.T + (exact.up_bias if with_bias else 0)).flatten()
    grad_x, grad_weights = dense_backward(
        grad_z.double(),
        None,
        x.detach().double(),
        exact,
        Rule(*rule, 0.0),
        r.double().flatten(),
        up,
        torch.empty(0, dtype=torch.bool),
    )
    wanted = [grad_x, *[grad for grad in grad_weights if grad is not None]]
    grads, plain_grads = (torch.autograd.grad(each[0], leaves, grad_z) for each in (got, plain))
    limit = 4e-6 if dtype == torch.float32 else 4e-2
    for one, twin, other in zip(grads, plain_grads, wanted, strict=True):
        # Of a sum that nearly cancels the unscreened block has as little left.
        assert error(one, other) < max(limit, 1.5 * error(twin, other))


def magnitude(x: Tensor, weights: Weights) -> Tensor:
    """Σ |x_i k_i| + |b|, float64 ``[T, F]``."""
    size = x.detach().double().abs() @ weights.activated.detach().double().abs().T
    bias = weights.activated_bias
    return size if bias is None else size + bias.detach().double().abs()


def near_zero(x: Tensor, weights: Weights) -> Tensor:
    """Where rounding decides the sign of p, bool ``[T, F]``."""
    p = x.detach().double() @ weights.activated.detach().double().T
    if weights.activated_bias is not None:
        p = p + weights.activated_bias.detach().double()
    return p.abs() <= (x.shape[1] + 2) * 2.0**-24 * magnitude(x, weights)


@native
@pytest.mark.parametrize("trains", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_it_is_the_screen_that_is_tested(
    dtype: torch.dtype, trains: bool, screens: list[bool]
) -> None:
    weights = weights_for(128, 512, False, dtype, -1.6)
    for _ in range(2):  # the first time the weight is new, and nothing is kept of it
        del screens[:]
        run(torch.randn(97, 128).to(dtype), weights, 1.0, trains)
    expected = [True, True] if trains else [True]  # in training first of some rows and units
    assert screens == expected
    run(torch.randn(97, 128).to(dtype), weights, 0.0, trains)
    assert screens == expected


@native
def test_more_candidates_than_are_allowed_are_not_screened(screens: list[bool]) -> None:
    weights = weights_for(128, 512, False, torch.float32, -1.6)
    x = torch.randn(960, 128)
    expected = run(x, weights, 0.0)
    screened = screen.screen_of(weights.activated)
    found = screen.find_candidates(x, screened, weights.activated_bias)
    assert found is not None
    share = found.share
    for most, tries in (
        (share / 2, [False]),  # some rows tell
        (share + 0.05, [True, True]),
    ):
        del screens[:]
        got = run(x, weights, most)
        assert screens == tries
        assert torch.equal(r_of(got, 960, 512) != 0, r_of(expected, 960, 512) != 0)
        assert torch.allclose(got[0], expected[0], atol=1e-5)
    # Rows that those looked at first do not stand for.
    del screens[:]
    looked_at = torch.zeros(960, dtype=torch.bool)
    looked_at[screen._sampled_rows(960)] = True
    x[looked_at] = 0.0
    weights.activated_bias.fill_(-0.5)
    expected = run(x, weights, 0.0)
    got = run(x, weights, 0.1)
    assert screens == [True, False]
    assert torch.equal(got[0], expected[0])
    assert torch.equal(got[1], expected[1])


@native
@pytest.mark.parametrize("rows", [6, 60])
def test_a_density_above_the_limit_runs_dense(rows: int) -> None:
    weights = weights_for(128, 512, False, torch.float32, 0.0)
    x = torch.randn(rows, 128)
    for trains in (False, True):
        for _ in range(2):
            z, r, _, _, index, offsets = run(x, weights, 1.0, trains, max_density=0.1)
        assert (index.numel(), offsets.numel(), r.numel()) == (0, 0, rows * 512)
        expected = dense_mlp(x, weights, Rule(1.0, 0.0, 0.0))
        assert torch.allclose(z, expected[0], atol=1e-5)
        assert torch.allclose(r, expected[1], atol=1e-5)
        assert (r > 0).any()


@native
@pytest.mark.parametrize("make", CASES, ids=lambda make: make.__name__)
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_active_set_of_adversarial_inputs_is_a_float32_evaluations(
    make: Make, dtype: torch.dtype
) -> None:
    """Of each unit that float64 cannot doubt, whatever the path."""
    x, weight, bias = (part.to(dtype) for part in make(torch.Generator().manual_seed(0)))
    x = x[:, :4096]
    down = torch.ones(len(weight), x.shape[1], dtype=dtype)
    weights = Weights(weight[:, :4096].contiguous(), bias, None, None, down, None)
    p = x.double() @ weights.activated.double().T + bias.double()
    size = magnitude(x, weights)
    overflows = size >= 2.0**126
    sure = (p.abs() > (x.shape[1] + 2) * 2.0**-24 * size + 2.0**-110) & ~overflows
    for rows in (len(x), 7):
        for trains in (False, True):
            for _ in range(2):
                r = r_of(run(x[:rows], weights, 1.0, trains), min(rows, len(x)), len(weight))
            active = ~(r == 0)
            assert torch.equal(active[sure[:rows]], (p > 0)[:rows][sure[:rows]])


@native
@pytest.mark.parametrize("place", ["x", "activated", "activated_bias", "down"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("rows", [7, 90])
def test_nan_and_infinity_propagate_as_in_dense(value: float, place: str, rows: int) -> None:
    for dtype in DTYPES:
        for trains in (False, True):
            weights = weights_for(64, 200, False, dtype, 0.0)
            x = torch.randn(rows, 64).to(dtype)
            spoilt = x if place == "x" else getattr(weights, place)
            spoilt.view(-1)[3] = value
            for _ in range(2):
                z = run(x, weights, 1.0, trains)[0]
            plain = run(x, weights, 0.0, trains)[0]
            dense = dense_mlp(x, weights, Rule(1.0, 0.0, 0.0))[0]
            wide = Weights(*[None if w is None else w.float() for w in weights])
            if not torch.equal(
                dense.isnan(), dense_mlp(x.float(), wide, Rule(1.0, 0.0, 0.0))[0].isnan()
            ):
                continue  # on AMX torch's own bfloat16 product makes NaN of what is infinite
            # Zero times infinity, which dense computes and a list does not, is NaN there.
            allowed = dense.isnan() if place == "down" else torch.zeros_like(dense, dtype=bool)
            assert torch.equal(z.isnan() | allowed, dense.isnan())
            assert torch.equal(z.isnan(), plain.isnan())
            whole = dense.isfinite()
            assert torch.allclose(z[whole], dense[whole], atol=1e-5 if dtype == DTYPES[0] else 0.1)
            assert not dense.isfinite().all() or value == -math.inf


@native
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_value_is_the_same_bits_however_many_others_are_listed(dtype: torch.dtype) -> None:
    """Of a row alone and among others, of a unit alone and among others."""
    weights = weights_for(200, 330, True, dtype, -0.5)
    x = torch.randn(97, 200).to(dtype)
    whole = run(x, weights, 1.0)
    r, up = (r_of((None, part, *whole[2:]), 97, 330) for part in whole[1:3])
    few = slice(20, 40)
    part_of = run(x[few], weights, 1.0)
    assert torch.equal(r_of(part_of, 20, 330), r[few])
    assert torch.equal(r_of((None, part_of[2], *part_of[2:]), 20, 330), up[few])
    units = torch.arange(330) % 3 == 1
    bias = weights.activated_bias.masked_fill(~units, -math.inf)
    fewer = run(x, weights._replace(activated_bias=bias), 1.0)
    there = r_of(fewer, 97, 330)
    assert int((there != 0).sum()) > 1000
    assert torch.equal(there, torch.where(units, r, 0.0))
    assert torch.equal(fewer[0], run(x, weights._replace(activated_bias=bias), 1.0)[0])


@native
@pytest.mark.parametrize(("width", "hidden"), [(0, 70), (5, 0), (0, 0)])
@pytest.mark.parametrize("rows", [0, 3, 20])
def test_a_block_without_width_or_hidden_units_is_its_biases(
    width: int, hidden: int, rows: int
) -> None:
    bias = torch.arange(float(width))
    x, weight = torch.randn(rows, width), torch.randn(hidden, width)
    weights = Weights(weight, torch.randn(hidden), None, None, weight, bias)
    for trains in (False, True):
        for most in (0.0, 1.0):
            assert torch.equal(run(x, weights, most, trains)[0], bias.expand(rows, width))


@native
def test_a_block_too_wide_for_int32_sums_is_not_screened(screens: list[bool]) -> None:
    width = screen.MAX_WIDTH
    weights = Weights(torch.ones(2, width), None, None, None, torch.ones(2, width), None)
    x = torch.ones(9, width)
    assert torch.equal(run(x, weights, 1.0)[1], torch.full((18,), float(width)))
    assert screens == []
    narrower = Weights(*[None if w is None else w[:, 1:] for w in weights])
    assert torch.equal(run(x[:, 1:], narrower, 1.0)[1], torch.full((18,), width - 1.0))
    assert screens == [True, True]
    assert torch.equal(run(-x[:, 1:], narrower, 1.0)[1], torch.zeros(0))


@native
def test_the_largest_integers_at_the_largest_width_fit() -> None:
    """|I| comes within two per cent of 2³¹; of either sign, in either screen."""
    width = screen.MAX_WIDTH - 1
    # Sixteen times the same in the rotated basis, so that every integer is the largest.
    x = torch.zeros(9, width)
    x[:, : screen.MAX_WIDTH // 16] = 1.0
    weight = torch.cat([x[:1], -x[:1]]).expand(2, width).contiguous()
    for bias in (-8191.0, -8492.0):  # of so many terms 260 are left to rounding
        biases = torch.full((2,), bias)
        found = screen.find_candidates(x, screen.screen_of(weight), biases)
        assert found is not None
        assert found.masks.flatten().tolist() == [1 if bias > -8192 else 0] * 9
        block = Weights(weight, biases, None, None, weight, None)
        for _ in range(2):
            r = run(x[:3], block, 1.0, trains=False)[1]
        assert r.tolist() == [1.0 if bias > -8192 else 0.0, 0.0] * 3
        assert copies.cached_screen(weight).few.share == (0.5 if bias > -8192 else 0.0)


@pytest.mark.parametrize(
    ("dtype", "trains", "gated"),
    [(torch.float32, True, False), (torch.bfloat16, True, True), (torch.float32, False, True)],
)
def test_opcheck(dtype: torch.dtype, trains: bool, gated: bool) -> None:
    x = torch.randn(20, 130, dtype=dtype, requires_grad=trains)
    weights = weights_for(130, 70, gated, dtype, -1.0)
    block = (x, *weights, 1.0, 0.5, torch.tensor(0.5), 0.0, trains, 1.0, 1.0)
    torch.library.opcheck(mlp_op.mlp, block)


def test_the_screened_block_compiles_into_one_graph() -> None:
    weights = weights_for(130, 200, True, torch.float32, -1.0)
    inputs = [t.requires_grad_() for t in (torch.randn(40, 130), *weights) if t is not None]

    def block(*leaves: Tensor) -> Tensor:
        return run(leaves[0], Weights(*leaves[1:]), 1.0)[0]

    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    got = torch.autograd.grad(compiled(*inputs).sum(), inputs)
    expected = torch.autograd.grad(block(*inputs).sum(), inputs)
    for one, other in zip(got, expected, strict=True):
        assert torch.allclose(one, other, atol=1e-6)


@native
def test_what_is_saved_for_backward_is_the_list_alone() -> None:
    weights = weights_for(64, 1024, False, torch.float32, -1.7)
    for weight in weights:
        if weight is not None:
            weight.requires_grad_()
    x = torch.randn(512, 64)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        z = run(x, weights, 1.0)[0]
    known = {t.untyped_storage().data_ptr() for t in (x, z, *weights) if t is not None}
    extra = sum(
        t.untyped_storage().nbytes() for t in saved if t.untyped_storage().data_ptr() not in known
    )
    assert 0 < extra < 512 * 1024 * 4 / 8
    # No view of a buffer that the next call writes to.
    buffers = {t.untyped_storage().data_ptr() for t in memory._scratch._buffers.values()}
    assert not buffers & {t.untyped_storage().data_ptr() for t in saved}
