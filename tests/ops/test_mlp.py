"""The sparse ops against float64, and as PyTorch sees them: gradients, fakes, compilation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from steppe.ops import mlp as mlp_op
from steppe.ops.cpu import calls
from steppe.ops.cpu import native_ops as native_ops  # registers the kernels
from steppe.ops.cpu.decode import DecodeBlock
from steppe.ops.cpu.library import kernels
from steppe.ops.reference import Rule, Weights, densify
from steppe.ops.reference import mlp as dense_mlp
from steppe.ops.reference import mlp_backward as dense_backward

native = pytest.mark.skipif(kernels().name != "native", reason=kernels().reason)
J_SQUARED_RELU = (1.0, 0.5)
RULES = [(1.0, 0.0), J_SQUARED_RELU, (0.0, 1.0)]
EPS = {torch.float32: 2.0**-23, torch.bfloat16: 2.0**-8}


def error(got: Tensor, expected: Tensor) -> float:
    """Relative to the whole tensor; zeros for anything else are 1."""
    scale = expected.norm().item()
    return (got.double() - expected).norm().item() / scale if scale else got.norm().item()


def off(got: Tensor, expected: Tensor, added: Tensor) -> float:
    """The error relative to the exact sum, or to an eighth of the absolute terms it adds up.

    Rounding is relative to the terms, which may be many times their sum.
    """
    size = max(expected.norm().item(), added.norm().item() / 8)
    return (got.double() - expected).norm().item() / size if size else got.norm().item()


def weights_for(
    width: int, hidden: int, gated: bool, dtype: torch.dtype, shift: float = 0.0
) -> Weights:
    """Random weights; `shift` moves the pre-activations."""

    def random(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(*shape) * scale).to(dtype)

    return Weights(
        activated=random(hidden, width, scale=width**-0.5),
        activated_bias=(torch.randn(hidden) / 4 + shift).to(dtype),
        up=random(hidden, width, scale=width**-0.5) if gated else None,
        up_bias=random(hidden) if gated else None,
        down=random(width, hidden, scale=hidden**-0.5).T,
        down_bias=random(width),
    )


def double(weights: Weights) -> Weights:
    return Weights(*[None if w is None else w.detach().double() for w in weights])


def run(
    x: Tensor,
    weights: Weights,
    rule: Rule,
    max_density: float,
    trains: bool = True,
    max_candidates: float = 0.0,
) -> Any:
    z, _, *saved = mlp_op.mlp(
        x,
        *weights,
        rule.alpha,
        rule.beta,
        None,
        rule.dropout,
        trains,
        max_density,
        max_candidates,
    )
    return z, *saved


@native
@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(0, 40),
    width=st.integers(1, 140),
    hidden=st.integers(1, 300),
    shift=st.sampled_from([-9.0, -2.0, -1.0, 0.0, 1.0, 9.0]),
    gated=st.booleans(),
    rule=st.sampled_from(RULES),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    trains=st.booleans(),
    threads=st.sampled_from([1, 3, 17]),
    seed=st.integers(0, 99),
)
@example(  # its only active unit is 5e-4, of terms that are about 1
    rows=3,
    width=33,
    hidden=2,
    shift=-1.0,
    gated=False,
    rule=(1.0, 0.0),
    dtype=torch.float32,
    trains=True,
    threads=1,
    seed=1,
)
def test_forward_and_backward_are_those_of_float64_on_the_same_support(
    rows: int,
    width: int,
    hidden: int,
    shift: float,
    gated: bool,
    rule: tuple[float, float],
    dtype: torch.dtype,
    trains: bool,
    threads: int,
    seed: int,
) -> None:
    torch.manual_seed(seed)
    torch.set_num_threads(threads)
    rule_ = Rule(*rule, 0.0)
    weights = weights_for(width, hidden, gated, dtype, shift)
    leaves = [None if w is None else w.requires_grad_() for w in weights]
    x = torch.randn(rows, width).to(dtype).requires_grad_()
    with torch.set_grad_enabled(trains):
        z, r, up, kept, index, offsets = run(x, weights, rule_, 1.0, trains)
    limit = 12 * EPS[dtype]
    shape = (rows, hidden)
    r_dense = densify(r.detach(), index, offsets, *shape) if offsets.numel() else r.view(shape)
    exact = double(weights)
    p = x.double() @ exact.activated.T + exact.activated_bias
    terms = x.double().abs() @ exact.activated.abs().T + exact.activated_bias.abs()
    active = (p > 0) | (r_dense > 0)  # in float64 a unit near 0 may be on the other side of it
    assert off(r_dense, torch.relu(p), terms * active) <= limit
    up_exact = up_terms = up.double()
    if gated:
        up_exact = (x.double() @ exact.up.T + exact.up_bias).flatten()
        up_terms = (x.double().abs() @ exact.up.abs().T + exact.up_bias.abs()).flatten()
    hidden_exact = rule_.hidden(r_dense.double().flatten(), up_exact, kept)
    expected = hidden_exact.view(shape) @ exact.down + exact.down_bias
    terms = hidden_exact.view(shape).abs() @ exact.down.abs() + exact.down_bias.abs()
    assert off(z, expected, terms) <= limit
    if not trains or rows == 0:
        return
    grad_z = torch.randn_like(z)
    inputs = [tensor for tensor in (x, *leaves) if tensor is not None]
    grads = torch.autograd.grad(z, inputs, grad_z)
    r_exact = r_dense.detach().double().flatten()

    def backward(of: Callable[[Tensor], Tensor], up: Tensor) -> list[Tensor]:
        part = Weights(*(None if w is None else of(w) for w in exact))
        grad, inputs = of(grad_z.double()), of(x.detach().double())
        grad_x, of_weights = dense_backward(
            grad, None, inputs, part, rule_, r_exact, up.detach(), kept
        )
        return [grad_x, *[one for one in of_weights if one is not None]]

    for got, want, added, tensor in zip(
        grads, backward(torch.clone, up_exact), backward(torch.abs, up_terms), inputs, strict=True
    ):
        assert got.stride() == tensor.stride()
        assert off(got, want, added) <= limit


@native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_error_is_at_most_twice_that_of_dense_torch(dtype: torch.dtype) -> None:
    weights = weights_for(768, 3072, False, dtype, shift=-1.0)
    x = torch.randn(256, 768).to(dtype)
    rule = Rule(1.0, 0.0, 0.0)
    z, r, _, _, index, offsets = run(x, weights, rule, 1.0)
    hidden = densify(r, index, offsets, 256, 3072)
    exact = hidden.double() @ weights.down.double() + weights.down_bias.double()
    dense = torch.nn.functional.linear(hidden, weights.down.T, weights.down_bias)
    assert error(z, exact) <= 2 * error(dense, exact)


@native
@pytest.mark.parametrize("rows", [1, 3, 100])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_results_are_the_same_bits_for_any_number_of_threads(rows: int, dtype: torch.dtype) -> None:
    weights = weights_for(130, 777, True, dtype)
    p = torch.randn(rows, 777).to(dtype)
    results = []
    for threads in (1, 2, 3, 17, 64, 2):
        torch.set_num_threads(threads)
        listed = calls.compact(p)
        assert listed is not None
        values, support = listed
        panels = calls.pack(weights.down)
        product = calls.spmm(values, support, panels)
        turned, (turned_values,) = calls.transpose(support, values)
        gradient = calls.spmm(turned_values, turned, calls.pack(product))
        entries = calls.sampled(support, calls.pack(product), panels)
        results.append(
            (values, support.index, support.offsets, product, turned.index, gradient, entries)
        )
        if rows <= calls.DECODE_ROWS:
            x = torch.linspace(-1, 1, rows * 130).view(rows, 130).to(dtype)
            z, r, up = (x.new_empty(rows, width) for width in (130, 777, 777))
            few = DecodeBlock(weights, screens=False, stays=False)
            assert few.run(x, (1.0, 0.5), 1.0, 0.0, (z, r, up))
            results[-1] += (z, r, up)
    for other in results[1:]:
        for first, second in zip(results[0], other, strict=True):
            assert torch.equal(first, second)


@native
def test_what_is_saved_for_backward_is_the_list_alone() -> None:
    weights = weights_for(64, 1024, False, torch.float32, shift=-1.7)
    for weight in weights:
        if weight is not None:
            weight.requires_grad_()
    x = torch.randn(512, 64)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        z = run(x, weights, Rule(1.0, 0.0, 0.0), 1.0)[0]
    known = {t.untyped_storage().data_ptr() for t in (x, z, *weights) if t is not None}
    extra = sum(
        t.untyped_storage().nbytes() for t in saved if t.untyped_storage().data_ptr() not in known
    )
    dense = 512 * 1024 * 4
    assert 0 < extra < dense / 8


def test_above_the_density_limit_the_block_runs_dense_and_keeps_all() -> None:
    weights = weights_for(16, 64, False, torch.float32)
    x = torch.randn(20, 16)
    z, r, _, _, index, offsets = run(x, weights, Rule(1.0, 0.0, 0.0), 0.0)
    assert (index.numel(), offsets.numel(), r.numel()) == (0, 0, 20 * 64)
    expected = torch.relu(x @ weights.activated.T + weights.activated_bias) @ weights.down
    assert torch.allclose(z, expected + weights.down_bias, atol=1e-5)


@native
@pytest.mark.parametrize("threads", [1, 3, 17])
def test_nan_and_infinity_propagate_as_in_dense(threads: int) -> None:
    torch.set_num_threads(threads)
    weights = weights_for(16, 64, False, torch.float32)
    for bad in (float("nan"), float("inf")):
        x = torch.randn(20, 16)
        x[3, 2] = bad
        sparse = run(x, weights, Rule(1.0, 0.0, 0.0), 1.0, trains=False)[0]
        dense = dense_mlp(x, weights, Rule(1.0, 0.0, 0.0))[0]
        assert torch.equal(sparse.isnan().any(1), dense.isnan().any(1))
        assert torch.allclose(sparse[4:], dense[4:], atol=1e-5)


@native
@pytest.mark.parametrize("threads", [1, 3, 17])
@pytest.mark.parametrize("gated", [False, True])
def test_dropout_keeps_the_mean_and_its_gradient_uses_the_same_mask(
    gated: bool, threads: int
) -> None:
    torch.set_num_threads(threads)
    weights = weights_for(32, 4096, gated, torch.float32)
    x = torch.randn(64, 32, requires_grad=True)
    rule = Rule(1.0, 0.5, 0.25)
    z, r, up, kept, index, offsets = run(x, weights, rule, 1.0)
    assert abs(kept.float().mean().item() - 0.75) < 0.01
    grad_z = torch.randn_like(z)
    (got,) = torch.autograd.grad(z, x, grad_z)

    def dense(part: Tensor) -> Tensor:
        return densify(part.detach(), index, offsets, 64, 4096).double().flatten()

    expected, _ = dense_backward(
        grad_z.double(),
        None,
        x.detach().double(),
        double(weights),
        rule,
        dense(r),
        dense(up) if gated else up.double(),
        dense(kept).bool(),
    )
    assert error(got, expected) < 1e-5


def small(gated: bool = True) -> tuple[list[Tensor], Callable[..., Tensor]]:
    """Float64 inputs, and the block as a function of them."""
    x = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    weights = weights_for(4, 70, gated, torch.float64)
    leaves = [w.requires_grad_() for w in weights if w is not None]

    def block(x: Tensor, *leaves: Tensor) -> Tensor:
        given_ = iter(leaves)
        full = Weights(*[None if w is None else next(given_) for w in weights])
        return run(x, full, Rule(*J_SQUARED_RELU, 0.0), 1.0)[0]

    return [x, *leaves], block


@pytest.mark.parametrize("gated", [False, True])
def test_gradcheck_of_the_block(gated: bool) -> None:
    inputs, block = small(gated)
    assert torch.autograd.gradcheck(block, inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_opcheck(dtype: torch.dtype) -> None:
    x = torch.randn(6, 3, dtype=dtype, requires_grad=True)
    weights = weights_for(3, 70, True, dtype)
    rule = 1.0, 0.5, torch.tensor(0.5)
    torch.library.opcheck(mlp_op.mlp, (x, *weights, *rule, 0.0, True, 1.0, 0.0))
    output = mlp_op.mlp(x, *weights, *rule, 0.5, True, 1.0, 0.0, True)
    _, l1, *saved = (part.detach() for part in output)
    torch.library.opcheck(mlp_op.support, (saved, 6, 70, *rule))
    torch.library.opcheck(mlp_op.dropout_mask, (saved, 6, 70))
    backward = (
        torch.randn(6, 3, dtype=dtype),
        torch.randn_like(l1),
        x.detach(),
        *weights,
        *rule,
        0.5,
        *saved,
        [True] * 7,
    )
    torch.library.opcheck(mlp_op.mlp_backward, backward)


def test_the_block_compiles_into_one_graph() -> None:
    inputs, block = small()
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    got = torch.autograd.grad(compiled(*inputs).sum(), inputs)
    expected = torch.autograd.grad(block(*inputs).sum(), inputs)
    for one, other in zip(got, expected, strict=True):
        assert torch.allclose(one, other, atol=1e-12)


def few_block(up: Tensor | None = None, up_bias: Tensor | None = None) -> DecodeBlock:
    matrix = torch.zeros(70, 5)
    weights = Weights(matrix, None, matrix if up is None else up, up_bias, matrix, None)
    return DecodeBlock(weights, screens=False, stays=False)


@native
@pytest.mark.parametrize(
    "call",
    [
        lambda v, s, m: calls.spmm(v[:-1], s, m),
        lambda v, s, m: calls.spmm(v.double(), s, m),
        lambda v, s, m: calls.spmm(v, replace(s, columns=s.columns + 64), m),
        lambda v, s, m: calls.spmm(v, s, m, torch.zeros(3)),
        lambda v, s, m: calls.sampled(s, m, m),
        lambda v, s, m: calls.transpose(replace(s, rows=s.rows + 1), v),
        lambda v, s, m: calls.sampled(s, calls.pack(torch.zeros(20, 5)), torch.zeros(70, 6)),
        lambda v, s, m: calls.spmm(v, s, torch.zeros(71, 5)),
        lambda v, s, m: few_block(up=torch.zeros(71, 5)),
        lambda v, s, m: few_block(up=torch.zeros(70, 6)),
        lambda v, s, m: few_block(up_bias=torch.zeros(5)),
        lambda v, s, m: few_block().run(torch.zeros(9, 5), (1.0, 0.0), 1.0, 0.0, (v, v, v)),
        lambda v, s, m: calls.pack(torch.zeros(3, 3, dtype=torch.float64)),
    ],
)
def test_wrong_lengths_and_dtypes_never_reach_the_native_code(call: Callable[..., Any]) -> None:
    listed = calls.compact(torch.randn(20, 70))
    assert listed is not None
    with pytest.raises(calls.KernelError, match="expected"):
        call(*listed, calls.pack(torch.randn(70, 5)))
