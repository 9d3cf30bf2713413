"""The file that says what a run was and what was measured of it; `steppe report` reads it.

A training run writes it into its folder, `steppe measure --json` where it is told to.
"""

from __future__ import annotations

import json
import platform
from dataclasses import dataclass, field, fields
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from steppe.errors import RunError
from steppe.files import write_file
from steppe.measures.report import LAYOUT, Report, from_json, report_from_dict, to_json

RUN_FILE = "steppe.json"
RUN_VERSION = 1


@dataclass(frozen=True)
class Run:
    """A training run, or checkpoints of one that were measured later.

    Attributes:
        name: what tables and charts call it.
        model: class of the model.
        tokens_per_sample: T̄, mean number of counted tokens a sample.
        activations: of each block, what the activation is.
        plugins: settings of the plug-ins; none for a plain model.
        settings: of the training, by the names of ``TrainingArguments``; JSON values.
        versions: of the packages and of Python, by name.
        steps: optimizer steps at which training batches were measured.
        training: what was measured of them, one report a step.
        held_out_steps: optimizer steps whose weights were measured on held-out data.
        held_out: what was measured of them.
        logs: what the Trainer logged, one dictionary a log, each with ``step``.
        quality: held-out quality at the end by its name (``accuracy``, ``loss``, …).
        speed: rows of `steppe.bench.time_model`: how fast the blocks ran on some machine.
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
    """Versions of what a number may depend on."""
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
        values = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RunError(
            f"{path}: expected a folder with {RUN_FILE}, or a file that `steppe measure` wrote;"
            " found neither"
        ) from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise RunError(f"{file}: cannot be read as JSON ({error})") from None
    version = values.get("version") if isinstance(values, dict) else None
    if version != RUN_VERSION or "training" not in values:
        raise RunError(
            f"{file}: expected a run of version {RUN_VERSION}, got version {version!r}. Another"
            " program, or another steppe, wrote it."
        )
    try:
        values.setdefault("speed", [])  # not in the first runs of this version
        known = {field.name: values[field.name] for field in fields(Run)}
        known["tokens_per_sample"] = from_json(known["tokens_per_sample"])
        for part in ("training", "held_out"):
            known[part] = [report_from_dict(values["blocks"] | entry) for entry in known[part]]
        return Run(**known)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise RunError(f"{file}: damaged ({type(error).__name__}: {error})") from None


def measures_of(report: Report) -> dict[str, Any]:
    """``report.to_dict()`` without what is the same for all reports of a run."""
    return {key: value for key, value in report.to_dict().items() if key not in LAYOUT}
