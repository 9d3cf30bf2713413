"""Makes Triton's interpreter right for bfloat16, and lets it run with numpy ≥ 2.4.

The interpreter keeps a bfloat16 as its 16 bits in a uint16 array, and its arithmetic, comparisons
and products then work on those integers; what it rounds to bfloat16 it truncates (all of 3.5.1 to
3.9.0; "not supported yet", triton issue 4972). And where 3.6.0 turns a scalar into a loop's bound,
it calls int() on an array with one element, which numpy 2.4 refuses (triton issue 9171). Here each
operation widens to float32, which holds every bfloat16, and rounds to nearest even, as torch does.

A sum of bfloat16 has no one answer on a card either, as each addition rounds: it is refused, and a
kernel has to widen first.

This reaches into private names of the version in `requirements.txt`; `test_interpreter.py` holds it
to torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from numpy.typing import NDArray
from torch import Tensor
from triton.runtime import interpreter

NEEDED = pytest.mark.skipif(
    not triton.knobs.runtime.interpret,
    reason="needs TRITON_INTERPRET=1 before triton is imported: make test-gpu-offline",
)
COMPARISONS = (np.less, np.less_equal, np.greater, np.greater_equal, np.equal, np.not_equal)

Builder = interpreter.InterpreterBuilder
Handle = interpreter.TensorHandle


def is_bfloat16(handle: Any) -> bool:
    return bool(handle.dtype.scalar == tl.bfloat16)


def widened(handle: Any) -> NDArray[Any]:
    """What a handle holds, bfloat16 as float32."""
    data = np.asarray(handle.data)
    if not is_bfloat16(handle):
        return data
    return (data.astype(np.uint32) << 16).view(np.float32).reshape(data.shape)


def rounded(numbers: NDArray[Any]) -> NDArray[np.uint16]:
    """The bits of the nearest bfloat16, of two the even one; every NaN is torch's."""
    single = np.ascontiguousarray(numbers, dtype=np.float32)
    bits = single.view(np.uint32)
    nearest = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(single), np.uint16(0x7FC0), nearest).reshape(np.shape(numbers))


def binary_op(self: Any, lhs: Any, rhs: Any, op: Callable[..., Any]) -> Any:
    if op in COMPARISONS:  # whose handle would go on with the type of what is compared
        return Handle(op(widened(lhs), widened(rhs)), tl.int1)
    if not is_bfloat16(lhs):
        return _binary_op(self, lhs, rhs, op)
    return Handle(rounded(op(widened(lhs), widened(rhs))), tl.bfloat16)


def unary_op(self: Any, argument: Any, op: Callable[..., Any]) -> Any:
    if not is_bfloat16(argument):
        return _unary_op(self, argument, op)
    return Handle(rounded(op(widened(argument))), tl.bfloat16)


def ternary_op(self: Any, lhs: Any, rhs: Any, other: Any, op: Callable[..., Any]) -> Any:
    if not is_bfloat16(other) or op is np.where:  # which moves bits and does not look at them
        return _ternary_op(self, lhs, rhs, other, op)
    return Handle(rounded(op(widened(lhs), widened(rhs), widened(other))), tl.bfloat16)


def create_fma(self: Any, x: Any, y: Any, z: Any) -> Any:
    if not is_bfloat16(z):
        return _create_fma(self, x, y, z)
    # Exact in float64, so rounded once, but for the float32 between.
    product = widened(x).astype(np.float64) * widened(y)
    return Handle(rounded(product + widened(z)), tl.bfloat16)


def cast_impl(self: Any, source: Any, target: Any) -> Any:
    if is_bfloat16(source) and target.scalar == tl.bfloat16:
        return Handle(source.data, tl.bfloat16)
    if target.scalar == tl.bfloat16:
        return Handle(rounded(source.data), tl.bfloat16)
    if is_bfloat16(source):
        return Handle(widened(source).astype(interpreter._get_np_dtype(target)), target.scalar)
    return _cast_impl(self, source, target)


def create_fp_to_fp(self: Any, source: Any, target: Any, rounding: Any) -> Any:
    # Only to and from float8 is what the interpreter does by itself right.
    if tl.bfloat16 in (source.dtype.scalar, target.scalar):
        return cast_impl(self, source, target)
    return _create_fp_to_fp(self, source, target, rounding)


def create_dot(self: Any, a: Any, b: Any, d: Any, *rest: Any) -> Any:
    if not is_bfloat16(a):
        return _create_dot(self, a, b, d, *rest)
    return Handle(np.matmul(widened(a), widened(b), dtype=d.data.dtype) + d.data, d.dtype.scalar)


def check_tensor(self: Any, inputs: Any) -> None:
    if any(value.dtype.scalar == tl.bfloat16 for value in inputs if isinstance(value, tl.tensor)):
        raise NotImplementedError("a reduction or scan of bfloat16: widen with .to(tl.float32)")
    _check_tensor(self, inputs)


def patch_tensor(tensor: Any, scope: Any) -> None:
    _patch_lang_tensor(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: np.asarray(self.handle.data).item())


_binary_op, _unary_op, _ternary_op = Builder.binary_op, Builder.unary_op, Builder.ternary_op
_cast_impl, _create_fp_to_fp = Builder.cast_impl, Builder.create_fp_to_fp
_create_fma, _create_dot = Builder.create_fma, Builder.create_dot
_create_masked_load = Builder.create_masked_load
_check_tensor = interpreter.ReduceScanOpInterface.check_tensor
_patch_lang_tensor = interpreter._patch_lang_tensor


@contextmanager
def repaired() -> Iterator[None]:
    """Within it the interpreter is right."""
    own = (binary_op, unary_op, ternary_op, create_fma, cast_impl, create_fp_to_fp, create_dot)
    with (
        mock.patch.multiple(Builder, **{function.__name__: function for function in own}),
        mock.patch.object(interpreter.ReduceScanOpInterface, "check_tensor", check_tensor),
        mock.patch.object(interpreter, "_patch_lang_tensor", patch_tensor),
    ):
        yield


@contextmanager
def loads() -> Iterator[list[NDArray[Any]]]:
    """The addresses that each load within it reads."""
    addresses: list[NDArray[Any]] = []

    def create_masked_load(self: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
        addresses.append(np.asarray(pointers.data)[np.asarray(mask.data)])
        return _create_masked_load(self, pointers, mask, *rest)

    with mock.patch.object(Builder, "create_masked_load", create_masked_load):
        yield addresses


def entries_read(tensor: Tensor, addresses: list[NDArray[Any]]) -> Tensor:
    """How many entries of each row of a contiguous tensor were read, ``[rows]``."""
    start, size = tensor.data_ptr(), tensor.stride(0) * tensor.element_size()
    places = np.concatenate([one.ravel() for one in addresses]).astype(np.int64) - start
    rows = places[(places >= 0) & (places < size * len(tensor))] // size
    return torch.from_numpy(np.bincount(rows, minlength=len(tensor)))
