"""`sparsify_`: puts plug-ins into a model, all or nothing."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import nn

from steppe.blocks.block import MLPBlock, Slot
from steppe.blocks.find import blocks_for
from steppe.blocks.patterns import BlockPattern
from steppe.blocks.wrappers import unwrap
from steppe.errors import SparsificationError
from steppe.plugins.applied import Applied, Sparsification, sparsification_of
from steppe.plugins.base import Plugin, mark_needs
from steppe.record import holders_of, own_configs
from steppe.routing.route import route_of
from steppe.surgery.journal import Journal, forget_compiled_code
from steppe.surgery.pattern_notes import note_patterns_, noted
from steppe.wiring.first_pass import look_later

_PART_OF = "_steppe_part_of"  # on a block's second layer: the class that `sparsify_` was given


def sparsify_(
    model: nn.Module,
    plugins: Sequence[Plugin],
    where: Callable[[MLPBlock], bool] | None = None,
    patterns: Sequence[BlockPattern] = (),
    strict: bool = False,
) -> nn.Module:
    """Put plug-ins into the MLP blocks of a model, in place.

    All is checked before anything is changed, except the tensors that flow between the modules of
    a block: its first pass compares them with its pattern, and raises `WiringError` where they
    differ. Existing Parameters stay the same objects under the same names; `added_parameters` names
    the new ones. A Hugging Face model notes the plug-ins in its config, so that ``save_pretrained``
    saves them and `load_pretrained` brings them back. Call it before DDP, FSDP or an optimizer see
    the model.

    Args:
        model: the model; wrappers (PEFT, ``torch.compile``) are seen through.
        plugins: `ZerothBias`, `RestrictedNorm`, `JumpingSquaredReLU`, `RisingThreshold`,
            `ActivationPenalty`, `SShapedActivation` or your own, in any combination.
        where: which blocks; all by default.
        patterns: patterns of your own for `find_blocks`. They are noted with the model and in its
            config, so that no later call needs them again; the names of the owners that they match
            stand there in place of functions.
        strict: refuse a model if some of its MLPs are not found, instead of warning once.

    Returns:
        The model.

    Raises:
        BlocksNotFoundError: there is no MLP block.
        SparsificationError: a block has one of the plug-ins already, or is accelerated.
        PatternError: a pattern has a value that cannot be written.
        UnfitBlockError: a plug-in does not fit a block; the model is untouched.

    Source: arXiv 2605.25612.

    Example:
        >>> from steppe import JumpingSquaredReLU, RestrictedNorm, restore_
        >>> layer = nn.TransformerEncoderLayer(8, 2, 32, norm_first=True)
        >>> _ = sparsify_(layer, [RestrictedNorm(), JumpingSquaredReLU()])
        >>> layer.activation
        Rectifier(alpha=1.0, beta=0.5)
        >>> restore_(layer).activation.__name__
        'relu'
    """
    root = unwrap(model)
    blocks = blocks_for("sparsify_", root, where, patterns, strict)
    if not plugins:
        raise ValueError("sparsify_: no plug-in given, e.g. sparsify_(model, [ZerothBias()])")
    old = sparsification_of(root)
    _refuse_parts(root, blocks, old)
    _refuse_duplicates(plugins, [block.name for block in blocks], old)
    _refuse_accelerated(blocks)
    resolved = [plugin.resolve(root, blocks) for plugin in plugins]
    for plugin in resolved:
        for block in blocks:
            plugin.check(block)

    new, notes = Sparsification(), Journal()
    try:
        note_patterns_(root, patterns, notes)
        _apply(resolved, root, blocks, new)
        if old is None:
            own_configs(root)
        for block in blocks:
            if _PART_OF not in block.down.__dict__:
                new.journal.add_attribute(Slot(block.down, _PART_OF), type(root).__name__)
        _joined(old or Sparsification(), new, root, blocks).keep()
    except BaseException:  # also Ctrl-C: never half a model
        new.undo()
        notes.undo()
        for holder in holders_of(root, [block.name for block in blocks]):
            holder.erase()
        if old is not None:
            old.keep()
        raise
    uses_norm = any(plugin.uses_norm for plugin in resolved)
    look_later(root, blocks, [block.name for block in blocks] if uses_norm else ())
    forget_compiled_code()
    return model


def _apply(
    plugins: Sequence[Plugin], root: nn.Module, blocks: Sequence[MLPBlock], new: Sparsification
) -> None:
    """Change the blocks, and take each edit down in `new` as it is made."""
    names = tuple(block.name for block in blocks)
    new.journal.hold_nested_tensors_off(root)
    new.journal.hold_parts(blocks)
    for plugin in plugins:
        applied = Applied(plugin, names, Journal(), [])
        new.applied.append(applied)
        applied.constraints += plugin.apply(root, blocks, applied.journal)
        mark_needs(plugin, blocks, applied.journal)


def _joined(
    before: Sparsification, new: Sparsification, root: nn.Module, blocks: Sequence[MLPBlock]
) -> Sparsification:
    """Earlier plug-ins and new ones as one, with the models that hold the record of all."""
    applied, found = before.applied + new.applied, noted(root)
    return Sparsification(
        applied=applied,
        progress=before.progress,
        journal=before.journal.followed_by(new.journal),
        holders=holders_of(root, [name for one in applied for name in one.names]),
        patterns={block.name: found.get(block.name) for block in blocks} | before.patterns,
    )


def _refuse_parts(root: nn.Module, blocks: Sequence[MLPBlock], old: Sparsification | None) -> None:
    """Refuse a model within which, or around which, another one was given plug-ins."""
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


def _refuse_accelerated(blocks: Sequence[MLPBlock]) -> None:
    """Refuse a block that is routed around its modules."""
    for block in blocks:
        if route_of(block.down) is not None:
            raise SparsificationError(
                f"{block.name}: is accelerated; first steppe.restore_(model), then sparsify_, then"
                " accelerate_"
            )


def _refuse_duplicates(
    plugins: Sequence[Plugin], names: Sequence[str], old: Sparsification | None
) -> None:
    """Refuse a plug-in that is given twice, or that a block has already."""
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
