"""Values that were read from JSON, checked strictly by the types of a dataclass's fields."""

from __future__ import annotations

import dataclasses
import functools
import typing
from collections.abc import Mapping
from typing import Any

_SHOWN = 60  # characters of a value in an error


def fault_of(kind: type, values: Mapping[str, Any]) -> str | None:
    """Why values are none of a dataclass's fields, or None if they are.

    A whole number is a number; text and true are none, nor are NaN and infinity. Fields whose types
    mean nothing outside of the class's module are not checked.

    Args:
        kind: the dataclass.
        values: by the names of fields; one with a default may be left out.
    """
    # Here, not above: a tenth of a second, for what only loading needs.
    import pydantic

    try:
        _model_of(kind).model_validate(dict(values))
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        return f"{where}: {first['msg']}, got {str(first['input'])[:_SHOWN]!r}"
    return None


@functools.cache
def _model_of(kind: type) -> Any:
    """A validator; making one takes a thousand times as long as using it."""
    import pydantic

    try:
        hints = typing.get_type_hints(kind)
    except NameError:  # a type of the user's that is only imported for type checkers
        hints = {}
    fields: dict[str, Any] = {
        field.name: (hints.get(field.name, Any), _default(field))
        for field in dataclasses.fields(kind)
    }
    return pydantic.create_model(
        kind.__name__,
        __config__=pydantic.ConfigDict(
            strict=True, extra="forbid", allow_inf_nan=False, arbitrary_types_allowed=True
        ),
        **fields,
    )


def _default(field: dataclasses.Field[Any]) -> Any:
    """A field's default as pydantic wants it: ... where there is none."""
    has_none = field.default is dataclasses.MISSING
    return ... if has_none and field.default_factory is dataclasses.MISSING else field.default
