"""Rising threshold, ours and not the paper's: active is what stands out from usual values."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn import functional as F

from steppe.blocks.block import MLPBlock, Slot
from steppe.blocks.linear import is_adapted, linear_weight
from steppe.checkpointing import in_backward
from steppe.errors import UnfitBlockError
from steppe.plugins.base import Constraint, Plugin, ramp_progress
from steppe.surgery.journal import Journal
from steppe.tokens import TokenContext, attach, listen

MODULE_NAME = "threshold"
_ADDING = threading.Lock()
DECAY = 0.95  # of the running deviation, a step


@dataclass(frozen=True)
class RisingThreshold(Plugin):
    """``σ(p − τ · s_u)``: only what stands out from unit u's usual values passes.

    s_u is the running standard deviation of the unit's pre-activations over the training batches:
    after each optimizer step, ``0.95 · s_u`` and 0.05 times the deviation over all tokens of the
    step; padding does not count and no gradient passes. τ rises linearly from 0 to `multiple` over
    the first `ramp` of the run. In evaluation both stay as they are. Gated blocks threshold the
    gate. `fold_` moves ``τ · s_u`` into the bias.

    It fits any activation and pays with those that are zero for negative inputs.

    Args:
        multiple: τ at the end of the ramp, in standard deviations, ≥ 0.
        ramp: share of the run over which τ rises, in (0, 1].

    Raises:
        ValueError: a setting is out of range.
    """

    key: ClassVar[str] = "rising_threshold"

    multiple: float = 2.0
    ramp: float = 0.5

    def __post_init__(self) -> None:
        """Refuse settings that mean nothing."""
        if not 0.0 <= self.multiple < math.inf:  # NaN too
            raise ValueError(f"RisingThreshold: expected multiple ≥ 0, got {self.multiple}")
        if not 0.0 < self.ramp <= 1.0:
            raise ValueError(
                "RisingThreshold.ramp is a share of the run, in which the deviations become known:"
                f" expected more than 0 and at most 1, got {self.ramp}"
            )

    @property
    def has_schedule(self) -> bool:
        """Whether the threshold rises."""
        return self.multiple > 0

    def check(self, block: MLPBlock) -> None:
        """Refuse a first layer that PEFT adapts, or one with a `threshold` of its own."""
        if is_adapted(block.activated):
            raise UnfitBlockError(
                f"{block.name}: PEFT adapts the first layer of the MLP, and merging would throw the"
                " threshold away. Name the attention alone in target_modules, or leave the block"
                " out: sparsify_(..., where=...)"
            )
        if hasattr(block.activated, MODULE_NAME):
            raise UnfitBlockError(
                f"{block.name}: {type(block.activated).__name__} has an attribute {MODULE_NAME!r}"
                " of its own"
            )

    def apply(
        self, model: nn.Module, blocks: Sequence[MLPBlock], journal: Journal
    ) -> list[Constraint]:
        """Add the thresholds and the hooks that subtract them."""
        contexts, hooks = listen(model, blocks)
        attach(journal, hooks)
        thresholds = []
        for block, context in zip(blocks, contexts, strict=True):
            threshold = Threshold(block, context)
            threshold.train(block.activated.training)
            journal.add_module(Slot(block.activated, MODULE_NAME), threshold)
            journal.add_forward_hook(block.activated, threshold.see_p)
            thresholds.append(threshold)
        return [Rising(thresholds, self.multiple, self.ramp)]


class Threshold(nn.Module):
    """``p − τ · s`` of one block, and what its training batches say of s.

    The buffers are `multiple`, τ, a 0-dim tensor that can change without recompiling, and
    `deviation`, s, ``[F]``, zero until a batch was seen; so without statistics nothing is
    subtracted, and neither is where a unit does not vary. Both are float32 or wider.

    Args:
        block: the block.
        context: tells its padding.

    Attributes:
        block: the block.
        sums: float64 ``[3, F]``, the number of tokens, Σ p and Σ p² of the batches since the last
            step. No buffer: DDP would give every process those of the first.
    """

    multiple: Tensor
    deviation: Tensor

    def __init__(self, block: MLPBlock, context: TokenContext) -> None:
        super().__init__()
        self.block = block
        self._context = context
        weight = linear_weight(block.activated)
        dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
        self.register_buffer("multiple", torch.zeros((), dtype=dtype, device=weight.device))
        self.register_buffer(
            "deviation", torch.zeros(block.d_hidden, dtype=dtype, device=weight.device)
        )
        self.sums = self._no_sums()

    def forward(self, p: Tensor) -> Tensor:
        """P, less the threshold; shape and dtype of p."""
        return p - self.shift(p.dtype)

    def shift(self, dtype: torch.dtype) -> Tensor:
        """τ · s, ``[F]``."""
        return (self.multiple * self.deviation).to(dtype)

    def see_p(self, module: nn.Module, args: tuple[Any, ...], p: Tensor) -> Tensor | None:
        """Forward hook on the layer that the activation reads."""
        if p.shape[-1] != self.block.d_hidden:
            return None  # the layer passed its input on, to where the whole block is computed
        if module.training:
            add_moments_(self.sums, p.detach(), self._counted(p))
        shifted: Tensor = self(p)
        return shifted

    def see_x(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
        """Take down the pre-activations of a training batch that nobody else computes.

        Args:
            x: the block's input ``[*, D]``.
            weight: ``[F, D]``.
            bias: ``[F]``, without the threshold.
        """
        add_product_moments_(
            self.sums,
            x.detach(),
            weight.detach(),
            None if bias is None else bias.detach(),
            self._counted(x),
        )

    @torch.no_grad()
    def take_up(self, sums: Tensor) -> None:
        """Move the deviation on by a step.

        A unit that has not varied before takes the step's own; one whose pre-activations were
        infinite keeps its old one, as do all if no token came.

        Args:
            sums: of all batches of the step, of all processes.
        """
        tokens, total, squares = sums.unbind()
        whole = tokens.clamp(min=1.0)
        variance = ((squares - total.square() / whole) / whole).clamp(min=0.0)
        seen = variance.sqrt().to(self.deviation)
        share = torch.full_like(seen, 1.0 - DECAY).masked_fill(self.deviation == 0, 1.0)
        moved = self.deviation + share * (seen - self.deviation)
        usable = (tokens > 0) & seen.isfinite()
        self.deviation.copy_(torch.where(usable, moved, self.deviation))
        self.sums.zero_()

    def _counted(self, hidden: Tensor) -> Tensor | None:
        """Which tokens count, bool ``[N]`` in the order of the rows of `hidden`; None for all."""
        counted = self._context.counted(hidden, self.block)
        return None if counted is None else counted.reshape(-1)

    def _no_sums(self) -> Tensor:
        device = self.deviation.device
        dtype = torch.float32 if device.type == "mps" else torch.float64
        return torch.zeros(3, self.block.d_hidden, dtype=dtype, device=device)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Threshold:
        """Move with the model, but not to half precision, in which a running mean stands still."""
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, old in before.items():
            new = self._buffers[name]
            assert old is not None
            assert new is not None
            if new.dtype in (torch.float16, torch.bfloat16):
                self._buffers[name] = old.to(new.device)
        if self.sums.device != self.deviation.device:
            self.sums = self._no_sums()
        return self


class Rising(Constraint):
    """The schedule of τ, and the running deviations, of all blocks together.

    Args:
        thresholds: of the blocks.
        multiple: τ at the end of the ramp.
        ramp: share of the run over which it rises.

    Attributes:
        thresholds: of the blocks.
    """

    def __init__(self, thresholds: Sequence[Threshold], multiple: float, ramp: float) -> None:
        self.thresholds = list(thresholds)
        self._multiple = multiple
        self._ramp = ramp

    def advance(self, progress: float) -> None:
        """Set τ."""
        for threshold in self.thresholds:
            threshold.multiple.fill_(self._multiple * ramp_progress(progress, self._ramp))

    @torch.no_grad()
    def project(self) -> None:
        """Take up the batches of the step; between two steps all passes see the same threshold."""
        sums = [threshold.sums for threshold in self.thresholds]
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            flat = torch.cat([part.flatten().to(sums[0].device) for part in sums])
            dist.all_reduce(flat)  # one for all blocks
            parts = flat.split([part.numel() for part in sums])
            sums = [part.view_as(own).to(own.device) for part, own in zip(parts, sums, strict=True)]
        for threshold, part in zip(self.thresholds, sums, strict=True):
            threshold.take_up(part)


def threshold_of(block: MLPBlock) -> Threshold | None:
    """The threshold of a block, or None."""
    threshold = block.activated._modules.get(MODULE_NAME)
    return threshold if isinstance(threshold, Threshold) else None


def activated_bias(block: MLPBlock) -> Tensor | None:
    """The bias of the layer that the activation reads, less the block's threshold.

    Args:
        block: the block, with or without a threshold.

    Returns:
        ``[F]``, with the graph of the bias; None where there is neither.
    """
    layer: Any = block.activated
    bias: Tensor | None = layer.bias
    threshold = threshold_of(block)
    if threshold is None:
        return bias
    shift = threshold.shift(linear_weight(layer).dtype)
    return -shift if bias is None else bias - shift


@torch.library.custom_op("steppe::add_moments_", mutates_args=("sums",))
def add_moments_(sums: Tensor, p: Tensor, counted: Tensor | None) -> None:
    """Add number, Σ p and Σ p² over the tokens of one call, unit by unit, on their device.

    A forward pass that gradient checkpointing runs again in the backward pass counts once. This is
    a custom op so that it does so inside compiled graphs too, where Python does not run.

    Args:
        sums: float64 ``[3, F]``, changed.
        p: ``[*, F]``.
        counted: bool ``[N]``, False where a token is padding; None for all.
    """
    if not in_backward():
        moments = moments_of(p.reshape(-1, p.shape[-1]), counted).to(sums.dtype)
        with _ADDING:  # the model may run in several threads at once
            sums += moments


@add_moments_.register_fake
def _(sums: Tensor, p: Tensor, counted: Tensor | None) -> None:
    """Nothing is returned."""


@torch.library.custom_op("steppe::add_product_moments_", mutates_args=("sums",))
def add_product_moments_(
    sums: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, counted: Tensor | None
) -> None:
    """`add_moments_` of ``p = x Wᵀ + b``, which is not kept.

    Args:
        sums: float64 ``[3, F]``, changed.
        x: ``[*, D]``.
        weight: ``[F, D]``.
        bias: ``[F]``, or None.
        counted: as in `add_moments_`.
    """
    if not in_backward():
        p = F.linear(x.reshape(-1, x.shape[-1]), weight, bias)
        moments = moments_of(p, counted).to(sums.dtype)
        with _ADDING:
            sums += moments


@add_product_moments_.register_fake
def _(sums: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, counted: Tensor | None) -> None:
    """Nothing is returned."""


def moments_of(p: Tensor, counted: Tensor | None) -> Tensor:
    """Number, Σ p and Σ p² over tokens.

    The squares are summed about the mean, in float32 or wider: of a unit whose mean is many
    deviations away from zero they would lose the deviation. Of half precision p itself is read, not
    a copy in float32, and that twice.

    Args:
        p: ``[N, F]``.
        counted: bool ``[N]``, False for tokens that do not count; None for all.

    Returns:
        float64 ``[3, F]``; float32 on devices without float64.

    Example:
        >>> moments_of(torch.tensor([[1.0], [3.0], [9.0]]), torch.tensor([True, True, False]))
        tensor([[ 2.],
                [ 4.],
                [10.]], dtype=torch.float64)
    """
    wide = torch.promote_types(p.dtype, torch.float32)
    precise = torch.float32 if p.device.type == "mps" else torch.float64
    with torch.autocast(p.device.type, enabled=False):
        padding = None if counted is None else ~counted.to(p.device).unsqueeze(-1)
        if padding is None:
            tokens = torch.full((), len(p), dtype=precise, device=p.device)
        else:
            p = p.masked_fill(padding, 0.0)  # what is there may be infinite
            tokens = len(p) - padding.sum(dtype=precise)
        total = p.sum(0, dtype=wide).to(precise)
        centre = (total / tokens.clamp(min=1.0)).to(wide)
        centred = p - centre
        if padding is not None:
            centred.masked_fill_(padding, 0.0)
        # The norm over rows takes twice as long on the CPU, and half as long elsewhere.
        squares = (
            centred.square_().sum(0)
            if p.is_cpu
            else torch.linalg.vector_norm(centred, dim=0).square()
        ).to(precise)
    centre = centre.to(precise)
    rest = total - tokens * centre
    return torch.stack(
        [
            tokens.expand_as(total),
            total,
            squares + 2.0 * centre * rest + tokens * centre.square(),
        ]
    )
