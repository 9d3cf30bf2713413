"""The measured steps and evaluations of a training run, one entry each; knows no training loop."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields
from typing import Any

import torch
from torch import distributed as dist
from torch import nn

from steppe.blocks.block import MLPBlock
from steppe.blocks.find import Blocks, find_blocks
from steppe.blocks.patterns import BlockPattern
from steppe.errors import ScheduleError
from steppe.measures.monitor import Monitor
from steppe.measures.tally import Tally, sum_over
from steppe.runs import measures_of
from steppe.surgery.pattern_notes import note_patterns_
from steppe.training.accelerated import AccelerationOfRun
from steppe.training.reporters import mean_of


class History:
    """The measured steps and evaluations of a run: the part that all callbacks share.

    Tallies of a step stay on the device (`_put_aside`) until a log or a save needs them
    (`_settle`), so a measured step waits for nothing.

    Args:
        every: measure one optimizer step in so many, ≥ 1.
        per_block: log each block too, not only the whole model.
        flatness: measure the backward pass too, not only the densities.
        where: which blocks to measure; all by default.
        patterns: patterns of the user's for `find_blocks`.
        accelerate: accelerate the model while it trains.

    Raises:
        ValueError: `every` is below 1.
    """

    def __init__(
        self,
        every: int,
        per_block: bool,
        flatness: bool,
        where: Callable[[MLPBlock], bool] | None = None,
        patterns: Sequence[BlockPattern] = (),
        accelerate: bool = False,
    ) -> None:
        if every < 1:
            raise ValueError(f"{type(self).__name__}: expected every ≥ 1, got {every}")
        self.every = every
        self.per_block = per_block
        self.flatness = flatness
        self.where = where
        self.patterns = tuple(patterns)
        self.accelerate = accelerate
        self.acceleration = AccelerationOfRun(accelerate, self.patterns)
        """How the blocks have run, while the model trains and afterwards."""
        self.history: list[dict[str, Any]] = []
        """One entry per measured step, complete when training ends: ``step`` and
        ``Report.to_dict()`` of it."""
        self.held_out_history: list[dict[str, Any]] = []
        """The same of the evaluations during training; densities only."""
        self._logged = 0  # number of entries of the history that a log has had
        self._measured: tuple[str, ...] = ()  # names of the blocks, once training has begun
        self._pending: list[tuple[int, list[Tally]]] = []
        self._held_out: tuple[int, list[Tally]] | None = None  # step and tallies of the last entry
        self._monitor: Monitor | None = None  # of the training steps
        self._evaluation: tuple[nn.Module, Monitor] | None = None

    @property
    def training_density(self) -> float:
        """Mean over the measured training steps of the density; NaN before the first log."""
        return mean_of([entry["density"] for entry in self.history])

    @property
    def training_density_per_block(self) -> list[float]:
        """The same per block, in forward order."""
        per_step = [entry["density_per_block"] for entry in self.history]
        return [mean_of(list(column)) for column in zip(*per_step, strict=True)]

    def _kept(self) -> dict[str, Any]:
        """The state that a checkpoint keeps, as JSON values."""
        return {
            "history": self.history,
            "held_out_history": self.held_out_history,
            "_logged": self._logged,
            "_measured": list(self._measured),
        }

    def _begin(self, model: nn.Module, kept: dict[str, Any]) -> None:
        """Start a run, or go on with the one that a checkpoint kept, and make its monitor.

        Raises:
            ScheduleError: the checkpoint's run has measured another number of blocks.
        """
        self.history = list(kept.get("history", []))
        self.held_out_history = list(kept.get("held_out_history", []))
        self._logged = int(kept.get("_logged", 0))
        self._measured = tuple(kept.get("_measured", ()))
        self._pending = []
        self._held_out = self._evaluation = None
        self._monitor = Monitor(model, self._blocks(model), self.flatness)
        counts = {
            len(entry["density_per_block"]) for entry in (*self.history, *self.held_out_history)
        }
        if counts - {len(self._monitor.names)}:
            raise ScheduleError(
                f"{type(self).__name__}: the run that goes on has measured {min(counts)} blocks,"
                f" and {len(self._monitor.names)} are to be measured now. Give the same `where` and"
                " `patterns` as before, or start again in another folder"
            )
        self._measured = self._monitor.names

    def _blocks(self, model: nn.Module) -> Blocks:
        """The blocks to measure; in a run that goes on without `where`, the ones from before."""
        blocks = find_blocks(model, self.where, self.patterns)
        note_patterns_(model, self.patterns)
        if self.where is not None or not any(block.name in self._measured for block in blocks):
            return blocks
        return find_blocks(model, lambda block: block.name in self._measured, self.patterns)

    def _put_aside(self, step: int) -> None:
        """Take the tallies of a step; nothing waits for the device here."""
        assert self._monitor is not None
        self._pending.append((step, self._monitor.take()))

    def _settle(self) -> None:
        """Turn pending tallies into history, which waits for the device and for all processes."""
        pending, self._pending = self._pending, []
        if not pending:
            return
        assert self._monitor is not None
        tallies = _over_processes([tally for _, blocks in pending for tally in blocks])
        count = len(self._monitor.names)
        for index, (step, _) in enumerate(pending):
            report = self._monitor.report_of(tallies[index * count : (index + 1) * count])
            self.history.append({"step": step, **measures_of(report)})

    def _not_logged(self) -> list[dict[str, Any]]:
        """The entries of the history that no log has had, which count as logged from now on."""
        new = self.history[self._logged :]
        self._logged = len(self.history)
        return new

    def _names(self) -> tuple[str, ...]:
        """The blocks that logs name: all that the training steps measure, or none."""
        return self._monitor.names if self._monitor is not None and self.per_block else ()

    def _monitor_of_evaluation(self, model: nn.Module) -> Monitor:
        """The monitor of evaluations, at zero; the same one each time, for torch.compile."""
        if self._evaluation is None or self._evaluation[0] is not model:
            with torch.inference_mode(False):  # Lightning evaluates under it, others do not
                self._evaluation = (
                    model,
                    Monitor(model, self._blocks(model), counts_generation=False),
                )
        monitor = self._evaluation[1]
        monitor.reset()
        return monitor

    def _names_of_evaluation(self) -> tuple[str, ...]:
        """The blocks that logs of the last evaluation name: all that it measured, or none."""
        assert self._evaluation is not None
        return self._evaluation[1].names if self.per_block else ()

    def _evaluated(self) -> tuple[list[Tally], dict[str, Any]]:
        """The last evaluation, summed over all processes: its tallies, and its entry."""
        assert self._evaluation is not None
        monitor = self._evaluation[1]
        tallies = _over_processes(monitor.take())
        return tallies, measures_of(monitor.report_of(tallies))

    def _note_held_out(self, step: int, tallies: list[Tally]) -> None:
        """Put an evaluation into the history; several data sets of one step make one entry."""
        assert self._evaluation is not None
        if self._held_out is not None and self._held_out[0] == step:
            tallies = list(map(_sum, self._held_out[1], tallies))
            self.held_out_history.pop()
        self._held_out = step, tallies
        report = self._evaluation[1].report_of(tallies)
        self.held_out_history.append({"step": step, **measures_of(report)})


def _over_processes(taken: list[Tally]) -> list[Tally]:
    """Tallies on the CPU, summed over all processes if there are several."""
    device = taken[0].counts.device
    tallies = [tally.cpu() for tally in taken]
    if not (dist.is_available() and dist.is_initialized()):
        return tallies
    assert dist.group.WORLD is not None
    return sum_over(tallies, device, dist.group.WORLD)


def _sum(one: Tally, other: Tally) -> Tally:
    """The tally of the samples of both."""
    return Tally(*(torch.add(getattr(one, f.name), getattr(other, f.name)) for f in fields(Tally)))
