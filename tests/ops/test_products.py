"""The building blocks as PyTorch sees them: gradients, fakes, docstrings."""

from __future__ import annotations

import doctest

import pytest
import torch
from torch import Tensor

from steppe.ops import products
from steppe.ops.cpu import native_ops as native_ops  # registers the kernels

OPS = ("compact", "spmm", "spmm_t", "sddmm", "scatter", "gather")


def test_the_single_ops_can_be_differentiated_twice() -> None:
    p = torch.randn(6, 70, dtype=torch.float64, requires_grad=True)
    matrix = torch.randn(70, 3, dtype=torch.float64, requires_grad=True)
    left = torch.randn(6, 3, dtype=torch.float64, requires_grad=True)
    _, index, offsets = products.compact(p.detach())

    def product(p: Tensor, matrix: Tensor) -> Tensor:
        return products.spmm(*products.compact(p), 6, matrix)

    def gradient(left: Tensor, right: Tensor) -> Tensor:
        values = products.sddmm(index, offsets, left, right)
        return products.spmm_t(values, index, offsets, left, 70)

    for function, inputs in ((product, (p, matrix)), (gradient, (left, matrix))):
        assert torch.autograd.gradcheck(function, inputs)
        assert torch.autograd.gradgradcheck(function, inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_opcheck(dtype: torch.dtype) -> None:
    p = torch.randn(6, 70, dtype=dtype, requires_grad=True)
    matrix = torch.randn(70, 3, dtype=dtype, requires_grad=True)
    left = torch.randn(6, 3, dtype=dtype, requires_grad=True)
    values, index, offsets = (t.detach() for t in products.compact(p))
    for op, arguments in (
        (products.compact, (p,)),
        (products.spmm, (values.requires_grad_(), index, offsets, 6, matrix)),
        (products.spmm_t, (values, index, offsets, left, 70)),
        (products.sddmm, (index, offsets, left, matrix)),
        (products.scatter, (values, index, offsets, 6, 70)),
        (products.gather, (p, index, offsets)),
    ):
        torch.library.opcheck(op, arguments)


@pytest.mark.parametrize("name", OPS)
def test_the_example_of_each_op_is_true(name: str) -> None:
    """Which ``--doctest-modules`` does not see: an op is an object and no function."""
    op = getattr(products, name)
    (test,) = doctest.DocTestFinder().find(op._init_fn, name, globs=dict(vars(products)))
    assert test.examples
    assert doctest.DocTestRunner().run(test).failed == 0


def test_the_old_name_of_sddmm_still_works() -> None:
    _, index, offsets = products.compact(torch.randn(6, 70))
    left, right = torch.randn(6, 3, requires_grad=True), torch.randn(70, 3)
    expected = products.sddmm(index, offsets, left, right)
    (gradient,) = torch.autograd.grad(expected.sum(), left)
    for old in (products.sampled, torch.ops.steppe.sampled):
        with pytest.warns(DeprecationWarning, match="sddmm"):
            got = old(index, offsets, left, right)
        assert torch.equal(got, expected)
        assert torch.equal(torch.autograd.grad(got.sum(), left)[0], gradient)
