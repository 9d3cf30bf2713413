"""The metrics of a run's logs: what the Trainer's log, W&B, TensorBoard and the console get."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from steppe.errors import NonFiniteLossError

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
_ON_CONSOLE = frozenset({"density", "derivative_density", "training_density"})


def means_of(entries: Sequence[dict[str, Any]], names: Iterable[str] = ()) -> dict[str, float]:
    """Means over some entries of a history, of the whole model and of the named blocks.

    Args:
        entries: of a `History`.
        names: of all blocks in forward order, or none.

    Returns:
        Metrics by name, those of a block as ``density_per_block/NAME``: MLflow keeps a metric as a
        file, so `density` can be no folder too. A mean that does not exist is left out.
    """
    metrics = {
        "density": mean_of([entry["density"] for entry in entries]),
        "derivative_density": mean_of([entry["derivative_density"] for entry in entries]),
    }
    for key in _MEASURES:
        metrics[key] = mean_of([mean_of(entry[f"{key}_per_block"]) for entry in entries])
    for index, name in enumerate(names):
        for key in ("density", "derivative_density", *_MEASURES):
            metrics[f"{key}_per_block/{name}"] = mean_of(
                [entry[f"{key}_per_block"][index] for entry in entries]
            )
    # AF of the gate is NaN in a block without one.
    return {key: value for key, value in metrics.items() if not math.isnan(value)}


def training_metrics(
    entries: Sequence[dict[str, Any]], names: Iterable[str], training_density: float
) -> dict[str, float]:
    """The metrics of a log during training; none where no step was measured since the last one.

    Args:
        entries: of the steps since the last log.
        names: of all blocks in forward order, or none.
        training_density: mean over all measured steps of the run.
    """
    return {**means_of(entries, names), "training_density": training_density} if entries else {}


def with_prefix(prefix: str, metrics: Mapping[str, float]) -> dict[str, float]:
    """Metrics under the names of one evaluation.

    Args:
        prefix: ``eval_``, ``val_``, ``test_``, or none.
        metrics: by name.
    """
    return {prefix + key: value for key, value in metrics.items()}


def off_console(prefix: str, metrics: Iterable[str]) -> frozenset[str]:
    """The names of metrics that the console leaves out: all but the densities of the whole model.

    Args:
        prefix: of the names.
        metrics: names without the prefix.
    """
    return frozenset(prefix + key for key in metrics if key not in _ON_CONSOLE)


def of_the_model(log: Mapping[str, Any]) -> dict[str, Any]:
    """A log without the metrics of single blocks, which stand in the history.

    Args:
        log: metrics by name.
    """
    return {name: value for name, value in log.items() if "/" not in name}


def require_finite(
    loss: float, step: int, clipping: str, settings: Mapping[str, object] | None = None
) -> None:
    """End a run that has diverged.

    Args:
        loss: of training, as it was logged.
        step: of the log.
        clipping: the setting of this Trainer that clips gradients.
        settings: to try instead; none by default.

    Raises:
        NonFiniteLossError: the loss is NaN or infinite.
    """
    if not math.isfinite(loss):
        raise NonFiniteLossError(
            f"the training loss is {loss} at step {step}. Clip gradients ({clipping}), warm up"
            " longer, or lower the learning rate",
            *([] if settings is None else [settings]),
        )


def mean_of(values: Sequence[float | None]) -> float:
    """The mean of the values that exist; NaN if none does.

    Args:
        values: None for one that does not exist.
    """
    found = [value for value in values if value is not None]
    return sum(found) / len(found) if found else float("nan")
