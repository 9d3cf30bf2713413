"""Plug-ins that a recipe names by their keys in the registry."""

from __future__ import annotations

import json

from steppe.errors import CheckpointError, RecipeError
from steppe.plugins import PLUGINS, Plugin
from steppe.plugins.registry import plugin_from_settings

_SHOWN = 300  # characters of a value


def named_plugins(text: str) -> list[Plugin]:
    """The plug-ins of a recipe's key `plugins`.

    Args:
        text: a JSON mapping from keys of registered plug-ins to their settings.

    Raises:
        RecipeError: it is no such mapping, or the settings of a plug-in are wrong.

    Example:
        >>> named_plugins('{"rising_threshold": {"multiple": 1.5}}')
        [RisingThreshold(multiple=1.5, ramp=0.5, sample=0.0625, seed=0)]
    """
    example = """e.g. '{"rising_threshold": {"multiple": 1.5}}'"""
    try:
        named = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise RecipeError(f"plugins: not valid JSON ({str(error)[:_SHOWN]}), {example}") from None
    if not isinstance(named, dict) or not all(isinstance(one, dict) for one in named.values()):
        raise RecipeError(
            f"plugins: expected a mapping from keys to settings, got {text[:_SHOWN]}; {example}"
        )
    unknown = sorted(set(named) - set(PLUGINS))
    if unknown:
        raise RecipeError(
            f"plugins: unknown {unknown[0]!r}; known are {', '.join(sorted(PLUGINS))}"
        )
    try:
        return [
            plugin_from_settings({**settings, "plugin": key}, list(PLUGINS.values()))
            for key, settings in named.items()
        ]
    except CheckpointError as error:
        text = str(error).removeprefix("config.json: ")
        raise RecipeError(f"plugins: {text}") from None
