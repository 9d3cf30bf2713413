"""One run of a study before it is run: its name, its settings and their hash."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

# Where things are on a machine is no setting of a run.
PLACES = ("data_dir", "cache_dir", "output_dir", "run_name", "resume")


@dataclass(frozen=True)
class PlannedRun:
    """A run of a study.

    Attributes:
        recipe: a name or a path, as `steppe train` takes it.
        recipe_name: the file's name without its ending.
        arm: of the study.
        setting: the values that vary over the study's runs of one arm, by key.
        seed: of the initial weights and the order of batches.
        flags: the values that differ from the recipe's, by key.
        settings: the recipe's values with those of the flags.
        after: the run whose trained model this one starts from; None for a new model.
    """

    recipe: str
    recipe_name: str
    arm: str
    setting: Mapping[str, Any]
    seed: int
    flags: Mapping[str, Any]
    settings: Mapping[str, Any]
    after: PlannedRun | None = None

    @property
    def key(self) -> tuple[str, str]:
        """The id and the hash, by which a row is found."""
        return self.id, self.hash

    @property
    def id(self) -> str:
        """The run's name, the same in every process and on every machine.

        Example:
            >>> PlannedRun("digits", "digits", "control", {"lr": 0.1}, 3, {}, {}).id
            'digits/control/lr=0.1/seed-3'
        """
        setting = [described(self.setting)] if self.setting else []
        return "/".join([self.recipe_name, self.arm, *setting, f"seed-{self.seed}"])

    @property
    def hash(self) -> str:
        """The first 12 hex digits of the settings' SHA-256; places on the machine are left out.

        The hash of the run that this one starts from is among the settings.
        """
        settings = {key: value for key, value in self.settings.items() if key not in PLACES}
        if self.after is not None:
            settings["after"] = self.after.hash
        text = json.dumps(settings, sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()[:12]


def described(setting: Mapping[str, Any]) -> str:
    """Values by key in one word that may be a file's name.

    Args:
        setting: of a run or an arm.

    Example:
        >>> described({"model_config.n_inner": 256, "learning_rate": 1e-3})
        'model_config.n_inner=256,learning_rate=0.001'
        >>> described({"plugins": {"restricted_norm": {"floor": 0.5}}})
        'plugins={restricted_norm-{floor-0.5}}'
    """
    words = ",".join(f"{key}={_word(value)}" for key, value in setting.items())
    return words.replace("/", "-")


def _word(value: Any) -> str:
    """A value without spaces and quotes."""
    if isinstance(value, str):
        return value
    text = json.dumps(value, separators=("+", "-"))
    return text.replace('"', "").replace(" ", "")
