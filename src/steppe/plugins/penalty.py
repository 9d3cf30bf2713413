"""Activation penalty: the L1 norm of the activations, added to the loss; not the paper's."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from steppe.blocks.block import MLPBlock
from steppe.blocks.linear import linear_weight
from steppe.checkpointing import in_backward
from steppe.errors import LossError, ScheduleError, SparsificationError
from steppe.plugins.base import (
    Constraint,
    LossTerm,
    Plugin,
    loss_terms_of,
    ramp_progress,
    require_share,
)
from steppe.surgery.journal import Journal
from steppe.tokens import TokenContext, attach, listen


@dataclass(frozen=True)
class ActivationPenalty(Plugin):
    """``λ · Σ_blocks mean over tokens of Σ_i |a_i|``, added to the loss while the model trains.

    a is the input of the block's second layer, before dropout; padding does not count. In a loop
    of your own: ``loss = steppe.penalize(loss, model)``. In the Trainer `SteppeCallback` does it.
    In evaluation there is no penalty.

    Args:
        strength: λ, ≥ 0.
        ramp: share of the run over which λ rises linearly from 0, in [0, 1]; 0 for at once.

    Raises:
        ValueError: a setting is out of range.
    """

    key: ClassVar[str] = "activation_penalty"

    strength: float
    ramp: float = 0.0

    def __post_init__(self) -> None:
        """Refuse settings that mean nothing."""
        if not 0.0 <= self.strength < math.inf:  # NaN too
            raise ValueError(f"ActivationPenalty: expected strength ≥ 0, got {self.strength}")
        require_share("ActivationPenalty.ramp", self.ramp)

    @property
    def has_schedule(self) -> bool:
        """Whether λ rises."""
        return self.ramp > 0

    def check(self, block: MLPBlock) -> None:
        """Every block fits."""

    def apply(
        self, model: nn.Module, blocks: Sequence[MLPBlock], journal: Journal
    ) -> list[Constraint]:
        """Add the hooks that see the activations."""
        device = linear_weight(blocks[0].down).device
        penalty = Penalty(self.strength, self.ramp, device)
        contexts, hooks = listen(model, blocks)
        journal.add_forward_pre_hook(model, penalty.begin)
        attach(journal, hooks)
        for block, context in zip(blocks, contexts, strict=True):
            penalty.join(block, journal)
            penalty.contexts[block.name] = context
            receiver = block.down if block.dropout is None else block.dropout
            journal.add_forward_pre_hook(receiver, partial(penalty.see_a, block, context))
        return [penalty]


class Penalty(LossTerm):
    """The penalty of all blocks together.

    Args:
        strength: λ at the end of the ramp.
        ramp: share of the run over which it rises.
        device: of the model.

    Attributes:
        strength: λ now, a 0-dim tensor on the loss's device, which can change without recompiling.
        contexts: by the block's name, it knows the padding.
    """

    reads_l1: ClassVar[bool] = True

    def __init__(self, strength: float, ramp: float, device: torch.device) -> None:
        self._most = strength
        self._ramp = ramp
        self.strength = torch.full((), strength * ramp_progress(0.0, ramp), device=device)
        self.contexts: dict[str, TokenContext] = {}
        self._means: list[Tensor] = []  # of the last forward pass
        self._is_due = False
        # Reentrant checkpointing first runs the blocks without a graph, so their means give no
        # gradient. The gradient is added when they run again in the backward pass; the factor of
        # the loss is known by then, because backward has passed the loss.
        self._bare: set[str] = set()
        self._factor: Tensor | None = None

    def advance(self, progress: float) -> None:
        """Set λ."""
        self.strength.fill_(self._most * ramp_progress(progress, self._ramp))

    def project(self) -> None:
        """Refuse a step whose loss did not get the penalty, or got it without a gradient.

        Raises:
            ScheduleError: no loss got it; names the line to write.
            LossError: the forward pass had no graph.
        """
        is_due, has_no_graph = self._is_due, bool(self._bare)
        self.begin()
        if is_due:
            raise ScheduleError(
                "ActivationPenalty: no loss got the penalty of the last forward pass. Before"
                " loss.backward(): loss = steppe.penalize(loss, model). In the Trainer:"
                " callbacks=[SteppeCallback()]"
            )
        if has_no_graph:
            raise LossError(
                "ActivationPenalty: the loss has the penalty of a forward pass under"
                " torch.no_grad(), from which no gradient comes. Penalize the loss right after its"
                " forward pass"
            )

    def begin(self, *arguments: Any) -> None:
        """Forget the state of an earlier pass; a forward pre-hook on the model."""
        self._means, self._is_due, self._factor = [], False, None
        self._bare.clear()

    def see_a(
        self, block: MLPBlock, context: TokenContext, module: nn.Module, args: tuple[Any, ...]
    ) -> tuple[Any, ...] | None:
        """Forward pre-hook on the module that receives a block's activations."""
        a = args[0]
        if not block.down.training or a.shape[-1] != block.d_hidden:
            return None
        taken = self._take(block, mean_l1(a, context.counted(a, block)), a)
        return None if taken is a else (taken, *args[1:])

    def see_l1(self, block: MLPBlock, l1: Tensor, z: Tensor) -> Tensor:
        """Take Σ|a| of a training call that is routed to the kernels; the output."""
        counted = self.contexts[block.name].counted(z, block)
        return self._take(block, mean_over(l1, counted), z)

    def _take(self, block: MLPBlock, mean: Tensor, carrier: Tensor) -> Tensor:
        """Keep a block's mean for the loss.

        Args:
            block: the block.
            mean: over tokens, of Σ|a|, 0-dim.
            carrier: a tensor of the same call, whose gradient comes by here.

        Returns:
            The carrier; with the gradient of the mean, if the loss has had the mean without one.
        """
        # A pass recomputed by checkpointing: the same operations, but nothing more to add.
        if torch.compiler.is_compiling() or not in_backward():
            self._means.append(mean)
            self._is_due = True
            if not mean.requires_grad:
                self._bare.add(block.name)
        elif block.name in self._bare and self._factor is not None:
            self._bare.remove(block.name)
            carrier = _WithGradient.apply(carrier, mean, self._factor.to(mean))
        return carrier

    def add_to(self, loss: Tensor, share: float = 1.0) -> Tensor:
        """The loss with the penalty of the last forward pass, which is then used up.

        Args:
            loss: scalar.
            share: this pass's share of the batch, if the loss is of the whole batch.
        """
        means, self._means = self._means, []
        self._is_due = False
        if not means:
            return loss
        if self.strength.device != loss.device:  # the model was moved
            self.strength = self.strength.to(loss.device)
        total = torch.stack([mean.to(loss.device) for mean in means]).sum()
        weight = self.strength * share
        penalty = (weight * total).to(loss.dtype)
        if not loss.requires_grad:
            self._bare.clear()
        if not self._bare:
            return loss + penalty
        added: Tensor = _Added.apply(loss, penalty, weight, self)
        return added

    def take_factor(self, factor: Tensor) -> None:
        """Take the gradient of each block's mean."""
        self._factor = factor

    def __getstate__(self) -> dict[str, Any]:
        """The state of a copy: without the graph of the last forward pass."""
        passing = {"_means": [], "_is_due": False, "_bare": set(), "_factor": None}
        return {**self.__dict__, **passing}


class _Added(torch.autograd.Function):
    """Loss + penalty; its backward keeps the factor of the sum, for blocks that run again later."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, penalty: Tensor, weight: Tensor, taker: Penalty) -> Tensor:
        """The sum."""
        ctx.taker = taker
        ctx.weight = weight
        return loss + penalty

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        """The gradient as it is, for both."""
        ctx.taker.take_factor(grad.detach() * ctx.weight)
        return grad, grad, None, None


class _WithGradient(torch.autograd.Function):
    """A tensor as it is; its backward also gives the mean of its block a gradient."""

    @staticmethod
    def forward(ctx: Any, carrier: Tensor, mean: Tensor, factor: Tensor) -> Tensor:
        """The tensor."""
        ctx.save_for_backward(factor)
        return carrier.detach()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        """The gradient as it is, and the factor."""
        return grad, ctx.saved_tensors[0], None


def mean_l1(a: Tensor, counted: Tensor | None) -> Tensor:
    """Mean over tokens of Σ_i |a_i|.

    Args:
        a: activations ``[*, F]``.
        counted: bool ``[*]``, False for tokens that do not count; None for all.

    Returns:
        A scalar, float32 or wider; 0 where no token counts.

    Example:
        >>> mean_l1(torch.tensor([[1.0, -2.0], [4.0, 1.0]]), None)
        tensor(4.)
    """
    return mean_over(a.abs().sum(-1, dtype=torch.promote_types(a.dtype, torch.float32)), counted)


def mean_over(values: Tensor, counted: Tensor | None) -> Tensor:
    """Mean of a number of each token over the tokens that count; 0 where none does.

    Args:
        values: ``[*]``.
        counted: bool ``[*]``; None for all.
    """
    if counted is None:
        return values.mean()
    return torch.where(counted, values, 0.0).sum() / counted.sum().clamp(min=1)


def penalize(loss: Tensor, model: nn.Module) -> Tensor:
    """A loss with the `ActivationPenalty` of the model's last forward pass.

    After a forward pass in evaluation mode the loss stays as it was. With gradient accumulation,
    call it for each micro-batch, before dividing.

    Args:
        loss: scalar, a mean over the tokens or samples of the forward pass.
        model: a model that carries the plug-in; wrappers are seen through.

    Returns:
        A scalar: ``loss + λ · Σ_blocks mean over tokens of Σ_i |a_i|``.

    Raises:
        SparsificationError: the model carries no `ActivationPenalty`.
    """
    penalties = penalties_of(model)
    if not penalties:
        raise SparsificationError(
            f"penalize: {type(model).__name__} carries no penalty. First:"
            " steppe.sparsify_(model, [steppe.ActivationPenalty(1e-4)])"
        )
    for penalty in penalties:
        loss = penalty.add_to(loss)
    return loss


def penalties_of(model: nn.Module) -> list[LossTerm]:
    """The terms that plug-ins add to a model's loss, `ActivationPenalty` and others."""
    return loss_terms_of(model)
