"""Measures one block, by hooks on its layers."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from steppe.activations import is_relu
from steppe.blocks.block import MLPBlock
from steppe.blocks.linear import linear_weight
from steppe.checkpointing import in_backward
from steppe.measures.density import (
    COUNTERS,
    SAMPLE_COUNTERS,
    active_entries,
    count_,
    sloped_entries,
)
from steppe.measures.flatness import COLUMNS, Calls, by_sample, new_probe, tap
from steppe.measures.losses import LossContext
from steppe.measures.tally import Tally, scaled
from steppe.per_thread import PerThread
from steppe.tokens import TokenContext, current_generation

Pass = defaultdict[tuple[int, str], Calls]
"""The calls of layers in one forward pass, by their observers and names."""


@dataclass
class Switch:
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

    def call(self, observer: Observer, name: str) -> Calls | None:
        """The calls of a layer in this pass, with the one that runs; None if that is all there is.

        It is where torch.compile traces, outside of the model's forward, and where gradient
        checkpointing runs a forward pass again.
        """
        if torch.compiler.is_compiling() or in_backward():
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


class Observer:
    """Measures one block: at the layer before the activation, at a gated `up`, at `down`."""

    def __init__(
        self,
        switch: Switch,
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
        """Divide the sums so far by the squared factor of their loss, and put them aside."""
        for name, probe in self.probes.items():
            if probe.grad is not None:
                self._settled[name] = self._gradients(name, squared_factor)
                probe.grad = None

    def tally(self, squared_factor: Tensor) -> Tally:
        """A copy of the sums so far."""
        gradients = (self._gradients(name, squared_factor) for name in ("activated", "up", "down"))
        return Tally(self.counts.clone(), self.units.clone(), self.moments.clone(), *gradients)

    def _gradients(self, name: str, squared_factor: Tensor) -> Tensor:
        """The sums of backward passes at a layer, for a loss with factor 1."""
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
        # Not `block.act`: a plug-in may have replaced it since.
        act = self.block.current_act
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
        """Whether a layer has passed its input on; `see_support` gets such a call."""
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
