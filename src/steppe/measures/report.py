"""The report of each block, and how its numbers follow from sums over samples."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from steppe.measures.curvature import BlockCurvature

NAN = float("nan")
FREQUENCY_EDGES = tuple(10.0 ** (k / 4 - 4) for k in range(17))
"""Upper edges of the classes of `BlockReport.neuron_frequency`: shares of tokens, 1e-4 to 1."""


_MANY, _SHOWN = 64, 2  # blocks: more than so many are not all shown, but so many


class _Text(str):
    """Shown as it is."""

    __slots__ = ()

    def __repr__(self) -> str:
        return str(self)


@dataclass(frozen=True)
class BlockReport:
    """The measures of one block.

    E_s is the mean over samples s, ℓ_s is that sample's own loss, and t runs over its tokens.
    Padding counts nowhere. A value that was not measured is NaN: everything from `AF_up` on where
    there was no backward pass, and the gate's values where there is none.

    Attributes:
        name: name of the block.
        d_model: D, width of the input.
        d_hidden: F, width of the hidden layer.
        gated: whether the block has a gate.
        samples: number of samples counted; of an expert, of those with a token routed to it.
        tokens: number of tokens counted, each as often as the block is called with it in a pass; of
            an expert, those routed to it.
        density: share of entries with a ≠ 0, in [0, 1].
        derivative_density: share of entries with σ′(p) ≠ 0, in [0, 1].
        dead_neurons: number of hidden units that were never active.
        neuron_frequency: number of hidden units by the share of tokens on which they are active:
            never, then up to each of `FREQUENCY_EDGES`; sums to `d_hidden`.
        AF_up: E_s Σ_t ‖∂ℓ_s/∂p_t‖² ‖x_t‖², the paper's AF_K; with p = up(x).
        AF_gate: the same for the gate of a gated block, NaN in others.
        AF_down: E_s Σ_t ‖∂ℓ_s/∂z_t‖² ‖a_t‖², the paper's AF_V; a as `down` receives it.
        active_gain: mean over the entries with σ′(p) ≠ 0 of ‖x_t‖² (∂ℓ_s/∂p_ti)².
        squared_input_norm: mean over tokens of ‖x_t‖².
        squared_activation_gradient: mean over the entries with σ′(p) ≠ 0 of (∂ℓ_s/∂p_ti)².
        squared_gradient_norm_up: E_s ‖∂ℓ_s/∂W‖² for the weight W of `up`, one for all tokens.
        squared_gradient_norm_gate: the same for the gate.
        squared_gradient_norm_down: the same for `down`.
        standard_errors: standard error over samples of the means above, by their names, and of
            `AF_per_entry` and `weighted_activation_gradient`.
        non_finite_passes: number of backward passes with an infinite or NaN gradient, as GradScaler
            skips their steps; they are in the densities alone.
    """

    name: str
    d_model: int
    d_hidden: int
    gated: bool
    samples: int
    tokens: int
    density: float
    derivative_density: float
    dead_neurons: int
    neuron_frequency: tuple[int, ...]
    AF_up: float
    AF_gate: float
    AF_down: float
    active_gain: float
    squared_input_norm: float
    squared_activation_gradient: float
    squared_gradient_norm_up: float
    squared_gradient_norm_gate: float
    squared_gradient_norm_down: float
    standard_errors: dict[str, float]
    non_finite_passes: int = 0

    @property
    def AF_activated(self) -> float:  # noqa: N802  # the paper's symbol
        """AF of the layer that the activation reads: of the gate, of `up` where there is none."""
        return self.AF_gate if self.gated else self.AF_up

    @property
    def AF_per_entry(self) -> float:  # noqa: N802
        """AF of the activated layer per hidden entry: AF / (T̄ F), T̄ tokens a sample."""
        entries = self.tokens * self.d_hidden
        return self.AF_activated * self.samples / entries if entries else NAN

    @property
    def weighted_activation_gradient(self) -> float:
        """`active_gain` / `squared_input_norm`: the mean of (∂ℓ_s/∂p_ti)² weighted by ‖x_t‖²."""
        return _divide(self.active_gain, self.squared_input_norm)

    @property
    def derivative_density_by_identity(self) -> float:
        """AF / (T̄ F · active_gain), which equals `derivative_density` exactly.

        Source: arXiv 2605.25612, the ratio of augmented flatness.
        """
        return _divide(self.AF_per_entry, self.active_gain)


_POOLED = ("density", "derivative_density", "coverage", "not_covered")


@dataclass(frozen=True)
class Report:
    """The measures of a model.

    Attributes:
        density: share of entries with a ≠ 0, pooled over the blocks, in [0, 1].
        derivative_density: share of entries with σ′(p) ≠ 0, pooled over the blocks, in [0, 1].
        blocks: the same and more per block, in forward order.
        curvature: of the Hessian of each block's weights, where it was asked for.
        coverage: share of the parameters of the model's MLPs that are in the blocks, in [0, 1]; NaN
            in files from before it was known.
        not_covered: a line for each kind of MLP in no block, and for each block that was left out.
    """

    density: float
    derivative_density: float
    blocks: tuple[BlockReport, ...]
    curvature: tuple[BlockCurvature, ...] = ()
    coverage: float = NAN
    not_covered: tuple[str, ...] = ()

    @property
    def density_by_tower(self) -> dict[str, float]:
        """The density pooled over the blocks of each tower: encoder, decoder, vision, text.

        Blocks are of one tower if their names are the same up to the first number.
        """
        active: dict[str, float] = {}
        entries: dict[str, int] = {}
        for block in self.blocks:
            parts = itertools.takewhile(lambda part: not part.isdigit(), block.name.split("."))
            tower, number = ".".join(parts), block.tokens * block.d_hidden
            entries[tower] = entries.get(tower, 0) + number
            active[tower] = active.get(tower, 0.0) + (block.density * number if number else 0.0)
        return {tower: _divide(active[tower], number) for tower, number in entries.items()}

    def __repr__(self) -> str:
        """All of it, or the first blocks where there are many."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        shown = ", ".join(map(repr, self.blocks[:_SHOWN]))
        if len(self.blocks) > _MANY:
            values["blocks"] = _Text(f"({shown}, and {len(self.blocks) - _SHOWN} more)")
        return f"Report({', '.join(f'{name}={value!r}' for name, value in values.items())})"

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON values.

        Returns:
            ``density``, ``derivative_density``, ``coverage``, ``not_covered``, and for each
            attribute of `BlockReport` a list over the blocks under its name with ``_per_block``;
            None for NaN.
        """
        lists = {
            f"{field.name}_per_block": [getattr(block, field.name) for block in self.blocks]
            for field in fields(BlockReport)
        }
        pooled = {name: getattr(self, name) for name in _POOLED}
        values: dict[str, Any] = to_json({**pooled, **lists})
        return values


def pooled(blocks: Sequence[BlockReport]) -> BlockReport:
    """Several blocks of the same widths as one, under the name that theirs begin with.

    Each mean is over the entries, tokens or samples of all blocks, as in each of them.

    Args:
        blocks: at least one.

    Returns:
        Their report, with the entries of `neuron_frequency` added, without standard errors.
    """
    tokens = [float(block.tokens) for block in blocks]
    samples = [float(block.samples) for block in blocks]
    active = [
        0.0 if math.isnan(block.derivative_density) else block.tokens * block.derivative_density
        for block in blocks
    ]
    weights = {
        **dict.fromkeys(("density", "derivative_density", "squared_input_norm"), tokens),
        **dict.fromkeys(("active_gain", "squared_activation_gradient"), active),
        **{
            f"{kind}_{layer}": samples
            for kind in ("AF", "squared_gradient_norm")
            for layer in ("up", "gate", "down")
        },
    }
    means: dict[str, Any] = {
        name: _weighted_mean([getattr(block, name) for block in blocks], chosen)
        for name, chosen in weights.items()
    }
    frequencies = zip(*(block.neuron_frequency for block in blocks), strict=True)
    return replace(
        blocks[0],
        name=blocks[0].name.rpartition(".")[0],
        samples=int(sum(samples)),
        tokens=int(sum(tokens)),
        dead_neurons=sum(block.dead_neurons for block in blocks),
        neuron_frequency=tuple(map(sum, frequencies)),
        standard_errors={},
        non_finite_passes=max(block.non_finite_passes for block in blocks),
        **means,
    )


LAYOUT = (
    *("name_per_block", "d_model_per_block", "d_hidden_per_block", "gated_per_block"),
    *("coverage", "not_covered"),
)
"""The keys of `Report.to_dict` that describe the blocks, whatever was measured of them."""


def report_from_dict(values: dict[str, Any]) -> Report:
    """The report that `Report.to_dict` described.

    Args:
        values: its result.

    Raises:
        KeyError: a measure is missing.
        TypeError: a measure is not a list.
        ValueError: the lists have different lengths.
    """
    values = from_json(values)
    names = [field.name for field in fields(BlockReport)]
    # Runs of before they were counted have none.
    values = {"non_finite_passes_per_block": [0] * len(values["name_per_block"]), **values}
    columns = [values[f"{name}_per_block"] for name in names]
    rows = [dict(zip(names, row, strict=True)) for row in zip(*columns, strict=True)]
    for row in rows:
        row["neuron_frequency"] = tuple(row["neuron_frequency"])
    left = tuple(values.get("not_covered", ()))  # not in reports of before it was said
    if not all(isinstance(line, str) for line in left):
        raise ValueError("not_covered is no list of lines")
    return Report(
        density=values["density"],
        derivative_density=values["derivative_density"],
        blocks=tuple(BlockReport(**row) for row in rows),
        coverage=values.get("coverage", NAN),
        not_covered=left,
    )


def ratio_of_sums(
    moments: Tensor, numerators: Sequence[int], denominators: Sequence[int]
) -> tuple[float, float]:
    """A product of sums over samples divided by another, and its standard error.

    For R = Π_j Σ_s u_sj / Π_k Σ_s v_sk the error is that of its linearisation,
    R √(n/(n−1) · Σ_s (Σ_j u_sj/U_j − Σ_k v_sk/V_k)²) with U_j, V_k the sums; for one numerator it
    is that of a ratio estimator, and with v_s = 1 the standard error of the mean.

    Args:
        moments: float64 ``[K, K]``, Σ_s w_s w_sᵀ for vectors w_s whose first entry is 1.
        numerators: columns of u.
        denominators: columns of v.

    Returns:
        The ratio, NaN if a denominator is 0, and its error, NaN for fewer than two samples.

    Source: Cochran, Sampling Techniques, 3rd ed. (1977), section 6.4.

    Example:
        >>> rows = torch.tensor([[1.0, 2.0], [1.0, 4.0]], dtype=torch.float64)
        >>> mean, error = ratio_of_sums(rows.T @ rows, [1], [0])
        >>> mean, round(error, 12)
        (3.0, 1.0)
    """
    sums = moments[0].tolist()
    samples = sums[0]
    below = math.prod(sums[column] for column in denominators)
    ratio = _divide(math.prod(sums[column] for column in numerators), below)
    if samples < 2 or math.isnan(ratio):
        return ratio, NAN
    if ratio == 0.0:
        return ratio, 0.0  # a number that is never negative and 0 on average is always 0
    weights = torch.zeros(len(sums), dtype=moments.dtype)
    for column in numerators:
        weights[column] += 1.0 / sums[column]
    for column in denominators:
        weights[column] -= 1.0 / sums[column]
    squares = (weights @ moments @ weights).item()
    # Rounding may leave a little less than nothing where all samples agree.
    return ratio, abs(ratio) * math.sqrt(max(0.0, squares) * samples / (samples - 1.0))


def frequency_histogram(active_tokens: Tensor, tokens: int) -> tuple[int, ...]:
    """Number of hidden units by the share of tokens on which they are active.

    Args:
        active_tokens: int64 ``[F]``, on how many tokens each unit was active.
        tokens: number of tokens counted.

    Returns:
        Units that were never active, then those up to each of `FREQUENCY_EDGES`.

    Example:
        >>> counts = frequency_histogram(torch.tensor([0, 1, 4]), tokens=4)
        >>> counts[0], counts[-1], sum(counts)
        (1, 1, 3)
    """
    if tokens == 0:
        return (len(active_tokens),) + (0,) * len(FREQUENCY_EDGES)
    edges = torch.tensor((0.0, *FREQUENCY_EDGES), dtype=torch.float64)
    bins = torch.bucketize(active_tokens.to(torch.float64) / tokens, edges)
    return tuple(torch.bincount(bins, minlength=len(edges)).tolist())


def to_json(value: Any) -> Any:
    """JSON values with None for infinity and NaN, since JSON has no word for them."""
    if isinstance(value, dict):
        return {key: to_json(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [to_json(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def from_json(value: Any) -> Any:
    """The inverse of `to_json`, with NaN for None."""
    if isinstance(value, dict):
        return {key: from_json(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [from_json(entry) for entry in value]
    return NAN if value is None else value


def _weighted_mean(values: Sequence[float], weights: Sequence[float]) -> float:
    """The mean of the values that are not NaN."""
    known = [(v, w) for v, w in zip(values, weights, strict=True) if not math.isnan(v)]
    return _divide(sum(v * w for v, w in known), sum(w for _, w in known))


def _divide(part: float, whole: float) -> float:
    return part / whole if whole else NAN
