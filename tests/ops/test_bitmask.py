"""The bit-mask pack against loops over entries, in float64."""

from __future__ import annotations

import importlib
import math
import sys

import pytest
import torch
from torch import Tensor

import oracles
from steppe.errors import KernelError, MissingExtraError
from steppe.ops import rectifier
from steppe.ops.bitmask import act_pack, kept_rows, recompute_lost_, unpack_grad

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
RULES = [(1.0, 0.0), (1.0, 0.5), (0.0, 1.0), (0.3, 0.2)]
SHAPES = [(0, 5), (5, 0), (0, 0), (1, 1), (1, 31), (3, 32), (2, 33), (7, 100)]


def pre_activations(rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    return (torch.randn(rows, columns, dtype=torch.float64) - 0.5).to(dtype)


def coefficients(alpha: float, beta: float, dtype: torch.dtype) -> Tensor:
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return torch.tensor([alpha, beta], dtype=wide)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "columns"), SHAPES)
def test_the_pack_is_the_active_entries_in_order(
    rows: int, columns: int, dtype: torch.dtype
) -> None:
    p = pre_activations(rows, columns, dtype)
    _, packed = act_pack(p, coefficients(1, 0, dtype), p.numel())
    values, starts = [], [0]
    words = [[0] * math.ceil(columns / 32) for _ in range(rows)]
    for t in range(rows):
        for i in range(columns):
            if p[t, i] > 0:
                values.append(p[t, i].item())
                words[t][i // 32] += 2 ** (i % 32)
        starts.append(len(values))
    assert packed.starts.tolist() == starts
    assert packed.values[: len(values)].tolist() == values
    assert (packed.words.long() % 2**32).tolist() == words
    assert packed.words.shape == (rows, math.ceil(columns / 32))
    assert (packed.words.dtype, packed.values.dtype) == (torch.int32, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("alpha", "beta"), RULES)
def test_activations_and_gradients(alpha: float, beta: float, dtype: torch.dtype) -> None:
    p, grad_a = pre_activations(6, 70, dtype), torch.randn(6, 70, dtype=torch.float64).to(dtype)
    rule = coefficients(alpha, beta, dtype)
    a, packed = act_pack(p, rule, p.numel())
    grad_p, again = unpack_grad(grad_a, packed, rule)
    expected_a, expected_grad = torch.zeros(2, 6, 70, dtype=torch.float64)
    for t in range(6):
        for i in range(70):
            number = p[t, i].item()
            expected_a[t, i] = oracles.rectifier(number, alpha, beta)
            expected_grad[t, i] = grad_a[t, i].item() * oracles.rectifier_derivative(
                number, alpha, beta
            )
    numbers = torch.finfo(dtype)
    tolerance = {  # one rounding to the dtype, be it to a subnormal number, after some wider ones
        "rtol": numbers.eps / 2 + (1e-15 if dtype == torch.float64 else 4e-7),
        "atol": numbers.smallest_normal * numbers.eps / 2,
    }
    assert a.dtype == grad_p.dtype == dtype
    torch.testing.assert_close(a.double(), expected_a, **tolerance)
    torch.testing.assert_close(grad_p.double(), expected_grad, **tolerance)
    assert torch.equal(again, a)


@pytest.mark.parametrize(("alpha", "beta"), RULES)
def test_the_numbers_of_the_rectifier(alpha: float, beta: float) -> None:
    p = pre_activations(6, 70, torch.float32)
    grad_a, rule = torch.randn(6, 70), coefficients(alpha, beta, torch.float32)
    a, packed = act_pack(p, rule, p.numel())
    assert torch.equal(a, rectifier.rectifier(p, alpha, beta))
    grad_p, _ = unpack_grad(grad_a, packed, rule)
    torch.testing.assert_close(grad_p, grad_a * rectifier.rectifier_derivative(p, alpha, beta))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("alpha", "beta"), [(1.0, 0.0), (0.5, 0.0), (1.0, 0.5)])
def test_numbers_that_are_not_finite_and_zeros(
    alpha: float, beta: float, dtype: torch.dtype
) -> None:
    inf, nan = math.inf, math.nan
    p = torch.tensor([[nan, inf, -inf, 0.0, -0.0, 1.0, -1.0, -inf]], dtype=dtype)
    grad_a = torch.tensor([[2.0, 2.0, nan, inf, -inf, inf, nan, 1.0]], dtype=dtype)
    rule = coefficients(alpha, beta, dtype)
    a, packed = act_pack(p, rule, 8)
    assert packed.words.tolist() == [[0b100011]]
    assert a[0, 0].isnan()
    assert a[0, 1] == inf
    assert a[0, 2:].tolist() == [0.0, 0.0, 0.0, alpha + beta, 0.0, 0.0]
    assert not a[0, 1:].signbit().any()
    grad_p, again = unpack_grad(grad_a, packed, rule)
    assert torch.equal(a.nan_to_num(nan=-7), again.nan_to_num(nan=-7))
    assert grad_p[0, 0].isnan() if beta else grad_p[0, 0] == 2 * alpha
    assert grad_p[0, 1] == (inf if beta else 2 * alpha)
    assert grad_p[0, 2:].tolist() == [0.0, 0.0, 0.0, inf, 0.0, 0.0]


@pytest.mark.parametrize("missing", [0, 1, 17, "all"])
def test_what_does_not_fit_is_reported_and_can_be_packed_again(missing: int | str) -> None:
    p, grad_a = pre_activations(8, 40, torch.float32), torch.randn(8, 40)
    p[3] = -1.0  # a row without values
    rule = coefficients(1.0, 0.5, torch.float32)
    a, whole = act_pack(p, rule, p.numel())
    count = int(whole.starts[-1])
    capacity = 0 if missing == "all" else count - int(missing)
    same, packed = act_pack(p, rule, capacity)
    kept = int(kept_rows(packed))
    assert (kept == 8) == (missing == 0)
    assert torch.equal(same, a)
    assert torch.equal(packed.words, whole.words)
    assert torch.equal(packed.starts, whole.starts)
    end = int(whole.starts[kept])
    assert torch.equal(packed.values[:end], whole.values[:end])

    expected, _ = unpack_grad(grad_a, whole, rule)
    grad_p, again = unpack_grad(grad_a, packed, rule)
    assert torch.equal(grad_p[:kept], expected[:kept])
    assert torch.equal(again[:kept], a[:kept])
    assert torch.equal(grad_p[kept:].isnan(), p[kept:] > 0)
    assert torch.equal(again[kept:].isnan(), p[kept:] > 0)

    _, rest = act_pack(p[kept:], rule, p[kept:].numel())
    grad_rest, again_rest = unpack_grad(grad_a[kept:], rest, rule)
    assert torch.equal(torch.cat([grad_p[:kept], grad_rest]), expected)
    assert torch.equal(torch.cat([again[:kept], again_rest]), a)


def whole_numbers(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """x, W and b whose products and sums are exact in each dtype, whatever the order."""
    shapes = (8, 6), (40, 6), (40,)
    x, weight, bias = (torch.randint(-3, 4, shape).to(dtype) for shape in shapes)
    return x, weight, bias - 4


def unpacked(
    p: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, grad_a: Tensor, capacity: int
) -> tuple[Tensor, Tensor, Tensor]:
    """a of packing; ∂ℓ/∂p and a of unpacking, with what was lost."""
    rule = coefficients(1.0, 0.5, p.dtype)
    a, packed = act_pack(p, rule, capacity)
    grad_p, again = unpack_grad(grad_a, packed, rule)
    recompute_lost_(grad_p, again, grad_a, packed, rule, x, weight, bias)
    return a, grad_p, again


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("missing", [0, 1, 17, "all"])
def test_what_does_not_fit_is_recomputed(missing: int | str, dtype: torch.dtype) -> None:
    x, weight, bias = whole_numbers(dtype)
    x[3], grad_a = 0.0, torch.randn(8, 40).to(dtype)
    bias[bias > 0] = 0.0  # so that the row of x that is zero has no active entry
    p = x @ weight.T + bias
    assert not (p[3] > 0).any()
    count = int((p > 0).sum())
    capacity = 0 if missing == "all" else count - int(missing)
    a, expected, _ = unpacked(p, x, weight, bias, grad_a, count)
    _, grad_p, again = unpacked(p, x, weight, bias, grad_a, capacity)
    assert torch.equal(again, a)
    assert torch.equal(grad_p, expected)
    # Of any strides, without a bias.
    p = x @ weight.T
    a, expected, _ = unpacked(p, x, weight, None, grad_a, p.numel())
    turned = x.T.contiguous().T, weight.T.contiguous().T
    _, grad_p, again = unpacked(p, *turned, None, grad_a, capacity // 2)
    assert torch.equal(again, a)
    assert torch.equal(grad_p, expected)


def test_the_mask_says_what_is_active_whatever_is_recomputed() -> None:
    rule, grad_a = torch.tensor([1.0, 0.5]), torch.ones(2, 3)
    _, packed = act_pack(torch.tensor([[1.0, -1.0, 1.0], [1.0, -1.0, 1.0]]), rule, 2)
    x, weight = torch.tensor([[0.0], [1.0]]), torch.tensor([[-5.0], [5.0], [math.nan]])
    grad_p, a = unpack_grad(grad_a, packed, rule)
    recompute_lost_(grad_p, a, grad_a, packed, rule, x, weight, None)
    assert grad_p[0].tolist() == [2.0, 0.0, 2.0]  # as it was kept
    assert grad_p[1, :2].tolist() == [1.0, 0.0]  # at r = 0, as max(p, 0) is
    assert a[1, :2].tolist() == [0.0, 0.0]
    assert grad_p[1, 2].isnan()
    assert a[1, 2].isnan()


P, RULE = torch.ones(2, 40), torch.tensor([1.0, 0.5])
PACKED = act_pack(P, RULE, 80)[1]


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ((P[0], RULE, 80), "p: expected a contiguous .* matrix"),
        ((P.T, RULE, 80), "strides"),
        ((P.int(), RULE, 80), "floating-point"),
        ((P, RULE, -1), "capacity"),
        ((P, RULE, 3.5), "capacity"),
        ((P, RULE, True), "capacity"),
        ((P, RULE.double(), 80), r"coefficients: .*float32 \[2\]"),
        ((P.double(), RULE, 80), r"coefficients: .*float64 \[2\]"),
        ((P, RULE[:1], 80), "coefficients"),
        ((P, RULE.to("meta"), 80), "on meta"),
    ],
)
def test_packing_refuses_what_does_not_fit(arguments: tuple, match: str) -> None:
    with pytest.raises(KernelError, match=match):
        act_pack(*arguments)


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ((P[0], PACKED, RULE), "grad_a"),
        ((torch.ones(40, 2).T, PACKED, RULE), "grad_a"),
        ((torch.ones(2, 80), PACKED, RULE), "words"),
        ((torch.ones(3, 40), PACKED, RULE), "words"),
        ((P, PACKED._replace(words=PACKED.words.long()), RULE), "words"),
        ((P, PACKED._replace(starts=PACKED.starts[:2]), RULE), "starts"),
        ((P, PACKED._replace(starts=PACKED.starts.int()), RULE), "starts"),
        ((P.half(), PACKED, RULE), "values"),
        ((P, PACKED._replace(values=PACKED.values.view(2, 40)), RULE), "values"),
        ((P, PACKED._replace(values=PACKED.values.to("meta")), RULE), "values"),
        ((P, PACKED, RULE.half()), "coefficients"),
    ],
)
def test_unpacking_refuses_what_does_not_fit(arguments: tuple, match: str) -> None:
    with pytest.raises(KernelError, match=match):
        unpack_grad(*arguments)


X, WEIGHT, BIAS = torch.ones(2, 5), torch.ones(40, 5), torch.ones(40)


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("grad_p", torch.ones(40, 2).T),
        ("a", P.double()),
        ("x", torch.ones(3, 5)),
        ("x", X.half()),
        ("weight", torch.ones(40, 4)),
        ("weight", WEIGHT.to("meta")),
        ("bias", torch.ones(5)),
    ],
)
def test_recomputing_refuses_what_does_not_fit(name: str, part: Tensor) -> None:
    arguments = {
        "grad_p": P.clone(),
        "a": P.clone(),
        "grad_a": P,
        "packed": PACKED,
        "coefficients": RULE,
        "x": X,
        "weight": WEIGHT,
        "bias": BIAS,
    }
    recompute_lost_(**arguments)
    with pytest.raises(KernelError, match=f"recompute_lost_: {name}: expected"):
        recompute_lost_(**{**arguments, name: part})


def test_without_triton_the_kernels_say_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    for name in ("steppe.ops.cuda", "steppe.ops.cuda.pack"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    with pytest.raises(MissingExtraError, match=r"expected Triton.*steppe\.ops\.bitmask"):
        importlib.import_module("steppe.ops.cuda.pack")
