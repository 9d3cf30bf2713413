"""Plots for a file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from steppe.errors import MissingExtraError
from steppe.files import write_file

# Okabe and Ito's palette: told apart with any colour vision, and in grey by the dashes.
_STYLES = (("#000000", "-"), ("#E69F00", "--"), ("#0072B2", "-"), ("#009E73", "-."))
_SMOOTHING = 5  # counted steps


def plot_training_density(summary: dict[str, Any], path: Path) -> Path:
    """Density over training, one panel per data set, one curve per arm.

    Args:
        summary: what `steppe.training.demo.run_demo` returned or wrote.
        path: a PNG.

    Returns:
        The path.

    Raises:
        MissingExtraError: matplotlib is not installed.
        OutputError: the file cannot be written.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise MissingExtraError("plots need matplotlib: pip install 'steppe[demo]'") from None
    data_sets = summary["data_sets"]
    figure = Figure(figsize=(5.2 * len(data_sets), 4.0), dpi=120, layout="constrained")
    panels = figure.subplots(1, len(data_sets), squeeze=False)[0]
    for panel, (name, data_set) in zip(panels, data_sets.items(), strict=True):
        for (arm, result), (colour, dash) in zip(data_set["arms"].items(), _STYLES, strict=False):
            for index, run in enumerate(result["runs"]):
                steps, densities = zip(*run["history"], strict=True)
                label = f"{arm}, {100 * result['density']:.1f} % held-out" if index == 0 else None
                smooth = _running_mean([100 * density for density in densities])
                panel.plot(steps, smooth, dash, color=colour, label=label, linewidth=1.6)
        quality = ", ".join(
            f"{arm} {_quality(data_set['quality'], result)}"
            for arm, result in data_set["arms"].items()
        )
        panel.set_title(f"{name}\n{quality}", fontsize=9)
        panel.set_xlabel("optimizer step")
        panel.set_ylabel("active hidden units, % of the training batch")
        panel.set_ylim(bottom=0)
        panel.grid(alpha=0.3)
        panel.legend(frameon=False, fontsize=9)
    write_file(path, lambda temporary: figure.savefig(temporary, format="png"))
    return path


def _quality(kind: str, result: dict[str, Any]) -> str:
    return f"{100 * result['accuracy']:.1f} %" if kind == "accuracy" else f"{result['loss']:.3f}"


def _running_mean(values: list[float]) -> list[float]:
    """Mean over the last few values."""
    return [
        sum(values[max(0, i + 1 - _SMOOTHING) : i + 1]) / min(i + 1, _SMOOTHING)
        for i in range(len(values))
    ]
