"""Put plug-ins into a model, take them out again, and keep their bounds while it trains."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from steppe.blocks.block import MLPBlock, Slot
from steppe.blocks.find import blocks_for
from steppe.blocks.patterns import BlockPattern
from steppe.blocks.wrappers import unwrap
from steppe.errors import SparsificationError
from steppe.plugins.base import Constraint, Plugin
from steppe.plugins.jumping_relu import JumpingSquaredReLU
from steppe.plugins.penalty import ActivationPenalty
from steppe.plugins.restricted_norm import RestrictedNorm
from steppe.plugins.rising_threshold import RisingThreshold
from steppe.plugins.zeroth_bias import ZerothBias
from steppe.record import (
    APPLIED,
    RECORD_VERSION,
    Holder,
    erase_records,
    holders_of,
    own_configs,
    unapplied,
)
from steppe.routing.route import route_of
from steppe.surgery.journal import Journal, forget_compiled_code
from steppe.surgery.pattern_notes import entries_of, forget_patterns_, note_patterns_, noted
from steppe.wiring.first_pass import look_later, stop_looking

_PART_OF = "_steppe_part_of"  # on a block's second layer: the class that `sparsify_` was given
PLUGINS: tuple[type[Plugin], ...] = (
    ZerothBias,
    RestrictedNorm,
    JumpingSquaredReLU,
    RisingThreshold,
    ActivationPenalty,
)


@dataclass
class Applied:
    """One plug-in in some blocks.

    Attributes:
        plugin: its settings, every one decided.
        names: of the blocks that have it.
        journal: takes it back.
        constraints: what it goes on doing.
    """

    plugin: Plugin
    names: tuple[str, ...]
    journal: Journal = field(repr=False)
    constraints: list[Constraint] = field(repr=False)


@dataclass
class Sparsification:
    """What steppe did to a model: the plug-ins, the blocks, and how to take it back.

    Attributes:
        applied: each plug-in, in the order in which they came.
        progress: share of the run that is done, in [0, 1].
        journal: what was done for all of them.
        holders: the models that keep this and the record of it, the one that was given first.
        patterns: by the names of all blocks that have plug-ins, the values of the user's pattern
            that they were found by, or None.
    """

    applied: list[Applied] = field(default_factory=list)
    progress: float = 0.0
    journal: Journal = field(default_factory=Journal, repr=False)
    holders: list[Holder] = field(default_factory=list, repr=False)
    patterns: dict[str, dict[str, Any] | None] = field(default_factory=dict, repr=False)

    @property
    def constraints(self) -> list[Constraint]:
        """Of all plug-ins, those that read the norm last."""
        found = [constraint for applied in self.applied for constraint in applied.constraints]
        return sorted(found, key=lambda constraint: constraint.reads_norm)

    @property
    def has_schedule(self) -> bool:
        """Whether some plug-in needs to know how much of the run is done."""
        return any(applied.plugin.has_schedule for applied in self.applied)

    def undo(self) -> None:
        """Take all of it back."""
        for applied in reversed(self.applied):
            applied.journal.undo()
        self.journal.undo()
        for holder in self.holders:
            holder.erase()

    def keep(self) -> None:
        """Note it on the models, and in the configs that ``save_pretrained`` writes."""
        record = self.record()
        for holder in self.holders:
            holder.write(self, record)

    def record(self) -> dict[str, Any]:
        """The JSON values that stand in ``config.json``."""
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
        """Of the user's, those that loading needs, by name: a plug-in's block keeps its first."""
        now = noted(self.holders[0].module) if self.holders else {}
        found = {**now, **self.patterns}
        return {name: values for name, values in found.items() if values is not None}


def sparsify_(
    model: nn.Module,
    plugins: Sequence[Plugin],
    where: Callable[[MLPBlock], bool] | None = None,
    patterns: Sequence[BlockPattern] = (),
    strict: bool = False,
) -> nn.Module:
    """Put plug-ins into the MLP blocks of a model, in place.

    All is checked before anything is changed, but for what flows between the modules of a block:
    that is compared in its first pass, which raises `WiringError` where it is not what the block's
    pattern says. Existing Parameters stay the same objects under the same names;
    `added_parameters` names the new ones. A Hugging Face model notes it in its config, so that
    ``save_pretrained`` saves it and `load_pretrained` brings it back. Call it before DDP, FSDP or
    an optimizer see the model.

    Args:
        model: the model; wrappers (PEFT, ``torch.compile``) are seen through.
        plugins: `ZerothBias`, `RestrictedNorm`, `JumpingSquaredReLU`, `RisingThreshold`,
            `ActivationPenalty`, in any combination.
        where: which blocks; all by default.
        patterns: patterns of your own for `find_blocks`. They are noted with the model and in its
            config, with the names of the owners that they match in place of their functions, so
            that nothing needs to be told of them again.
        strict: refuse a model of which some MLPs are not found, instead of warning once.

    Returns:
        The model.

    Raises:
        BlocksNotFoundError: there is no MLP block.
        SparsificationError: a block has one of the plug-ins already, or is accelerated.
        PatternError: a pattern has a value that cannot be written.
        UnfitBlockError: a plug-in does not fit a block; the model is untouched.

    Source: arXiv 2605.25612.

    Example:
        >>> layer = nn.TransformerEncoderLayer(8, 2, 32, norm_first=True)
        >>> _ = sparsify_(layer, [RestrictedNorm(), JumpingSquaredReLU()])
        >>> layer.activation
        Rectifier(alpha=1.0, beta=0.5)
        >>> restore_(layer).activation.__name__
        'relu'
    """
    root = unwrap(model)
    blocks = blocks_for("sparsify_", root, where, patterns, strict)
    names = tuple(block.name for block in blocks)
    if not plugins:
        raise ValueError("sparsify_: no plug-in given, e.g. sparsify_(model, [ZerothBias()])")
    old = sparsification_of(root)
    if old is not None and old.holders[0].module is not root:
        raise SparsificationError(
            f"{type(root).__name__}: the plug-ins that are in it were put into"
            f" {type(old.holders[0].module).__name__}; put more into that, or first"
            " steppe.restore_(model)"
        )
    for block in blocks if old is None else ():
        if (owner := block.down.__dict__.get(_PART_OF)) is not None:
            raise SparsificationError(
                f"{block.name}: is part of {owner}, which has plug-ins; put more into that, with"
                " where=... for some of its blocks, or first steppe.restore_(model)"
            )
    _refuse_duplicates(plugins, names, old)
    for block in blocks:
        if route_of(block.down) is not None:
            raise SparsificationError(
                f"{block.name}: is accelerated; first steppe.restore_(model), then sparsify_, then"
                " accelerate_"
            )
    resolved = [plugin.resolve(root, blocks) for plugin in plugins]
    for plugin in resolved:
        for block in blocks:
            plugin.check(block)

    new, notes = Sparsification(), Journal()
    try:
        note_patterns_(root, patterns, notes)
        new.journal.hold_nested_tensors_off(root)
        new.journal.hold_parts(blocks)
        for plugin in resolved:
            applied = Applied(plugin, names, Journal(), [])
            new.applied.append(applied)
            applied.constraints += plugin.apply(root, blocks, applied.journal)
        if old is None:
            own_configs(root)
        for block in blocks:
            if _PART_OF not in block.down.__dict__:
                new.journal.add_attribute(Slot(block.down, _PART_OF), type(root).__name__)
        before, found = old or Sparsification(), noted(root)
        all_applied = before.applied + new.applied
        changed = [name for applied in all_applied for name in applied.names]
        Sparsification(
            applied=all_applied,
            progress=before.progress,
            journal=before.journal.followed_by(new.journal),
            holders=holders_of(root, changed),
            patterns={name: found.get(name) for name in names} | before.patterns,
        ).keep()
    except BaseException:  # also Ctrl-C: never half a model
        new.undo()
        notes.undo()
        for holder in holders_of(root, names):
            holder.erase()
        if old is not None:
            old.keep()
        raise
    uses_norm = any(plugin.uses_norm for plugin in resolved)
    look_later(root, blocks, names if uses_norm else ())
    forget_compiled_code()
    return model


def restore_(model: nn.Module) -> nn.Module:
    """Take everything back that `sparsify_` did: the exact inverse.

    Values that training has given to the model's own parameters stay; the zeroth biases and the
    thresholds are gone (`fold_` keeps those), and so are noted patterns.

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
        applied: of its `sparsification_of`.
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
    """What `sparsify_` did to a model, or to the one in it (an ``AveragedModel``'s), or None.

    Raises:
        SparsificationError: to several models in it.
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
    """What `sparsify_` did to a model.

    Raises:
        SparsificationError: nothing; the message says how to begin.
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

    An optimizer that was made before takes them with
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
    """What a checkpoint needs besides the model's own weights as they were before `sparsify_`.

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


def advance_(model: nn.Module, progress: float) -> nn.Module:
    """Set the schedules of a model's plug-ins.

    Args:
        model: a sparsified model.
        progress: share of the run that is done, in [0, 1].

    Returns:
        The model.

    Raises:
        SparsificationError: the model carries no plug-in.
        ValueError: `progress` is outside [0, 1].
    """
    if not 0.0 <= progress <= 1.0:
        raise ValueError(f"advance_: expected a share of the run in 0 … 1, got {progress}")
    root = unwrap(model)
    sparsification = require_sparsification(root)
    sparsification.progress = progress
    for constraint in sparsification.constraints:
        constraint.advance(progress)
    sparsification.keep()
    return model


def project_(model: nn.Module) -> nn.Module:
    """Bring the parameters of a model's plug-ins back within their bounds, after a step.

    With `RisingThreshold` it takes up the step's statistics, summed over all processes: every one
    must call it, once a step.

    Args:
        model: a sparsified model, on one device or sharded by FSDP2.

    Returns:
        The model.

    Raises:
        SparsificationError: the model carries no plug-in.
        ScheduleError: no loss has got an `ActivationPenalty`.
        LossError: the one that has got it gives it no gradient.
    """
    for constraint in require_sparsification(model).constraints:
        constraint.project()
    return model


def _refuse_duplicates(
    plugins: Sequence[Plugin], names: Sequence[str], old: Sparsification | None
) -> None:
    """Refuse a plug-in that is given twice or that a block has already."""
    keys = [plugin.key for plugin in plugins]
    for key in keys:
        if keys.count(key) > 1:
            raise SparsificationError(f"sparsify_: {key} is given {keys.count(key)} times")
    for applied in [] if old is None else old.applied:
        again = [name for name in names if name in applied.names]
        if applied.plugin.key in keys and again:
            raise SparsificationError(
                f"{again[0]}: has {type(applied.plugin).__name__} already; the model is unchanged."
                " To start over: steppe.restore_(model)"
            )
