"""Which of two rows of the table comes first, where one owner can match both."""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from graphlib import TopologicalSorter

from steppe.blocks.patterns.pattern import BlockPattern


@dataclass(frozen=True)
class Before:
    """Rows that are tried before others.

    Attributes:
        first: families of the rows.
        then: families of the others.
        why: the reason.
    """

    first: tuple[str, ...]
    then: tuple[str, ...]
    why: str


def families_of(rows: Iterable[BlockPattern]) -> tuple[str, ...]:
    """The names of rows, by which `Before` refers to them."""
    return tuple(row.family for row in rows)


def in_order(rows: Sequence[BlockPattern], rules: Iterable[Before]) -> tuple[BlockPattern, ...]:
    """Rows in an order that keeps every rule; rows that no rule names stay in the order given.

    Args:
        rows: of different families.
        rules: about families that are among them.

    Raises:
        ValueError: two rows have the same family, or a rule names a family that there is not.
        graphlib.CycleError: the rules contradict each other.

    Example:
        >>> rows = [BlockPattern(family=name, up="up", down="down") for name in "abc"]
        >>> [row.family for row in in_order(rows, [Before(("c",), ("a",), "c is narrower")])]
        ['b', 'c', 'a']
    """
    place = {row.family: number for number, row in enumerate(rows)}
    if len(place) < len(rows):
        raise ValueError("two patterns have the same family")
    graph: TopologicalSorter[int] = TopologicalSorter(dict.fromkeys(place.values(), ()))
    for rule in rules:
        unknown = {*rule.first, *rule.then} - place.keys()
        if unknown:
            raise ValueError(f"{rule.why!r}: there is no pattern {', '.join(sorted(unknown))}")
        for then in rule.then:
            graph.add(place[then], *(place[first] for first in rule.first))
    graph.prepare()
    ready: list[int] = []
    ordered = []
    while graph.is_active():
        for number in graph.get_ready():
            heapq.heappush(ready, number)
        number = heapq.heappop(ready)
        graph.done(number)
        ordered.append(rows[number])
    return tuple(ordered)
