"""The rectifier family as modules, and where the derivative of any activation is zero."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from steppe.ops.rectifier import (
    rectifier,
    rectifier_derivative,
    s_shaped_squared_relu,
    s_shaped_squared_relu_derivative,
)

Activation = Callable[[Tensor], Tensor]


@runtime_checkable
class HasDerivative(Protocol):
    """An activation that knows its own derivative."""

    def derivative(self, p: Tensor) -> Tensor:
        """σ′(p), shape and dtype of p."""


class KnownRectifier:
    """Mixin of an activation that tells the kernels which rectifier it is now.

    That is ``σ(p) = α r + m β r²`` with ``r = max(p − shift, 0)``. `accelerate_` asks such an
    activation in every call, so that it may have a schedule; any other one is recognised by its
    values, once, and must stay as it is.

    Attributes:
        shift: where σ begins to rise.
        is_fixed: whether the coefficients never change.
    """

    shift: float = 0.0
    is_fixed: bool = False

    def coefficients(self) -> tuple[float, float, Tensor | None]:
        """α ≥ 0, β ≥ 0, and m, 0-dim, by which β is multiplied, or None for 1."""
        raise NotImplementedError

    def unfit(self) -> str:
        """Why it is no such function now, a clause; empty if it is."""
        return ""


class Rectifier(KnownRectifier, nn.Module):
    """``σ(p) = α r + β r²`` with ``r = max(p, 0)``, wherever an elementwise activation stands.

    ReLU is (1, 0), J-SquaredReLU (1, ½), SquaredReLU (0, 1).

    Args:
        alpha: slope of the jump at zero, ≥ 0.
        beta: quadratic coefficient, ≥ 0; not both zero.

    Raises:
        ValueError: a negative coefficient, or both zero.

    Source: arXiv 2605.25612, J-SquaredReLU.

    Example:
        >>> Rectifier(1.0, 0.5)(torch.tensor([-1.0, 2.0])).tolist()
        [0.0, 4.0]
    """

    def __init__(self, alpha: float = 1.0, beta: float = 0.0) -> None:
        super().__init__()
        if not (alpha >= 0 and beta >= 0 and 0 < alpha + beta < math.inf):
            raise ValueError(
                f"Rectifier: expected alpha ≥ 0 and beta ≥ 0, not both zero; got {alpha=}, {beta=}"
            )
        self.alpha = float(alpha)
        self.beta = float(beta)

    def forward(self, p: Tensor) -> Tensor:
        """σ(p), shape and dtype of p."""
        return rectifier(p, self.alpha, self.beta)

    def derivative(self, p: Tensor) -> Tensor:
        """σ′(p), shape and dtype of p."""
        return rectifier_derivative(p, self.alpha, self.beta)

    def coefficients(self) -> tuple[float, float, Tensor | None]:
        """α, β, and None."""
        return self.alpha, self.beta, None

    def extra_repr(self) -> str:
        """The coefficients."""
        return f"alpha={self.alpha}, beta={self.beta}"


class SShapedSquaredReLU(nn.Module):
    """``s(p − shift_x) + shift_y`` with ``s(q) = relu(q − h)² − relu(−q − h)²``.

    For the stability study: density stays 1 while the derivative density falls.

    Args:
        shift_x: shift of the flat part; the paper uses −1.6 and 1.6.
        shift_y: value on the flat part; the paper uses −1.6 and 1.6.
        half_width: h > 0.

    Raises:
        ValueError: a shift is not finite, or `half_width` is not finite and positive.

    Source: arXiv 2605.25612, stability study.
    """

    def __init__(self, shift_x: float = 0.0, shift_y: float = 0.0, half_width: float = 1.5) -> None:
        super().__init__()
        if not 0 < half_width < math.inf:  # NaN too
            raise ValueError(f"SShapedSquaredReLU: expected half_width > 0, got {half_width}")
        if not (math.isfinite(shift_x) and math.isfinite(shift_y)):
            raise ValueError(
                f"SShapedSquaredReLU: expected finite shifts, got {shift_x=}, {shift_y=}"
            )
        self.shift_x = float(shift_x)
        self.shift_y = float(shift_y)
        self.half_width = float(half_width)

    def forward(self, p: Tensor) -> Tensor:
        """s(p), shape and dtype of p."""
        return s_shaped_squared_relu(p, self.shift_x, self.shift_y, self.half_width)

    def derivative(self, p: Tensor) -> Tensor:
        """s′(p), shape and dtype of p."""
        return s_shaped_squared_relu_derivative(p, self.shift_x, self.half_width)

    def extra_repr(self) -> str:
        """The shifts."""
        return f"shift_x={self.shift_x}, shift_y={self.shift_y}, half_width={self.half_width}"


def is_relu(act: Activation) -> bool:
    """Whether an activation is ReLU, under any of the names PyTorch and steppe have for it.

    Example:
        >>> is_relu(nn.ReLU()), is_relu(F.relu), is_relu(nn.GELU())
        (True, True, False)
    """
    if isinstance(act, Rectifier):
        return act.alpha == 1.0 and act.beta == 0.0
    return isinstance(act, nn.ReLU) or act in (F.relu, torch.relu)


def name_of(act: Activation) -> str:
    """The name of an activation, for a reader.

    Example:
        >>> name_of(F.relu), name_of(Rectifier(1.0, 0.5))
        ('relu', 'Rectifier(alpha=1.0, beta=0.5)')
    """
    return repr(act) if isinstance(act, nn.Module) else getattr(act, "__name__", repr(act))


def evaluate(act: Activation, p: Tensor) -> Tensor:
    """``act(p)`` that leaves p as it was and runs no hook, also for ``nn.ReLU(inplace=True)``."""
    apply = act.forward if isinstance(act, nn.Module) else act
    value: Tensor = apply(p.clone() if getattr(act, "inplace", False) else p)
    return value


def derivative(act: Activation, p: Tensor) -> Tensor:
    """``σ′(p)`` of any elementwise activation, by its own formula if it has one, else by autograd.

    Args:
        act: elementwise activation, module or function.
        p: pre-activations, any shape, floating point.

    Returns:
        Derivatives, shape and dtype of p, with no graph.

    Example:
        >>> derivative(nn.ReLU(), torch.tensor([-1.0, 0.0, 2.0])).tolist()
        [0.0, 0.0, 1.0]
        >>> derivative(torch.sin, torch.tensor([0.0])).tolist()
        [1.0]
    """
    p = p.detach()
    if is_relu(act):
        return (p > 0).to(p.dtype)
    if isinstance(act, HasDerivative):
        with torch.no_grad():
            return act.derivative(p)
    if torch.compiler.is_compiling() or torch._C._functorch.peek_interpreter_stack() is not None:
        # Neither lets a leaf be made. An autograd.Function whose `forward` takes a ctx, as Bloom's
        # and timm's activations have, cannot run under torch.func in turn.
        gradient: Tensor = torch.func.grad(lambda q: evaluate(act, q).sum())(p)
    else:
        gradient = _gradient_of_sum(act, p)
    return gradient.detach()


def _gradient_of_sum(act: Activation, p: Tensor) -> Tensor:
    """``∂ Σ σ(p) / ∂p`` by autograd, whatever the mode around it.

    Of hooks on saved tensors only the innermost act: without those here, this backward pass within
    a block that is checkpointed would make torch run the block again.
    """
    with (
        torch.inference_mode(False),
        torch.enable_grad(),
        torch.autograd.graph.saved_tensors_hooks(_same, _same),
    ):
        leaf = p.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(evaluate(act, leaf).sum(), leaf)
    return gradient


def _same(tensor: Tensor) -> Tensor:
    """The tensor."""
    return tensor
