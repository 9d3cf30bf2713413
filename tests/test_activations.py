"""Activation modules, what counts as ReLU, and derivatives of any activation.

Numbers come from ``oracles``, from closed forms, and from autograd one function at a time.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.activations import ACT2FN

import oracles
from steppe.activations import (
    Activation,
    HasDerivative,
    Rectifier,
    SShapedSquaredReLU,
    derivative,
    evaluate,
    is_relu,
)

ELEMENTWISE = [
    "gelu",
    "gelu_10",
    "gelu_fast",
    "gelu_new",
    "gelu_pytorch_tanh",
    "hardswish",
    "laplace",
    "leaky_relu",
    "linear",
    "mish",
    "quick_gelu",
    "relu2",
    "relu6",
    "sigmoid",
    "silu",
    "swish",
    "tanh",
]


class LearnedSlope(nn.Module):
    """An activation of a user: trainable, and no formula for its derivative."""

    def __init__(self) -> None:
        super().__init__()
        self.slope = nn.Parameter(torch.tensor(0.25, dtype=torch.float64))

    def forward(self, p: Tensor) -> Tensor:
        return torch.where(p > 0, p * p, self.slope * p)


class MemoryEfficientSwish(torch.autograd.Function):
    """SiLU in the form of timm's and Bloom's activations, which torch.func refuses."""

    @staticmethod
    def forward(ctx: Any, p: Tensor) -> Tensor:
        ctx.save_for_backward(p)
        return p * p.sigmoid()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (p,) = ctx.saved_tensors
        s = p.sigmoid()
        return grad * s * (1 + p * (1 - s))


def memory_efficient_swish(p: Tensor) -> Tensor:
    return MemoryEfficientSwish.apply(p)


def name_of(value: object) -> str:
    """The same in every process, which the repr of a function is not."""
    return getattr(value, "__name__", repr(value))


def grid() -> Tensor:
    """float64 ``[7, 7]`` without the kinks at 0, ±1, 3 and 6 of the activations below."""
    return torch.linspace(-7.0, 8.0, 49, dtype=torch.float64).reshape(7, 7) + 0.011


def normal_density(p: Tensor) -> Tensor:
    return torch.exp(-p * p / 2.0) / math.sqrt(2.0 * math.pi)


def normal_distribution(p: Tensor) -> Tensor:
    return 0.5 * (1.0 + torch.erf(p / math.sqrt(2.0)))


def gelu_derivative(p: Tensor) -> Tensor:
    return normal_distribution(p) + p * normal_density(p)


def silu_derivative(p: Tensor) -> Tensor:
    s = 1.0 / (1.0 + torch.exp(-p))
    return s * (1.0 + p * (1.0 - s))


def tanh_gelu_derivative(p: Tensor) -> Tensor:
    c = math.sqrt(2.0 / math.pi)
    t = torch.tanh(c * (p + 0.044715 * p**3))
    return 0.5 * (1.0 + t) + 0.5 * p * (1.0 - t * t) * c * (1.0 + 3.0 * 0.044715 * p * p)


@pytest.mark.parametrize(("alpha", "beta"), [(1.0, 0.0), (1.0, 0.5), (0.0, 1.0), (0.3, 1.7)])
def test_rectifier_module_equals_the_loop(alpha: float, beta: float) -> None:
    module = Rectifier(alpha, beta)
    p = torch.tensor([-2.0, -0.0, 0.0, 0.7, 3.0], dtype=torch.float64)
    values = [oracles.rectifier(entry, alpha, beta) for entry in p.tolist()]
    slopes = [oracles.rectifier_derivative(entry, alpha, beta) for entry in p.tolist()]
    assert module(p).tolist() == pytest.approx(values, rel=1e-15)
    assert module.derivative(p).tolist() == pytest.approx(slopes, rel=1e-15)


def test_rectifier_is_relu_by_default_and_has_no_state() -> None:
    module = Rectifier()
    p = torch.randn(50)
    assert torch.equal(module(p), torch.relu(p))
    assert module.state_dict() == {}
    assert repr(Rectifier(1, 0.5)) == "Rectifier(alpha=1.0, beta=0.5)"


@pytest.mark.parametrize(
    ("alpha", "beta"),
    [
        (-1.0, 0.0),
        (0.0, -1.0),
        (2.0, -1.0),
        (0.0, 0.0),
        # Every comparison with NaN is false.
        (math.nan, 0.0),
        (0.0, math.nan),
    ],
)
def test_rectifier_refuses_what_is_no_rectifier(alpha: float, beta: float) -> None:
    with pytest.raises(ValueError, match=r"alpha ≥ 0 and beta ≥ 0, not both zero; got alpha="):
        Rectifier(alpha, beta)


@pytest.mark.parametrize("shift_x", [-1.6, 0.0, 1.6])
@pytest.mark.parametrize("shift_y", [-1.6, 1.6])
def test_s_shaped_module_equals_the_loop(shift_x: float, shift_y: float) -> None:
    module = SShapedSquaredReLU(shift_x, shift_y, half_width=1.25)
    p = grid().flatten()
    values = [oracles.s_shaped(entry, shift_x, shift_y, 1.25) for entry in p.tolist()]
    assert module(p).tolist() == pytest.approx(values, rel=1e-15)
    q = p.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(module(q).sum(), q)
    torch.testing.assert_close(module.derivative(p), gradient, rtol=1e-15, atol=0)


def test_s_shaped_tells_the_two_densities_apart() -> None:
    module = SShapedSquaredReLU(shift_y=1.6)
    p = torch.tensor([-1.4, 0.0, 1.4])
    assert bool((module(p) != 0).all())
    assert not module.derivative(p).any()
    assert repr(module) == "SShapedSquaredReLU(shift_x=0.0, shift_y=1.6, half_width=1.5)"


@pytest.mark.parametrize("half_width", [0.0, -1.5, math.nan, math.inf])
def test_s_shaped_refuses_a_flat_part_without_width(half_width: float) -> None:
    with pytest.raises(ValueError, match="half_width > 0"):
        SShapedSquaredReLU(half_width=half_width)


@pytest.mark.parametrize("shift", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", ["shift_x", "shift_y"])
def test_s_shaped_refuses_a_shift_that_is_no_number(name: str, shift: float) -> None:
    with pytest.raises(ValueError, match=f"expected finite shifts, .*{name}={shift}"):
        SShapedSquaredReLU(**{name: shift})


@pytest.mark.parametrize(
    "act",
    [
        nn.ReLU(),
        nn.ReLU(inplace=True),
        F.relu,
        torch.relu,
        ACT2FN["relu"],
        Rectifier(),
        Rectifier(1, 0),
        nn.TransformerEncoderLayer(8, 2).activation,
    ],
    ids=name_of,
)
def test_relu_is_told_under_all_its_names(act: Activation) -> None:
    assert is_relu(act)


@pytest.mark.parametrize(
    "act",
    [
        *(ACT2FN[name] for name in ELEMENTWISE),
        nn.LeakyReLU(0.0),
        nn.PReLU(),
        nn.RReLU(),
        nn.Threshold(0.0, 0.0),
        F.gelu,
        F.relu6,
        torch.sin,
        Rectifier(1.0, 0.5),
        Rectifier(0.0, 1.0),
        Rectifier(2.0, 0.0),
        SShapedSquaredReLU(),
    ],
    ids=name_of,
)
def test_nothing_else_is_taken_for_relu(act: Activation) -> None:
    assert not is_relu(act)


@pytest.mark.parametrize(
    ("act", "closed_form"),
    [
        (nn.GELU(), gelu_derivative),
        (F.gelu, gelu_derivative),
        (ACT2FN["gelu"], gelu_derivative),
        (nn.GELU(approximate="tanh"), tanh_gelu_derivative),
        (ACT2FN["gelu_new"], tanh_gelu_derivative),
        (nn.SiLU(), silu_derivative),
        (ACT2FN["silu"], silu_derivative),
        (memory_efficient_swish, silu_derivative),
        (MemoryEfficientSwish.apply, silu_derivative),
        (torch.sin, torch.cos),
        (nn.ReLU(), lambda p: (p > 0).double()),
        (torch.relu, lambda p: (p > 0).double()),
        (ACT2FN["relu2"], lambda p: 2.0 * p.clamp(min=0.0)),
        (Rectifier(1.0, 0.5), lambda p: torch.where(p > 0, 1.0 + p, 0.0)),
        (LearnedSlope(), lambda p: torch.where(p > 0, 2.0 * p, 0.25)),
    ],
    ids=name_of,
)
def test_derivative_has_its_closed_form(
    act: Activation, closed_form: Callable[[Tensor], Tensor]
) -> None:
    torch.testing.assert_close(derivative(act, grid()), closed_form(grid()), rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize("name", ELEMENTWISE)
def test_derivative_of_hugging_faces_activations_is_that_of_autograd(name: str) -> None:
    act = ACT2FN[name]
    p = grid().requires_grad_()
    (gradient,) = torch.autograd.grad(act(p).sum(), p)
    assert gradient.any()
    torch.testing.assert_close(derivative(act, p), gradient, rtol=1e-15, atol=0)


@pytest.mark.parametrize("act", [nn.ReLU(), Rectifier(), F.relu, Rectifier(1.0, 0.5)], ids=name_of)
def test_derivative_at_exactly_zero_is_zero(act: Activation) -> None:
    assert derivative(act, torch.tensor([0.0, -0.0])).tolist() == [0.0, 0.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("act", [nn.ReLU(), nn.GELU(), Rectifier(1.0, 0.5)], ids=name_of)
def test_derivative_keeps_shape_and_dtype_and_has_no_graph(
    act: Activation, dtype: torch.dtype
) -> None:
    p = torch.randn(2, 3, 4).to(dtype).requires_grad_()
    slope = derivative(act, p)
    assert (slope.shape, slope.dtype, slope.requires_grad) == (p.shape, dtype, False)
    assert p.grad is None


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
@pytest.mark.parametrize(
    "act", [nn.GELU(), F.silu, LearnedSlope(), memory_efficient_swish], ids=name_of
)
def test_derivative_is_the_same_whether_gradients_are_on_or_off(
    act: Activation, mode: Callable[[], torch.autograd.grad_mode.no_grad]
) -> None:
    expected = derivative(act, grid())
    with mode():
        got = derivative(act, grid())
    assert torch.equal(got, expected)


@pytest.mark.parametrize("act", [nn.GELU(), memory_efficient_swish], ids=name_of)
def test_hooks_on_saved_tensors_do_not_see_the_derivative(act: Activation) -> None:
    seen: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        seen.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        got = derivative(act, grid())
    assert torch.equal(got, derivative(act, grid()))
    assert not seen


def test_derivative_within_a_function_that_is_differentiated() -> None:
    slope = torch.func.grad(lambda p: (derivative(torch.sin, p) * p).sum())(grid())
    torch.testing.assert_close(slope, torch.cos(grid()), rtol=1e-13, atol=1e-14)


def test_derivative_leaves_the_parameters_of_an_activation_without_gradients() -> None:
    act = LearnedSlope()
    derivative(act, grid())
    assert act.slope.grad is None


@pytest.mark.parametrize("act", [nn.GELU(), nn.ReLU(), Rectifier(1.0, 0.5)], ids=name_of)
def test_derivative_compiles_to_one_graph(act: Activation) -> None:
    compiled = torch.compile(derivative, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(act, grid()), derivative(act, grid()))


def test_an_activations_own_formula_goes_before_autograd() -> None:
    class Stated(nn.Module):
        def forward(self, p: Tensor) -> Tensor:
            return torch.sin(p)

        def derivative(self, p: Tensor) -> Tensor:
            return torch.full_like(p, 7.0)

    assert isinstance(Stated(), HasDerivative)
    assert not isinstance(nn.GELU(), HasDerivative)
    assert derivative(Stated(), torch.zeros(2)).tolist() == [7.0, 7.0]


@pytest.mark.parametrize(
    "act",
    [nn.ReLU(inplace=True), nn.SiLU(inplace=True), nn.LeakyReLU(inplace=True), nn.ReLU(), F.relu],
    ids=name_of,
)
def test_evaluate_and_derivative_leave_p_as_it_was(act: Activation) -> None:
    p = torch.tensor([-2.0, -0.5, 0.0, 3.0])
    before = p.clone()
    value = evaluate(act, p)
    derivative(act, p)
    assert torch.equal(p, before)
    assert torch.equal(value, act(before.clone()))


def test_an_inplace_activation_does_change_p_without_evaluate() -> None:
    p = torch.tensor([-2.0])
    nn.ReLU(inplace=True)(p)
    assert p.item() == 0.0
