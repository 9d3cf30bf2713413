"""A `BlockPattern` as plain values: in ``config.json``, on a model's modules, in a recipe, typed.

The functions of a pattern are written as their results for one owner of a block, so nothing that is
read back is code.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from torch import nn

from steppe.blocks.patterns import BlockPattern
from steppe.errors import PatternError
from steppe.schema import fault_of

NOTE = "_steppe_pattern"
"""The attribute of an owner of a block that has the values of the pattern that it is found by."""
TOKENS_FIRST = "sequence_first"  # the one function of a pattern that is written, as its result
_CONDITION = "when"
_FLAGS = "act_flags"
_FAMILY = "family"
_PATH = re.compile(r"\w+(\.\w+)*")
_PLAIN = (str, int, float, bool, type(None))
_EVERY_MODULE = nn.Module()
_EXAMPLE = "BlockPattern(family='mine', up='fc_in', act='act', down='fc_out')"
_SHOWN = 200  # characters of a text that is not ours


def values_of(pattern: BlockPattern, owner: nn.Module) -> dict[str, Any]:
    """A pattern as JSON values, as it is of one owner of a block, without the default values.

    Args:
        pattern: one that matches the owner.
        owner: of a block.

    Raises:
        PatternError: it has a value that cannot be written.
    """
    written: dict[str, Any] = {}
    for one in fields(BlockPattern):
        value = getattr(pattern, one.name)
        if value == one.default or one.name == _CONDITION:
            continue
        if one.name == TOKENS_FIRST:
            value = bool(value(owner))
            if not value:
                continue
        written[one.name] = _plain(value, f"{pattern.family!r}, {one.name}")
    return written


def pattern_of(values: Mapping[str, Any]) -> BlockPattern:
    """The pattern of values without a fault."""
    values = {name: _tuples(value) for name, value in values.items()}
    if values.pop(TOKENS_FIRST, False):
        return BlockPattern(**values, sequence_first=_always)
    return BlockPattern(**values)


def pattern_noted_on(owner: nn.Module) -> tuple[BlockPattern, ...]:
    """The pattern of the user's that is noted on an owner, or none."""
    values = owner.__dict__.get(NOTE)
    return () if values is None else (pattern_of(values),)


def fault_in(values: Mapping[str, Any]) -> str | None:
    """Why values from a file are none of a pattern, or None if they are."""
    values = {name: _tuples(value) for name, value in values.items()}
    if not isinstance(values.pop(TOKENS_FIRST, None), bool | None):
        return f"{TOKENS_FIRST}: expected true or false"
    fault = fault_of(BlockPattern, values)
    if fault is not None:
        return fault
    try:
        pattern = BlockPattern(**values)
    except ValueError as error:
        return str(error)
    for name, value in pattern.act_flags:
        if hasattr(_EVERY_MODULE, name) or not isinstance(value, _PLAIN):
            return f"{_FLAGS}: {name!r} is not for a pattern to set"
    for one in fields(BlockPattern):
        path = getattr(pattern, one.name)
        if isinstance(path, str) and path and one.name != _FAMILY:
            parts = path.split(".")
            if not _PATH.fullmatch(path) or any(hasattr(_EVERY_MODULE, part) for part in parts):
                return f"{one.name}: expected a dotted path of parts, got {path!r}"
    return None


def pattern_from_text(text: str) -> BlockPattern:
    """The pattern that ``BlockPattern(family='mine', up='fc1', …)`` describes; nothing is run.

    Args:
        text: as `steppe blocks` prints it, or the fields in JSON.

    Raises:
        PatternError: it is something else; shows a right one.

    Example:
        >>> pattern_from_text("BlockPattern(family='mine', up='fc1', act='act', down='fc2')").up
        'fc1'
        >>> pattern_from_text('{"family": "mine", "up": "fc1", "act": "act", "down": "fc2"}').up
        'fc1'
    """
    try:
        values = json.loads(text) if text.lstrip().startswith("{") else _named_in(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise _no_pattern(text, str(error)) from None
    fault = fault_in(values)
    if fault is not None:
        raise _no_pattern(text, fault)
    return pattern_of(values)


def _named_in(text: str) -> dict[str, Any]:
    """The values by name in a call that is written down, which is not made."""
    call = ast.parse(text.strip(), mode="eval").body
    if not isinstance(call, ast.Call) or ast.unparse(call.func) != BlockPattern.__name__:
        raise ValueError("it is no BlockPattern(...)")
    if call.args or not all(word.arg for word in call.keywords):
        raise ValueError("every part must be named")
    return {str(word.arg): ast.literal_eval(word.value) for word in call.keywords}


def _no_pattern(text: str, fault: str) -> PatternError:
    return PatternError(
        f"expected a pattern as `steppe blocks` prints it, e.g. {_EXAMPLE}, got {text[:_SHOWN]!r}"
        f" ({fault[:_SHOWN]})"
    )


def _plain(value: Any, where: str) -> Any:
    """A value as JSON has it."""
    if isinstance(value, tuple | list):
        return [_plain(item, where) for item in value]
    if isinstance(value, _PLAIN):
        return value
    raise PatternError(
        f"pattern {where}: {value!r} cannot be written into config.json. Use a string, a number,"
        " True, False or None"
    )


def _tuples(value: Any) -> Any:
    """A value of JSON as a pattern has it."""
    return tuple(map(_tuples, value)) if isinstance(value, list | tuple) else value


def _always(owner: Any) -> bool:
    """A condition that was true when it was asked."""
    return True
