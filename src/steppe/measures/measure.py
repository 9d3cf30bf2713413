"""Measure a model on held-out data."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist

from steppe.blocks import BlockPattern, MLPBlock, unwrap
from steppe.errors import EmptyLoaderError
from steppe.measures.density import DensityReport
from steppe.measures.watch import watch


def call_model(model: nn.Module, batch: Any) -> Any:
    """Run a model on a batch as loaders give them.

    Args:
        model: the model.
        batch: a mapping (keyword arguments), a tuple or list (the first is the input, the rest are
            targets), or a tensor.

    Returns:
        What the model returns.
    """
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    if isinstance(batch, Mapping):
        return model(**{key: _to(value, device) for key, value in batch.items()})
    if isinstance(batch, tuple | list):
        batch = batch[0]
    return model(_to(batch, device))


def measure(
    model: nn.Module,
    loader: Iterable[Any],
    forward: Callable[[nn.Module, Any], Any] = call_model,
    max_batches: int | None = None,
    where: Callable[[MLPBlock], bool] | None = None,
    patterns: Sequence[BlockPattern] = (),
    group: dist.ProcessGroup | None = None,
) -> DensityReport:
    """Density and derivative density of a model on some data, in evaluation mode.

    Args:
        model: the model; it is back in its mode afterwards, module by module.
        loader: batches.
        forward: runs the model on a batch.
        max_batches: stop after so many; all by default.
        where: which blocks; all by default.
        patterns: patterns of your own for `find_blocks`.
        group: processes that measure a share of the data each; the counts are summed over them.

    Returns:
        Densities pooled over the counted entries.

    Raises:
        BlocksNotFoundError: there is no MLP block.
        EmptyLoaderError: the loader gave no batch, or no token that counts.

    Source: arXiv 2605.25612.

    Example:
        >>> layer = nn.TransformerEncoderLayer(8, 2, 32, batch_first=True)
        >>> report = measure(layer, [torch.randn(2, 5, 8)])
        >>> 0.0 < report.density == report.derivative_density < 1.0
        True
    """
    batches = 0
    with watch(model, where, patterns) as monitor, _evaluating(model), torch.no_grad():
        for batch in islice(loader, max_batches):
            forward(model, batch)
            batches += 1
        counts = monitor.counts(group)
    if int(counts[:, 3].sum()) == 0:
        raise EmptyLoaderError(
            f"measure: {batches} batches without a single token that counts in"
            f" {type(unwrap(model)).__name__}. Is the loader empty (an iterator that was used up"
            " before, drop_last with a large batch), or every token padding?"
        )
    return monitor.report(group)


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, then every module back in its own."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


def _to(value: Any, device: torch.device) -> Any:
    return value.to(device) if isinstance(value, Tensor) else value
