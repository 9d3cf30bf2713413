"""The rectifier family ``σ(p) = α r + β r²`` with ``r = max(p, 0)``, and the S-shaped variant.

ReLU is (1, 0), J-SquaredReLU is (1, ½), SquaredReLU is (0, 1). The derivative is ``α + 2 β r`` for
``p > 0`` and 0 elsewhere, and since ``σ′² = α² + 4 β σ`` it follows from the output alone: the
backward pass keeps σ(p), which the next layer keeps anyway, and no copy of p.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

Coefficient = float | Tensor


class _Rectifier(torch.autograd.Function):
    """α r + β r², saving its output only."""

    generate_vmap_rule = True

    @staticmethod
    def forward(p: Tensor, alpha: Coefficient, beta: Coefficient) -> Tensor:
        """A = r (α + β r)."""
        r = torch.relu(p)
        return r * (alpha + beta * r)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Keep a, and the coefficients."""
        _, ctx.alpha, ctx.beta = inputs
        ctx.save_for_backward(output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        """∂ℓ/∂p = ∂ℓ/∂a · σ′."""
        (a,) = ctx.saved_tensors
        return grad * _slope_from_output(a, ctx.alpha, ctx.beta), None, None


class _ForwardRectifier(_Rectifier):
    """The same, also in forward mode, which torch.compile refuses to trace."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Keep a for both modes."""
        _Rectifier.setup_context(ctx, inputs, output)
        ctx.save_for_forward(output)

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: Any) -> Tensor:
        """The tangent of a: that of p times σ′."""
        (a,) = ctx.saved_tensors
        return tangent * _slope_from_output(a, ctx.alpha, ctx.beta)


def rectifier(p: Tensor, alpha: Coefficient = 1.0, beta: Coefficient = 0.0) -> Tensor:
    """``α r + β r²`` with ``r = max(p, 0)``, differentiable twice.

    Args:
        p: pre-activations, any shape, floating point.
        alpha: slope of the jump at zero, ≥ 0; a number or a 0-dim tensor (no gradient).
        beta: quadratic coefficient, ≥ 0; a number or a 0-dim tensor (no gradient).

    Returns:
        Activations, shape and dtype of p.

    Source: arXiv 2605.25612, J-SquaredReLU; SquaredReLU is of arXiv 2109.08668.

    Example:
        >>> rectifier(torch.tensor([-1.0, 0.0, 2.0]), 1.0, 0.5).tolist()
        [0.0, 0.0, 4.0]
    """
    if not isinstance(alpha, Tensor) and not isinstance(beta, Tensor) and (alpha, beta) == (1, 0):
        return torch.relu(p)  # which keeps its output only, too
    function = _Rectifier if torch.compiler.is_compiling() else _ForwardRectifier
    out: Tensor = function.apply(p, _as_dtype(alpha, p), _as_dtype(beta, p))
    return out


def rectifier_derivative(p: Tensor, alpha: Coefficient = 1.0, beta: Coefficient = 0.0) -> Tensor:
    """``σ′(p)``: ``α + 2 β p`` for ``p > 0``, else 0 (0 at ``p = 0``).

    Args:
        p: pre-activations, any shape, floating point.
        alpha: as in `rectifier`.
        beta: as in `rectifier`.

    Returns:
        Derivatives, shape and dtype of p.

    Example:
        >>> rectifier_derivative(torch.tensor([-1.0, 0.0, 2.0]), 1.0, 0.5).tolist()
        [0.0, 0.0, 3.0]
    """
    slope = _as_dtype(alpha, p) + 2.0 * _as_dtype(beta, p) * p
    return torch.where(p <= 0, torch.zeros_like(p), slope)


def s_shaped_squared_relu(
    p: Tensor, shift_x: float = 0.0, shift_y: float = 0.0, half_width: float = 1.5
) -> Tensor:
    """``s(p − shift_x) + shift_y`` with ``s(q) = relu(q − h)² − relu(−q − h)²``.

    Flat between −h and h: with ``shift_y ≠ 0`` the activation is non-zero where its derivative is
    zero, which separates activation sparsity from derivative sparsity.

    Args:
        p: pre-activations, any shape, floating point.
        shift_x: shift of the flat part; the paper's study uses −1.6 and 1.6.
        shift_y: value on the flat part; the study uses the same two.
        half_width: h, half the width of the flat part.

    Returns:
        Activations, shape and dtype of p.

    Source: arXiv 2605.25612, stability study.

    Example:
        >>> s_shaped_squared_relu(torch.tensor([-3.5, 0.0, 2.5])).tolist()
        [-4.0, 0.0, 1.0]
    """
    q = p - shift_x
    return torch.relu(q - half_width) ** 2 - torch.relu(-q - half_width) ** 2 + shift_y


def s_shaped_squared_relu_derivative(
    p: Tensor, shift_x: float = 0.0, half_width: float = 1.5
) -> Tensor:
    """``s′(p − shift_x) = 2 relu(q − h) + 2 relu(−q − h)`` with ``q = p − shift_x``.

    Args:
        p: pre-activations, any shape, floating point.
        shift_x: as in `s_shaped_squared_relu`.
        half_width: as in `s_shaped_squared_relu`.

    Returns:
        Derivatives, shape and dtype of p.

    Example:
        >>> s_shaped_squared_relu_derivative(torch.tensor([-3.5, 0.0, 2.5])).tolist()
        [4.0, 0.0, 2.0]
    """
    q = p - shift_x
    return 2.0 * torch.relu(q - half_width) + 2.0 * torch.relu(-q - half_width)


def _slope_from_output(a: Tensor, alpha: Coefficient, beta: Coefficient) -> Tensor:
    """σ′ from a = σ(p): √(α² + 4 β a) where a ≠ 0, else 0. Non-finite a stays non-finite."""
    zero = a == 0
    # The root of 0 has no derivative, and 4 β a would overflow float16 where σ′ does not.
    slope = 2.0 * torch.sqrt(alpha * alpha / 4.0 + beta * a.masked_fill(zero, 1.0))
    return slope.masked_fill(zero, 0.0)


def _as_dtype(coefficient: Coefficient, p: Tensor) -> Coefficient:
    """A coefficient that does not promote p."""
    return coefficient.to(p) if isinstance(coefficient, Tensor) else coefficient
