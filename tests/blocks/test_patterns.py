"""The table of patterns: its order is what `ORDER` says, and nothing else in it matters."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator, Sequence
from graphlib import CycleError

import pytest
from torch import nn

from architectures import ARCHITECTURES, SLOW, Architecture
from steppe.blocks.coverage import coverage
from steppe.blocks.patterns import ORDER, PATTERNS, BlockPattern
from steppe.blocks.patterns.order import Before, in_order

BY_NAME = {one.name: one for one in ARCHITECTURES}


def shuffled(seed: int, rules: Sequence[Before]) -> tuple[BlockPattern, ...]:
    """The rows of the table in another order, which keeps the rules."""
    rows = random.Random(seed).sample(PATTERNS, len(PATTERNS))
    return in_order(rows, rules)


def found(model: nn.Module, patterns: Sequence[BlockPattern] = ()) -> list[tuple[object, ...]]:
    """What a table finds; one that is given has all rows, so the built-in one is not asked."""
    return [
        (block.name, block.family, block.norm, block.gate, block.up, block.down, block.dropout)
        for block in coverage(model, patterns).blocks
    ]


def cases() -> Iterator[object]:
    for one in ARCHITECTURES:
        marks = [pytest.mark.slow] if one.name in SLOW else []
        yield pytest.param(one, id=one.name, marks=marks)


@pytest.mark.parametrize("one", list(cases()))
def test_rows_that_do_not_name_each_other_may_be_in_any_order(one: Architecture) -> None:
    model = one.build()
    expected = found(model)
    for seed in range(3):
        assert found(model, shuffled(seed, ORDER)) == expected


@pytest.mark.parametrize("name", ["RoBERTa-PreLayerNorm", "BART", "OPT", "BERT", "FlauBERT"])
def test_the_comparison_of_orders_can_fail(name: str) -> None:
    model = BY_NAME[name].build()
    expected = found(model)
    assert any(found(model, shuffled(seed, ())) != expected for seed in range(8))


def test_every_family_has_one_name_and_every_rule_a_reason() -> None:
    assert max(Counter(pattern.family for pattern in PATTERNS).values()) == 1
    assert all(rule.why and rule.first and rule.then for rule in ORDER)
    place = {pattern.family: number for number, pattern in enumerate(PATTERNS)}
    for rule in ORDER:
        assert max(place[one] for one in rule.first) < min(place[one] for one in rule.then)


def test_rules_that_cannot_be_kept_are_refused() -> None:
    rows = [BlockPattern(family=name, up="up", down="down") for name in ("one", "other")]
    forth, back = Before(("one",), ("other",), "why"), Before(("other",), ("one",), "why")
    with pytest.raises(CycleError):
        in_order(rows, [forth, back])
    with pytest.raises(ValueError, match="'why': there is no pattern third"):
        in_order(rows, [Before(("one",), ("third",), "why")])
    with pytest.raises(ValueError, match="two patterns have the same family"):
        in_order([rows[0], rows[0]], [])
