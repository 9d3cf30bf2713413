"""What a plug-in is: it checks a block, changes it, and keeps it within bounds while it trains."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from steppe.blocks.block import MLPBlock
from steppe.errors import CheckpointError
from steppe.schema import fault_of
from steppe.surgery.journal import Journal


class Constraint:
    """What a plug-in goes on doing to its blocks during training; by default nothing.

    Attributes:
        reads_norm: the bounds depend on the norm's scale, so it is projected after the norm.
    """

    reads_norm: ClassVar[bool] = False

    def changed(self) -> list[nn.Parameter]:
        """The model's own parameters that `project` changes, frozen ones too."""
        return []

    def advance(self, progress: float) -> None:
        """Set schedules.

        Args:
            progress: share of the run that is done, in [0, 1].
        """

    def project(self) -> None:
        """Bring the parameters back within their bounds, after an optimizer step.

        What follows from the step's batches is taken up here, too: in every process, at once.
        """


@dataclass(frozen=True)
class Plugin(ABC):
    """One change to the MLP blocks of a model; its fields are its settings, all JSON values.

    A concrete plug-in is a frozen dataclass with a `key`, the name of it in ``config.json``.

    Attributes:
        uses_norm: it depends on the block's norm, which must then be the one that the block reads.
    """

    key: ClassVar[str]
    uses_norm: ClassVar[bool] = False

    @property
    def has_schedule(self) -> bool:
        """Whether the plug-in needs to know how much of the run is done."""
        return False

    def resolve(self, model: nn.Module, blocks: Sequence[MLPBlock]) -> Plugin:
        """The same plug-in with every setting decided.

        Args:
            model: the model to be changed.
            blocks: the blocks to be changed.

        Raises:
            UnfitBlockError: a setting is missing that this model does not tell.
        """
        return self

    @abstractmethod
    def check(self, block: MLPBlock) -> None:
        """Refuse a block that the plug-in does not fit; changes nothing.

        Raises:
            UnfitBlockError: says which block, what was expected, and what to do.
        """

    @abstractmethod
    def apply(
        self, model: nn.Module, blocks: Sequence[MLPBlock], journal: Journal
    ) -> list[Constraint]:
        """Change the blocks through the journal.

        Args:
            model: the model that the blocks are of.
            blocks: blocks that passed `check`.
            journal: takes down every edit.

        Returns:
            Constraints, of a block each or of all together.
        """

    def settings(self) -> dict[str, Any]:
        """The plug-in as JSON values."""
        return {"plugin": self.key, **dataclasses.asdict(self)}


def plugin_from_settings(settings: dict[str, Any], kinds: Sequence[type[Plugin]]) -> Plugin:
    """The plug-in that `Plugin.settings` described.

    Args:
        settings: what stands in ``config.json``.
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


def ramp_progress(progress: float, ramp: float) -> float:
    """How far a linear ramp over the first part of a run has come.

    Args:
        progress: share of the run that is done, in [0, 1].
        ramp: share of the run that the ramp takes; 0 for at once.

    Returns:
        Position on the ramp, in [0, 1].

    Example:
        >>> ramp_progress(0.1, 0.4), ramp_progress(0.9, 0.4), ramp_progress(0.0, 0.0)
        (0.25, 1.0, 1.0)
    """
    return 1.0 if ramp == 0 else min(1.0, progress / ramp)


def require_share(name: str, value: float) -> None:
    """Refuse a setting that is no share of a run.

    Raises:
        ValueError: `value` is outside [0, 1].
    """
    if not 0.0 <= value <= 1.0:
        raise ValueError(f"{name} is a share of the run: expected 0 … 1, got {value}")
