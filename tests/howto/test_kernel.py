"""A kernel in miniature: `row_sums`, from its slow twin to every instruction set.

The steps that every kernel has: the definition as plain loops in float64 (here, or in
`steppe.ops.reference` where other code uses it too); an entry in ``native/functions.def``; a
template of that name in a header of ``native/``; a call in ``ops/cpu/calls.py``; and tests with
fresh memory full of NaN, more threads than there is work, and values that sum to the same bits for
any number of threads. ``tests/native/kernels_test.cpp`` has its cases in C++, for sanitizers.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

import steppe
from steppe.ops.cpu import calls
from steppe.ops.cpu.library import kernels

NATIVE = Path(steppe.__file__).parent / "native"
OPS = Path(steppe.__file__).parent / "ops" / "cpu"
LIST = (NATIVE / "functions.def").read_text(encoding="utf-8").partition("#ifdef STEPPE_TESTS")[0]
KERNELS = re.findall(r"^KERNEL\([^,]+, (\w+),", LIST, re.MULTILINE)

pytestmark = pytest.mark.skipif(kernels().name != "native", reason=kernels().reason)


def slow_row_sums(p: torch.Tensor) -> list[float]:
    """The definition: the sum of the entries of each row that are not ≤ 0, in float64."""
    return [sum(value for value in row if not value <= 0) for row in p.double().tolist()]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 1), (3, 65), (7, 200), (70, 64)])
@pytest.mark.parametrize("threads", [1, 2, 16])
def test_it_is_the_definition(shape: tuple[int, int], threads: int, dtype: torch.dtype) -> None:
    torch.manual_seed(sum(shape))
    p = torch.randn(shape).to(dtype)
    p[0, 0] = 1.5  # one entry at least
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        sums = calls.row_sums(*calls.compact(p))
    finally:
        torch.set_num_threads(before)
    expected = torch.tensor(slow_row_sums(p), dtype=torch.float64)
    # All terms are positive: a sum of n in float32, which is then rounded once to the dtype.
    rounding = shape[1] * torch.finfo(torch.float32).eps / 2 + torch.finfo(dtype).eps / 2
    assert ((sums.double() - expected).abs() <= rounding * expected).all()
    assert expected.abs().max() > 1.0  # zeros would not pass


def test_every_kernel_of_the_list_has_a_template_and_a_caller() -> None:
    assert "row_sums" in KERNELS
    headers = "".join(path.read_text(encoding="utf-8") for path in NATIVE.glob("*.h"))
    callers = "".join(path.read_text(encoding="utf-8") for path in OPS.glob("*.py"))
    for name in KERNELS:
        assert re.search(rf"\b{name}\(", headers), name
        assert f"steppe_{name}" in callers, name
