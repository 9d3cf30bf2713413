"""Watch the MLP blocks of a model while any loop runs it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist

from steppe.activations import Activation
from steppe.blocks import (
    BlockPattern,
    MLPBlock,
    Slot,
    find_blocks,
    linear_weight,
)
from steppe.measures.density import (
    COUNTERS,
    DensityReport,
    count_,
    report_from_counts,
    supports,
)
from steppe.surgery import Journal
from steppe.tokens import TokenContext, listen


class Monitor:
    """Counts of a model's MLP blocks, streaming on the device; made by `watch`.

    Attributes:
        enabled: whether forward passes are counted now.
        names: the blocks' names, in forward order.
    """

    def __init__(self, blocks: Sequence[MLPBlock], contexts: Sequence[TokenContext]) -> None:
        self.enabled = True
        self.names = tuple(block.name for block in blocks)
        self._observers = [
            _Observer(self, block, context) for block, context in zip(blocks, contexts, strict=True)
        ]

    def counts(self, group: dist.ProcessGroup | None = None) -> Tensor:
        """The counts so far.

        Args:
            group: processes to sum over, all of which must call this; None for this one alone.

        Returns:
            int64 ``[blocks, 4]`` on the CPU: entries with a ≠ 0, with σ′ ≠ 0, all, and tokens.
        """
        counts = torch.stack([observer.counts.cpu() for observer in self._observers])
        return counts if group is None else sum_over(counts, self._observers[0].device, group)

    def report(self, group: dist.ProcessGroup | None = None) -> DensityReport:
        """The densities so far.

        Args:
            group: processes to sum over, all of which must call this; None for this one alone.

        Returns:
            Shares of the entries counted since the start or the last `reset`.
        """
        return report_from_counts(self.names, self.counts(group))

    def reset(self) -> None:
        """Start counting from zero."""
        for observer in self._observers:
            observer.counts.zero_()

    def take(self) -> list[Tensor]:
        """The counts so far, one int64 ``[4]`` per block on its device, and start from zero."""
        taken = [observer.counts.clone() for observer in self._observers]
        self.reset()
        return taken

    def hooks(self) -> Iterator[tuple[nn.Module, Callable[..., None]]]:
        """The forward hooks that count, with the modules they belong to."""
        for observer in self._observers:
            yield observer.block.activated, observer.see_p
            if observer.block.gate is not None:
                yield observer.block.up, observer.see_up


class _Observer:
    """Counts one block: p from the layer before the activation, and `up` of gated blocks."""

    def __init__(self, monitor: Monitor, block: MLPBlock, context: TokenContext) -> None:
        self.block = block
        self._monitor = monitor
        self._context = context
        # Gated blocks run gate and up in either order: keep the first until the second comes.
        self._p: Tensor | None = None
        self._up: Tensor | None = None
        self.counts = torch.zeros(len(COUNTERS), dtype=torch.int64, device=self.device)

    @property
    def device(self) -> torch.device:
        """Where the block is; the CPU while it is nowhere."""
        weight = linear_weight(self.block.up)
        return torch.device("cpu") if weight.is_meta else weight.device

    def see_p(self, module: nn.Module, args: tuple[Any, ...], p: Tensor) -> None:
        """Forward hook on the activated layer."""
        if not self._monitor.enabled:
            return
        if self.block.gate is None:
            self._count(p, None)
        elif self._up is None:
            self._p = p.detach()
        else:
            up, self._up = self._up, None
            self._count(p, up)

    def see_up(self, module: nn.Module, args: tuple[Any, ...], up: Tensor) -> None:
        """Forward hook on `up` of a gated block."""
        if not self._monitor.enabled:
            return
        if self._p is None:
            self._up = up.detach()
        else:
            p, self._p = self._p, None
            self._count(p, up)

    def _count(self, p: Tensor, up: Tensor | None) -> None:
        if self.counts.device != p.device:
            self.counts = self.counts.to(p.device)
        # The slot, not the block: the activation may have been replaced since.
        slot = self.block.act_slot
        act: Activation = getattr(slot.module, slot.name)
        active, slopes = supports(act, p, up)
        count_(self.counts, active, slopes, self._context.flat_mask(p, self.block))


@contextmanager
def watch(
    model: nn.Module,
    where: Callable[[MLPBlock], bool] | None = None,
    patterns: Sequence[BlockPattern] = (),
) -> Iterator[Monitor]:
    """Count density and derivative density of a model's MLP blocks while any loop runs it.

    Counting is streaming, on the model's device, and keeps no hidden tensor. Padding tokens (by
    ``attention_mask``, ``src_key_padding_mask``, or a decoder's ignored labels) count nowhere;
    dropout is not seen; a forward pass repeated by gradient checkpointing counts once. Works under
    autocast and ``torch.compile``. The hooks are gone afterwards, also when the loop raises.

    Args:
        model: the model; wrappers are seen through.
        where: which blocks; all by default.
        patterns: patterns of your own for `find_blocks`.

    Yields:
        The monitor; ``monitor.report()`` at any time, also afterwards.

    Raises:
        BlocksNotFoundError: there is no MLP block.

    Example:
        >>> layer = nn.TransformerEncoderLayer(8, 2, 32, batch_first=True)
        >>> with watch(layer) as monitor:
        ...     _ = layer(torch.randn(2, 5, 8))
        >>> monitor.report().blocks[0].tokens
        10
    """
    blocks = find_blocks(model, where, patterns)
    contexts, context_hooks = listen(model, blocks)
    monitor = Monitor(blocks, contexts)
    journal = Journal()
    try:
        journal.hold_nested_tensors_off(model)
        for module, hook in context_hooks:
            journal.add_forward_pre_hook(module, hook, with_kwargs=True)
        for module, see in monitor.hooks():
            journal.add_forward_hook(module, see)
            journal.set_attribute(Slot(module, "__class__"), _watched_class(type(module)))
        yield monitor
    finally:
        journal.undo()


def sum_over(counts: Tensor, device: torch.device, group: dist.ProcessGroup) -> Tensor:
    """The sum of counts over processes, exact.

    Args:
        counts: int64 on the CPU, the same shape everywhere.
        device: where the group's backend wants its tensors.
        group: the processes.

    Returns:
        The sum, on the CPU.
    """
    total = counts.to(device)
    dist.all_reduce(total, group=group)
    return total.cpu()


_WATCHED: dict[type[nn.Module], type[nn.Module]] = {}


def _watched_class(kind: type[nn.Module]) -> type[nn.Module]:
    """A subclass that differs by identity only, the same one every time.

    torch.compile does not guard on hooks and would run its old code, but it guards on types: with
    another class it traces the hooks, and with the old one back it runs the old code again.
    """
    if kind not in _WATCHED:
        _WATCHED[kind] = type(kind.__name__, (kind,), {"__module__": kind.__module__})
    return _WATCHED[kind]
