"""Find the columns of text, images and classes, and map the classes to those of a model."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import datasets

from steppe.data.rows import Rows
from steppe.errors import DataError

PAIRS = (
    ("input", "target"),
    ("inputs", "targets"),
    ("source", "target"),
    ("input_text", "target_text"),
    ("text", "target"),
    ("text", "summary"),
    ("document", "summary"),
    ("dialogue", "summary"),
    ("article", "highlights"),
    ("question", "answer"),
)
"""Columns that are taken for the input and the target of an encoder-decoder model."""
_NAMELESS = re.compile(r"LABEL_\d+")  # Transformers' names for classes without one
_SHOWN = 5


def text_column(rows: Rows) -> str:
    """Name of the column of the text: the one asked for, ``text``, or the only one of strings.

    Args:
        rows: the data.

    Raises:
        DataError: there is none, or several; says which option decides.
    """
    strings = [column for column in _columns(rows) if _is_text(rows, column)]
    asked = rows.source.text_column
    if asked is not None:
        if asked in strings:
            return asked
        raise DataError(
            f"{rows.name}: expected a column of strings {asked!r}, it has {_described(rows)}"
        )
    if "text" in strings:
        return "text"
    if len(strings) == 1:
        return strings[0]
    raise DataError(
        f"{rows.name}: expected a column 'text' or a single one of strings, it has"
        f" {_described(rows)}. Say which",
        {"text_column": strings[0] if strings else "NAME"},
    )


def pair_columns(rows: Rows) -> tuple[str, str]:
    """The columns of the input and the target: those asked for, or one of `PAIRS`.

    Args:
        rows: the data.

    Raises:
        DataError: there are none; lists the recognised ones.
    """
    source, target = rows.source.text_column, rows.source.target_column
    strings = [column for column in _columns(rows) if _is_text(rows, column)]
    for pair in PAIRS:
        wanted = (source or pair[0], target or pair[1])
        if wanted[0] in strings and wanted[1] in strings and wanted[0] != wanted[1]:
            return wanted
    if source in strings and target in strings and source is not None and target is not None:
        return source, target
    known = ", ".join("/".join(pair) for pair in PAIRS)
    raise DataError(
        f"{rows.name}: an encoder-decoder model needs an input and a target, as columns of strings"
        f" {known}; it has {_described(rows)}. Say which",
        {"text_column": "INPUT", "target_column": "TARGET"},
    )


def image_column(rows: Rows) -> str:
    """The column of the images: the only one of that type, else ``image`` or ``img``.

    Args:
        rows: the data.

    Raises:
        DataError: there is none.
    """
    typed = [c for c in _columns(rows) if isinstance(rows.features.get(c), datasets.Image)]
    for column in ("image", "img", *typed):
        if column in (typed or _columns(rows)):
            return column
    raise DataError(
        f"{rows.name}: the model takes images, expected a column 'image', it has"
        f" {_described(rows)}. For text use the checkpoint of a language model."
    )


class Classes:
    """The classes of a data set as those of a model.

    By name where both have names; else whole numbers as they are, which must be below the model's
    number of classes.

    Args:
        rows: the data.
        config: the model's.

    Raises:
        DataError: there is no column of classes, or its classes are not the model's.

    Attributes:
        column: their column.
        notes: assumptions, for the user.
    """

    def __init__(self, rows: Rows, config: Any) -> None:
        self._where = rows.name
        self._number = int(config.num_labels)
        real = [name for name in config.label2id if not _NAMELESS.fullmatch(str(name))]
        self._by_name = {str(name): int(config.label2id[name]) for name in real}
        self.column = label_column(rows)
        self.notes: tuple[str, ...] = ()
        feature = rows.features.get(self.column)
        names = feature.names if isinstance(feature, datasets.ClassLabel) else None
        self._table = None if names is None else self._mapped(names)

    def __call__(self, row: Mapping[str, Any]) -> int:
        """The model's class for a row.

        Raises:
            DataError: it has none.
        """
        value = row[self.column]
        if isinstance(value, str):
            known = self._by_name.get(value, int(value) if value.isdecimal() else None)
        else:
            known = value if isinstance(value, int) else None
            if self._table is not None and known is not None and 0 <= known < len(self._table):
                known = self._table[known]
        if known is None or not 0 <= known < self._number:
            wrong = f"{self._where}: column {self.column!r} has {value!r}, the model knows"
            if value == -1:
                raise DataError(
                    f"{wrong} {self._named()}. The labels of this split are withheld",
                    {"split": "validation"},
                )
            raise DataError(f"{wrong} {self._named()}.")
        return known

    def _mapped(self, names: Sequence[str]) -> list[int]:
        """The model's class for each of the data's."""
        if self._by_name:
            known = [self._by_name.get(name) for name in names]
            unknown = [name for name, index in zip(names, known, strict=True) if index is None]
            if not unknown:
                return [index for index in known if index is not None]
        if all(name.isdecimal() for name in names):
            return [int(name) for name in names]
        if self._by_name and len(unknown) < len(names):
            raise DataError(
                f"{self._where}: the classes {', '.join(unknown[:_SHOWN])} are not the model's,"
                f" which knows {self._named()}. Rename or remove them."
            )
        if len(names) != self._number:
            raise DataError(
                f"{self._where}: expected the model's {self._named()}, the data has {len(names)}:"
                f" {', '.join(names[:_SHOWN])}{'…' * (len(names) > _SHOWN)}. Measure on the data"
                " that the model was trained for, or name the classes as it does."
            )
        self.notes = (
            f"{self._where}: classes by their position ({names[0]} is class 0): data and model"
            " share no names",
        )
        return list(range(len(names)))

    def _named(self) -> str:
        """The model's classes in few words."""
        names = sorted(self._by_name, key=self._by_name.__getitem__)
        shown = f" ({', '.join(names[:_SHOWN])}{'…' * (len(names) > _SHOWN)})" if names else ""
        return f"{self._number} classes{shown}"


def label_column(rows: Rows) -> str:
    """The column of the classes: the one asked for, ``label``, ``labels``, or the only typed one.

    Args:
        rows: the data.

    Raises:
        DataError: there is none.
    """
    columns = _columns(rows)
    asked = rows.source.label_column
    typed = [c for c in columns if isinstance(rows.features.get(c), datasets.ClassLabel)]
    candidates = ["label", "labels", *(typed if len(typed) == 1 else [])]
    for column in candidates if asked is None else [asked]:
        if column in columns:
            return column
    raise DataError(
        f"{rows.name}: expected a column {asked or 'label'!r} of classes, it has"
        f" {_described(rows)}. Images need a folder a class. Say which column it is, or measure"
        " without labels",
        {"label_column": "NAME"},
        {"labels": "model"},
    )


def _columns(rows: Rows) -> list[str]:
    return list(rows.first)


def _is_text(rows: Rows, column: str) -> bool:
    """Whether a column holds strings; the first may be null."""
    feature = rows.features.get(column)
    if isinstance(feature, datasets.Value):
        return feature.dtype in ("string", "large_string", "string_view")
    return isinstance(rows.first[column], str)


def _described(rows: Rows) -> str:
    """The columns with their types."""
    return ", ".join(f"{name} ({type(value).__name__})" for name, value in rows.first.items())
