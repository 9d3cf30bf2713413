"""A new architecture in miniature: one row, and all verbs know it.

Of a user's: ``patterns=[ROW]``, once. Of steppe's own: the row goes into the file of its family in
`steppe.blocks.patterns`, a rule into `ORDER` there if another row can match the same owner, a tiny
model into ``tests/architectures.py``, and ``python docs/models.py --only NAME`` into the table.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

import steppe
from steppe import BlockPattern

D_MODEL, D_HIDDEN = 8, 32


class ForeignLayer(nn.Module):
    """A layer with names that no built-in row has."""

    def __init__(self) -> None:
        super().__init__()
        self.prenorm = nn.LayerNorm(D_MODEL)
        self.grow = nn.Linear(D_MODEL, D_HIDDEN)
        self.kink = nn.ReLU()
        self.shrink = nn.Linear(D_HIDDEN, D_MODEL)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.shrink(self.kink(self.grow(self.prenorm(x))))


# Paths below the layer. `norm` is the one whose output `up` reads.
ROW = BlockPattern(family="foreign", norm="prenorm", up="grow", act="kink", down="shrink")


def model_and_input() -> tuple[nn.Sequential, Tensor]:
    return nn.Sequential(ForeignLayer(), ForeignLayer()), torch.randn(2, 5, D_MODEL)


def test_it_is_found() -> None:
    model, _ = model_and_input()
    blocks = steppe.find_blocks(model, patterns=[ROW], strict=True)
    assert [(block.name, block.family) for block in blocks] == [("0", "foreign"), ("1", "foreign")]
    assert blocks[0].norm is model[0].prenorm
    assert blocks.coverage.share == 1.0


def test_it_is_measured() -> None:
    model, x = model_and_input()
    with steppe.watch(model, patterns=[ROW]) as monitor:
        model(x)
    a = torch.relu(model[0].grow(model[0].prenorm(x)))
    assert monitor.report().blocks[0].density == (a != 0).double().mean().item()


def test_it_is_made_sparser_and_comes_back() -> None:
    model, x = model_and_input()
    expected = model(x)
    steppe.sparsify_(model, [steppe.ZerothBias(5), steppe.RestrictedNorm()], patterns=[ROW])
    assert len(steppe.added_parameters(model)) == 2
    assert torch.equal(steppe.restore_(model)(x), expected)


def test_it_is_accelerated() -> None:
    model, x = model_and_input()
    expected = model(x)
    steppe.accelerate_(model, patterns=[ROW], max_density=1.0)
    torch.testing.assert_close(model(x), expected)
    assert {block.how for block in steppe.explain(model).blocks} == {"sparse"}


def test_its_pattern_travels_with_the_model() -> None:
    model, x = model_and_input()
    with steppe.watch(model, patterns=[ROW]):
        model(x)
    assert len(steppe.find_blocks(copy.deepcopy(model))) == 2, "named once, known from then on"
