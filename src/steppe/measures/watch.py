"""Watch the MLP blocks of a model while any loop runs it."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist

from steppe.activations import Activation, is_relu
from steppe.blocks.find import Blocks, MLPBlock, blocks_for, unwrap
from steppe.blocks.linear import linear_weight
from steppe.blocks.patterns import BlockPattern
from steppe.errors import LossError
from steppe.measures.density import (
    COUNTERS,
    SAMPLE_COUNTERS,
    active_entries,
    count_,
    sloped_entries,
)
from steppe.measures.flatness import COLUMNS, Calls, by_sample, new_probe, tap
from steppe.measures.generation import follow_generation
from steppe.measures.losses import LossContext, Reduction
from steppe.measures.report import Report
from steppe.measures.tally import Tally, report_of, scaled, sum_over
from steppe.per_thread import PerThread
from steppe.routing.observers import observers_of
from steppe.surgery.journal import Journal
from steppe.surgery.pattern_notes import note_patterns_
from steppe.tokens import TokenContext, attach, current_generation, listen
from steppe.wiring.first_pass import Look, is_to_be_seen, looking, names_of


class Monitor:
    """What is measured of a model's MLP blocks, streaming on the device; made by `watch`.

    Args:
        model: the model.
        blocks: of it; of `find_blocks`, for what they cover to be known.
        gradients: measure backward passes too.
        reduction: of a loss that is not the model's own, over its terms.
        counts_generation: whether passes within the model's ``generate`` are measured.
        verb: what the user has called, for errors.

    Attributes:
        enabled: whether forward passes, and their backward passes, are measured now.
        names: the blocks' names, in forward order.
        loss_factor: what the loss is multiplied by before ``backward``, where it is not the model's
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
        self._model = model
        self._switch = _Switch(counts_generation=counts_generation)
        self._losses = LossContext(model, reduction) if gradients else None
        contexts, self._context_hooks = listen(model, blocks)
        self._observers = [
            _Observer(self._switch, block, context, self._losses)
            for block, context in zip(blocks, contexts, strict=True)
        ]
        root = unwrap(model)
        self._coverage = blocks.coverage if isinstance(blocks, Blocks) else None
        names = names_of(root)
        self._looks = [Look(root, names, block, verb) for block in blocks if is_to_be_seen(block)]
        self.enabled = True

    @contextmanager
    def attached(self) -> Iterator[Monitor]:
        """Measure while this lasts, any number of times; the model is then as it was before."""
        journal = Journal(transient=True)
        try:
            journal.add_forward_pre_hook(unwrap(self._model), self._switch.enter)
            journal.add_forward_hook(unwrap(self._model), self._switch.leave, always=True)
            journal.hold_nested_tensors_off(self._model)
            journal.hold_parts([observer.block for observer in self._observers])
            for observer in self._observers:
                journal.append(observers_of(observer.block.down), observer)
            attach(journal, self._context_hooks)
            follow_generation(self._model, journal)
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
        """What the loss is multiplied by before ``backward`` now."""
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

    def counts(self, group: dist.ProcessGroup | None = None) -> Tensor:
        """The counts so far.

        Args:
            group: processes to sum over, all of which must call this; None for this one alone.

        Returns:
            int64 ``[blocks, 5]`` on the CPU: entries with a ≠ 0, with σ′ ≠ 0, all, tokens, samples.
        """
        return torch.stack([tally.counts for tally in self._tallies(group)])

    def report(self, group: dist.ProcessGroup | None = None) -> Report:
        """What was measured so far.

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
        """What was gathered so far, a tally per block on its device, and start from zero."""
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
        """The leaves whose gradients gather what backward passes tell."""
        return [probe for observer in self._observers for probe in observer.probes.values()]

    @contextmanager
    def outside_loss(self, scale: Tensor) -> Iterator[Callable[[Tensor], Tensor]]:
        """For passes whose loss is made outside of the model, where that is not told the labels.

        Args:
            scale: float ``[S]``, what turns the gradient of the batch's loss into that of each
                sample's own.

        Yields:
            What the loss must go through: it measures by what it is multiplied afterwards.
        """
        assert self._losses is not None
        self._losses.outside = scale
        try:
            yield self._losses.tapped_outside
        finally:
            self._losses.outside = None

    def use_scale(self, scale: Tensor | None) -> None:
        """Set what turns the gradient of the next batch's loss into that of each sample's own.

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
        """Refuse passes of several factors, whose moments are one sum by now."""
        factors = None if self._losses is None else self._losses.probe.grad
        if factors is None:
            return
        passes, total, squares = factors.tolist()
        if passes * squares > total * total * (1.0 + 1e-6) or not math.isfinite(squares):
            raise LossError(
                "watch(gradients=True): what the loss is multiplied by before backward() has"
                " changed since the last reset; GradScaler changes it after a step that it skips."
                " Report after each step: report = monitor.report(); monitor.reset()"
            )

    def _squared_loss_factor(self) -> Tensor:
        """The square of what the loss was multiplied by, measured where it was the model's own."""
        factors = None if self._losses is None else self._losses.probe.grad
        if factors is not None:
            return factors[2] / factors[0]
        return torch.as_tensor(self._loss_factor, dtype=torch.float64).square()


Pass = defaultdict[tuple[int, str], Calls]
"""The calls of layers in one forward pass, by their observers and names."""


@dataclass
class _Switch:
    """Whether passes are measured now; the observers do not keep their monitor alive."""

    enabled: bool = True
    counts_generation: bool = True
    passes: PerThread[tuple[Pass, ...]] = field(default_factory=lambda: PerThread(()))

    def enter(self, *arguments: Any) -> None:
        """Forward pre-hook on the model: a pass begins."""
        if not torch.compiler.is_compiling():
            self.passes.set((*self.passes.get(), defaultdict(Calls)))

    def leave(self, *arguments: Any) -> None:
        """Forward hook on it, called also where its forward has raised."""
        if not torch.compiler.is_compiling():
            self.passes.set(self.passes.get()[:-1])

    def call(self, observer: _Observer, name: str) -> Calls | None:
        """The calls of a layer in this pass, with the one that runs; None if that is all there is.

        It is where torch.compile traces, outside of the model's forward, and where gradient
        checkpointing runs a forward pass again.
        """
        if torch.compiler.is_compiling() or torch._C._current_graph_task_id() != -1:
            return None
        passes = self.passes.get()
        if not passes:
            return None
        calls = passes[-1][id(observer), name]
        calls.made += 1
        return calls

    @property
    def is_on(self) -> bool:
        """Whether the pass that runs is measured."""
        return self.enabled and (self.counts_generation or current_generation.get() is None)


class _Observer:
    """Measures one block: at the layer before the activation, at a gated `up`, at `down`."""

    def __init__(
        self,
        switch: _Switch,
        block: MLPBlock,
        context: TokenContext,
        losses: LossContext | None,
    ) -> None:
        self.block = block
        self._switch = switch
        self._context = context
        self._losses = losses
        # Gated blocks run gate and up in either order: keep the first until the second comes.
        self._gate: PerThread[tuple[Tensor, Tensor] | None] = PerThread(None)
        self._up: PerThread[Tensor | None] = PerThread(None)
        self.probes: dict[str, Tensor] = {}
        self._settled: dict[str, Tensor] = {}  # of passes with an earlier factor of the loss
        self._allocate(self.device)

    @property
    def device(self) -> torch.device:
        """Where the block is; the CPU while it is nowhere."""
        weight = linear_weight(self.block.up)
        return torch.device("cpu") if weight.is_meta else weight.device

    def reset(self) -> None:
        """Start from zero; the compiled graphs hold on to these very tensors."""
        for tensor in (self.counts, self.units, self.moments):
            tensor.zero_()
        for probe in self.probes.values():
            probe.grad = None
        self._settled.clear()

    def settle(self, squared_factor: Tensor) -> None:
        """Have what was gathered so far be of a loss that was multiplied by this."""
        for name, probe in self.probes.items():
            if probe.grad is not None:
                self._settled[name] = self._gradients(name, squared_factor)
                probe.grad = None

    def tally(self, squared_factor: Tensor) -> Tally:
        """A copy of what was gathered so far."""
        gradients = (self._gradients(name, squared_factor) for name in ("activated", "up", "down"))
        return Tally(self.counts.clone(), self.units.clone(), self.moments.clone(), *gradients)

    def _gradients(self, name: str, squared_factor: Tensor) -> Tensor:
        """What backward passes told at a layer, for the loss itself."""
        moments = self.probes[name].grad if name in self.probes else None
        settled = self._settled.get(name)
        if moments is None:
            shape = (len(COLUMNS) + 1, len(COLUMNS))
            return torch.zeros(shape, dtype=self.moments.dtype) if settled is None else settled
        found = scaled(moments, squared_factor)
        return found if settled is None else found + settled

    @property
    def needs_dense(self) -> bool:
        """Whether a routed block's own modules must run now, for their gradients to be seen."""
        return self._switch.is_on and self._losses is not None

    def see_support(self, x: Tensor, active: Tensor, slopes: Tensor) -> None:
        """The support of a routed call."""
        if self._switch.is_on:
            self._count(active, active, slopes)

    def see_p(self, module: nn.Module, args: tuple[Any, ...], p: Tensor) -> Tensor | None:
        """Forward hook on the activated layer."""
        if not self._switch.is_on or self._is_routed(p):
            return None
        # The slot, not the block: the activation may have been replaced since.
        slot = self.block.act_slot
        act: Activation = getattr(slot.module, slot.name)
        slopes = sloped_entries(act, p)
        if self.block.gate is None:
            active = slopes if is_relu(act) else active_entries(act, p)
            self._count(p, active, slopes)
        elif (up := self._up.get()) is None:
            self._gate.set((active_entries(act, p), slopes))
        else:
            self._up.set(None)
            self._count(p, active_entries(act, p) & up, slopes)
        return self._tapped("activated", args[0], p, slopes)

    def see_up(self, module: nn.Module, args: tuple[Any, ...], up: Tensor) -> Tensor | None:
        """Forward hook on `up` of a gated block."""
        if not self._switch.is_on or self._is_routed(up):
            return None
        gate = self._gate.get()
        if gate is None:
            self._up.set(up.detach() != 0)
        else:
            active, slopes = gate
            self._gate.set(None)
            self._count(up, active & (up.detach() != 0), slopes)
        return self._tapped("up", args[0], up, None)

    def see_z(self, module: nn.Module, args: tuple[Any, ...], z: Tensor) -> Tensor | None:
        """Forward hook on `down`."""
        return self._tapped("down", args[0], z, None) if self._switch.is_on else None

    def _is_routed(self, output: Tensor) -> bool:
        """Whether a layer has passed its input on; `see_support` is told of such a call."""
        return output.dim() == 0 or output.shape[-1] != self.block.d_hidden

    def _count(self, p: Tensor, active: Tensor, slopes: Tensor) -> None:
        if self.counts.device != p.device:
            self._allocate(p.device)
        layout = self._context.layout(p, self.block)
        calls = self._switch.call(self, "counts")
        count_(
            self.counts,
            self.units,
            self.moments,
            by_sample(active, layout),
            by_sample(slopes, layout),
            layout.mask,
            calls is not None and calls.made > 1,
        )

    def _tapped(
        self, name: str, layer_input: Tensor, output: Tensor, slopes: Tensor | None
    ) -> Tensor | None:
        """The output through a tap, where a backward pass can follow."""
        if self._losses is None or not torch.is_grad_enabled():
            return None
        layout = self._context.layout(output, self.block)
        scale = self._losses.scale_of(layout.samples, output.device, self.block.name)
        calls = self._switch.call(self, name)
        return tap(output, self.probes[name], layer_input, layout, slopes, scale, calls)

    def _allocate(self, device: torch.device) -> None:
        """Nothing counted yet, on a device."""
        rows = len(SAMPLE_COUNTERS)
        self.counts = torch.zeros(len(COUNTERS), dtype=torch.int64, device=device)
        self.units = torch.zeros(self.block.d_hidden, dtype=torch.int64, device=device)
        self.moments = torch.zeros(rows, rows, dtype=torch.float64, device=device)
        self._settled.clear()
        if self._losses is not None:
            self.probes = {name: new_probe(device) for name in ("activated", "down")}
            if self.block.gate is not None:
                self.probes["up"] = new_probe(device)


@contextmanager
def watch(
    model: nn.Module,
    where: Callable[[MLPBlock], bool] | None = None,
    patterns: Sequence[BlockPattern] = (),
    gradients: bool = False,
    reduction: Reduction = "mean",
    strict: bool = False,
) -> Iterator[Monitor]:
    """Measure a model's MLP blocks while any loop runs it.

    Counting is streaming, on the model's device, and keeps no hidden tensor. Padding tokens (by
    ``attention_mask``, ``src_key_padding_mask``, or a decoder's ignored labels) count nowhere;
    dropout is not seen in the densities; a forward pass repeated by gradient checkpointing counts
    once. Works under autocast and ``torch.compile``. The hooks are gone afterwards, also when the
    loop raises. In ``generate`` a row counts until it has ended (its end-of-sequence token, a
    string, a criterion of yours), not what it is fed afterwards; with beams all rows count, also
    those of samples that are done, until the whole batch is. A copy of the model that is
    made meanwhile (``copy.deepcopy``, ``torch.save``, a process that is spawned) is not watched.

    With `gradients` the backward passes of the loop are measured too: augmented flatness and its
    factors, see `BlockReport`. The loop's own numbers do not change. Each sample's own loss is told
    from the model's ``labels``; where a Hugging Face model computes the loss, what it is multiplied
    by before ``backward`` (accumulation, a GradScaler, the number of processes) is measured and
    undone, and must not change between two reports. A pass in which a gradient is infinite or NaN
    is left out of what is of gradients, and counted. For a loss computed outside the model,
    `reduction` says how it is made of the samples' losses, and ``monitor.loss_factor``, set before
    ``backward``, what it is multiplied by: ``monitor.loss_factor = 1 / accumulation``. Forward
    passes without a backward pass count in the densities alone.

    Args:
        model: the model; wrappers are seen through.
        where: which blocks; all by default.
        patterns: patterns of your own for `find_blocks`, which are noted with the model.
        gradients: measure backward passes too.
        reduction: of the loss over its terms, as in ``nn.CrossEntropyLoss``.
        strict: refuse a model of which some MLPs are not found, instead of warning once;
            ``Report.coverage`` says it in any case.

    Yields:
        The monitor; ``monitor.report()`` at any time, also afterwards.

    Raises:
        BlocksNotFoundError: there is no MLP block.
        WiringError: in the first forward pass, what flows through a block is not what its pattern
            says.
        ValueError: `reduction` is neither ``mean`` nor ``sum``.

    Example:
        >>> layer = nn.TransformerEncoderLayer(8, 2, 32, batch_first=True)
        >>> with watch(layer, gradients=True) as monitor:
        ...     layer(torch.randn(2, 5, 8)).square().mean().backward()
        >>> monitor.report().blocks[0].tokens
        10
    """
    blocks = blocks_for("watch", model, where, patterns, strict)
    monitor = Monitor(model, blocks, gradients, reduction)
    note_patterns_(model, patterns)
    with monitor.attached():
        yield monitor
