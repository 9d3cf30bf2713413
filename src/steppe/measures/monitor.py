"""`Monitor`: measures the blocks of one model while any loop runs it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch import distributed as dist

from steppe.blocks.block import MLPBlock
from steppe.blocks.find import Blocks
from steppe.blocks.wrappers import unwrap
from steppe.errors import LossError
from steppe.measures.density import COUNTERS
from steppe.measures.generation import follow_generation
from steppe.measures.losses import LossContext, Reduction
from steppe.measures.observer import Observer, Switch
from steppe.measures.report import Report
from steppe.measures.tally import Tally, report_of, sum_over
from steppe.routing.observers import observers_of
from steppe.surgery.journal import Journal
from steppe.tokens import attach, listen
from steppe.wiring.first_pass import Look, is_to_be_seen, looking, names_of


class Monitor:
    """Measures a model's MLP blocks, streaming on the device; made by `watch`.

    Args:
        model: the model.
        blocks: of it; those of `find_blocks` come with their coverage.
        gradients: measure backward passes too.
        reduction: of a loss that is not the model's own, over its terms.
        counts_generation: whether passes within the model's ``generate`` are measured.
        verb: the function that the user has called, for errors.

    Attributes:
        enabled: whether forward passes, and their backward passes, are measured now.
        names: the blocks' names, in forward order.
        loss_factor: the factor of the loss before ``backward``, where that is not the model's
            own, whose factor is measured; 1 by default. A number or a 0-dim tensor. One that is set
            later is that of the passes that follow: ``monitor.loss_factor = scaler.get_scale()``
            before each.
    """

    def __init__(
        self,
        model: nn.Module,
        blocks: Sequence[MLPBlock],
        gradients: bool = False,
        reduction: Reduction = "mean",
        counts_generation: bool = True,
        verb: str = "watch",
    ) -> None:
        self.names = tuple(block.name for block in blocks)
        self._loss_factor: float | Tensor = 1.0
        self._has_loss_factor = False
        self._root = root = unwrap(model)
        self._switch = Switch(counts_generation=counts_generation)
        self._losses = LossContext(root, reduction) if gradients else None
        contexts, self._context_hooks = listen(root, blocks)
        self._observers = [
            Observer(self._switch, block, context, self._losses)
            for block, context in zip(blocks, contexts, strict=True)
        ]
        self._coverage = blocks.coverage if isinstance(blocks, Blocks) else None
        names = names_of(root)
        self._looks = [Look(root, names, block, verb) for block in blocks if is_to_be_seen(block)]
        self.enabled = True

    @contextmanager
    def attached(self) -> Iterator[Monitor]:
        """Measure while this lasts, any number of times; the model is then as it was before."""
        journal = Journal(transient=True)
        try:
            journal.add_forward_pre_hook(self._root, self._switch.enter)
            journal.add_forward_hook(self._root, self._switch.leave, always=True)
            journal.hold_nested_tensors_off(self._root)
            journal.hold_parts([observer.block for observer in self._observers])
            for observer in self._observers:
                journal.append(observers_of(observer.block.down), observer)
            attach(journal, self._context_hooks)
            follow_generation(self._root, journal)
            if self._losses is not None:
                self._losses.attach(journal)
            for module, see in self._hooks():
                journal.add_forward_hook(module, see)
            with looking(self._looks):
                yield self
        finally:
            journal.undo()

    @property
    def enabled(self) -> bool:
        """Whether passes are measured now."""
        return self._switch.enabled

    @enabled.setter
    def enabled(self, value: bool) -> None:
        self._switch.enabled = value
        if self._losses is not None:
            self._losses.enabled = value

    @property
    def loss_factor(self) -> float | Tensor:
        """The factor of the loss before ``backward`` now."""
        return self._loss_factor

    @loss_factor.setter
    def loss_factor(self, value: float | Tensor) -> None:
        is_measured = self._losses is not None and self._losses.probe.grad is not None
        if not is_measured and any(probe.grad is not None for probe in self.probes()):
            if not self._has_loss_factor:
                raise LossError(
                    "monitor.loss_factor: a backward pass has gone by without it. Set it before"
                    " backward(), or call monitor.reset()."
                )
            squared_factor = self._squared_loss_factor()
            for observer in self._observers:
                observer.settle(squared_factor)
        self._loss_factor, self._has_loss_factor = value, True

    @property
    def density(self) -> float:
        """The density so far, pooled over the blocks, of this process; NaN before any pass.

        Waits for the device.
        """
        sums = torch.stack([observer.counts.cpu() for observer in self._observers]).sum(0)
        counts = dict(zip(COUNTERS, sums.tolist(), strict=True))
        return counts["active"] / counts["entries"] if counts["entries"] else math.nan

    def counts(self, group: dist.ProcessGroup | None = None) -> Tensor:
        """The counts so far.

        Args:
            group: processes to sum over, all of which must call this; None for this one alone.

        Returns:
            int64 ``[blocks, 5]`` on the CPU: entries with a ≠ 0, with σ′ ≠ 0, all, tokens, samples.
        """
        return torch.stack([tally.counts for tally in self._tallies(group)])

    def report(self, group: dist.ProcessGroup | None = None) -> Report:
        """The measures so far.

        Args:
            group: processes to sum over, all of which must call this; None for this one alone.

        Returns:
            Means over the samples since the start or the last `reset`.

        Raises:
            LossError: gradients were asked for and none came, or the factor of the model's own loss
                changed meanwhile.
        """
        self._refuse_changed_factor()
        tallies = self._tallies(group)
        if self._losses is not None and not any(tally.activated[:, 0].any() for tally in tallies):
            raise LossError(
                "watch(gradients=True): no gradient came to any block. Call loss.backward() while"
                " watching, not under torch.no_grad(); for densities alone: watch(model)."
            )
        return self.report_of(tallies)

    def report_of(self, tallies: Sequence[Tally]) -> Report:
        """The report of tallies that `take` gave, on the CPU."""
        report = report_of([observer.block for observer in self._observers], tallies)
        found = self._coverage
        if found is None:
            return report
        return replace(report, coverage=found.share, not_covered=found.not_covered())

    def reset(self) -> None:
        """Start from zero."""
        for observer in self._observers:
            observer.reset()
        if self._losses is not None:
            self._losses.probe.grad = None

    def take(self) -> list[Tally]:
        """A tally per block on its device, of all since the last one; then start from zero."""
        squared_factor = self._squared_loss_factor()
        taken = [observer.tally(squared_factor) for observer in self._observers]
        self.reset()
        return taken

    def _hooks(self) -> Iterator[tuple[nn.Module, Callable[..., Tensor | None]]]:
        """The forward hooks that measure, with the modules they belong to."""
        for observer in self._observers:
            yield observer.block.activated, observer.see_p
            if observer.block.gate is not None:
                yield observer.block.up, observer.see_up
            if self._losses is not None:
                yield observer.block.down, observer.see_z

    def probes(self) -> list[Tensor]:
        """The leaves that gather the sums of backward passes in their gradients."""
        return [probe for observer in self._observers for probe in observer.probes.values()]

    @contextmanager
    def outside_loss(self, scale: Tensor) -> Iterator[Callable[[Tensor], Tensor]]:
        """For passes with a loss outside of the model, which does not get the labels.

        Args:
            scale: float ``[S]``, turns the gradient of the batch's loss into that of each
                sample's own.

        Yields:
            The function that the loss must go through: it measures the factor that follows.
        """
        assert self._losses is not None
        self._losses.outside = scale
        try:
            yield self._losses.tapped_outside
        finally:
            self._losses.outside = None

    def use_scale(self, scale: Tensor | None) -> None:
        """Set the factors from the next batch's gradients to those of each sample's own loss.

        Args:
            scale: float ``[S]`` or one for all; None where the reduction alone tells.
        """
        if self._losses is not None:
            self._losses.given = True
            self._losses.scale = scale

    def _tallies(self, group: dist.ProcessGroup | None) -> list[Tally]:
        squared_factor = self._squared_loss_factor()
        tallies = [observer.tally(squared_factor).cpu() for observer in self._observers]
        return tallies if group is None else sum_over(tallies, self._observers[0].device, group)

    def _refuse_changed_factor(self) -> None:
        """Refuse passes of several factors: their moments are one sum by now."""
        factors = None if self._losses is None else self._losses.probe.grad
        if factors is None:
            return
        passes, total, squares = factors.tolist()
        if passes * squares > total * total * (1.0 + 1e-6) or not math.isfinite(squares):
            raise LossError(
                "watch(gradients=True): the factor of the loss before backward() has"
                " changed since the last reset; GradScaler changes it after a step that it skips."
                " Report after each step: report = monitor.report(); monitor.reset()"
            )

    def _squared_loss_factor(self) -> Tensor:
        """The square of the loss's factor, measured where the loss is the model's own."""
        factors = None if self._losses is None else self._losses.probe.grad
        if factors is not None:
            return factors[2] / factors[0]
        return torch.as_tensor(self._loss_factor, dtype=torch.float64).square()
