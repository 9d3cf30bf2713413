"""The rectifier family: values, derivatives, what it keeps for backward, how it compiles.

Numbers come from ``oracles``, from closed forms, and from torch's own ReLU bit by bit.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

import oracles
from steppe.ops.rectifier import (
    Coefficient,
    rectifier,
    rectifier_derivative,
    s_shaped_squared_relu,
    s_shaped_squared_relu_derivative,
)

RELU = (1.0, 0.0)
J_SQUARED_RELU = (1.0, 0.5)
SQUARED_RELU = (0.0, 1.0)
FAMILY = [RELU, J_SQUARED_RELU, SQUARED_RELU, (0.3, 1.7), (2.0, 0.0)]
SHIFTS = [(0.0, 0.0), (1.6, -1.6), (-1.6, 1.6)]
FLOATS = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
BITS = {
    torch.float64: torch.int64,
    torch.float32: torch.int32,
    torch.bfloat16: torch.int16,
    torch.float16: torch.int16,
}


# torch.compile makes an instance of autograd.Function to trace one, and warns itself of that.
traces_a_function = pytest.mark.filterwarnings(
    "ignore:.*should not be instantiated:DeprecationWarning"
)


def grid() -> Tensor:
    """float64 ``[126]``: both signs, both zeros, tiny and large."""
    return torch.cat(
        [
            torch.linspace(-6.0, 6.0, 120, dtype=torch.float64),
            torch.tensor([0.0, -0.0, 1e-30, -1e-30, 1e30, -1e30], dtype=torch.float64),
        ]
    )


def away_from_zero(*shape: int) -> Tensor:
    """float64, both signs, |p| ≥ 0.1: the derivative jumps at 0, where finite differences fail."""
    p = torch.randn(shape, dtype=torch.float64)
    return (p.sign() * (p.abs() + 0.1)).requires_grad_()


def entry_by_entry(scalar: Callable[..., float], p: Tensor, *settings: float) -> Tensor:
    """float64, shape of p."""
    values = [scalar(entry, *settings) for entry in p.flatten().tolist()]
    return torch.tensor(values, dtype=torch.float64).reshape(p.shape)


def value_and_gradient(
    p: Tensor, alpha: Coefficient, beta: Coefficient, upstream: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """a, and ∂(Σ upstream · a)/∂p."""
    p = p.detach().clone().requires_grad_()
    a = rectifier(p, alpha, beta)
    (gradient,) = torch.autograd.grad(a, p, torch.ones_like(a) if upstream is None else upstream)
    return a.detach(), gradient


def saved_storages(run: Callable[[], Tensor], hidden: int) -> tuple[Tensor, set[int]]:
    """The output, and the storages of all tensors of at least `hidden` entries that it saved."""
    saved: set[int] = set()

    def pack(tensor: Tensor) -> Tensor:
        if tensor.numel() >= hidden:
            saved.add(tensor.untyped_storage().data_ptr())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = run()
    return output, saved


@pytest.mark.parametrize(("alpha", "beta"), FAMILY)
def test_values_equal_the_loop(alpha: float, beta: float) -> None:
    expected = entry_by_entry(oracles.rectifier, grid(), alpha, beta)
    torch.testing.assert_close(rectifier(grid(), alpha, beta), expected, rtol=1e-15, atol=0)


@pytest.mark.parametrize(("alpha", "beta"), FAMILY)
def test_derivative_equals_the_loop(alpha: float, beta: float) -> None:
    expected = entry_by_entry(oracles.rectifier_derivative, grid(), alpha, beta)
    got = rectifier_derivative(grid(), alpha, beta)
    torch.testing.assert_close(got, expected, rtol=1e-15, atol=0)


@pytest.mark.parametrize(("alpha", "beta"), FAMILY)
def test_backward_from_the_output_alone_equals_the_loop(alpha: float, beta: float) -> None:
    upstream = torch.randn(grid().shape, dtype=torch.float64)
    _, gradient = value_and_gradient(grid(), alpha, beta, upstream)
    expected = upstream * entry_by_entry(oracles.rectifier_derivative, grid(), alpha, beta)
    torch.testing.assert_close(gradient, expected, rtol=1e-15, atol=0)


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")
@pytest.mark.parametrize(("alpha", "beta"), FAMILY)
def test_gradcheck_and_gradgradcheck_away_from_zero(alpha: float, beta: float) -> None:
    p = away_from_zero(3, 4)
    assert torch.autograd.gradcheck(lambda q: rectifier(q, alpha, beta), p, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(lambda q: rectifier(q, alpha, beta), p)


@pytest.mark.parametrize(("alpha", "beta"), [J_SQUARED_RELU, SQUARED_RELU, (0.3, 1.7)])
def test_second_derivative_is_twice_beta_where_active_and_zero_elsewhere(
    alpha: float, beta: float
) -> None:
    # The backward pass takes a root of the output, and the root of 0 has no derivative.
    p = torch.tensor([-1.0, -0.0, 0.0, 2.0], dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(rectifier(p, alpha, beta).sum(), p, create_graph=True)
    (curvature,) = torch.autograd.grad(slope.sum(), p)
    expected = torch.tensor([0.0, 0.0, 0.0, 2.0 * beta], dtype=torch.float64)
    torch.testing.assert_close(curvature, expected, rtol=1e-15, atol=0)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("alpha", "beta"), FAMILY)
def test_derivative_at_exactly_zero_is_zero(alpha: float, beta: float, dtype: torch.dtype) -> None:
    p = torch.tensor([0.0, -0.0], dtype=dtype)
    assert rectifier_derivative(p, alpha, beta).tolist() == [0.0, 0.0]
    assert value_and_gradient(p, alpha, beta)[1].tolist() == [0.0, 0.0]


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("beta", [0.0, 0, torch.tensor(0.0)], ids=["float", "int", "tensor"])
def test_one_and_zero_is_bit_identical_to_relu(beta: Coefficient, dtype: torch.dtype) -> None:
    limits = torch.finfo(dtype)
    edges = [0.0, -0.0, limits.max, limits.min, limits.tiny, limits.smallest_normal / 4, -1e-30]
    p = torch.cat(
        [torch.tensor(edges, dtype=torch.float64), 100.0 * torch.randn(1000).double()]
    ).to(dtype)
    upstream = torch.randn(p.shape, dtype=dtype)
    q = p.clone().requires_grad_()
    a = torch.relu(q)
    (gradient,) = torch.autograd.grad(a, q, upstream)
    got_a, got_gradient = value_and_gradient(p, 1.0, beta, upstream)
    assert torch.equal(got_a.view(BITS[dtype]), a.detach().view(BITS[dtype]))
    # Where the gradient is zero, its sign is no information: 0 · −1 is −0.
    assert torch.equal((got_gradient + 0.0).view(BITS[dtype]), (gradient + 0.0).view(BITS[dtype]))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(
    ("alpha", "beta"),
    [
        *FAMILY,
        (torch.tensor(1.0, dtype=torch.float64), torch.tensor(0.5, dtype=torch.float64)),
        (1.0, torch.tensor(0.5, dtype=torch.float32)),
    ],
    ids=str,
)
def test_dtype_is_kept(alpha: Coefficient, beta: Coefficient, dtype: torch.dtype) -> None:
    p = torch.randn(5).to(dtype)
    a, gradient = value_and_gradient(p, alpha, beta)
    assert a.dtype == gradient.dtype == rectifier_derivative(p, alpha, beta).dtype == dtype


@pytest.mark.parametrize(("p", "alpha", "beta"), [(256.0, 1.0, 0.5), (150.0, 0.0, 1.0)])
def test_a_finite_half_precision_activation_has_a_finite_gradient(
    p: float, alpha: float, beta: float
) -> None:
    # 4 β a overflows float16 here, a and σ′ do not.
    a, gradient = value_and_gradient(torch.tensor([p], dtype=torch.float16), alpha, beta)
    assert a.isfinite().all()
    assert gradient.item() == pytest.approx(alpha + 2.0 * beta * p, rel=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("alpha", "beta"), [J_SQUARED_RELU, SQUARED_RELU, (0.3, 1.7)])
def test_low_precision_gradients_are_within_a_few_roundings(
    alpha: float, beta: float, dtype: torch.dtype
) -> None:
    p = (4.0 * torch.rand(500) + 0.05).to(dtype)  # 0.05² is a normal number in every dtype
    _, gradient = value_and_gradient(p, alpha, beta)
    expected = entry_by_entry(oracles.rectifier_derivative, p.double(), alpha, beta)
    rtol = 4 * torch.finfo(dtype).eps
    torch.testing.assert_close(gradient.double(), expected, rtol=rtol, atol=0.0)


@pytest.mark.parametrize(("alpha", "beta"), FAMILY)
def test_zero_dimensional_tensors_are_coefficients_as_numbers_are(
    alpha: float, beta: float
) -> None:
    tensors = (torch.tensor(alpha).double(), torch.tensor(beta).double())
    numbers = (float(tensors[0]), float(tensors[1]))
    a, gradient = value_and_gradient(grid(), *tensors)
    expected_a, expected_gradient = value_and_gradient(grid(), *numbers)
    torch.testing.assert_close(a, expected_a, rtol=1e-15, atol=0)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-15, atol=0)
    torch.testing.assert_close(
        rectifier_derivative(grid(), *tensors),
        rectifier_derivative(grid(), *numbers),
        rtol=1e-15,
        atol=0,
    )


@st.composite
def strided(draw: st.DrawFn) -> Tensor:
    """float64 views: permuted, with gaps, expanded; also empty and 0-dim."""
    shape = draw(st.lists(st.integers(0, 4), min_size=0, max_size=3))
    steps = [draw(st.integers(1, 2)) for _ in shape]
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    full = [size * step for size, step in zip(shape, steps, strict=True)]
    p = torch.randn(full, dtype=torch.float64, generator=generator)
    p = p[tuple(slice(None, None, step) for step in steps)]
    p = p.permute(draw(st.permutations(range(p.dim()))))
    return p.unsqueeze(0).expand(draw(st.integers(1, 3)), *p.shape) if draw(st.booleans()) else p


coefficients = st.one_of(
    st.sampled_from([0.0, 0.5, 1.0]), st.floats(0.0, 10.0, allow_subnormal=False)
)


@settings(max_examples=80, deadline=None)
@given(p=strided(), alpha=coefficients, beta=coefficients)
def test_any_shape_strides_and_coefficients_equal_the_loop(
    p: Tensor, alpha: float, beta: float
) -> None:
    before = p.clone()
    a, gradient = value_and_gradient(p, alpha, beta)
    slope = entry_by_entry(oracles.rectifier_derivative, p, alpha, beta)
    torch.testing.assert_close(
        a, entry_by_entry(oracles.rectifier, p, alpha, beta), rtol=1e-15, atol=0
    )
    torch.testing.assert_close(rectifier_derivative(p, alpha, beta), slope, rtol=1e-15, atol=0)
    # √ of what underflows: a < 1e-300 where α and β both are tiny.
    torch.testing.assert_close(gradient, slope, rtol=1e-14, atol=1e-140)
    assert torch.equal(p, before)


@pytest.mark.parametrize(("alpha", "beta"), [RELU, J_SQUARED_RELU, SQUARED_RELU])
def test_nan_and_infinity_propagate(alpha: float, beta: float) -> None:
    p = torch.tensor([float("nan"), float("inf"), float("-inf")])
    a, gradient = value_and_gradient(p, alpha, beta)
    assert a[0].isnan()
    assert a[1:].tolist() == [float("inf"), 0.0]
    assert gradient[2] == 0.0
    if beta > 0:  # σ′ grows without bound
        assert gradient[0].isnan()
        assert gradient[1] == float("inf")


def test_a_tensor_beta_hides_no_nan_and_no_infinity() -> None:
    a, gradient = value_and_gradient(
        torch.tensor([float("nan"), float("inf"), float("-inf")]), 1.0, torch.tensor(0.0)
    )
    assert a.isfinite().tolist() == gradient.isfinite().tolist() == [False, False, True]


@pytest.mark.parametrize(
    ("alpha", "beta"), [*FAMILY, (1.0, torch.tensor(0.0)), (1.0, torch.tensor(0.5))], ids=str
)
def test_the_output_is_the_only_hidden_tensor_kept_for_backward(
    alpha: float, beta: Coefficient
) -> None:
    p = torch.randn(8, 64, requires_grad=True)
    a, saved = saved_storages(lambda: rectifier(p, alpha, beta), hidden=64)
    assert saved == {a.untyped_storage().data_ptr()}


def test_the_check_of_what_is_kept_can_fail() -> None:
    p = torch.randn(8, 64, requires_grad=True)
    a, saved = saved_storages(lambda: p.relu() * (1.0 + 0.5 * p.relu()), hidden=64)
    assert saved - {a.untyped_storage().data_ptr()}


@traces_a_function
@pytest.mark.parametrize(
    ("alpha", "beta"), [RELU, J_SQUARED_RELU, (1.0, torch.tensor(0.25))], ids=str
)
def test_compiles_to_one_graph_with_the_same_gradients(alpha: float, beta: Coefficient) -> None:
    compiled = torch.compile(rectifier, fullgraph=True, backend="aot_eager")
    p = torch.randn(4, 5, requires_grad=True)
    a = compiled(p, alpha, beta)
    (gradient,) = torch.autograd.grad(a.sum(), p)
    expected_a, expected_gradient = value_and_gradient(p, alpha, beta)
    torch.testing.assert_close(a.detach(), expected_a)
    torch.testing.assert_close(gradient, expected_gradient)


@traces_a_function
def test_a_tensor_coefficient_changes_without_recompiling() -> None:
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(rectifier, fullgraph=True, backend=counter)
    p = torch.tensor([-1.0, 2.0])
    beta = torch.tensor(0.0)
    for value in (0.0, 0.25, 0.5):
        assert compiled(p, 1.0, beta.fill_(value)).tolist() == [0.0, 2.0 + 4.0 * value]
    assert counter.frame_count == 1


@pytest.mark.parametrize(("alpha", "beta"), FAMILY)
def test_vmap_of_grad_is_the_derivative(alpha: float, beta: float) -> None:
    p = grid()
    slopes = torch.func.vmap(torch.func.grad(lambda q: rectifier(q, alpha, beta)))(p)
    torch.testing.assert_close(slopes, rectifier_derivative(p, alpha, beta), rtol=1e-15, atol=0)


def test_vmap_maps_over_a_coefficient_too() -> None:
    p = torch.randn(3, 4, dtype=torch.float64)
    betas = torch.tensor([0.0, 0.5, 2.0], dtype=torch.float64)
    together = torch.func.vmap(rectifier, in_dims=(0, None, 0))(p, 1.0, betas)
    alone = torch.stack([rectifier(row, 1.0, float(b)) for row, b in zip(p, betas, strict=True)])
    torch.testing.assert_close(together, alone, rtol=1e-15, atol=0)


@pytest.mark.parametrize(("shift_x", "shift_y"), SHIFTS)
def test_s_shaped_values_equal_the_loop(shift_x: float, shift_y: float) -> None:
    expected = entry_by_entry(oracles.s_shaped, grid(), shift_x, shift_y, 1.5)
    got = s_shaped_squared_relu(grid(), shift_x, shift_y, 1.5)
    torch.testing.assert_close(got, expected, rtol=1e-15, atol=0)


@pytest.mark.parametrize(("shift_x", "shift_y"), SHIFTS)
def test_s_shaped_derivative_is_that_of_autograd(shift_x: float, shift_y: float) -> None:
    p = grid().requires_grad_()
    (gradient,) = torch.autograd.grad(s_shaped_squared_relu(p, shift_x, shift_y).sum(), p)
    got = s_shaped_squared_relu_derivative(p.detach(), shift_x)
    torch.testing.assert_close(got, gradient, rtol=1e-15, atol=0)


def test_s_shaped_derivative_is_zero_on_the_flat_part_only() -> None:
    p = torch.tensor([-4.0, 0.1, 1.6, 3.1, 3.2])
    assert s_shaped_squared_relu_derivative(p, 1.6, 1.5).tolist() == pytest.approx(
        [8.2, 0.0, 0.0, 0.0, 0.2], abs=1e-6
    )
    flat = s_shaped_squared_relu(p[1:4], 1.6, -1.6, 1.5)
    assert flat.tolist() == pytest.approx([-1.6] * 3, abs=1e-6)


def test_s_shaped_passes_gradcheck() -> None:
    assert torch.autograd.gradcheck(
        lambda q: s_shaped_squared_relu(q, 1.6, -1.6), grid()[:20].requires_grad_()
    )


@pytest.mark.parametrize("dtype", FLOATS)
def test_s_shaped_keeps_the_dtype(dtype: torch.dtype) -> None:
    p = torch.randn(3).to(dtype)
    assert s_shaped_squared_relu(p, 1.6, 1.6).dtype == dtype
    assert s_shaped_squared_relu_derivative(p, 1.6).dtype == dtype
