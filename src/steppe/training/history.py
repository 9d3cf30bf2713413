"""What a training run has measured so far, step by step; knows no training loop."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import fields
from typing import Any

import torch
from torch import distributed as dist
from torch import nn

from steppe.activations import name_of
from steppe.blocks.block import MLPBlock
from steppe.blocks.find import Blocks, find_blocks
from steppe.blocks.patterns import BlockPattern
from steppe.blocks.wrappers import unwrap
from steppe.errors import ScheduleError
from steppe.measures.monitor import Monitor
from steppe.measures.report import Report, report_from_dict
from steppe.measures.tally import Tally, sum_over
from steppe.plugins.applied import sparsification_of
from steppe.runs import Run, measures_of, versions
from steppe.surgery.pattern_notes import note_patterns_

# Means over the blocks that each log gets, beside the densities.
_MEASURES = (
    "AF_up",
    "AF_gate",
    "AF_down",
    "active_gain",
    "squared_input_norm",
    "squared_activation_gradient",
    "squared_gradient_norm_up",
    "squared_gradient_norm_gate",
    "squared_gradient_norm_down",
    "dead_neurons",
)
# What of all metrics stands on a line of the console.
HEADLINE = {"density", "derivative_density", "training_density"}


class History:
    """The steps that were measured, and the evaluations, as a callback keeps them.

    Args:
        where: which blocks; all by default.
        patterns: patterns of the user's for `find_blocks`.
    """

    def __init__(
        self,
        where: Callable[[MLPBlock], bool] | None = None,
        patterns: Sequence[BlockPattern] = (),
    ) -> None:
        self.where = where
        self.patterns = tuple(patterns)
        self.history: list[dict[str, Any]] = []
        """One entry per measured step, complete when training ends: ``step`` and
        ``Report.to_dict()`` of it."""
        self.held_out_history: list[dict[str, Any]] = []
        """The same of the evaluations during training; densities only."""
        self._logged = 0  # entries of the history that a log has had
        self._measured: tuple[str, ...] = ()  # the names of the blocks, once training began
        self._pending: list[tuple[int, list[Tally]]] = []
        self._held_out: tuple[int, list[Tally]] | None = None  # of the last entry
        self._monitor: Monitor | None = None  # of the training steps
        self._evaluation: tuple[nn.Module, Monitor] | None = None

    @property
    def training_density(self) -> float:
        """Mean over the counted training steps of the density; NaN before the first log."""
        return _mean([entry["density"] for entry in self.history])

    @property
    def training_density_per_block(self) -> list[float]:
        """The same per block, in forward order."""
        per_step = [entry["density_per_block"] for entry in self.history]
        return [_mean(list(column)) for column in zip(*per_step, strict=True)]

    def _kept(self) -> dict[str, Any]:
        """What a checkpoint keeps, JSON values."""
        return {
            "history": self.history,
            "held_out_history": self.held_out_history,
            "_logged": self._logged,
            "_measured": list(self._measured),
        }

    def _begin(self, model: nn.Module, gradients: bool, kept: dict[str, Any]) -> Monitor:
        """Take up what a checkpoint kept, or begin anew; the monitor of the training steps."""
        self.history = list(kept.get("history", []))
        self.held_out_history = list(kept.get("held_out_history", []))
        self._logged = int(kept.get("_logged", 0))
        self._measured = tuple(kept.get("_measured", ()))
        self._pending = []
        self._held_out = self._evaluation = None
        self._monitor = Monitor(model, self._blocks(model), gradients)
        counts = {
            len(entry["density_per_block"]) for entry in (*self.history, *self.held_out_history)
        }
        if counts - {len(self._monitor.names)}:
            raise ScheduleError(
                f"{type(self).__name__}: the run that goes on has measured {min(counts)} blocks,"
                f" and {len(self._monitor.names)} are to be measured now. Give the same `where` and"
                " `patterns` as before, or begin anew in another folder"
            )
        self._measured = self._monitor.names
        return self._monitor

    def _blocks(self, model: nn.Module) -> Blocks:
        """The blocks to measure; without `where`, in a run that goes on those from before."""
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

    def _monitor_of_evaluation(self, model: nn.Module) -> Monitor:
        """What measures an evaluation, at zero; the same one each time, for torch.compile."""
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
        """The blocks that the last evaluation measured."""
        assert self._evaluation is not None
        return self._evaluation[1].names

    def _evaluated(self) -> tuple[list[Tally], dict[str, Any]]:
        """What the last evaluation measured, over all processes: tallies, and an entry of it."""
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

    def _metrics_since_last_log(self, per_block: bool) -> dict[str, float]:
        """The metrics of the steps that no log has had."""
        new = self.history[self._logged :]
        self._logged = len(self.history)
        if not new or self._monitor is None:
            return {}
        metrics = means_of(new, self._monitor.names if per_block else ())
        return {**metrics, "training_density": self.training_density}

    def _run(
        self,
        model: nn.Module,
        name: str,
        settings: dict[str, Any],
        packages: dict[str, str],
        logs: list[dict[str, Any]],
    ) -> Run:
        """The record of the run."""
        sparsification = sparsification_of(model)
        blocks = self._blocks(model)
        layout: dict[str, Any] = {
            "name_per_block": [block.name for block in blocks],
            "d_model_per_block": [block.d_model for block in blocks],
            "d_hidden_per_block": [block.d_hidden for block in blocks],
            "gated_per_block": [block.gate is not None for block in blocks],
            "coverage": blocks.coverage.share,
            "not_covered": list(blocks.coverage.not_covered()),
        }
        training = [report_from_dict(layout | entry) for entry in self.history]
        return Run(
            name=name,
            model=type(unwrap(model)).__name__,
            tokens_per_sample=_tokens_per_sample(training),
            activations=[name_of(b.current_act) for b in blocks],
            plugins=[] if sparsification is None else sparsification.record()["plugins"],
            settings=settings,
            versions={**versions(), **packages},
            steps=[entry["step"] for entry in self.history],
            training=training,
            held_out_steps=[entry["step"] for entry in self.held_out_history],
            held_out=[report_from_dict(layout | entry) for entry in self.held_out_history],
            logs=[{k: v for k, v in log.items() if "/" not in k} for log in logs],
        )


def means_of(entries: Sequence[dict[str, Any]], names: Iterable[str] = ()) -> dict[str, float]:
    """Means over some entries of a history, of the whole model and of the named blocks.

    Args:
        entries: of a `History`.
        names: of all blocks in forward order, or none.

    Returns:
        Metrics by name, those of a block as ``density_per_block/NAME``: MLflow keeps a metric as a
        file, so `density` can be no folder too. None that does not exist.
    """
    metrics = {
        "density": _mean([entry["density"] for entry in entries]),
        "derivative_density": _mean([entry["derivative_density"] for entry in entries]),
    }
    for key in _MEASURES:
        metrics[key] = _mean([_mean(entry[f"{key}_per_block"]) for entry in entries])
    for index, name in enumerate(names):
        for key in ("density", "derivative_density", *_MEASURES):
            metrics[f"{key}_per_block/{name}"] = _mean(
                [e[f"{key}_per_block"][index] for e in entries]
            )
    # AF of the gate where there is none, for one.
    return {key: value for key, value in metrics.items() if not math.isnan(value)}


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


def _tokens_per_sample(reports: list[Report]) -> float:
    """Mean over all samples of all steps of the first block's tokens; NaN if there are none."""
    samples = sum(report.blocks[0].samples for report in reports)
    tokens = sum(report.blocks[0].tokens for report in reports)
    return tokens / samples if samples else float("nan")


def _mean(values: list[float | None]) -> float:
    """The mean of those that exist; NaN if there are none."""
    found = [value for value in values if value is not None]
    return sum(found) / len(found) if found else float("nan")
