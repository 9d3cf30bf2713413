"""Watch the MLP blocks of a model while any loop runs it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from torch import nn

from steppe.blocks.block import MLPBlock
from steppe.blocks.find import blocks_for
from steppe.blocks.patterns import BlockPattern
from steppe.measures.losses import Reduction
from steppe.measures.monitor import Monitor
from steppe.surgery.pattern_notes import note_patterns_


@contextmanager
def watch(
    model: nn.Module,
    where: Callable[[MLPBlock], bool] | None = None,
    patterns: Sequence[BlockPattern] = (),
    gradients: bool = False,
    reduction: Reduction = "mean",
    strict: bool = False,
) -> Iterator[Monitor]:
    """Measure a model's MLP blocks while any loop runs it.

    Counting is streaming, on the model's device, and keeps no hidden tensor. Padding tokens (by
    ``attention_mask``, ``src_key_padding_mask``, or a decoder's ignored labels) count nowhere;
    dropout is not seen in the densities; a forward pass repeated by gradient checkpointing counts
    once. Works under autocast and ``torch.compile``. The hooks are gone afterwards, also when the
    loop raises. In ``generate`` a row counts until it has ended (its end-of-sequence token, a
    string, a criterion of yours), not the tokens that follow; with beams all rows count, also
    those of samples that are done, until the whole batch is. A copy of the model that is
    made meanwhile (``copy.deepcopy``, ``torch.save``, a process that is spawned) is not watched.

    With `gradients` the backward passes of the loop are measured too: augmented flatness and its
    factors, see `BlockReport`. The loop's own numbers do not change. Each sample's own loss
    follows from the model's ``labels``; where a Hugging Face model computes the loss, its factor
    before ``backward`` (accumulation, a GradScaler, the number of processes) is measured and
    undone, and must not change between two reports. A pass in which a gradient is infinite or NaN
    counts in no measure of gradients, and is counted itself. For a loss outside the model,
    `reduction` says how it is made of the samples' losses, and ``monitor.loss_factor``, set before
    ``backward``, its factor: ``monitor.loss_factor = 1 / accumulation``. Forward
    passes without a backward pass count in the densities alone.

    Args:
        model: the model; wrappers are seen through.
        where: which blocks; all by default.
        patterns: patterns of your own for `find_blocks`, which are noted with the model.
        gradients: measure backward passes too.
        reduction: of the loss over its terms, as in ``nn.CrossEntropyLoss``.
        strict: refuse a model with MLPs that are not found, instead of warning once;
            ``Report.coverage`` says it in any case.

    Yields:
        The monitor; ``monitor.report()`` at any time, also afterwards.

    Raises:
        BlocksNotFoundError: there is no MLP block.
        WiringError: in the first forward pass, a block computes something else than its pattern
            says.
        ValueError: `reduction` is neither ``mean`` nor ``sum``.

    Example:
        >>> import torch
        >>> layer = nn.TransformerEncoderLayer(8, 2, 32, batch_first=True)
        >>> with watch(layer, gradients=True) as monitor:
        ...     layer(torch.randn(2, 5, 8)).square().mean().backward()
        >>> monitor.report().blocks[0].tokens
        10
    """
    blocks = blocks_for("watch", model, where, patterns, strict)
    monitor = Monitor(model, blocks, gradients, reduction)
    note_patterns_(model, patterns)
    with monitor.attached():
        yield monitor
