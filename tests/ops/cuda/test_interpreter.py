"""The repaired interpreter computes bfloat16 as torch does, bit for bit, and without repair not.

When Triton is right by itself, the tests of the fault fail: then `interpreter.py` can go.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime.errors import InterpreterError

from ops.cuda import interpreter

pytestmark = interpreter.NEEDED
SIZE = 256
# NaN, infinities, both zeros, the largest, the smallest normal, the smallest of all; ties to even.
SPECIAL = [
    float("nan"), float("inf"), -float("inf"), 0.0, -0.0, 3.3895313892515355e38,
    1.1754943508222875e-38, 9.183549615799121e-41, 1.00390625, 1.01171875, 1.0, -1.0,
]  # fmt: skip


@pytest.fixture
def repaired() -> Iterator[None]:
    with interpreter.repaired():
        yield


def numbers(dtype: torch.dtype, seed: int) -> Tensor:
    """Numbers of all magnitudes that arithmetic can take, the special ones shuffled in."""
    generator = torch.Generator().manual_seed(seed)
    mantissa = torch.randn(SIZE, generator=generator)
    exponent = torch.randint(-12, 12, (SIZE,), generator=generator)
    mixed = mantissa * 2.0**exponent
    mixed[: len(SPECIAL)] = torch.tensor(SPECIAL)
    return mixed[torch.randperm(SIZE, generator=generator)].to(dtype)


@triton.jit
def add(x, y, out, SIZE: tl.constexpr):
    i = tl.arange(0, SIZE)
    tl.store(out + i, tl.load(x + i) + tl.load(y + i))


@triton.jit
def subtract(x, y, out, SIZE: tl.constexpr):
    i = tl.arange(0, SIZE)
    tl.store(out + i, tl.load(x + i) - tl.load(y + i))


@triton.jit
def multiply(x, y, out, SIZE: tl.constexpr):
    i = tl.arange(0, SIZE)
    tl.store(out + i, tl.load(x + i) * tl.load(y + i))


@triton.jit
def negate(x, y, out, SIZE: tl.constexpr):
    i = tl.arange(0, SIZE)
    tl.store(out + i, -tl.load(x + i))


@triton.jit
def absolute(x, y, out, SIZE: tl.constexpr):
    i = tl.arange(0, SIZE)
    tl.store(out + i, tl.abs(tl.load(x + i)))


@triton.jit
def less(x, y, out, SIZE: tl.constexpr):
    i = tl.arange(0, SIZE)
    tl.store(out + i, tl.where(tl.load(x + i) < tl.load(y + i), 1.0, 0.0))


@triton.jit
def at_most_zero(x, y, out, SIZE: tl.constexpr):
    i = tl.arange(0, SIZE)
    tl.store(out + i, (tl.load(x + i) <= 0).to(tl.bfloat16))


@triton.jit
def largest(x, y, out, SIZE: tl.constexpr):
    i = tl.arange(0, SIZE)
    both = tl.maximum(tl.load(x + i), tl.load(y + i), propagate_nan=tl.PropagateNan.ALL)
    tl.store(out + i, both)


@triton.jit
def clamp(x, y, out, SIZE: tl.constexpr):
    i = tl.arange(0, SIZE)
    a = tl.load(x + i)
    low = tl.full((SIZE,), -1.0, tl.float32).to(tl.bfloat16)
    tl.store(out + i, tl.clamp(a, low, -low, propagate_nan=tl.PropagateNan.ALL))


@triton.jit
def choose(x, y, out, SIZE: tl.constexpr):
    i = tl.arange(0, SIZE)
    a = tl.load(x + i)
    tl.store(out + i, tl.where(a > 0, a, tl.load(y + i)))


@triton.jit
def from_integers(x, y, out, SIZE: tl.constexpr):
    i = tl.arange(0, SIZE)
    tl.store(out + i, (i * 1001 - 7).to(tl.bfloat16))


@triton.jit
def convert(x, out, SIZE: tl.constexpr):
    i = tl.arange(0, SIZE)
    tl.store(out + i, tl.load(x + i).to(out.dtype.element_ty))


@triton.jit
def product(x, y, out, M: tl.constexpr):
    i = tl.arange(0, M)
    at = i[:, None] * M + i[None, :]
    tl.store(out + at, tl.dot(tl.load(x + at), tl.load(y + at)))


@triton.jit
def total(x, out, SIZE: tl.constexpr):
    tl.store(out, tl.sum(tl.load(x + tl.arange(0, SIZE)), 0))


@triton.jit
def count_up(out, n, STEP: tl.constexpr):
    steps = 0
    for _ in range(0, n, STEP):
        steps += 1
    tl.store(out, steps)


OPERATIONS: dict[str, tuple[object, Callable[[Tensor, Tensor], Tensor]]] = {
    "add": (add, torch.add),
    "subtract": (subtract, torch.sub),
    "multiply": (multiply, torch.mul),
    "negate": (negate, lambda x, y: 0.0 - x),
    "absolute": (absolute, lambda x, y: x.abs()),
    "less": (less, lambda x, y: (x < y).to(x.dtype)),
    "at_most_zero": (at_most_zero, lambda x, y: (x <= 0).to(x.dtype)),
    "largest": (largest, torch.maximum),
    "clamp": (clamp, lambda x, y: x.clamp(-1, 1)),
    "choose": (choose, lambda x, y: torch.where(x > 0, x, y)),
    "from_integers": (from_integers, lambda x, y: (torch.arange(SIZE) * 1001 - 7).to(x.dtype)),
}
# It clears the sign bit.
RIGHT_BY_ITSELF = {"absolute"}


def same_bits(one: Tensor, other: Tensor) -> bool:
    """NaN is NaN, and −0 is not 0."""
    nan = one.isnan()
    equal = one.dtype == other.dtype and torch.equal(nan, other.isnan())
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}[one.element_size()]
    return equal and torch.equal(one[~nan].view(integers), other[~nan].view(integers))


def is_wrong(compute: Callable[[], tuple[Tensor, Tensor]]) -> bool:
    try:
        return not same_bits(*compute())
    except InterpreterError:
        return True


def computed(operation: str) -> tuple[Tensor, Tensor]:
    """What the interpreter gives, and torch."""
    kernel, by_torch = OPERATIONS[operation]
    x, y = numbers(torch.bfloat16, 1), numbers(torch.bfloat16, 2)
    out = torch.full_like(x, torch.nan)
    with np.errstate(all="ignore"):
        kernel[(1,)](x, y, out, SIZE)  # type: ignore[index]
    return out, by_torch(x, y)


def converted(source: torch.dtype, target: torch.dtype) -> tuple[Tensor, Tensor]:
    x = numbers(source, 3)
    out = torch.empty(SIZE, dtype=target)
    with np.errstate(all="ignore"):
        convert[(1,)](x, out, SIZE)
    return out, x.to(target)


def multiplied() -> tuple[Tensor, Tensor]:
    """Of small integers, whose products are exact whatever the order of the sums."""
    x, y = torch.randint(-8, 9, (2, 16, 16)).to(torch.bfloat16)
    out = torch.full((16, 16), torch.nan)
    product[(1,)](x, y, out, 16)
    return out, x.float() @ y.float()


@pytest.mark.parametrize("operation", OPERATIONS)
def test_repaired_operations_give_torchs_bits(operation: str, repaired: None) -> None:
    assert same_bits(*computed(operation))


@pytest.mark.parametrize("operation", sorted(set(OPERATIONS) - RIGHT_BY_ITSELF))
def test_without_repair_operations_are_wrong(operation: str) -> None:
    assert is_wrong(lambda: computed(operation))


@pytest.mark.parametrize("other", [torch.float16, torch.float32, torch.float64])
def test_repaired_conversions_give_torchs_bits(other: torch.dtype, repaired: None) -> None:
    assert same_bits(*converted(other, torch.bfloat16))
    assert same_bits(*converted(torch.bfloat16, other))


def test_without_repair_rounding_to_bfloat16_is_wrong() -> None:
    assert is_wrong(lambda: converted(torch.float32, torch.bfloat16))


def test_all_bfloat16_are_widened_and_rounded_back(repaired: None) -> None:
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    wide, back = torch.empty(2**16), torch.empty(2**16, dtype=torch.bfloat16)
    convert[(1,)](every, wide, 2**16)
    assert same_bits(wide, every.float())
    convert[(1,)](wide, back, 2**16)
    assert same_bits(back, every)


def test_products_of_bfloat16(repaired: None) -> None:
    assert same_bits(*multiplied())


def test_without_repair_products_of_bfloat16_are_wrong() -> None:
    assert is_wrong(multiplied)


def test_what_depends_on_the_order_of_roundings_is_refused(repaired: None) -> None:
    x = torch.ones(SIZE, dtype=torch.bfloat16)
    with pytest.raises(InterpreterError, match="widen with"):
        total[(1,)](x, torch.empty_like(x), SIZE)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_other_dtypes_are_left_alone(dtype: torch.dtype, repaired: None) -> None:
    x, y = numbers(dtype, 1), numbers(dtype, 2)
    out = torch.full_like(x, torch.nan)
    with np.errstate(all="ignore"):
        multiply[(1,)](x, y, out, SIZE)
    assert same_bits(out, x * y)


def test_loops_run_to_a_bound_that_is_an_argument(repaired: None) -> None:
    out = torch.zeros(1, dtype=torch.int32)
    count_up[(1,)](out, 100, 32)
    assert out.item() == 4


@pytest.mark.skipif(np.lib.NumpyVersion(np.__version__) < "2.4.0", reason="numpy < 2.4 lets it")
def test_without_repair_such_loops_fail() -> None:
    with pytest.raises(InterpreterError, match="only 0-dimensional arrays"):
        count_up[(1,)](torch.zeros(1, dtype=torch.int32), 100, 32)


def test_the_repair_ends_with_its_block() -> None:
    with interpreter.repaired():
        pass
    test_without_repair_rounding_to_bfloat16_is_wrong()
