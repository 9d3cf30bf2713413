"""Activations packed as a bit mask and the values of the active entries, in plain torch.

An entry of p is active unless p ≤ 0, so NaN is active. One bit an entry says where the active ones
are, and their values stand in a row: at density ρ that is 1/16 + ρ of p's bytes in a 16-bit dtype.
From the pack and ∂ℓ/∂a follow ∂ℓ/∂p and a, and no copy of p is kept for the backward pass. The
values of rows that did not fit are computed again from x (`recompute_lost_`).

This is the definition, and the slow twin of the kernels in `steppe.ops.cuda.pack`: the same numbers
bit for bit. All arithmetic on 16-bit entries is in float32 and rounded once.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from steppe.errors import KernelError
from steppe.ops.reference import ceil_div, linear

WORD = 32  # bits


class Packed(NamedTuple):
    """A packed matrix ``[T, F]``.

    Attributes:
        words: int32 ``[T, ⌈F/32⌉]``; bit j of word w is set where column 32 w + j is active, and
            those past the last column are 0.
        starts: int64 ``[T + 1]``; the values of row t are those from ``starts[t]`` up to
            ``starts[t + 1]``, and ``starts[T]`` is the number of active entries, kept or not.
        values: ``[capacity]``, the active entries of p, row by row. A row is kept if all its
            values fit, so the rows that are kept are the first ones (`kept_rows`). Values behind
            the last kept one are undefined.
    """

    words: Tensor
    starts: Tensor
    values: Tensor


def act_pack(p: Tensor, coefficients: Tensor, capacity: int) -> tuple[Tensor, Packed]:
    """σ(p) = α r + β r² with r = max(p, 0), and a pack of p for the backward pass.

    Args:
        p: ``[T, F]``, floating point, contiguous.
        coefficients: α and β, ``[2]``, float32, or float64 for a float64 p; on p's device, so that
            a mix that changes during training is never waited for.
        capacity: how many values there is room for. Nothing is lost but what does not fit:
            `kept_rows` says which rows those are, without waiting for the device.

    Returns:
        a = σ(p), ``[T, F]``, in p's dtype; and the pack.

    Raises:
        KernelError: shapes, dtypes or devices are others.

    Example:
        >>> a, packed = act_pack(torch.tensor([[-1.0, 2.0, 4.0]]), torch.tensor([1.0, 0.5]), 2)
        >>> a.tolist(), packed.words.tolist(), packed.values.tolist()
        ([[0.0, 4.0, 12.0]], [[6]], [2.0, 4.0])
    """
    check_pre_activations("act_pack", p, coefficients, capacity)
    active = ~(p <= 0)
    starts = torch.zeros(p.shape[0] + 1, dtype=torch.int64, device=p.device)
    torch.cumsum(active.sum(1), 0, out=starts[1:])
    kept = p[active & (starts[1:] <= capacity)[:, None]]
    values = p.new_empty(capacity)
    values[: kept.shape[0]] = kept
    a = torch.where(active, _activation(_wide(p), coefficients), 0.0).to(p.dtype)
    return a, Packed(_words_of(active), starts, values)


def unpack_grad(grad_a: Tensor, packed: Packed, coefficients: Tensor) -> tuple[Tensor, Tensor]:
    """``∂ℓ/∂p = ∂ℓ/∂a · σ′(p)`` and a again, from a pack.

    σ′ is α + 2 β r for an active entry, and 0 for any other, whatever its ∂ℓ/∂a is. The values of
    rows that are not kept count as NaN, so a forgotten overflow cannot pass for a gradient.

    Args:
        grad_a: ∂ℓ/∂a, ``[T, F]``, dtype of the values, contiguous.
        packed: as `act_pack` gave it.
        coefficients: α and β, as for `act_pack`.

    Returns:
        ∂ℓ/∂p and a, ``[T, F]`` each, in grad_a's dtype.

    Raises:
        KernelError: shapes, dtypes or devices are others.

    Example:
        >>> one_half = torch.tensor([1.0, 0.5])
        >>> _, packed = act_pack(torch.tensor([[-1.0, 2.0, 4.0]]), one_half, 2)
        >>> grad_p, a = unpack_grad(torch.tensor([[1.0, 1.0, 10.0]]), packed, one_half)
        >>> grad_p.tolist(), a.tolist()
        ([[0.0, 3.0, 50.0]], [[0.0, 4.0, 12.0]])
    """
    check_gradient("unpack_grad", grad_a, packed, coefficients)
    active = active_of(packed.words, grad_a.shape[1])
    kept = active & (packed.starts[1:] <= packed.values.shape[0])[:, None]
    r = torch.full_like(grad_a, torch.nan)
    r[kept] = packed.values[: int(kept.sum())]
    wide = _wide(r)
    grad_p = torch.where(active, _wide(grad_a) * _slope(wide, coefficients), 0.0)
    a = torch.where(active, _activation(wide, coefficients), 0.0)
    return grad_p.to(grad_a.dtype), a.to(grad_a.dtype)


def recompute_lost_(
    grad_p: Tensor,
    a: Tensor,
    grad_a: Tensor,
    packed: Packed,
    coefficients: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
) -> None:
    """Write the rows of ∂ℓ/∂p and a that `unpack_grad` could not tell: those that are not kept.

    p = x Wᵀ + b is computed again for them. Its bits may differ from those of the first time, so
    the mask alone says which entries are active; r of an active one is max(p, 0).

    Args:
        grad_p: ``[T, F]``, as `unpack_grad` gave it, contiguous; is changed.
        a: so is this.
        grad_a: ∂ℓ/∂a, ``[T, F]``, contiguous.
        packed: as `act_pack` gave it.
        coefficients: α and β, as for `act_pack`.
        x: ``[T, D]``, in grad_a's dtype, of any strides.
        weight: W, ``[F, D]``, in the same dtype, of any strides.
        bias: b, ``[F]``, or None.

    Raises:
        KernelError: shapes, dtypes or devices are others.

    Example:
        >>> one_half, x = torch.tensor([1.0, 0.5]), torch.tensor([[2.0], [4.0]])
        >>> weight, ones = torch.ones(1, 1), torch.ones(2, 1)
        >>> _, packed = act_pack(x @ weight.T, one_half, 1)
        >>> grad_p, a = unpack_grad(ones, packed, one_half)
        >>> recompute_lost_(grad_p, a, ones, packed, one_half, x, weight, None)
        >>> grad_p.tolist(), a.tolist()
        ([[3.0], [5.0]], [[4.0], [12.0]])
    """
    check_sources("recompute_lost_", grad_p, a, grad_a, packed, coefficients, x, weight, bias)
    kept = int(kept_rows(packed))
    if kept == len(x):
        return
    p = linear(x[kept:], weight, bias)
    r = _wide(torch.where(p <= 0, 0.0, p))  # which leaves NaN as it is
    active = active_of(packed.words[kept:], grad_a.shape[1])
    of_p = _wide(grad_a[kept:]) * _slope(r, coefficients)
    grad_p[kept:] = torch.where(active, of_p, 0.0).to(grad_p.dtype)
    a[kept:] = torch.where(active, _activation(r, coefficients), 0.0).to(a.dtype)


def kept_rows(packed: Packed) -> Tensor:
    """How many rows have all their values in a pack: the first ones.

    Args:
        packed: as `act_pack` gave it.

    Returns:
        0-dim, int64, on the pack's device: T unless the values overflowed their capacity.

    Example:
        >>> _, packed = act_pack(torch.ones(3, 4), torch.tensor([1.0, 0.0]), capacity=9)
        >>> int(kept_rows(packed)), int(packed.starts[-1])
        (2, 12)
    """
    return (packed.starts[1:] <= packed.values.shape[0]).sum()


def check_pre_activations(where: str, p: Tensor, coefficients: Tensor, capacity: int) -> None:
    """Raises unless p, its coefficients and its room fit together."""
    if p.dim() != 2 or not p.is_floating_point() or not p.is_contiguous():
        raise KernelError(
            f"{where}: p: expected a contiguous floating-point matrix [T, F], got {_shown(p)}. "
            "Flatten what is before the last dimension, and call .contiguous()"
        )
    if isinstance(capacity, bool) or not isinstance(capacity, int) or capacity < 0:
        raise KernelError(f"{where}: capacity: expected an int ≥ 0, got {capacity!r}")
    _check_coefficients(where, coefficients, p)


def check_gradient(where: str, grad_a: Tensor, packed: Packed, coefficients: Tensor) -> None:
    """Raises unless a gradient, a pack and its coefficients fit together."""
    words, starts, values = packed
    if grad_a.dim() != 2 or not grad_a.is_floating_point() or not grad_a.is_contiguous():
        raise KernelError(
            f"{where}: grad_a: expected a contiguous floating-point matrix [T, F], "
            f"got {_shown(grad_a)}. Call .contiguous()"
        )
    rows, columns = grad_a.shape
    for name, part, shape, dtype in (
        ("words", words, (rows, ceil_div(columns, WORD)), torch.int32),
        ("starts", starts, (rows + 1,), torch.int64),
        ("values", values, tuple(values.shape[:1]), grad_a.dtype),
    ):
        fits = tuple(part.shape) == shape and part.dtype == dtype and part.is_contiguous()
        if not fits or part.device != grad_a.device:
            raise KernelError(
                f"{where}: {name}: expected {dtype} {list(shape)} on {grad_a.device} for a "
                f"gradient {_shown(grad_a)}, got {_shown(part)}. Give the pack and the gradient "
                "of one and the same p"
            )
    _check_coefficients(where, coefficients, grad_a)


def check_sources(
    where: str,
    grad_p: Tensor,
    a: Tensor,
    grad_a: Tensor,
    packed: Packed,
    coefficients: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
) -> None:
    """Raises unless a gradient, a pack and what its p was computed from fit together."""
    check_gradient(where, grad_a, packed, coefficients)
    rows, columns = grad_a.shape
    width = x.shape[-1]
    for name, part, shape in (
        ("grad_p", grad_p, (rows, columns)),
        ("a", a, (rows, columns)),
        ("x", x, (rows, width)),
        ("weight", weight, (columns, width)),
        ("bias", bias, (columns,)),
    ):
        if part is None:
            continue
        is_result = name in ("grad_p", "a")
        fits = tuple(part.shape) == shape and (part.is_contiguous() or not is_result)
        if not fits or part.dtype != grad_a.dtype or part.device != grad_a.device:
            raise KernelError(
                f"{where}: {name}: expected {grad_a.dtype} {list(shape)} on {grad_a.device} for a "
                f"gradient {_shown(grad_a)}, got {_shown(part)}. Give what p was computed from"
            )


def _check_coefficients(where: str, coefficients: Tensor, like: Tensor) -> None:
    expected = _wide(like.new_empty(0)).dtype
    fits = tuple(coefficients.shape) == (2,) and coefficients.dtype == expected
    if not fits or coefficients.device != like.device or not coefficients.is_contiguous():
        raise KernelError(
            f"{where}: coefficients: expected α and β as {expected} [2] on {like.device}, "
            f"got {_shown(coefficients)}. Give torch.tensor([alpha, beta], dtype={expected}, "
            f"device={str(like.device)!r})"
        )


def _shown(tensor: Tensor) -> str:
    strides = "" if tensor.is_contiguous() else f" with strides {list(tensor.stride())}"
    return f"{tensor.dtype} {list(tensor.shape)}{strides} on {tensor.device}"


def _wide(tensor: Tensor) -> Tensor:
    """In the dtype that arithmetic is done in."""
    return tensor.float() if tensor.element_size() < 4 else tensor


def _activation(r: Tensor, coefficients: Tensor) -> Tensor:
    """σ from r ≠ 0; without 0 · ∞ where β is 0."""
    alpha, beta = coefficients
    return torch.where(beta == 0, alpha * r, r * (alpha + beta * r))


def _slope(r: Tensor, coefficients: Tensor) -> Tensor:
    """σ′ from r ≠ 0; without 0 · ∞ where β is 0."""
    alpha, beta = coefficients
    return torch.where(beta == 0, alpha, alpha + 2.0 * beta * r)


def _words_of(active: Tensor) -> Tensor:
    """The bit mask of a bool matrix."""
    rows, columns = active.shape
    bits = active.new_zeros(rows, ceil_div(columns, WORD), WORD, dtype=torch.int32)
    bits.flatten(1)[:, :columns] = active
    lanes = torch.arange(WORD, dtype=torch.int32, device=active.device)
    return (bits << lanes).sum(2, dtype=torch.int32)


def active_of(words: Tensor, columns: int) -> Tensor:
    """The bool matrix ``[T, F]`` of a bit mask.

    Args:
        words: of a `Packed`.
        columns: F.
    """
    lanes = torch.arange(WORD, dtype=torch.int32, device=words.device)
    bits = (words[:, :, None] >> lanes) & 1
    return bits.flatten(1)[:, :columns].bool()
