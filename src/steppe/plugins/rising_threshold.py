"""Rising threshold, ours and not the paper's: only unusually large pre-activations are active."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch import distributed as dist

from steppe.blocks.block import MLPBlock
from steppe.blocks.linear import is_adapted, linear_weight
from steppe.errors import UnfitBlockError
from steppe.plugins.base import BiasShift, Constraint, Plugin, ramp_progress
from steppe.plugins.moments import add_moments_, add_product_moments_, start_of
from steppe.surgery.journal import Journal
from steppe.tokens import TokenContext, attach, listen

MODULE_NAME = "threshold"
DECAY = 0.95  # of the running deviation, a step


@dataclass(frozen=True)
class RisingThreshold(Plugin):
    """``σ(p − τ · s_u)``: only pre-activations that are large for their unit u pass.

    s_u is the running standard deviation of the unit's pre-activations over the training batches:
    each optimizer step gives ``0.95 · s_u + 0.05 ·`` the deviation over a sample of its tokens.
    Padding does not count, and no gradient passes. τ rises linearly from 0 to `multiple` over the
    first `ramp` of the run. In evaluation both stay as they are. Gated blocks threshold the gate.
    `fold_` moves ``τ · s_u`` into the bias.

    The sample of a forward pass is every k-th token, with at least 64 tokens of all processes. Its
    first token is a function of the seed and the step, so a forward pass that is repeated has the
    same sample, and so has a batch that more processes share. From n tokens the deviation has a
    relative standard error of about ``1 / √(2 n)``, which the running mean divides by 6.

    It fits any activation, and makes a model sparser if σ is zero for negative inputs.

    Args:
        multiple: τ at the end of the ramp, in standard deviations, ≥ 0.
        ramp: share of the run over which τ rises, in (0, 1].
        sample: 1 / k, the share of the tokens in the sample, in (0, 1]; 1 for all tokens.
        seed: of the sample.

    Raises:
        ValueError: a setting is out of range.
    """

    key: ClassVar[str] = "rising_threshold"

    multiple: float = 2.0
    ramp: float = 0.5
    sample: float = 1 / 16
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse settings that mean nothing."""
        if not 0.0 <= self.multiple < math.inf:  # NaN too
            raise ValueError(f"RisingThreshold: expected multiple ≥ 0, got {self.multiple}")
        if not 0.0 < self.ramp <= 1.0:
            raise ValueError(
                "RisingThreshold.ramp is a share of the run, in which the deviations become known:"
                f" expected more than 0 and at most 1, got {self.ramp}"
            )
        if not 0.0 < self.sample <= 1.0:
            raise ValueError(
                "RisingThreshold.sample is a share of the tokens: expected more than 0 and at most"
                f" 1, got {self.sample}"
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
            threshold = Threshold(block, context, self.sample)
            threshold.add_to(journal, MODULE_NAME)
            thresholds.append(threshold)
        return [Rising(thresholds, self.multiple, self.ramp, self.seed)]


class Threshold(BiasShift):
    """The shift ``τ · s`` of one block, and the statistics of its training batches for s.

    The buffers are `multiple`, τ, a 0-dim tensor that can change without recompiling, and
    `deviation`, s, ``[F]``, zero until a batch was seen; so without statistics nothing is
    subtracted, nor from a unit that does not vary. Both are float32 or wider.

    Args:
        block: the block.
        context: knows its padding.
        sample: share of the tokens that the statistics are taken from.

    Attributes:
        block: the block.
        sums: float64 ``[3, F]``, the number of tokens, Σ p and Σ p² of the batches since the last
            step. It is no buffer, since DDP gives every process the first one's buffers.
        start: int64, of the samples of this step, see `steppe.plugins.moments.start_of`; a 0-dim
            tensor, like τ.
    """

    multiple: Tensor
    deviation: Tensor

    def __init__(self, block: MLPBlock, context: TokenContext, sample: float) -> None:
        super().__init__(block)
        self._context = context
        self._sample = sample
        weight = linear_weight(block.activated)
        dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
        self.register_buffer("multiple", torch.zeros((), dtype=dtype, device=weight.device))
        self.register_buffer(
            "deviation", torch.zeros(block.d_hidden, dtype=dtype, device=weight.device)
        )
        self.sums = self._no_sums()
        self.start = torch.zeros((), dtype=torch.int64, device=weight.device)

    def shift(self, dtype: torch.dtype) -> Tensor:
        """τ · s, ``[F]``."""
        return (self.multiple * self.deviation).to(dtype)

    def see_p(self, module: nn.Module, args: tuple[Any, ...], p: Tensor) -> Tensor | None:
        """Forward hook on the layer that the activation reads."""
        if module.training and p.shape[-1] == self.block.d_hidden:
            add_moments_(self.sums, p.detach(), self._counted(p), self.start, self._sample)
        return super().see_p(module, args, p)

    def see_x(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
        """Add the pre-activations of a routed training batch to the statistics."""
        add_product_moments_(
            self.sums,
            x.detach(),
            weight.detach(),
            None if bias is None else bias.detach(),
            self._counted(x),
            self.start,
            self._sample,
        )

    @torch.no_grad()
    def take_up(self, sums: Tensor) -> None:
        """Move the deviation on by a step.

        A unit that has not varied before takes the step's deviation. A unit keeps its old one if
        its pre-activations were infinite, and all units do if there was no token.

        Args:
            sums: of all batches of the step, of all processes, ``[3, F]``.
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
        """Move with the model, but not to half precision, where a running mean stands still."""
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
            self.start = self.start.to(self.deviation.device)
        return self


class Rising(Constraint):
    """The schedule of τ and the running deviations of all blocks together.

    Args:
        thresholds: of the blocks.
        multiple: τ at the end of the ramp.
        ramp: share of the run over which it rises.
        seed: of the samples.

    Attributes:
        thresholds: of the blocks.
    """

    def __init__(
        self, thresholds: Sequence[Threshold], multiple: float, ramp: float, seed: int
    ) -> None:
        self.thresholds = list(thresholds)
        self._multiple = multiple
        self._ramp = ramp
        self._seed = seed

    def advance(self, progress: float) -> None:
        """Set τ, and choose the samples of the next step."""
        start = start_of(self._seed, progress)
        for threshold in self.thresholds:
            threshold.multiple.fill_(self._multiple * ramp_progress(progress, self._ramp))
            threshold.start.fill_(start)

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
