"""The registry: every plug-in by its key, for records, recipes and the tables in the documents."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, TypeVar

from steppe.errors import CheckpointError
from steppe.plugins.base import Plugin
from steppe.plugins.jumping_relu import JumpingSquaredReLU
from steppe.plugins.penalty import ActivationPenalty
from steppe.plugins.restricted_norm import RestrictedNorm
from steppe.plugins.rising_threshold import RisingThreshold
from steppe.plugins.s_shaped import SShapedActivation
from steppe.plugins.zeroth_bias import ZerothBias
from steppe.schema import fault_of

_Kind = TypeVar("_Kind", bound=type[Plugin])

_BY_KEY: dict[str, type[Plugin]] = {
    kind.key: kind
    for kind in (
        ZerothBias,
        RestrictedNorm,
        JumpingSquaredReLU,
        RisingThreshold,
        ActivationPenalty,
        SShapedActivation,
    )
}
PLUGINS: Mapping[str, type[Plugin]] = MappingProxyType(_BY_KEY)
"""The class of each plug-in, by its key; steppe's own first."""


def register(kind: _Kind) -> _Kind:
    """Make a plug-in of your own known by its key; a class decorator.

    A saved model that has it is then loaded without ``plugins=[...]``, also by the stock
    ``from_pretrained``, and a recipe may name it. A class may be registered again, as when a cell
    of a notebook runs twice, or a file is imported under another name: the last one counts.

    Args:
        kind: the class.

    Returns:
        The class.

    Raises:
        ValueError: another plug-in has the key.
    """
    known = _BY_KEY.get(kind.key)
    if known is not None and _origin_of(known) != _origin_of(kind):
        raise ValueError(
            f"{kind.__name__}: another plug-in, {known.__name__}, has the key {kind.key!r}. Give it"
            " its own."
        )
    _BY_KEY[kind.key] = kind
    return kind


def _origin_of(kind: type[Plugin]) -> tuple[str, str]:
    """The file of a class, of a notebook's the module, and its name there."""
    file = getattr(sys.modules.get(kind.__module__), "__file__", None)
    return file or kind.__module__, kind.__qualname__


def kinds_with(own: Sequence[type[Plugin]]) -> list[type[Plugin]]:
    """The registered plug-ins, and some that are not.

    Args:
        own: classes of the user's; they may be registered, too.

    Raises:
        ValueError: one of them has the key of another plug-in.
    """
    kinds = list(dict.fromkeys((*PLUGINS.values(), *own)))
    for kind in own:
        if [one.key for one in kinds].count(kind.key) > 1:
            raise ValueError(
                f"{kind.__name__}: another plug-in has the key {kind.key!r}. Give it its own."
            )
    return kinds


def plugin_from_settings(settings: Mapping[str, Any], kinds: Sequence[type[Plugin]]) -> Plugin:
    """The plug-in that `Plugin.settings` described.

    Args:
        settings: the entry in ``config.json``.
        kinds: the classes to choose from.

    Raises:
        CheckpointError: an unknown plug-in, or unknown settings.
    """
    by_key = {kind.key: kind for kind in kinds}
    arguments = dict(settings)
    key = arguments.pop("plugin", None)
    if not isinstance(key, str) or key not in by_key:
        raise CheckpointError(
            f"config.json names the plug-in {key!r}; known are {', '.join(sorted(by_key))}. If it"
            " is your own: steppe.load_pretrained(..., plugins=[ItsClass]). Else update steppe, or"
            " check the file."
        )
    fault = fault_of(by_key[key], arguments)
    if fault is None:
        try:
            return by_key[key](**arguments)
        except (TypeError, ValueError) as error:
            fault = str(error)
    raise CheckpointError(f"config.json: the settings of {key!r} are wrong: {fault}")
