"""One line on each chart, computed from the data that it shows."""

from __future__ import annotations

import math
from collections.abc import Sequence

from steppe.measures.report import BlockReport
from steppe.report.series import (
    NAN,
    baseline_of,
    curve_of,
    density_at_end,
    inference_density,
    inference_flops,
    last_report,
    last_tenth,
    mean_of,
    training_flops,
)
from steppe.runs import Run

_NAMED = 3  # runs besides the baseline that a line names
_EXACT = 1e-3  # an identity of float32 sums is far below, a broken one far above
_BETTER = {"accuracy": 1, "f1": 1, "bleu": 1, "loss": -1, "perplexity": -1, "error": -1}


def percent(share: float) -> str:
    """A share in percent, with a space that does not break.

    Example:
        >>> percent(0.1523).split(), percent(0.00034).split()
        (['15.2', '%'], ['0.034', '%'])
    """
    value = 100.0 * share
    if not math.isfinite(value):
        return "–"
    text = f"{value:.1f}" if abs(value) >= 1 else f"{value:.2g}"
    return f"{text}\u00a0%"


def scientific(value: float) -> str:
    """A small number as one reads it.

    Example:
        >>> scientific(3.14e-7), scientific(0.0)
        ('3.1·10⁻⁷', '0')
    """
    if value == 0 or not math.isfinite(value):
        return "0" if value == 0 else "–"
    digits, _, power = f"{value:.1e}".partition("e")
    raised = str(int(power)).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
    return f"{digits}·10{raised}"


def against(new: float, old: float) -> str:
    """``37 % fewer``, ``12 % more`` or ``as many``; empty where there is nothing to compare."""
    if not (math.isfinite(new) and math.isfinite(old)) or old == 0:
        return ""
    change = 100.0 * (new / old - 1.0)
    if abs(change) < 0.5:
        return "as many"
    return f"{abs(change):.0f}\u00a0% {'fewer' if change < 0 else 'more'}"


def read_inference(runs: Sequence[Run]) -> str:
    """The densities on held-out data, compared."""
    values = [inference_density(run) for run in runs]
    return _compare(runs, values, "At the end, on held-out data,") or (
        "No density was measured on held-out data."
    )


def read_density(runs: Sequence[Run]) -> str:
    """The densities at the end of training, compared; of a single run also with its start."""
    values = [density_at_end(run) for run in runs]
    text = _compare(runs, values, "In the last tenth of the measured training steps,")
    if text and len(runs) == 1:
        reports = runs[0].training
        first = mean_of([report.density for report in reports[: len(last_tenth(reports))]])
        change = against(values[0], first)
        if change:
            than = "as" if change == "as many" else "than"
            text = text[:-1] + f", {change} {than} in the first tenth ({percent(first)})."
    return text or "No training step was measured."


def read_gap(runs: Sequence[Run]) -> str:
    """Whether inference is sparser than training, and where the two differ most."""
    pairs = [
        (run.name, run.training_density, inference_density(run))
        for run in runs
        if math.isfinite(run.training_density) and math.isfinite(inference_density(run))
    ]
    if not pairs:
        return "No run has both a training density and an inference density."
    sparser = sum(inference < training for _, training, inference in pairs)
    name, training, inference = max(pairs, key=_distance)
    if len(pairs) == 1:
        word = "sparser than" if inference < training else "not sparser than"
        return (
            f"{name} is {word} in training when it runs on held-out data: {percent(inference)}"
            f" against {percent(training)}."
        )
    return (
        f"Inference is sparser than training in {sparser} of {len(pairs)} runs; they differ most in"
        f" {name}: {percent(training)} in training, {percent(inference)} at inference."
    )


def read_identity(runs: Sequence[Run], held_out: bool) -> str:
    """The largest relative deviation between the quotient and the derivative density."""
    worst, where, count = -1.0, "", 0
    for run in runs:
        for step, report in zip(*curve_of(run, held_out), strict=True):
            for block in report.blocks:
                deviation = identity_deviation(block)
                count += math.isfinite(deviation)
                if deviation > worst:
                    worst, where = deviation, f"{run.name}, {block.name}, step {step:,}"
    if not count:
        return "The ratio was not measured: it needs a backward pass."
    if worst <= _EXACT:
        return (
            f"The quotient is the measured derivative density: over {count:,} measurements the"
            f" largest relative deviation is {scientific(worst)} ({where})."
        )
    return (
        f"The quotient deviates from the measured derivative density by up to {percent(worst)}"
        f" ({where}), so the identity does not hold in this data."
    )


def read_terms(runs: Sequence[Run], drawn: Sequence[int], index: int, held_out: bool) -> str:
    """By what factors the terms of the ratio changed in one block, which says why density did."""
    parts = []
    for i in drawn[: _NAMED + 1]:
        _, reports = curve_of(runs[i], held_out)
        if len(reports) < 2:
            continue
        last = [report.blocks[index] for report in last_tenth(reports)]
        first = [report.blocks[index] for report in reports[: len(last)]]
        factors = (
            ("AF", _factor([b.AF_per_entry for b in first], [b.AF_per_entry for b in last])),
            (
                "‖x‖²",
                _factor(
                    [b.squared_input_norm for b in first], [b.squared_input_norm for b in last]
                ),
            ),
            (
                "gradient",
                _factor(
                    [b.weighted_activation_gradient for b in first],
                    [b.weighted_activation_gradient for b in last],
                ),
            ),
        )
        words = ", ".join(f"{name} {factor}" for name, factor in factors)
        parts.append(f"{runs[i].name}: {words}")
    more = len(drawn) - _NAMED - 1
    rest = f"; {more} more not named" if parts and more > 0 else ""
    return (
        f"From the first to the last tenth of the steps. {'; '.join(parts)}{rest}." if parts else ""
    )


def identity_deviation(block: BlockReport) -> float:
    """|quotient / derivative density − 1|; NaN where either was not measured or is zero."""
    measured = block.derivative_density
    return abs(block.derivative_density_by_identity / measured - 1.0) if measured else NAN


def read_derivative(runs: Sequence[Run], held_out: bool) -> str:
    """Where derivative density and density differ most."""
    worst, where = -1.0, ""
    text = ""
    for run in runs:
        for step, report in zip(*curve_of(run, held_out), strict=True):
            for block in report.blocks:
                gap = abs(block.derivative_density - block.density)
                if gap > worst:
                    worst, where = gap, f"{run.name}, {block.name}, step {step:,}"
                    text = f"{percent(block.derivative_density)} against {percent(block.density)}"
    if worst < 0:
        return "No density was measured."
    if worst == 0:
        return "Derivative density and density are equal in every measured block and step."
    return f"Derivative density and density differ most in {where}: {text}."


def read_layers(runs: Sequence[Run]) -> str:
    """The sparsest and the densest block at the end."""
    parts = []
    for run in runs:
        report = last_report(run)
        blocks = [b for b in report.blocks if math.isfinite(b.density)] if report else []
        if blocks:
            low, high = min(blocks, key=_density), max(blocks, key=_density)
            parts.append((run.name, low, high))
    if not parts:
        return "No density was measured."
    if len(parts) > _NAMED:
        low_of, low, _ = min(parts, key=_lowest)
        high_of, _, high = max(parts, key=_highest)
        return (
            f"At the end the sparsest block is {low.name} of {low_of} ({percent(low.density)}), the"
            f" densest {high.name} of {high_of} ({percent(high.density)})."
        )
    return (
        "At the end, from the sparsest to the densest block: "
        + "; ".join(
            f"{name} {percent(low.density)} ({low.name}) to {percent(high.density)} ({high.name})"
            for name, low, high in parts
        )
        + "."
    )


def read_frequency(runs: Sequence[Run]) -> str:
    """How many hidden units were never active."""
    counts = []
    for run in runs:
        report = last_report(run)
        units = sum(sum(block.neuron_frequency) for block in report.blocks) if report else 0
        if report and units:
            dead = sum(block.dead_neurons for block in report.blocks)
            words = f"{dead:,} of {units:,} in {run.name} ({percent(dead / units)})"
            counts.append((dead / units, words))
    if not counts:
        return "No neuron was counted."
    return f"Hidden units that were never active: {_few(counts)}."


def read_quality(runs: Sequence[Run]) -> str:
    """Held-out quality at the end, compared with the baseline, for each name that it has."""
    base = runs[baseline_of(runs)]
    lines = []
    for name, old in base.quality.items():
        if not _is_number(old):
            continue
        others = [
            f"{run.name} {_quality_change(name, run.quality[name], old)}"
            for run in runs
            if run is not base and _is_number(run.quality.get(name))
        ]
        if len(others) > _NAMED:
            others[_NAMED:] = [f"{len(others) - _NAMED} more in the table"]
        lines.append("; ".join([f"Final {name}: {base.name} {format_quality(name, old)}", *others]))
    return f"{'. '.join(lines)}." if lines else "No held-out quality was recorded."


def read_flops(runs: Sequence[Run]) -> str:
    """How much faster the products can get at most."""
    bounds = []
    for run in runs:
        inference, training = inference_flops(run), training_flops(run)
        words = [
            f"{inference.inference_bound:.2f}× in inference" if inference else "",
            f"{training.training_bound:.2f}× in training" if training else "",
        ]
        size = inference.inference_bound if inference else training and training.training_bound
        if size:
            bounds.append((size, f"{run.name} {' and '.join(word for word in words if word)}"))
    if not bounds:
        return "No density was measured, so nothing bounds the speed-up."
    return f"Skipping every zero makes the products at most this much faster: {_few(bounds)}."


def format_quality(name: str, value: float) -> str:
    """An accuracy in percent, anything else as a number."""
    if not _is_number(value):
        return "–"
    if "accuracy" in name and 0 <= value <= 1:
        return percent(value)
    return f"{value:.3f}" if 0.01 <= abs(value) < 1000 else f"{value:.3g}"


def _quality_change(name: str, new: float, old: float) -> str:
    """The value, and how it compares; better or worse only where the name tells."""
    in_percent = "accuracy" in name and 0 <= new <= 1 and 0 <= old <= 1
    difference = 100 * (new - old) if in_percent else new - old
    size = f"{abs(difference):.1f} points" if in_percent else f"{abs(difference):.2g}"
    text = format_quality(name, new)
    if text == format_quality(name, old):
        return f"{text}, the same"
    sign = next((sign for word, sign in _BETTER.items() if word in name), 0)
    up, down = {1: ("better", "worse"), -1: ("worse", "better"), 0: ("higher", "lower")}[sign]
    return f"{text}, {size} {up if difference > 0 else down}"


def _compare(runs: Sequence[Run], values: Sequence[float], when: str) -> str:
    """``WHEN steppe has 15.2 % active hidden units, 37 % fewer than vanilla (24.1 %); …``."""
    base = baseline_of(runs)
    known = [i for i, value in enumerate(values) if math.isfinite(value)]
    others = sorted((i for i in known if i != base), key=values.__getitem__)
    if not known:
        return ""
    if not others or base not in known:
        named = ", ".join(f"{runs[i].name} has {percent(values[i])}" for i in known[: _NAMED + 1])
        more = len(known) - _NAMED - 1
        rest = f"; {more} more not named" if more > 0 else ""
        return f"{when} {named} active hidden units{rest}."
    first, old = others[0], values[base]
    change = against(values[first], old)
    than = "as" if change == "as many" else "than"
    beside = (
        f"{change} {than} {runs[base].name} ({percent(old)})"
        if change
        else f"{runs[base].name} {percent(old)}"
    )
    text = f"{when} {runs[first].name} has {percent(values[first])} active hidden units, {beside}"
    for i in others[1:_NAMED]:
        text += f"; {runs[i].name} {percent(values[i])}, {against(values[i], old)}".rstrip(", ")
    if len(others) > _NAMED:
        low, high = values[others[_NAMED]], values[others[-1]]
        text += f"; {len(others) - _NAMED} more from {percent(low)} to {percent(high)}"
    return text + "."


def _factor(old: Sequence[float], new: Sequence[float]) -> str:
    """``×0.31``, of the means."""
    before, after = mean_of(old), mean_of(new)
    finite = math.isfinite(before) and math.isfinite(after) and before != 0
    return f"×{float(f'{after / before:.2g}'):g}" if finite else "–"


def _few(parts: Sequence[tuple[float, str]]) -> str:
    """The words of all, or of many only those of the smallest and of the largest."""
    if len(parts) <= _NAMED:
        return "; ".join(words for _, words in parts)
    return f"from {min(parts)[1]} to {max(parts)[1]}"


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _distance(pair: tuple[str, float, float]) -> float:
    return abs(pair[1] - pair[2])


def _density(block: BlockReport) -> float:
    return block.density


def _lowest(part: tuple[str, BlockReport, BlockReport]) -> float:
    return part[1].density


def _highest(part: tuple[str, BlockReport, BlockReport]) -> float:
    return part[2].density
