"""Applied plug-ins: those of a model, in the order of `sparsify_`, and how to take them back."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from steppe.blocks.find import unwrap
from steppe.errors import SparsificationError
from steppe.plugins.base import Constraint, Plugin
from steppe.record import APPLIED, RECORD_VERSION, Holder, erase_records, unapplied
from steppe.surgery.journal import Journal, forget_compiled_code
from steppe.surgery.pattern_notes import entries_of, forget_patterns_, noted
from steppe.wiring.first_pass import stop_looking


@dataclass
class Applied:
    """One plug-in in some blocks.

    Attributes:
        plugin: its settings, every one decided.
        names: of the blocks that have it.
        journal: takes its edits back.
        constraints: its parts that go on during training.
    """

    plugin: Plugin
    names: tuple[str, ...]
    journal: Journal = field(repr=False)
    constraints: list[Constraint] = field(repr=False)


@dataclass
class Sparsification:
    """The plug-ins of a model: in which blocks, how far their schedules are, how to take them back.

    Attributes:
        applied: each plug-in, in the order in which they came.
        progress: share of the run that is done, in [0, 1].
        journal: takes back the edits that were made for all of them.
        holders: the models that keep this and its record, the one that `sparsify_` got first.
        patterns: by the names of all blocks that have plug-ins, the values of the user's pattern
            that found the block, or None.
    """

    applied: list[Applied] = field(default_factory=list)
    progress: float = 0.0
    journal: Journal = field(default_factory=Journal, repr=False)
    holders: list[Holder] = field(default_factory=list, repr=False)
    patterns: dict[str, dict[str, Any] | None] = field(default_factory=dict, repr=False)

    @property
    def constraints(self) -> list[Constraint]:
        """The constraints of all plug-ins, those that read the norm last."""
        found = [constraint for applied in self.applied for constraint in applied.constraints]
        return sorted(found, key=lambda constraint: constraint.reads_norm)

    @property
    def has_schedule(self) -> bool:
        """Whether some plug-in needs to know how much of the run is done."""
        return any(applied.plugin.has_schedule for applied in self.applied)

    @property
    def longest_sequence(self) -> int | None:
        """The longest sequence that all plug-ins allow, in tokens; None for any."""
        found = [applied.plugin.longest_sequence for applied in self.applied]
        return min((length for length in found if length is not None), default=None)

    def undo(self) -> None:
        """Take all plug-ins back."""
        for applied in reversed(self.applied):
            applied.journal.undo()
        self.journal.undo()
        for holder in self.holders:
            holder.erase()

    def keep(self) -> None:
        """Note the plug-ins on the models, and in the configs that ``save_pretrained`` writes."""
        record = self.record()
        for holder in self.holders:
            holder.write(self, record)

    def record(self) -> dict[str, Any]:
        """The entry in ``config.json``, as JSON values."""
        record: dict[str, Any] = {
            "version": RECORD_VERSION,
            "progress": self.progress,
            "plugins": [
                {**applied.plugin.settings(), "blocks": list(applied.names)}
                for applied in self.applied
            ],
        }
        patterns = entries_of(self._patterns())
        return {**record, "patterns": patterns} if patterns else record

    def _patterns(self) -> dict[str, dict[str, Any]]:
        """The user's patterns that loading needs, by block: one with plug-ins keeps its first."""
        now = noted(self.holders[0].module) if self.holders else {}
        found = {**now, **self.patterns}
        return {name: values for name, values in found.items() if values is not None}


def restore_(model: nn.Module) -> nn.Module:
    """Take everything back that `sparsify_` did: the exact inverse.

    Values that training has given to the model's own parameters stay; the plug-ins' parameters and
    buffers go (`fold_` keeps thresholds), and so do noted patterns.

    Args:
        model: a model that `sparsify_` changed.

    Returns:
        The model.

    Raises:
        SparsificationError: the model carries no plug-in.
    """
    root = unwrap(model)
    if sparsification_of(root) is None and unapplied(root) is not None:
        erase_records(root)  # of plug-ins that it never had
        return model
    stop_looking(root)
    require_sparsification(root).undo()
    forget_patterns_(root)
    forget_compiled_code()
    return model


def take_out_(model: nn.Module, applied: Applied) -> None:
    """Take one plug-in back and leave the others.

    Args:
        model: a sparsified model.
        applied: the plug-in, one of its `sparsification_of`.
    """
    root = unwrap(model)
    sparsification = require_sparsification(root)
    applied.journal.undo()
    sparsification.applied.remove(applied)
    if sparsification.applied:
        sparsification.keep()
    else:
        sparsification.undo()
    forget_compiled_code()


def sparsification_of(model: nn.Module) -> Sparsification | None:
    """The plug-ins of a model, or of the one in it (an ``AveragedModel``'s), or None.

    Raises:
        SparsificationError: several models in it have plug-ins.
    """
    root = unwrap(model)
    found: Sparsification | None = root.__dict__.get(APPLIED)
    if found is not None:
        return found
    inside = {
        id(module.__dict__[APPLIED]): module
        for module in reversed(list(root.modules()))
        if APPLIED in module.__dict__
    }
    if len(inside) > 1:
        names = {module: name for name, module in root.named_modules()}
        raise SparsificationError(
            f"{type(root).__name__} holds {len(inside)} models with plug-ins:"
            f" {', '.join(sorted(names[module] for module in inside.values()))}. Name one of them"
        )
    return next((module.__dict__[APPLIED] for module in inside.values()), None)


def require_sparsification(model: nn.Module) -> Sparsification:
    """The plug-ins of a model.

    Raises:
        SparsificationError: it has none; the message says how to begin.
    """
    sparsification = sparsification_of(model)
    if sparsification is None:
        raise SparsificationError(
            f"{type(unwrap(model)).__name__} carries no plug-in. First:"
            " steppe.sparsify_(model, [ZerothBias(), RestrictedNorm(), JumpingSquaredReLU()])"
        )
    return sparsification


def added_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that `sparsify_` added, by name; empty if there are none.

    An optimizer that was made before gets them by
    ``optimizer.add_param_group({"params": list(added_parameters(model).values())})``.
    """
    sparsification = sparsification_of(model)
    journals = [] if sparsification is None else [a.journal for a in sparsification.applied]
    slots = [slot for journal in journals for slot in journal.added_parameters()]
    # By place: PEFT renames modules, FSDP2 replaces parameters.
    names = {module: name for name, module in unwrap(model).named_modules()}
    return {
        f"{names[slot.module]}.{slot.name}".lstrip("."): getattr(slot.module, slot.name)
        for slot in slots
        if slot.module in names
    }


def changed_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The tensors that a checkpoint needs besides the model's own as they were before `sparsify_`.

    Args:
        model: any model.

    Returns:
        The tensors that plug-ins added, and the model's own that they change even where those are
        frozen (the scale of a norm), by name; empty if there are none.
    """
    sparsification = sparsification_of(model)
    if sparsification is None:
        return {}
    root = unwrap(model)
    names = {module: name for name, module in root.named_modules()}
    added = {
        f"{names[slot.module]}.{slot.name}".lstrip(".")
        for applied in sparsification.applied
        for slot in applied.journal.added_tensors()
        if slot.module in names
    }
    ours = {id(one) for constraint in sparsification.constraints for one in constraint.changed()}
    owned = {name for name, parameter in root.named_parameters() if id(parameter) in ours}
    return {
        name: tensor
        for name, tensor in root.state_dict().items()
        if name in owned or any(name == one or name.startswith(f"{one}.") for one in added)
    }
