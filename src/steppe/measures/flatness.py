"""Augmented flatness and its factors, measured in the backward pass that runs anyway.

A `tap` passes a layer's output on as it is. In the backward pass it sees the gradient of that
output beside the layer's input, reduces both to eight numbers a sample, and adds their second
moments to the gradient of a small leaf, the *probe*. So the engine itself does the bookkeeping: a
forward pass without a backward counts nothing, one repeated by gradient checkpointing counts once,
compiled graphs need no Python, and ``backward(inputs=probes)`` measures without touching the
gradient of a single parameter.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from steppe.tokens import Layout

COLUMNS = (
    "samples",
    "tokens",
    "derivative_active",
    "squared_input",  # Σ_t ‖x_t‖²
    "flatness",  # Σ_t ‖∂ℓ/∂p_t‖² ‖x_t‖²
    "gain",  # Σ_t ‖x_t‖² (∂ℓ/∂p_ti)² over the entries with σ′ ≠ 0
    "squared_gradient",  # Σ_t (∂ℓ/∂p_ti)² over the entries with σ′ ≠ 0
    "squared_weight_gradient",  # ‖Σ_t ∂ℓ/∂p_t x_tᵀ‖²
)
GRADIENT_COLUMNS = COLUMNS[4:]  # these grow with the square of the loss
_CHUNK = 2**24  # entries of the largest temporary


class Calls:
    """The calls of one layer in one forward pass, with tokens of the same samples.

    Most layers have one. The gradient of a weight that is used several times is a sum over all of
    them, and none of them knows its norm.

    Attributes:
        made: how many of them were made.
        seen: of those that ran backward, input, gradient, support and mask.
    """

    def __init__(self) -> None:
        self.made = 0
        self.seen: list[tuple[Tensor, Tensor, Tensor | None, Tensor | None]] = []

    def together(
        self, x: Tensor, grad: Tensor, support: Tensor | None, mask: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None] | None:
        """The tokens of all calls, once the last one of them runs backward; None until then.

        Args:
            x: ``[S, T, D]``.
            grad: ``[S, T, F]``.
            support: as in `sample_rows`.
            mask: as of `Layout`.
        """
        self.seen.append((x, grad, support, mask))
        if len(self.seen) < self.made:
            return None
        seen, self.seen = self.seen, []  # the graph may be run backward once more
        if len(seen) == 1:
            return seen[0]
        xs, grads, supports, masks = zip(*seen, strict=True)
        if any(one is not None for one in masks):
            masks = tuple(
                a.new_ones(a.shape[:2], dtype=torch.bool) if one is None else one.to(a.device)
                for one, a in zip(masks, xs, strict=True)
            )
        return (
            torch.cat(xs, 1),
            torch.cat(grads, 1),
            None if support is None else torch.cat(supports, 1),
            None if masks[0] is None else torch.cat(masks, 1),
        )


def new_probe(device: torch.device) -> Tensor:
    """A leaf whose gradient gathers the moments of one tap.

    Returns:
        float64 ``[9, 8]`` of zeros that requires grad; float32 on devices without float64. Its last
        row begins with the number of passes that were left out, since they are not finite.
    """
    dtype = torch.float32 if device.type == "mps" else torch.float64
    size = len(COLUMNS)
    return torch.zeros(size + 1, size, dtype=dtype, device=device, requires_grad=True)


def tap(
    output: Tensor,
    probe: Tensor,
    layer_input: Tensor,
    layout: Layout,
    support: Tensor | None,
    scale: Tensor,
    calls: Calls | None = None,
) -> Tensor:
    """The output of a linear layer, watched in the backward pass.

    Args:
        output: of the layer, ``[*, F]``.
        probe: of `new_probe`; Σ_s w_s w_sᵀ is added to its gradient, w_s the `COLUMNS` of sample s.
            A pass with a number that is not finite, as GradScaler skips it, is counted instead.
        layer_input: of the layer, ``[*, D]``; kept until the backward pass, as the layer
            itself keeps it for its weight's gradient.
        layout: of its tokens.
        support: bool ``[*, F]``, where σ′ ≠ 0, for the layer that the activation reads.
        scale: float ``[S]``, the factor from the gradient of the loss that is run backward to
            be that of the sample's own loss.
        calls: those of the layer in this pass, with this one; None if it is the only one.

    Returns:
        The same values in the same memory.
    """
    result: Tensor = _Tap.apply(
        output,
        probe,
        layer_input,
        layout[:3],
        layout.slots,
        support,
        layout.mask,
        scale,
        calls,
    )
    return result


class _Tap(torch.autograd.Function):
    """The identity; its backward adds the moments to the probe."""

    @staticmethod
    def forward(
        ctx: Any,
        output: Tensor,
        probe: Tensor,
        layer_input: Tensor,
        layout: tuple[int, bool, int],
        slots: Tensor | None,
        support: Tensor | None,
        mask: Tensor | None,
        scale: Tensor,
        calls: Calls | None,
    ) -> Tensor:
        """The output; not a view of it, which an in-place activation could not follow."""
        ctx.layout = layout
        ctx.calls = calls
        ctx.probe_dtype = probe.dtype
        ctx.save_for_backward(layer_input, slots, support, mask, scale)
        return output.detach()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """The gradient as it is, and the moments."""
        layer_input, slots, support, mask, scale = ctx.saved_tensors
        samples, tokens_first, longest = ctx.layout
        layout = Layout(samples, tokens_first, longest, slots)
        with torch.no_grad(), torch.autocast(grad.device.type, enabled=False):
            tokens: Any = (
                by_sample(layer_input.detach(), layout),
                by_sample(grad.detach(), layout),
                None if support is None else by_sample(support, layout),
                mask,
            )
            if ctx.calls is not None:
                tokens = ctx.calls.together(*tokens)
            if tokens is None:
                return grad, *(None,) * 8
            x, grads, slopes, counted = tokens
            rows = sample_rows(x, grads, slopes, counted, scale).to(ctx.probe_dtype)
            moments = rows.mT @ rows
            is_finite = moments.isfinite().all()
            left_out = F.pad((~is_finite).to(moments).reshape(1, 1), (0, moments.shape[1] - 1))
            found = torch.cat([torch.where(is_finite, moments, 0.0), left_out])
        return grad, found, *(None,) * 7


def by_sample(tensor: Tensor, layout: Layout) -> Tensor:
    """A tensor of tokens, sample by sample.

    Args:
        tensor: ``[S, T, *]``, ``[T, S, *]``, flattened ``[S·T, *]``, or with T in several
            dimensions, ``[S, H, W, *]``; or of an expert, ``[n, *]``.
        layout: of the tokens.

    Returns:
        ``[S, T, *]``, of the same memory where it can be; of an expert with zeros after the tokens
        of all but the longest sample.
    """
    if layout.slots is not None:
        padded = tensor.new_zeros(layout.samples * layout.longest, tensor.shape[-1])
        padded[layout.slots] = tensor.reshape(-1, tensor.shape[-1])
        return padded.unflatten(0, (layout.samples, layout.longest))
    if layout.tokens_first and tensor.dim() == 3:
        return tensor.transpose(0, 1)
    return tensor.reshape(layout.samples, -1, tensor.shape[-1])


def sample_rows(
    x: Tensor, grad: Tensor, support: Tensor | None, mask: Tensor | None, scale: Tensor
) -> Tensor:
    """The numbers of each sample in one backward pass.

    Args:
        x: inputs of the layer ``[S, T, D]``.
        grad: gradients of its outputs ``[S, T, F]``.
        support: as in `tap`.
        mask: as in `tap`.
        scale: as in `tap`.

    Returns:
        float64 ``[S, 8]``, the `COLUMNS`; all 0 for a sample that is padding throughout.

    Source: arXiv 2605.25612, augmented flatness; the last column is the gradient of the weight that
    all tokens share, by Gram matrices as in arXiv 2110.05679 where that is less work.
    """
    samples, tokens, width = grad.shape
    chunk = max(1, _CHUNK // max(1, tokens * max(width, x.shape[-1])))
    parts = [
        _rows_of_chunk(
            x[start : start + chunk],
            grad[start : start + chunk],
            None if support is None else support[start : start + chunk],
            None if mask is None else mask[start : start + chunk],
        )
        for start in range(0, samples, chunk)
    ]
    rows = torch.cat(parts) if parts else x.new_zeros(0, len(COLUMNS), dtype=torch.float64)
    factor = torch.ones_like(rows)
    factor[:, -len(GRADIENT_COLUMNS) :] = scale.to(rows).square().unsqueeze(-1)
    return rows * factor


def _rows_of_chunk(x: Tensor, grad: Tensor, support: Tensor | None, mask: Tensor | None) -> Tensor:
    """`sample_rows` of some samples, before scaling."""
    precise = torch.promote_types(grad.dtype, torch.float32)  # half precision overflows in squares
    x, grad = x.to(precise), grad.to(precise)
    counted = x.new_ones(x.shape[:2])
    if mask is not None:
        mask = mask.to(x.device)  # of a model on several devices it is where the input is
        counted = mask.to(x.dtype)
        # Not a product: values on padding may be infinite.
        x = x.masked_fill(~mask.unsqueeze(-1), 0.0)
        grad = grad.masked_fill(~mask.unsqueeze(-1), 0.0)
    counted = counted.to(torch.float64)
    squared_input = torch.linalg.vecdot(x, x).to(torch.float64)
    squared_gradient = torch.linalg.vecdot(grad, grad).to(torch.float64)
    if support is None:
        slopes = active_gradient = torch.zeros_like(squared_gradient)
    else:
        slopes = torch.count_nonzero(support, dim=-1) * counted
        on_support = grad.masked_fill(~support, 0.0)
        active_gradient = torch.linalg.vecdot(on_support, on_support).to(torch.float64)
    return torch.stack(
        [
            counted.amax(-1),
            counted.sum(-1),
            slopes.sum(-1),
            squared_input.sum(-1),
            (squared_gradient * squared_input).sum(-1),
            (active_gradient * squared_input).sum(-1),
            active_gradient.sum(-1),
            squared_weight_gradient(x, grad),
        ],
        dim=-1,
    )


def squared_weight_gradient(x: Tensor, grad: Tensor) -> Tensor:
    """‖Σ_t g_t x_tᵀ‖² of each sample, by T × T Gram matrices or by F × D products.

    Args:
        x: ``[S, T, D]``.
        grad: ``[S, T, F]``.

    Returns:
        float64 ``[S]``.
    """
    (_, tokens, d_in), d_out = x.shape, grad.shape[-1]
    if tokens * (d_in + d_out) <= d_in * d_out:
        products = torch.bmm(x, x.mT) * torch.bmm(grad, grad.mT)
        return products.sum((1, 2), dtype=torch.float64)
    chunk = max(1, _CHUNK // (d_in * d_out))
    norms = [
        torch.bmm(grad[start : start + chunk].mT, x[start : start + chunk])
        .square()
        .sum((1, 2), dtype=torch.float64)
        for start in range(0, len(x), chunk)
    ]
    return torch.cat(norms)


def tap_loss(loss: Tensor, probe: Tensor) -> Tensor:
    """A model's own loss, through a tap that measures its factor on the way to ``backward``.

    Accumulation, gradient scaling and the number of processes all multiply it.

    Args:
        loss: scalar.
        probe: of `new_loss_probe`; 1, f and f² are added to its gradient, f the factor.

    Returns:
        The same value.
    """
    result: Tensor = _LossTap.apply(loss, probe)
    return result


def new_loss_probe(device: torch.device) -> Tensor:
    """A leaf whose gradient gathers the factors of `tap_loss`, ``[3]``."""
    dtype = torch.float32 if device.type == "mps" else torch.float64
    return torch.zeros(3, dtype=dtype, device=device, requires_grad=True)


class _LossTap(torch.autograd.Function):
    """The identity; its backward adds the factor of the loss to the probe."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, probe: Tensor) -> Tensor:
        """The loss."""
        ctx.probe_dtype = probe.dtype
        return loss.clone()  # no view: the Trainer multiplies it in place

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        """The gradient as it is, and 1, itself and its square."""
        factor = grad.detach().to(ctx.probe_dtype)
        return grad, torch.stack([torch.ones_like(factor), factor, factor.square()])
