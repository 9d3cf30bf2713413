"""The definitions of design.md, section 2, as slow float64 loops; imports torch only."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def rectifier(p: float, alpha: float, beta: float) -> float:
    """α r + β r²."""
    r = max(p, 0.0)
    return alpha * r + beta * r * r


def rectifier_derivative(p: float, alpha: float, beta: float) -> float:
    """α + 2 β p for p > 0, else 0."""
    return alpha + 2.0 * beta * p if p > 0.0 else 0.0


def s_shaped(p: float, shift_x: float, shift_y: float, h: float) -> float:
    """s(p − shift_x) + shift_y."""
    q = p - shift_x
    return max(q - h, 0.0) ** 2 - max(-q - h, 0.0) ** 2 + shift_y


def gelu(p: float) -> float:
    """The exact GELU."""
    return 0.5 * p * (1.0 + math.erf(p / math.sqrt(2.0)))


def counts(a: Tensor, slope: Tensor, counted: Tensor) -> tuple[int, int, int, int]:
    """Active entries, entries with a slope, entries, tokens; one entry at a time.

    a and slope are ``[N, F]``, counted is bool ``[N]``.
    """
    active = slopes = entries = tokens = 0
    for token in range(a.shape[0]):
        if not counted[token]:
            continue
        tokens += 1
        for unit in range(a.shape[1]):
            entries += 1
            active += a[token, unit].item() != 0.0
            slopes += slope[token, unit].item() != 0.0
    return active, slopes, entries, tokens


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    """LayerNorm over the last dimension, float64."""
    x = x.to(torch.float64)
    centred = x - x.mean(-1, keepdim=True)
    scaled = centred / torch.sqrt(centred.pow(2).mean(-1, keepdim=True) + eps)
    scaled = scaled * weight.to(torch.float64)
    return scaled if bias is None else scaled + bias.to(torch.float64)


def flatness_row(x: Tensor, grad: Tensor, slope: Tensor, counted: Tensor) -> list[float]:
    """One sample, entry by entry: tokens, sloped entries, Σ‖x‖², AF, gain, Σg² and ‖Σ g xᵀ‖².

    x is ``[T, D]``, grad and slope are ``[T, F]``, counted is bool ``[T]``.
    """
    tokens = sloped = inputs = flatness = gain = gradients = 0.0
    weight_gradient = torch.zeros(grad.shape[1], x.shape[1], dtype=torch.float64)
    for t in range(x.shape[0]):
        if not counted[t]:
            continue
        tokens += 1
        norm = sum(v.item() ** 2 for v in x[t].double())
        inputs += norm
        for i in range(grad.shape[1]):
            g = grad[t, i].double().item()
            flatness += g * g * norm
            if slope[t, i].item() != 0.0:
                sloped += 1
                gain += g * g * norm
                gradients += g * g
            for j in range(x.shape[1]):
                weight_gradient[i, j] += g * x[t, j].double().item()
    tied = sum(v.item() ** 2 for v in weight_gradient.flatten())
    return [tokens, sloped, inputs, flatness, gain, gradients, tied]


def deviation(p: Tensor, counted: Tensor) -> list[float]:
    """Standard deviation of each unit over the counted tokens, one entry at a time.

    p is ``[N, F]``, counted is bool ``[N]``.
    """
    found = []
    for unit in range(p.shape[1]):
        values = [p[t, unit].double().item() for t in range(p.shape[0]) if counted[t]]
        mean = math.fsum(values) / len(values)
        found.append(math.sqrt(math.fsum((v - mean) ** 2 for v in values) / len(values)))
    return found


def running_deviation(steps: list[list[float]], decay: float) -> list[float]:
    """Of each unit after some steps; the first deviation above zero is taken as it is."""
    running = [0.0] * len(steps[0])
    for step in steps:
        for unit, value in enumerate(step):
            old = running[unit]
            running[unit] = value if old == 0.0 else decay * old + (1.0 - decay) * value
    return running


def mean_l1(a: Tensor, counted: Tensor) -> float:
    """Mean over the counted tokens of Σ_i |a_i|; a is ``[N, F]``, counted is bool ``[N]``."""
    sums = [
        math.fsum(abs(v.double().item()) for v in a[t]) for t in range(a.shape[0]) if counted[t]
    ]
    return math.fsum(sums) / len(sums)
