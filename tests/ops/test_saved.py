"""What `mlp` saves for backward belongs to the backend: another form, and what a trace knows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv, free_unbacked_symbols

from steppe.ops import bitmask, reference
from steppe.ops import mlp as mlp_op
from steppe.ops.cpu import native_ops as native_ops  # registers the kernels
from steppe.ops.cpu.saved import Saved
from steppe.ops.reference import Rule, Weights

ROWS, WIDTH, HIDDEN = 6, 4, 70
CAPACITY = ROWS * HIDDEN  # a GPU would take what the last steps needed, and a quarter more


def coefficients_of(alpha: float, beta: float, mix: Tensor | None) -> Tensor:
    factor = torch.ones((), dtype=torch.float64) if mix is None else mix.double()
    return torch.stack([torch.full_like(factor, alpha), beta * factor])


def packed_mlp(x: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    """`mlp` in the form of a GPU: a bit mask, row starts and values of fixed capacity."""
    weights, (alpha, beta, mix) = Weights(*arguments[:6]), arguments[6:9]
    p = reference.linear(x, weights.activated, weights.activated_bias)
    a, packed = bitmask.act_pack(p, coefficients_of(alpha, beta, mix), CAPACITY)
    z = reference.linear(a, weights.down.T, weights.down_bias)
    return (
        z,
        mlp_op.no_l1(x),
        packed.values,
        packed.words,
        packed.starts,
        x.new_empty(0),
        x.new_empty(0),
    )


def packed_backward(
    grad_z: Tensor, grad_l1: None, x: Tensor, *arguments: Any
) -> tuple[Tensor, ...]:
    weights, (alpha, beta, mix), saved = Weights(*arguments[:6]), arguments[6:9], arguments[10:15]
    values, words, starts, *_ = saved
    packed = bitmask.Packed(words, starts, values)
    grad_a = grad_z @ weights.down.T
    grad_p, a = bitmask.unpack_grad(grad_a, packed, coefficients_of(alpha, beta, mix))
    grads = (grad_p @ weights.activated, grad_p.T @ x, grad_p.sum(0), None, None)
    wanted = (x, *weights), arguments[15]
    return mlp_op.only_needed((*grads, a.T @ grad_z, grad_z.sum(0)), *wanted)


def packed_support(
    saved: Sequence[Tensor], rows: int, columns: int, alpha: float, *_: Any
) -> tuple[Tensor, Tensor]:
    one = torch.tensor([1.0, 0.0], dtype=torch.float64)
    values, words, starts, *_ = saved
    ones = values.new_ones(rows, columns)
    slopes, a = bitmask.unpack_grad(ones, bitmask.Packed(words, starts, values), one)
    return a != 0, slopes != 0


def packed_fake(x: Tensor, hidden: int, gated: bool, dropout: float) -> mlp_op.Five:
    words = x.new_empty(x.shape[0], -(-hidden // 32), dtype=torch.int32)
    starts = x.new_empty(x.shape[0] + 1, dtype=torch.int64)
    return x.new_empty(CAPACITY), words, starts, x.new_empty(0), x.new_empty(0)


@pytest.fixture
def packed_form(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Another backend in the place of the CPU's."""
    for op, kernel in (
        (mlp_op.mlp, packed_mlp),
        (mlp_op.mlp_backward, packed_backward),
        (mlp_op.support, packed_support),
    ):
        monkeypatch.setitem(op._backend_fns, "cpu", kernel)
    monkeypatch.setitem(mlp_op._fakes, "cpu", packed_fake)
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def block() -> tuple[list[Tensor], Any]:
    """Float64 leaves, and z and the support as a function of them."""
    shapes = ((ROWS, WIDTH), (HIDDEN, WIDTH), (HIDDEN,), (HIDDEN, WIDTH), (WIDTH,))
    leaves = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    mix = torch.tensor(0.5, dtype=torch.float64)

    def run(x: Tensor, up: Tensor, bias: Tensor, down: Tensor, out: Tensor) -> Any:
        rule = 1.0, 0.5, mix
        z, _, *saved = mlp_op.mlp(x, up, bias, None, None, down, out, *rule, 0.0, True, 1.0, 0.0)
        support = mlp_op.support([part.detach() for part in saved], ROWS, HIDDEN, *rule)
        return z, *support

    return leaves, run


def results(leaves: list[Tensor], run: Any) -> list[Tensor]:
    """z, the support and the gradients."""
    z, *support = run(*leaves)
    grads = torch.autograd.grad(z, leaves, torch.ones_like(z).cumsum(1))
    return [z.detach(), *support, *grads]


def test_a_backend_with_another_form_gives_the_same(packed_form: None) -> None:
    leaves, run = block()
    got = results(leaves, run)
    compiled = results(leaves, torch.compile(run, fullgraph=True, backend="aot_eager"))
    x, up, bias, down, out = (leaf.detach() for leaf in leaves)
    rule, weights = Rule(1.0, 0.25, 0.0), Weights(up, bias, None, None, down, out)
    z, r, none, kept = reference.mlp(x, weights, rule)
    grad_z = torch.ones_like(z).cumsum(1)
    grad_x, grads = reference.mlp_backward(grad_z, None, x, weights, rule, r, none, kept)
    active = (r != 0).view(ROWS, HIDDEN)
    expected = [z, active, active, grad_x, *(one for one in grads if one is not None)]
    for one, other, want in zip(got, compiled, expected, strict=True):
        assert torch.equal(one, other)
        assert torch.allclose(one.double(), want.double(), atol=1e-12)


def saved_in_a_trace(device: str) -> list[Tensor]:
    """Fake tensors of the five that a call on a device saves."""
    with FakeTensorMode(shape_env=ShapeEnv()):
        x = torch.empty(ROWS, WIDTH, device=device)
        up, down = (torch.empty(HIDDEN, WIDTH, device=device) for _ in range(2))
        rest = 1.0, 0.5, None, 0.0, True, 1.0, 0.0
        with torch.no_grad():
            return list(mlp_op.mlp(x, up, None, None, None, down, None, *rest))[2:]


def test_only_the_cpu_saves_lengths_that_depend_on_the_data() -> None:
    exact = Saved(*saved_in_a_trace("cpu"))
    for part in (exact.r, exact.indices, exact.offsets):
        assert free_unbacked_symbols(part)
    for device in ("cuda", "meta"):
        saved = saved_in_a_trace(device)
        assert [tuple(part.shape) for part in saved] == [(ROWS * HIDDEN,), (0,), (0,), (0,), (0,)]
        assert not any(map(free_unbacked_symbols, saved))


def test_a_form_of_fixed_capacity_is_known_in_a_trace(packed_form: None) -> None:
    saved = saved_in_a_trace("cpu")
    assert saved[0].shape == (CAPACITY,)
    assert not any(map(free_unbacked_symbols, saved))


@pytest.mark.parametrize("max_density", [0.0, 1.0])
@pytest.mark.parametrize("shift", [-9.0, 0.0])
def test_the_support_is_that_of_r_also_where_nothing_is_active(
    max_density: float, shift: float
) -> None:
    x, up, down = torch.randn(ROWS, WIDTH), torch.randn(HIDDEN, WIDTH), torch.randn(HIDDEN, WIDTH)
    bias, rule = torch.full((HIDDEN,), 5 * shift), (0.0, 1.0, torch.tensor(0.5))
    rest = *rule, 0.25, True, max_density, 0.0
    _, _, *saved = mlp_op.mlp(x, up, bias, None, None, down, None, *rest)
    active, slopes = mlp_op.support(saved, ROWS, HIDDEN, *rule)
    expected = x @ up.T + bias > 0
    assert torch.equal(active, expected)
    assert torch.equal(slopes, expected)
    kept = mlp_op.dropout_mask(saved, ROWS, HIDDEN)
    assert (kept.shape, kept.dtype) == ((ROWS * HIDDEN,), torch.bool)
    assert not expected.any() or 0.5 < kept.view(ROWS, HIDDEN)[expected].float().mean() < 1.0
