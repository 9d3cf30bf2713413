"""The kernels in the interpreter give the bits of their twin, and touch only what is theirs."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from ops.cuda import interpreter
from steppe.errors import KernelError
from steppe.ops import bitmask
from steppe.ops.cuda import pack

pytestmark = [interpreter.NEEDED, pytest.mark.usefixtures("poisoned")]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [  # T, F: within a word, a word, a step; just below and above; several steps, ragged
    (0, 8), (3, 0), (1, 1), (1, 31), (2, 32), (3, 33), (5, 63), (4, 64), (2, 65), (1, 200),
    (7, 130), (3, 256),
]  # fmt: skip
RULES = [(1.0, 0.0), (0.5, 0.0), (1.0, 0.5), (0.0, 1.0)]
GUARD = 256  # entries on either side, more than a step of 64 columns and its words
POISON = {torch.int32: 0x5A5A5A5A, torch.int64: 0x5A5A5A5A}  # elsewhere NaN


def same_bits(one: Tensor, other: Tensor) -> bool:
    """NaN is NaN, and −0 is not 0."""
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    if not one.is_floating_point():
        return torch.equal(one, other)
    nan = one.isnan()
    integers = {2: torch.int16, 4: torch.int32}[one.element_size()]
    return torch.equal(nan, other.isnan()) and torch.equal(
        one[~nan].view(integers), other[~nan].view(integers)
    )


def pre_activations(rows: int, columns: int, dtype: torch.dtype, shift: float = -0.5) -> Tensor:
    return (torch.randn(rows, columns) + shift).to(dtype)


def coefficients(alpha: float, beta: float) -> Tensor:
    return torch.tensor([alpha, beta])


class Guarded:
    """A tensor between two stretches of poison."""

    def __init__(self, content: Tensor) -> None:
        self.poison = POISON.get(content.dtype, math.nan)
        self.memory = torch.full((content.numel() + 2 * GUARD,), self.poison, dtype=content.dtype)
        self.tensor = self.memory[GUARD : GUARD + content.numel()].view(content.shape)
        self.tensor.copy_(content)

    @classmethod
    def fresh(cls, *shape: int, dtype: torch.dtype) -> Guarded:
        """One to write to, poison all through."""
        return cls(torch.full(shape, POISON.get(dtype, math.nan), dtype=dtype))

    def is_whole(self) -> bool:
        """Whether nothing was written outside."""
        outside = torch.cat([self.memory[:GUARD], self.memory[-GUARD:]])
        return same_bits(outside, torch.full_like(outside, self.poison))


def assert_same_pack(packed: bitmask.Packed, expected: bitmask.Packed) -> None:
    """All that is defined of both."""
    assert same_bits(packed.words, expected.words)
    assert same_bits(packed.starts, expected.starts)
    end = int(expected.starts[bitmask.kept_rows(expected)])
    assert same_bits(packed.values[:end], expected.values[:end])
    assert packed.values.shape == expected.values.shape


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "columns"), SHAPES)
def test_shapes(rows: int, columns: int, dtype: torch.dtype) -> None:
    p, grad_a = (pre_activations(rows, columns, dtype) for _ in range(2))
    rule = coefficients(1.0, 0.5)
    expected_a, expected = bitmask.act_pack(p, rule, p.numel())
    a, packed = pack.act_pack(p, rule, p.numel(), block=64)
    assert same_bits(a, expected_a)
    assert_same_pack(packed, expected)
    expected_grad, _ = bitmask.unpack_grad(grad_a, expected, rule)
    grad_p, again = pack.unpack_grad(grad_a, packed, rule, block=64)
    assert same_bits(grad_p, expected_grad)
    assert same_bits(again, expected_a)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shift", [-9.0, -1.7, 0.0, 9.0])
@pytest.mark.parametrize(("alpha", "beta"), RULES)
def test_rules_and_densities(alpha: float, beta: float, shift: float, dtype: torch.dtype) -> None:
    p, grad_a = pre_activations(3, 100, dtype, shift), pre_activations(3, 100, dtype)
    rule = coefficients(alpha, beta)
    expected_a, expected = bitmask.act_pack(p, rule, 300)
    a, packed = pack.act_pack(p, rule, 300, block=64)
    assert same_bits(a, expected_a)
    assert_same_pack(packed, expected)
    assert [
        same_bits(*pair)
        for pair in zip(
            pack.unpack_grad(grad_a, packed, rule, block=64),
            bitmask.unpack_grad(grad_a, expected, rule),
            strict=True,
        )
    ] == [True, True]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("alpha", "beta"), RULES)
def test_numbers_that_are_not_finite_zeros_and_the_smallest(
    alpha: float, beta: float, dtype: torch.dtype
) -> None:
    limits = torch.finfo(dtype)
    smallest = limits.smallest_normal * limits.eps
    special = [math.nan, math.inf, -math.inf, 0.0, -0.0, smallest, -smallest, limits.max]
    p = torch.tensor(special).to(dtype).repeat(8, 8)
    grad_a = torch.tensor(special).to(dtype).repeat_interleave(8).repeat(8, 1)
    rule = coefficients(alpha, beta)
    expected_a, expected = bitmask.act_pack(p, rule, p.numel())
    a, packed = pack.act_pack(p, rule, p.numel(), block=32)
    assert same_bits(a, expected_a)
    assert_same_pack(packed, expected)
    for one, other in zip(
        pack.unpack_grad(grad_a, packed, rule, block=32),
        bitmask.unpack_grad(grad_a, expected, rule),
        strict=True,
    ):
        assert same_bits(one, other)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("missing", [0, 1, 40, "all"])
def test_overflow(missing: int | str, dtype: torch.dtype) -> None:
    p, grad_a = pre_activations(5, 70, dtype), pre_activations(5, 70, dtype)
    p[2] = -1.0
    rule = coefficients(1.0, 0.5)
    count = int((p > 0).sum())
    capacity = 0 if missing == "all" else count - int(missing)
    expected_a, expected = bitmask.act_pack(p, rule, capacity)
    a, packed = pack.act_pack(p, rule, capacity, block=64)
    assert (int(bitmask.kept_rows(packed)) == 5) == (missing == 0)
    assert same_bits(a, expected_a)
    assert_same_pack(packed, expected)
    for one, other in zip(
        pack.unpack_grad(grad_a, packed, rule, block=64),
        bitmask.unpack_grad(grad_a, expected, rule),
        strict=True,
    ):
        assert same_bits(one, other)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "columns", "missing"), [(1, 1, 0), (3, 70, 0), (3, 70, 9)])
def test_nothing_outside_is_read_or_written(
    rows: int, columns: int, missing: int, dtype: torch.dtype
) -> None:
    p, grad_a = (Guarded(pre_activations(rows, columns, dtype, 0.5).abs()) for _ in range(2))
    p.tensor[:, ::3] *= -1
    if columns > 1:
        p.tensor[:, -1] = 1.0  # a read past a row's end would be of the next one
    rule, capacity = Guarded(coefficients(1.0, 0.5)), int((p.tensor > 0).sum()) - missing
    expected_a, expected = bitmask.act_pack(p.tensor, rule.tensor, capacity)
    starts = Guarded.fresh(rows + 1, dtype=torch.int64)
    pack.count_rows[(rows,)](p.tensor, starts.tensor, columns, BLOCK=64)
    assert starts.tensor.tolist() == [0, *expected.starts.diff().tolist()]
    assert starts.is_whole()

    starts = Guarded(expected.starts)
    a = Guarded.fresh(rows, columns, dtype=dtype)
    words = Guarded.fresh(*expected.words.shape, dtype=torch.int32)
    values = Guarded.fresh(capacity, dtype=dtype)
    pack.pack_rows[(rows,)](
        p.tensor, a.tensor, words.tensor, values.tensor, starts.tensor, rule.tensor,
        columns, capacity, BLOCK=64,
    )  # fmt: skip
    packed = bitmask.Packed(words.tensor, starts.tensor, values.tensor)
    assert same_bits(a.tensor, expected_a)
    assert_same_pack(packed, expected)
    end = int(expected.starts[bitmask.kept_rows(expected)])
    assert values.tensor[end:].isnan().all()

    expected_grad, expected_again = bitmask.unpack_grad(grad_a.tensor, expected, rule.tensor)
    grad_p, again = (Guarded.fresh(rows, columns, dtype=dtype) for _ in range(2))
    pack.unpack_rows[(rows,)](
        grad_a.tensor, words.tensor, values.tensor, starts.tensor, rule.tensor,
        grad_p.tensor, again.tensor, columns, capacity, BLOCK=64,
    )  # fmt: skip
    assert same_bits(grad_p.tensor, expected_grad)
    assert same_bits(again.tensor, expected_again)
    for guarded in (p, grad_a, rule, starts, a, words, values, grad_p, again):
        assert guarded.is_whole()


def test_guards_show_a_stray_write() -> None:
    guarded = Guarded(torch.zeros(3))
    assert guarded.is_whole()
    guarded.memory[GUARD + 3] = 0.0
    assert not guarded.is_whole()


@pytest.mark.parametrize("block", [32, 128, 1024])
def test_results_do_not_depend_on_the_width_of_a_step(block: int) -> None:
    p, rule = pre_activations(2, 200, torch.bfloat16), coefficients(1.0, 0.5)
    expected_a, expected = bitmask.act_pack(p, rule, 400)
    a, packed = pack.act_pack(p, rule, 400, block=block)
    assert same_bits(a, expected_a)
    assert_same_pack(packed, expected)
    for one, other in zip(
        pack.unpack_grad(p, packed, rule, block=block),
        bitmask.unpack_grad(p, expected, rule),
        strict=True,
    ):
        assert same_bits(one, other)


SMALL = {"ROWS": 16, "COLUMNS": 32, "STEP": 16}


def whole_numbers(
    rows: int, width: int, columns: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """x, W and b whose products and sums are exact in each dtype, whatever the order."""
    shapes = (rows, width), (columns, width), (columns,)
    x, weight, bias = (torch.randint(-3, 4, shape).to(dtype) for shape in shapes)
    return x, weight, bias - 2


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("rows", "width", "columns"),
    [(0, 3, 8), (3, 4, 0), (1, 1, 1), (2, 16, 32), (17, 33, 40), (33, 5, 65)],
)
@pytest.mark.parametrize("share", [0.0, 0.4, 0.999, 1.0])
def test_what_does_not_fit_is_recomputed(
    share: float, rows: int, width: int, columns: int, dtype: torch.dtype
) -> None:
    x, weight, bias = whole_numbers(rows, width, columns, dtype)
    grad_a, rule = pre_activations(rows, columns, dtype), coefficients(1.0, 0.5)
    for p, b in ((torch.addmm(bias, x, weight.T), bias), (x @ weight.T, None)):
        a, packed = bitmask.act_pack(p, rule, int(share * int((p > 0).sum())))
        expected = bitmask.unpack_grad(grad_a, packed, rule)
        got = tuple(one.clone() for one in expected)
        bitmask.recompute_lost_(*expected, grad_a, packed, rule, x, weight, b)
        turned = x.T.contiguous().T, weight.T.contiguous().T
        pack.recompute_lost_(*got, grad_a, packed, rule, *turned, b, SMALL)
        assert same_bits(expected[1], a)
        assert same_bits(got[0], expected[0])
        assert same_bits(got[1], a)


@pytest.mark.parametrize("dtype", DTYPES)
def test_recomputing_within_rounding_and_numbers_that_are_not_finite(dtype: torch.dtype) -> None:
    x, weight, bias = (torch.randn(shape).to(dtype) for shape in ((20, 24), (40, 24), (40,)))
    x[4, 3], x[9, 3], weight[5, 3] = math.nan, math.inf, -1.0
    p, grad_a, rule = torch.addmm(bias, x, weight.T), torch.randn(20, 40), coefficients(1.0, 0.0)
    grad_a = grad_a.to(dtype)
    a, whole = bitmask.act_pack(p, rule, p.numel())
    expected, _ = bitmask.unpack_grad(grad_a, whole, rule)
    packed = whole._replace(values=whole.values[:60].clone())
    grad_p, again = bitmask.unpack_grad(grad_a, packed, rule)
    assert again.isnan().sum() > 300  # not recomputed yet
    pack.recompute_lost_(grad_p, again, grad_a, packed, rule, x, weight, bias, SMALL)
    assert again[4].isnan().all()
    assert again[9].isinf().any()
    assert same_bits(grad_p, expected)  # as σ′ is 1 on the mask, whatever p is now
    limit = {torch.float32: 1e-6, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-9}[dtype]
    torch.testing.assert_close(again, a, rtol=limit, atol=4 * limit, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_mask_says_what_is_active_whatever_is_recomputed(dtype: torch.dtype) -> None:
    x, weight, bias = whole_numbers(5, 6, 70, dtype)
    grad_a, rule = pre_activations(5, 70, dtype), coefficients(1.0, 0.5)
    _, packed = bitmask.act_pack(pre_activations(5, 70, dtype), rule, 60)  # of another p
    expected = bitmask.unpack_grad(grad_a, packed, rule)
    got = tuple(one.clone() for one in expected)
    bitmask.recompute_lost_(*expected, grad_a, packed, rule, x, weight, bias)
    pack.recompute_lost_(*got, grad_a, packed, rule, x, weight, bias, SMALL)
    assert same_bits(got[0], expected[0])
    assert same_bits(got[1], expected[1])
    assert (expected[1] >= 0).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_recomputing_reads_and_writes_nothing_outside(dtype: torch.dtype) -> None:
    parts = [Guarded(part) for part in whole_numbers(19, 18, 41, dtype)]
    x, weight, bias = (part.tensor for part in parts)
    rule, grad_a = Guarded(coefficients(1.0, 0.5)), Guarded(pre_activations(19, 41, dtype))
    p = torch.addmm(bias, x, weight.T)
    expected_a, whole = bitmask.act_pack(p, rule.tensor, p.numel())
    expected_grad, _ = bitmask.unpack_grad(grad_a.tensor, whole, rule.tensor)
    kept = int(whole.starts[7])
    words, starts = Guarded(whole.words), Guarded(whole.starts)
    packed = bitmask.Packed(words.tensor, starts.tensor, whole.values[:kept].clone())
    grad_p, a = map(Guarded, bitmask.unpack_grad(grad_a.tensor, packed, rule.tensor))
    grad_p.tensor[:7], a.tensor[:7] = 7.0, 7.0  # rows that are kept are not written to
    pack.recompute_lost_(
        grad_p.tensor, a.tensor, grad_a.tensor, packed, rule.tensor, x, weight, bias, SMALL
    )
    assert same_bits(grad_p.tensor[7:], expected_grad[7:])
    assert same_bits(a.tensor[7:], expected_a[7:])
    assert (grad_p.tensor[:7] == 7.0).all()
    assert (a.tensor[:7] == 7.0).all()
    for guarded in (*parts, rule, grad_a, words, starts, grad_p, a):
        assert guarded.is_whole()


P, RULE = torch.ones(2, 40), torch.tensor([1.0, 0.5])


@pytest.mark.parametrize(
    ("p", "rule", "options", "match"),
    [
        (P.double(), RULE.double(), {}, "float16, got torch.float64"),
        (P, RULE, {"block": 48}, "power of two"),
        (P, RULE, {"block": 16}, "power of two"),
        (P.T, RULE, {}, "contiguous"),
        (P, RULE[:1], {}, "coefficients"),
    ],
)
def test_what_does_not_fit_is_refused(p: Tensor, rule: Tensor, options: dict, match: str) -> None:
    with pytest.raises(KernelError, match=match):
        pack.act_pack(p, rule, 80, **options)


def test_what_does_not_fit_is_refused_in_unpacking_too() -> None:
    _, packed = bitmask.act_pack(P, RULE, 80)
    with pytest.raises(KernelError, match="values"):
        pack.unpack_grad(P.half(), packed, RULE)
    with pytest.raises(KernelError, match="power of two"):
        pack.unpack_grad(P, packed, RULE, block=0)
    with pytest.raises(KernelError, match="weight: expected"):
        pack.recompute_lost_(P, P, P, packed, RULE, torch.ones(2, 3), torch.ones(40, 4), None)
