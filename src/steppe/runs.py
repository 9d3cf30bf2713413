"""The record of a run, ``steppe.json``: settings, measures, logs; `steppe report` reads it.

A training run writes it into its folder, `steppe measure --json FILE` into that file.
"""

from __future__ import annotations

import json
import math
import platform
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from steppe.errors import RunError
from steppe.files import write_file
from steppe.measures.report import (
    FREQUENCY_EDGES,
    LAYOUT,
    BlockReport,
    Report,
    from_json,
    report_from_dict,
    to_json,
)

RUN_FILE = "steppe.json"
RUN_VERSION = 1
_MOST_BYTES = 1 << 30
_LARGEST = 1e150  # of a number, so that its square is finite
_SHOWN = 200  # characters of a wrong value in an error


@dataclass(frozen=True)
class Run:
    """A training run, or checkpoints of one that were measured later.

    Attributes:
        name: of the run in tables and charts.
        model: class of the model.
        tokens_per_sample: T̄, mean number of counted tokens a sample.
        activations: name of each block's activation.
        plugins: settings of the plug-ins; none for a plain model.
        settings: of the training, by the names of ``TrainingArguments``; JSON values.
        versions: of the packages and of Python, by name.
        steps: optimizer steps at which training batches were measured.
        training: one report per measured step.
        held_out_steps: optimizer steps after which the weights were measured on held-out data.
        held_out: one report per such step.
        logs: of the Trainer, one dictionary per log, each with ``step``.
        quality: held-out quality at the end by its name (``accuracy``, ``loss``, …).
        speed: rows of `steppe.bench.time_model`: how fast the blocks ran on some machine.
        acceleration: how the blocks ran on the sparse kernels, as
            `steppe.training.accelerated.record_of_acceleration` has it; empty for a run without.
    """

    name: str
    model: str
    tokens_per_sample: float
    activations: list[str] = field(default_factory=list)
    plugins: list[dict[str, Any]] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    steps: list[int] = field(default_factory=list)
    training: list[Report] = field(default_factory=list)
    held_out_steps: list[int] = field(default_factory=list)
    held_out: list[Report] = field(default_factory=list)
    logs: list[dict[str, Any]] = field(default_factory=list)
    quality: dict[str, float] = field(default_factory=dict)
    speed: list[dict[str, Any]] = field(default_factory=list)
    acceleration: dict[str, Any] = field(default_factory=dict)

    @property
    def training_density(self) -> float:
        """Mean over the measured training steps of the density; NaN if there are none."""
        densities = [report.density for report in self.training]
        return sum(densities) / len(densities) if densities else float("nan")

    @property
    def block_names(self) -> tuple[str, ...]:
        """Names of the blocks, in forward order."""
        for report in (*self.held_out, *self.training):
            return tuple(block.name for block in report.blocks)
        return ()


def versions() -> dict[str, str]:
    """Versions of the packages that numbers may depend on, by name."""
    return {
        "steppe": metadata.version("steppe"),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def write_run(run: Run, path: Path) -> None:
    """Write a run under a temporary name, then rename the file.

    Args:
        run: the run.
        path: the file.

    Raises:
        OutputError: it cannot be written; an older file of the name is still whole.
    """
    reports = (*run.held_out, *run.training)
    values = {
        **vars(run),
        "version": RUN_VERSION,
        "blocks": {key: reports[0].to_dict()[key] for key in LAYOUT} if reports else {},
        "training": [measures_of(report) for report in run.training],
        "held_out": [measures_of(report) for report in run.held_out],
    }
    text = json.dumps(to_json(values), allow_nan=False) + "\n"
    write_file(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def read_run(path: Path) -> Run:
    """Read a run.

    Args:
        path: the file, or the folder that holds it under `RUN_FILE`.

    Returns:
        The run.

    Raises:
        RunError: there is no such file, or it is no run of this version.
    """
    file = path / RUN_FILE if path.is_dir() else path
    try:
        if file.is_char_device():  # it may never end
            raise RunError(f"{file}: expected a file, got a device")
        if not file.is_file():
            raise RunError(
                f"{path}: expected a folder with {RUN_FILE}, or a file that `steppe measure` wrote;"
                " found neither"
            )
        if file.stat().st_size > _MOST_BYTES:
            raise RunError(f"{file}: has more than {_MOST_BYTES >> 20} MiB, and is no run")
        values = json.loads(file.read_text(encoding="utf-8"))
    except RunError:
        raise
    except RecursionError:
        raise RunError(f"{file}: cannot be read as JSON (it nests too deeply)") from None
    except (OSError, ValueError) as error:
        raise RunError(f"{file}: cannot be read as JSON ({str(error)[:_SHOWN]})") from None
    version = values.get("version") if isinstance(values, dict) else None
    if version != RUN_VERSION or "training" not in values:
        raise RunError(
            f"{file}: expected a run of version {RUN_VERSION}, got version"
            f" {repr(version)[:_SHOWN]}. Another program, or another steppe, wrote it."
        )
    try:
        for key, empty in (("speed", []), ("acceleration", {})):
            values.setdefault(key, empty)  # not in the first runs of this version
        known = {field.name: values[field.name] for field in fields(Run)}
        for part in ("training", "held_out"):
            known[part] = [report_from_dict(values["blocks"] | entry) for entry in known[part]]
        for part in ("tokens_per_sample", "speed"):
            known[part] = from_json(known[part])
        run = Run(**known)
        _require_kinds(
            run, *(block for one in (*run.training, *run.held_out) for block in one.blocks)
        )
        _require_whole(run)
        return run
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        detail = str(error)[:_SHOWN]
        raise RunError(f"{file}: damaged ({type(error).__name__}: {detail})") from None


def _require_kinds(*records: Run | Report | BlockReport) -> None:
    """Refuse records with an attribute of another type than its annotation.

    Raises:
        ValueError: names it.
    """
    for record in records:
        for attribute in fields(record):
            value = getattr(record, attribute.name)
            kind = str(attribute.type)
            if kind in _KINDS and not _KINDS[kind](value):
                raise ValueError(f"{attribute.name} is no {kind}: {repr(value)[:_SHOWN]}")


def _require_whole(run: Run) -> None:
    """Refuse a run with reports without a step, or with entries of another form.

    Raises:
        ValueError: says which.
    """
    for steps, reports in ((run.steps, run.training), (run.held_out_steps, run.held_out)):
        _require_kinds(*reports)
        if len(steps) != len(reports):
            raise ValueError(f"{len(steps)} steps of {len(reports)} reports")
        for report in reports:
            if any(len(b.neuron_frequency) != len(FREQUENCY_EDGES) + 1 for b in report.blocks):
                raise ValueError("neuron_frequency is not of the usual length")
    for row in run.speed:
        for key, kind in _SPEED.items():
            if not _KINDS[kind](row.get(key)):
                raise ValueError(
                    f"speed has a {key} that is no {kind}: {repr(row.get(key))[:_SHOWN]}"
                )
    for key, kind in _ACCELERATION.items():
        if run.acceleration and not _KINDS[kind](run.acceleration.get(key)):
            raise ValueError(f"acceleration has a {key} that is no {kind}")
    for block in run.acceleration.get("blocks", ()):
        counts = [*block.get("calls", {}).values(), *block.get("reasons", {}).values()]
        if not _is_text(block.get("name")) or not all(map(_is_count, counts)):
            raise ValueError(f"acceleration has no numbers of calls: {repr(block)[:_SHOWN]}")


def _is_number(value: object) -> bool:
    """Whether a value is a number that others can be computed from, or NaN."""
    if isinstance(value, int):
        return not isinstance(value, bool) and abs(value) < _LARGEST
    return isinstance(value, float) and (math.isnan(value) or abs(value) < _LARGEST)


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < _LARGEST


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def _list_of(is_one: Callable[[Any], bool]) -> Callable[[Any], bool]:
    """Whether all of a list are of a kind."""
    return lambda value: isinstance(value, list | tuple) and all(map(is_one, value))


def _table_of(is_one: Callable[[Any], bool]) -> Callable[[Any], bool]:
    """Whether all values of a table are of a kind."""
    return lambda value: isinstance(value, dict) and all(map(is_one, value.values()))


_anything = _table_of(lambda _: True)
_KINDS: dict[str, Callable[[Any], bool]] = {
    "str": _is_text,
    "int": _is_count,
    "float": _is_number,
    "bool": lambda value: isinstance(value, bool),
    "list[str]": _list_of(_is_text),
    "list[int]": _list_of(_is_count),
    "tuple[int, ...]": _list_of(_is_count),
    "dict[str, str]": _table_of(_is_text),
    "dict[str, float]": _table_of(lambda value: value is None or _is_number(value)),
    "dict[str, Any]": _anything,
    "list[dict[str, Any]]": _list_of(_anything),
}
"""Tests of the attributes of runs and blocks, by their annotations."""
_SPEED = {
    **dict.fromkeys(("case", "dtype"), "str"),
    **dict.fromkeys(("d", "tokens", "threads"), "int"),
    **dict.fromkeys(
        ("density", "candidates", "dense_ms", "ratio", "unscreened_ratio", "bound"), "float"
    ),
}
"""Keys that a row of `Run.speed` must have, by kind."""
_ACCELERATION = {
    "kernels": "str",
    "blocks": "list[dict[str, Any]]",
    "not_accelerated": "dict[str, str]",
}
"""Keys of `Run.acceleration`, by kind."""


def measures_of(report: Report) -> dict[str, Any]:
    """``report.to_dict()`` without the layout, which all reports of a run share.

    Args:
        report: of a run.
    """
    return {key: value for key, value in report.to_dict().items() if key not in LAYOUT}
