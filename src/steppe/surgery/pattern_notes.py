"""The patterns that a user gave, noted on the owners of the blocks that they matched.

A verb that changes a model or watches it notes them, so that every later search for its blocks
finds the same ones without the patterns. They are plain values, which a copy of the model has too,
and which `sparsify_` writes into its record. A function of a pattern (`when`,
`sequence_first`) is asked once, and holds for those owners from then on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from torch import nn

from steppe.blocks.block import Slot
from steppe.blocks.matching import matches
from steppe.blocks.pattern_values import NOTE, pattern_of, values_of
from steppe.blocks.patterns import BlockPattern
from steppe.blocks.wrappers import owner_name, unwrap
from steppe.errors import CheckpointError
from steppe.surgery.journal import Journal

Noted = tuple[dict[str, Any], list[str]]
"""The values of a pattern, and the names of the owners that it is noted on."""


def note_patterns_(
    model: nn.Module, patterns: Sequence[BlockPattern], journal: Journal | None = None
) -> nn.Module:
    """Have blocks that patterns of the user's match be found by them from now on.

    Args:
        model: any model; wrappers are seen through.
        patterns: as of `find_blocks`.
        journal: takes it back.

    Returns:
        The model.

    Raises:
        PatternError: a pattern has a value that cannot be written; the model is as it was.
    """
    if not patterns:
        return model
    notes = [
        (owner, values_of(pattern, owner))
        for _, owner, pattern, _ in matches(unwrap(model), patterns)
        if pattern is not None and any(pattern is one for one in patterns)
    ]
    _note(notes, Journal() if journal is None else journal)
    return model


def noted(model: nn.Module) -> dict[str, dict[str, Any]]:
    """The values of the patterns that are noted on a model, by the names of the owners."""
    return {
        owner_name(name, owner): owner.__dict__[NOTE]
        for name, owner in unwrap(model).named_modules()
        if NOTE in owner.__dict__
    }


def entries_of(patterns: Mapping[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """Patterns by the names of owners as a record has them: each once, with its ``blocks``."""
    found: list[Noted] = []
    for name, values in patterns.items():
        names = next((names for one, names in found if one == values), None)
        if names is None:
            found.append((values, [name]))
        else:
            names.append(name)
    return [{**values, "blocks": names} for values, names in found]


def note_record_(
    root: nn.Module, record: Iterable[Noted], rename: Callable[[str], str], place: str
) -> bool:
    """Note the patterns of a record.

    Args:
        root: the model, which has no wrappers.
        record: values without a fault, and names in the record.
        rename: makes a name in the record one in the model.
        place: of the record, for errors.

    Returns:
        Whether the model has all of the owners; if not, it is as it was.

    Raises:
        CheckpointError: an owner has other parts than its pattern says.
    """
    owners = {owner_name(name, owner): owner for name, owner in root.named_modules()}
    notes = [(rename(name), values) for values, names in record for name in names]
    if not notes:
        return True
    if not {name for name, _ in notes} <= owners.keys():
        return False
    for name, values in notes:
        for flag, _ in pattern_of(values).act_flags:
            if not isinstance(getattr(owners[name], flag, None), bool | int | float | str):
                raise CheckpointError(
                    f"{place}: a pattern of its record sets {flag!r}, and {name} has no such flag"
                )
    journal = Journal()
    _note([(owners[name], values) for name, values in notes], journal)
    found = {owner: pattern for _, owner, pattern, _ in matches(root, ())}
    for name, values in notes:
        if found.get(owners[name]) != pattern_of(values):
            journal.undo()
            raise CheckpointError(
                f"{place}: a pattern of its record, {values.get('family')!r}, does not match {name}"
            )
    return True


def forget_patterns_(model: nn.Module) -> None:
    """Leave no pattern noted on a model."""
    for module in unwrap(model).modules():
        module.__dict__.pop(NOTE, None)


def _note(notes: Iterable[tuple[nn.Module, dict[str, Any]]], journal: Journal) -> None:
    for owner, values in notes:
        slot = Slot(owner, NOTE)
        if NOTE in owner.__dict__:
            journal.set_attribute(slot, values)
        else:
            journal.add_attribute(slot, values)
