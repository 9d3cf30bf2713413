"""A new number in miniature, in the three steps that every measure has.

1. Look: hooks on the layers of each block, by a transient `Journal`; `listen` says which tokens are
   padding. In steppe that is `measures/observer.py`.
2. Count: sums on the device, no tensor kept (`measures/density.py`; backward: `flatness.py`).
3. Tell: a value of the sums (`measures/tally.py`) in a field of `BlockReport`
   (`measures/report.py`), which is in all reports, files and tables from then on.

The number here: the share of tokens that activate no hidden unit at all.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor, nn

import steppe
from steppe import BlockReport, MLPBlock
from steppe.measures.report import report_from_dict
from steppe.surgery.journal import Journal
from steppe.tokens import TokenContext, attach, listen


class SilentTokens:
    """Counts the tokens of one block without an active unit."""

    def __init__(self, block: MLPBlock, context: TokenContext) -> None:
        self.block, self.context = block, context
        self.counts = torch.zeros(2, dtype=torch.int64, device=block.up.weight.device)

    def see(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        """Forward pre-hook on `down`, which gets a, ``[B, T, F]``."""
        silent = (args[0].detach() == 0).all(-1)
        counted = self.context.counted(args[0], self.block)  # None: all tokens count
        if counted is None:
            counted = torch.ones_like(silent)
        self.counts += torch.stack([(silent & counted).sum(), counted.sum()])

    @property
    def share(self) -> float:
        """Silent tokens over all tokens, in [0, 1]."""
        silent, tokens = self.counts.tolist()
        return silent / tokens


@contextmanager
def silent_tokens(model: nn.Module) -> Iterator[list[SilentTokens]]:
    """Count in each block while this lasts; the model is then as it was before."""
    blocks = steppe.find_blocks(model)
    contexts, hooks = listen(model, blocks)
    counters = [SilentTokens(*pair) for pair in zip(blocks, contexts, strict=True)]
    journal = Journal(transient=True)
    try:
        journal.hold_nested_tensors_off(model)
        journal.hold_parts(blocks)
        attach(journal, hooks)
        for counter in counters:
            journal.add_forward_pre_hook(counter.block.down, counter.see)
        yield counters
    finally:
        journal.undo()


def layer_and_batch() -> tuple[nn.Module, Tensor, Tensor]:
    layer = nn.TransformerEncoderLayer(8, 2, 4, dropout=0.0, batch_first=True)
    nn.init.constant_(layer.linear1.bias, -1.0)  # so that some tokens are silent
    x, padding = torch.randn(4, 6, 8), torch.zeros(4, 6, dtype=torch.bool)
    padding[0, 3:] = True
    return layer, x, padding


def test_it_is_what_a_loop_counts_beside_the_monitor() -> None:
    layer, x, padding = layer_and_batch()
    inputs: list[Tensor] = []
    handle = layer.linear2.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    with silent_tokens(layer) as (counter,), steppe.watch(layer) as monitor:
        layer(x, src_key_padding_mask=padding)
    handle.remove()
    rows = inputs[0][~padding].tolist()
    assert len(rows) == monitor.report().blocks[0].tokens == 21
    assert 0 < counter.share == sum(not any(row) for row in rows) / len(rows) < 1


def test_nothing_of_it_stays() -> None:
    layer, x, padding = layer_and_batch()
    with silent_tokens(layer) as (counter,):
        pass
    layer(x, src_key_padding_mask=padding)
    assert counter.counts.tolist() == [0, 0]
    assert not layer.linear2._forward_pre_hooks


def test_a_field_of_the_report_is_documented_and_written() -> None:
    layer, x, _ = layer_and_batch()
    with steppe.watch(layer) as monitor:
        layer(x)
    report = monitor.report()
    written = report.to_dict()
    for field in fields(BlockReport):
        assert f"        {field.name}: " in (BlockReport.__doc__ or "")
        assert f"{field.name}_per_block" in written
    assert report_from_dict(written).blocks[0].tokens == 24
