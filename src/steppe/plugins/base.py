"""The base of every plug-in: it checks a block, changes it, and keeps it within bounds in training.

A plug-in is one file and one entry in `steppe.plugins.registry`. No other part of steppe knows it
by its class; they use the names in this file. The kernels ask a block for its effective bias and
for the need of the hidden tensor, and an activation for its coefficients
(`steppe.activations.KnownRectifier`). The data ask for the longest sequence, a checkpoint for the
settings and the lengths of added tensors.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from steppe.blocks.block import MLPBlock, Slot
from steppe.blocks.linear import linear_weight
from steppe.surgery.journal import Journal

_NEEDS_HIDDEN = "_steppe_needs_hidden"  # on a block's second layer: by mode, the reasons
_LOSS_TERMS = "_steppe_loss_terms"  # on a block's second layer
_NO_SHIFTS: tuple[BiasShift, ...] = ()


class Constraint:
    """The part of a plug-in that goes on during training; by default it does nothing.

    Attributes:
        reads_norm: the bounds depend on the norm's scale, so it is projected after the norm.
    """

    reads_norm: ClassVar[bool] = False

    def changed(self) -> list[nn.Parameter]:
        """The model's own parameters that `project` changes, frozen ones too."""
        return []

    def advance(self, progress: float) -> None:
        """Set schedules.

        Args:
            progress: share of the run that is done, in [0, 1].
        """

    def project(self) -> None:
        """Bring the parameters back within their bounds, after an optimizer step.

        Statistics of the step's batches are taken up here, too: in every process, at once.
        """


class LossTerm(Constraint):
    """A constraint that adds a term to the loss of each training step.

    Attributes:
        reads_l1: the term is made of Σ|a| of each token, which the kernels compute on the support;
            `see_l1` gets it in routed calls.
    """

    reads_l1: ClassVar[bool] = False

    def join(self, block: MLPBlock, journal: Journal) -> None:
        """Note the term on a block, so that `penalize` and the callbacks find it.

        Args:
            block: a block that the term is of.
            journal: takes it back.
        """
        terms = block.down.__dict__.get(_LOSS_TERMS) or []
        journal.hold_attribute(Slot(block.down, _LOSS_TERMS), terms)
        journal.append(terms, self)

    def add_to(self, loss: Tensor, share: float = 1.0) -> Tensor:
        """The loss with the term of the last forward pass, which is then used up.

        Args:
            loss: scalar.
            share: this pass's share of the batch, if the loss is of the whole batch.
        """
        raise NotImplementedError

    def see_l1(self, block: MLPBlock, l1: Tensor, z: Tensor) -> Tensor:
        """Take Σ|a| of a training call that is routed to the kernels.

        Args:
            block: the block.
            l1: Σ|a| of each token, before dropout, ``[*]``, with its graph.
            z: the block's output ``[*, D]``.

        Returns:
            z, with which the gradient of the term may travel.
        """
        raise NotImplementedError


@dataclass(frozen=True)
class Plugin(ABC):
    """One change to the MLP blocks of a model; its fields are its settings, all JSON values.

    A concrete plug-in is a frozen dataclass with a `key`, its name in ``config.json`` and recipes.
    In a call that `accelerate_` routes to the kernels there is no hidden tensor: a forward hook on
    the activated layer gets the block's input, and so does a pre-hook on `down`. A plug-in that
    shifts the pre-activations does it by a `BiasShift`; one that reads or changes the hidden tensor
    otherwise says so in `needs_hidden`.

    Attributes:
        uses_norm: it depends on the block's norm, which must then be the one that the block reads.
    """

    key: ClassVar[str]
    uses_norm: ClassVar[bool] = False

    @property
    def has_schedule(self) -> bool:
        """Whether the plug-in needs to know how much of the run is done."""
        return False

    @property
    def longest_sequence(self) -> int | None:
        """The longest sequence that the plug-in allows, in tokens; None for any."""
        return None

    def needs_hidden(self, training: bool) -> str:
        """Why the plug-in needs a block's dense hidden tensor; empty if it does not.

        Where it does, the block runs its own modules and not the kernels.

        Args:
            training: the mode of the block.
        """
        return ""

    def resolve(self, model: nn.Module, blocks: Sequence[MLPBlock]) -> Plugin:
        """The same plug-in with every setting decided.

        Args:
            model: the model to be changed.
            blocks: the blocks to be changed.

        Raises:
            UnfitBlockError: a setting is missing that this model does not decide.
        """
        return self

    @abstractmethod
    def check(self, block: MLPBlock) -> None:
        """Refuse a block that the plug-in does not fit; changes nothing.

        Raises:
            UnfitBlockError: names the block, the expectation, and the cure.
        """

    @abstractmethod
    def apply(
        self, model: nn.Module, blocks: Sequence[MLPBlock], journal: Journal
    ) -> Sequence[Constraint]:
        """Change the blocks through the journal.

        Args:
            model: the model that the blocks are of.
            blocks: blocks that passed `check`.
            journal: takes down every edit.

        Returns:
            Constraints, of a block each or of all together.
        """

    def settings(self) -> dict[str, Any]:
        """The plug-in as JSON values."""
        return {"plugin": self.key, **dataclasses.asdict(self)}

    def added_lengths(self, model: nn.Module) -> Mapping[str, int]:
        """Length of the first dimension of the tensors that the plug-in adds, by their last name.

        Only those whose length the settings decide: a checkpoint with other lengths is refused
        before memory is taken for them.

        Args:
            model: the model to be changed.
        """
        return {}


class BiasShift(nn.Module):
    """A vector that is subtracted from a block's pre-activations: a module below their layer.

    The block's own modules subtract it by a forward hook; the kernels get the bias less the vector
    (`effective_bias`). `add_to` puts both into a model. A subclass computes the vector from its own
    parameters and buffers, see `sources`.

    Args:
        block: the block.

    Attributes:
        block: the block.
    """

    def __init__(self, block: MLPBlock) -> None:
        super().__init__()
        self.block = block

    def shift(self, dtype: torch.dtype) -> Tensor:
        """The vector that is subtracted, ``[F]``, in a dtype."""
        raise NotImplementedError

    def forward(self, p: Tensor) -> Tensor:
        """The pre-activations less the shift; shape and dtype of p."""
        return p - self.shift(p.dtype)

    def see_p(self, module: nn.Module, args: tuple[Any, ...], p: Tensor) -> Tensor | None:
        """Forward hook on the layer that the activation reads."""
        if p.shape[-1] != self.block.d_hidden:
            return None  # a routed call: the layer hands its input on, and the kernels shift
        shifted: Tensor = self(p)
        return shifted

    def see_x(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
        """Take a training batch of a routed call, in which `see_p` sees no pre-activations.

        Args:
            x: the block's input ``[*, D]``.
            weight: ``[F, D]``.
            bias: ``[F]``, without any shift.
        """

    def sources(self) -> list[Tensor]:
        """The tensors that `shift` is computed from: the kernels notice when they change."""
        held = (*self._buffers.values(), *self._parameters.values())
        return [tensor for tensor in held if tensor is not None]

    def add_to(self, journal: Journal, name: str) -> None:
        """Put the module and its hook into the model.

        Args:
            journal: takes it back.
            name: of the module below the layer; its tensors are saved under it.
        """
        layer = self.block.activated
        self.train(layer.training)
        journal.add_module(Slot(layer, name), self)
        journal.add_forward_hook(layer, self.see_p)


def shifts_of(block: MLPBlock) -> Sequence[BiasShift]:
    """The shifts of a block's pre-activations, in the order in which they were added."""
    modules = block.activated._modules
    if not modules:
        return _NO_SHIFTS
    return [module for module in modules.values() if isinstance(module, BiasShift)]


def effective_bias(block: MLPBlock) -> Tensor | None:
    """The bias of the layer that the activation reads, with all plug-ins applied.

    Args:
        block: the block, with or without shifts.

    Returns:
        ``[F]``, with the graph of the bias; None where there is neither bias nor shift.
    """
    return shifted_bias(block.activated, shifts_of(block))


def shifted_bias(layer: Any, shifts: Sequence[BiasShift]) -> Tensor | None:
    """The bias of a linear layer less some shifts.

    Args:
        layer: the layer.
        shifts: of its outputs.

    Returns:
        ``[F]``, with the graph of the bias; None where there is neither bias nor shift.
    """
    bias: Tensor | None = layer.bias
    for one in shifts:
        shift = one.shift(linear_weight(layer).dtype)
        bias = -shift if bias is None else bias - shift
    return bias


def l1_readers(block: MLPBlock) -> Sequence[LossTerm]:
    """The terms of the loss that read Σ|a| of a block in training."""
    terms: list[LossTerm] | None = block.down.__dict__.get(_LOSS_TERMS)
    return [term for term in terms if term.reads_l1] if terms else ()


def loss_terms_of(model: nn.Module) -> list[LossTerm]:
    """The terms that plug-ins add to a model's loss, each once."""
    terms: list[LossTerm] = []
    for module in model.modules():
        terms += module.__dict__.get(_LOSS_TERMS, [])
    return list({id(term): term for term in terms}.values())


def mark_needs(plugin: Plugin, blocks: Sequence[MLPBlock], journal: Journal) -> None:
    """Note on blocks in which modes a plug-in needs their hidden tensor, and why.

    Args:
        plugin: that was applied to them.
        blocks: the blocks.
        journal: takes it back.
    """
    reasons = {mode: reason for mode in (True, False) if (reason := plugin.needs_hidden(mode))}
    for block in blocks if reasons else ():
        slot = Slot(block.down, _NEEDS_HIDDEN)
        marks = block.down.__dict__.get(_NEEDS_HIDDEN) or {True: [], False: []}
        journal.hold_attribute(slot, marks)  # held by each plug-in, so that any can go first
        for mode, reason in reasons.items():
            journal.append(marks[mode], reason)


def needs_hidden(block: MLPBlock) -> str:
    """Why a plug-in needs a block's dense hidden tensor now; empty if none does."""
    marks: dict[bool, list[str]] | None = block.down.__dict__.get(_NEEDS_HIDDEN)
    reasons = marks[block.down.training] if marks else None
    return reasons[0] if reasons else ""


def ramp_progress(progress: float, ramp: float) -> float:
    """How far a linear ramp over the first part of a run has come.

    Args:
        progress: share of the run that is done, in [0, 1].
        ramp: share of the run that the ramp takes; 0 for at once.

    Returns:
        Position on the ramp, in [0, 1].

    Example:
        >>> ramp_progress(0.1, 0.4), ramp_progress(0.9, 0.4), ramp_progress(0.0, 0.0)
        (0.25, 1.0, 1.0)
    """
    return 1.0 if ramp == 0 else min(1.0, progress / ramp)


def require_share(name: str, value: float) -> None:
    """Refuse a setting that is no share of a run.

    Raises:
        ValueError: `value` is outside [0, 1].
    """
    if not 0.0 <= value <= 1.0:
        raise ValueError(f"{name} is a share of the run: expected 0 … 1, got {value}")
