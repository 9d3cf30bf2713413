"""Which rectifier an activation is, found by evaluating it and not by its class."""

from __future__ import annotations

import contextlib
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from steppe.activations import Activation, evaluate
from steppe.blocks.bare import without_hooks

_ULPS = 16.0  # for the values and slopes of formulas that round elsewhere than ours
_MAGNITUDES = (
    *(10.0**k for k in (-60, -30, -15, -9, -6, -4, -3, -2)),
    *(0.1 * k for k in range(1, 81)),
    *(9.0, 12.0, 20.0, 33.0, 64.0, 100.0, 127.5, 255.0, 1e3, 1e4, 7e4, 1e6, 1e9, 1e15, 1e30, 1e60),
)
_TINY, _HUGE = 2.0**-200, 2.0**200  # their squares are float64 still
_SHOWN = (-1.0, 1.0, 2.0, 0.5, 7.0, -3.0, 100.0)  # points that a reason names if it can
_SECTIONS = 256  # of an interval, each time that the shift is looked for


@dataclass(frozen=True)
class Recognised:
    """``σ(p) = α r + β r²`` with ``r = max(p − shift, 0)``, as the activation is now.

    Attributes:
        alpha: slope of the jump, ≥ 0.
        beta: quadratic coefficient, ≥ 0; not both zero.
        shift: where σ begins to rise.
    """

    alpha: float
    beta: float
    shift: float

    def value(self, p: Tensor) -> Tensor:
        """σ(p), shape and dtype of p."""
        r = torch.relu(p - self.shift)
        return r * (self.alpha + self.beta * r)

    def slope(self, p: Tensor) -> Tensor:
        """σ′(p), 0 at the shift; shape and dtype of p."""
        r = torch.relu(p - self.shift)
        return torch.where(r > 0, self.alpha + 2.0 * self.beta * r, 0.0)


def recognise(act: Activation) -> Recognised | str:
    """Which rectifier an activation is, by its values and its gradients in float64 and float32.

    Both are compared to a few units in the last place, in training and in evaluation, at some
    hundred points between 1e-60 and 1e60 of either sign (float32: up to 1e9); the function between
    them is not seen, and infinite inputs are not tried. The activation is left as it is: a copy of
    it without hooks is evaluated, on the CPU, and the state of the random generator is put back. An
    activation with a schedule is recognised as the function that it is now.

    Args:
        act: a module or a function.

    Returns:
        The rectifier, or in one clause why it is none, to follow the activation's name.

    Example:
        >>> recognise(nn.ReLU())
        Recognised(alpha=1.0, beta=0.0, shift=0.0)
        >>> recognise(nn.SiLU())
        'is not zero for negative inputs: σ(-1.0) = -0.2689'
        >>> recognise(nn.ReLU6())
        'is 6.0 at 7.0, where 7.0 would be expected: capped'
    """
    if isinstance(act, nn.Module) and next(act.parameters(), None) is not None:
        return "has parameters"
    try:
        with undisturbed():
            return _recognise(act)
    except _NotRecognisedError as reason:
        return str(reason)
    except Exception as error:  # of somebody else's code, on inputs that it was not made for
        return f"cannot be evaluated ({type(error).__name__}: {_first_line(error)})"


class _NotRecognisedError(Exception):
    """Why an activation is no rectifier, in one clause."""


def _recognise(act: Activation) -> Recognised:
    """The rectifier that an activation is.

    Raises:
        _NotRecognisedError: it is none.
    """
    trained, evaluated = _bare(act, training=True), _bare(act, training=False)
    p = _points(0.0)
    values = _values(trained, p)
    if not _agree(values, _values(trained, p)):
        raise _NotRecognisedError("is random in training")
    in_evaluation = _values(evaluated, p)
    _require_elementwise(evaluated, p, in_evaluation)
    if not _agree(values, in_evaluation):
        raise _NotRecognisedError("is another function in training than in evaluation")
    _require_finite(p, values)
    _require_zero_below(p, values)
    try:
        found = _fit(evaluated, _shift(evaluated, p, values))
        _compare_values(found, p, values)
    except _NotRecognisedError:
        _require_zero_below(p, values, all_of_them=True)  # the better reason, if it is one
        raise
    q = p if found.shift == 0 else torch.cat([p, _points(found.shift)])
    for dtype in (torch.float64, torch.float32):
        q = q.to(dtype)
        if dtype == torch.float32:  # in which a cube of GELU's would overflow, times zero
            q = q[q.abs() < 1e10]
        for act_now in (evaluated,) if trained is evaluated else (trained, evaluated):
            values, slopes = _values_and_slopes(act_now, q)
            _compare_values(found, q, values)
            _compare_slopes(found, q, slopes)
    return found


def _points(about: float) -> Tensor:
    """float64 ``[n]``, ascending, n even: points of many magnitudes on both sides of one."""
    magnitudes = torch.tensor(_MAGNITUDES, dtype=torch.float64, device="cpu")
    zeros = torch.tensor([-0.0, 0.0], dtype=torch.float64, device="cpu")
    return about + torch.cat([-magnitudes.flip(0), zeros, magnitudes])


# ---- conditions on an activation


def _require_elementwise(act: Activation, p: Tensor, values: Tensor) -> None:
    """Refuse a function of other entries, or of the place of an entry."""
    half = len(p) // 2
    elsewhere = _values(act, p.flip(0).view(2, 1, half)).view(-1).flip(0)
    alone = _values(act, p[half:])
    if not _agree(values, elsewhere) or not _agree(values[half:], alone):
        raise _NotRecognisedError("is not elementwise")


def _require_finite(p: Tensor, values: Tensor) -> None:
    """Refuse a function that is infinite or NaN where no rectifier is."""
    wrong = ~values.isfinite()
    if wrong.any():
        at = _shown(p, wrong)
        raise _NotRecognisedError(f"is not finite: σ({_text(p[at])}) = {_text(values[at])}")


def _require_zero_below(p: Tensor, values: Tensor, all_of_them: bool = False) -> None:
    """Refuse a function that is not zero for some negative inputs, or for `all_of_them`."""
    wrong = (p < 0) & (values < 0 if values[0] == 0 and not all_of_them else values != 0)
    if wrong.any():
        at = _shown(p, wrong)
        raise _NotRecognisedError(
            f"is not zero for negative inputs: σ({_text(p[at])}) = {_text(values[at])}"
        )


def _compare_values(found: Recognised, p: Tensor, values: Tensor) -> None:
    """Refuse an activation that has other values than the rectifier that was found."""
    info, want = torch.finfo(p.dtype), found.value(p)
    # The error of rounding p and the shift; below the smallest normal number it is not relative.
    blur = _blur(found, p)
    room = _ULPS * (info.eps * want + info.tiny) + blur * (found.slope(p) + found.beta * blur)
    wrong = ((values - want).abs() > room) & want.isfinite()
    if wrong.any():
        at = _shown(p, wrong)
        capped = ": capped" if values[at] == values[-1] == values[-2] else ""
        raise _NotRecognisedError(
            f"is {_text(values[at])} at {_text(p[at])}, where {_text(want[at])} would be"
            f" expected{capped}"
        )


def _compare_slopes(found: Recognised, p: Tensor, slopes: Tensor) -> None:
    """Refuse an activation that has other gradients than the rectifier that was found."""
    info, want, steep = torch.finfo(p.dtype), found.value(p), found.slope(p)
    above, blur = p - found.shift, _blur(found, p)
    # A slope may come from the value, which then has to be a normal number.
    counted = (above <= 0) | (want.isfinite() & (want > info.tiny / info.eps))
    # Other formulas round the shift elsewhere. In float64 it is the activation's own.
    counted &= (above > blur) | (above <= (0.0 if p.dtype == torch.float64 else -blur))
    room = _ULPS * info.eps * steep + 2.0 * found.beta * blur
    wrong = ~((slopes - steep).abs() <= room) & counted
    if wrong.any():
        at = _shown(p, wrong)
        raise _NotRecognisedError(
            f"has a gradient that is not that of its values: {_text(slopes[at])} at {_text(p[at])},"
            f" where {_text(steep[at])} would be expected"
        )


def _blur(found: Recognised, p: Tensor) -> float:
    """How far off the shift may be in p's dtype."""
    return _ULPS * torch.finfo(p.dtype).eps * abs(found.shift)


# ---- the coefficients


def _shift(act: Activation, p: Tensor, values: Tensor) -> float:
    """The largest float64 number up to which σ is zero."""
    if not values.any():
        raise _NotRecognisedError("is zero everywhere")
    if (values < 0).any():
        at = _shown(p, values < 0)
        raise _NotRecognisedError(f"is negative: σ({_text(p[at])}) = {_text(values[at])}")
    first = int((values != 0).nonzero()[0])
    low, high = float(p[first - 1]), float(p[first])
    if low == 0.0 and float(_values(act, torch.full_like(p, _TINY))[0]) != 0.0:
        return 0.0
    while True:
        inner = torch.linspace(low, high, _SECTIONS + 1, dtype=torch.float64, device="cpu")[1:-1]
        inner = inner[(inner > low) & (inner < high)]
        if not len(inner):
            return low
        above = (_values(act, inner) != 0).nonzero()
        first = int(above[0]) if len(above) else len(inner)
        if first > 0:
            low = float(inner[first - 1])
        if first < len(inner):
            high = float(inner[first])


def _fit(act: Activation, shift: float) -> Recognised:
    """α and β by σ / r = α + β r, at a small r, at one near 1, and at a huge one."""
    scale = max(1.0, abs(shift))
    small = _TINY if shift == 0 else scale * 2.0**-20
    steps = torch.tensor([small, scale, _HUGE], dtype=torch.float64, device="cpu")
    p = shift + steps
    after = math.nextafter(shift, math.inf)
    values = _values(act, torch.cat([p, p.new_tensor([after])]))
    r = p - shift
    near, middle, far = (values[:3] / r).tolist()
    if shift != 0 and float(values[3]) > 0.5 * float(values[0]):
        raise _NotRecognisedError(f"jumps from 0 to {_text(values[3])} at {_text(p[0])}")
    beta = (middle - near) / float(r[1] - r[0])
    if beta < 0:
        raise _NotRecognisedError(
            f"bends down: σ({_text(p[1])}) = {_text(values[1])}, less than"
            f" {_text(near * r[1])}, where its slope at first leads"
        )
    exact = (far - near) / float(r[2])  # far from zero the quadratic part is all there is
    if abs(exact - beta) <= 1e-6 * (abs(near) + beta):
        beta = 0.0 if abs(far - near) <= 1e-6 * near else exact
    alpha = near - beta * small
    if alpha <= _ULPS * torch.finfo(torch.float64).eps * beta * small:
        alpha = 0.0
    return Recognised(alpha, beta, shift)


# ---- evaluating without a trace


@contextlib.contextmanager
def undisturbed() -> Iterator[None]:
    """Gradients on, autocast and compiling off, and the random numbers as they were."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices=[]))
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(torch.autocast("cpu", enabled=False))
        if "torch._dynamo" in sys.modules:  # a compiled function would be compiled for our shapes
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        yield


def _bare(act: Activation, training: bool) -> Activation:
    """A module as a copy of its own, without hooks, on the CPU, in a mode; a function as it is."""
    if not isinstance(act, nn.Module) or isinstance(act, torch.jit.ScriptModule):
        return act
    return without_hooks(act, device="cpu").train(training)


def _values(act: Activation, p: Tensor) -> Tensor:
    """σ(p), with no graph.

    Raises:
        _NotRecognisedError: the result is no tensor like p, or has a graph of its own.
    """
    output: Any = evaluate(act, p.clone())
    if not isinstance(output, Tensor) or output.shape != p.shape:
        raise _NotRecognisedError("is not elementwise")
    if output.dtype != p.dtype:
        raise _NotRecognisedError(f"gives {output.dtype} for {p.dtype}")
    if output.requires_grad:
        raise _NotRecognisedError("has parameters")
    return output


def _values_and_slopes(act: Activation, p: Tensor) -> tuple[Tensor, Tensor]:
    """σ(p), and σ′(p) by autograd.

    Raises:
        _NotRecognisedError: there is no gradient, or NaN does not stay NaN.
    """
    leaf = torch.cat([p, p.new_tensor([math.nan])]).requires_grad_()
    output = evaluate(act, leaf.clone())  # an activation may work in place
    if not output.requires_grad:
        raise _NotRecognisedError("has no gradient")
    values = output.detach()
    if not values[-1].isnan():
        raise _NotRecognisedError(f"is {_text(values[-1])} for NaN, which has to stay NaN")
    (slopes,) = torch.autograd.grad(output[:-1].sum(), leaf)
    return values[:-1], slopes[:-1]


def _agree(one: Tensor, other: Tensor) -> bool:
    """Whether two evaluations are one function; vector and scalar code round differently."""
    return torch.allclose(one, other, rtol=1e-9, atol=0.0, equal_nan=True)


def _shown(p: Tensor, wrong: Tensor) -> int:
    """The point to name in a reason, of those where something is wrong."""
    for point in _SHOWN:
        here = (wrong & ((p - point).abs() < 1e-6)).nonzero()
        if len(here):
            return int(here[0])
    return int(wrong.nonzero()[0])


def _text(number: Tensor) -> str:
    """Whole numbers in full, others to four digits; no negative zero."""
    value = float(number) + 0.0
    return str(value if value == round(value, 1) else float(f"{value:.4g}"))


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), "")
