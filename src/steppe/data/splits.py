"""Which split of a data set is trained on, and which is held out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from steppe.errors import DataError

HELD_OUT = ("validation", "valid", "val", "dev", "test")
"""Names of held-out splits; the first that is there is taken."""


def measured_split(data: str, splits: Mapping[str, Any], asked: str | None, is_local: bool) -> str:
    """Name of the split to measure on: the one asked for, a held-out one, or the only one.

    Args:
        data: the data's name.
        splits: by name.
        asked: by the user.
        is_local: whether the data lies here; the only split of a data set on the hub must be asked
            for, unless it is called a held-out one.

    Raises:
        DataError: there is no such split, or none is held out; lists those that are there.
    """
    there = ", ".join(sorted(splits))
    if asked is not None:
        if asked in splits:
            return asked
        raise DataError(f"{data}: expected a split {asked!r}, it has: {there}")
    if len(splits) == 1 and (is_local or next(iter(splits)) in HELD_OUT):
        return next(iter(splits))
    for name in HELD_OUT:
        if name in splits:
            return name
    raise DataError(
        f"{data}: none of its splits ({there}) is called validation or test. Say which one"
        " is held out",
        {"split": sorted(splits)[0]},
    )


def training_splits(
    data: str, splits: Mapping[str, Any], asked: str | None
) -> tuple[str, str | None]:
    """Names of the split to train on and of the held-out split.

    Args:
        data: the data's name.
        splits: by name.
        asked: the held-out split that the user asks for.

    Returns:
        ``train`` or the only split; and the split asked for, the first of `HELD_OUT`, or None where
        a part of the training split is to be held out.

    Raises:
        DataError: there is no such split, or none to train on; lists those that are there.
    """
    there = ", ".join(splits)
    if "train" not in splits and len(splits) > 1:
        raise DataError(f"{data}: expected a split 'train', it has {there}")
    train = "train" if "train" in splits else next(iter(splits))
    held_out = asked or next((name for name in HELD_OUT if name in splits), None)
    if held_out is not None and held_out not in splits:
        raise DataError(
            f"{data}: expected a split {held_out!r}, it has {there}", {"held_out_split": "NAME"}
        )
    return train, held_out
