"""Find the MLP blocks of a Transformer, by the table of `steppe.blocks.patterns`."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Sequence

from torch import nn

from steppe.blocks.block import MLPBlock
from steppe.blocks.candidates import Candidate, listed, share_of
from steppe.blocks.coverage import Coverage, coverage, nothing_found
from steppe.blocks.patterns import BlockPattern
from steppe.blocks.wrappers import unwrap
from steppe.errors import BlocksNotFoundError, IncompleteCoverageWarning, SparsificationError
from steppe.record import unapplied

# The warnings that each model has had: one for each function that the user calls is enough.
_warned: weakref.WeakKeyDictionary[nn.Module, set[str]] = weakref.WeakKeyDictionary()


class Blocks(list[MLPBlock]):
    """Blocks of a model, in forward order.

    Attributes:
        coverage: the part of the model that they cover, and the rest.
    """

    def __init__(self, found: Coverage) -> None:
        super().__init__(found.blocks)
        self.coverage = found


def find_blocks(
    model: nn.Module,
    where: Callable[[MLPBlock], bool] | None = None,
    patterns: Sequence[BlockPattern] = (),
    strict: bool = False,
) -> Blocks:
    """Every MLP block of a model, in forward order.

    Sees through ``torch.compile``, DDP, PEFT and checkpoint wrappers. Names are those of the
    unwrapped model. Warns, once a model, of modules that look like an MLP and are not among them,
    except those that `where` leaves out: ``print(find_blocks(model, where=...).coverage)`` shows
    these.

    Args:
        model: T5, ViT, I-JEPA, OPT, GPT-2, BERT, GPT-NeoX, Llama/Qwen, ``nn.TransformerEncoder``,
            timm's or torchvision's ViT, or anything of the same shape.
        where: keeps the blocks for which it is true; all by default.
        patterns: patterns of your own, tried first; then those that `sparsify_`, `accelerate_`,
            `watch` or `measure` was given for this model, then the built-in ones.
        strict: refuse a model with MLPs that are not found, instead of warning.

    Returns:
        The blocks, a list with their ``coverage`` of the model. Never empty.

    Raises:
        BlocksNotFoundError: no module matches any pattern, or `where` refused all that do, or with
            `strict` something that looks like an MLP is not found.
        SparsificationError: the config has the record of plug-ins that the model does not have.

    Example:
        >>> layer = nn.TransformerEncoderLayer(8, 2, 32, norm_first=True, batch_first=True)
        >>> [(b.d_model, b.d_hidden) for b in find_blocks(layer)]
        [(8, 32)]
    """
    return blocks_for("find_blocks", model, where, patterns, strict)


def blocks_for(
    verb: str,
    model: nn.Module,
    where: Callable[[MLPBlock], bool] | None = None,
    patterns: Sequence[BlockPattern] = (),
    strict: bool = False,
) -> Blocks:
    """`find_blocks` for a function that the user has called, which warns in its own name.

    Args:
        verb: the function.
        model: as of `find_blocks`, as all that follows.
        where: which blocks.
        patterns: of the user's own.
        strict: refuse instead of warning.
    """
    root = unwrap(model)
    _refuse_record(root)
    found = coverage(root, patterns, where)
    if not found.blocks and not found.excluded:
        raise BlocksNotFoundError(nothing_found(root, patterns, found.left))
    if not found.blocks:
        names = ", ".join(block.name for block in found.excluded)
        raise BlocksNotFoundError(
            f"`where` refused all {len(found.excluded)} MLP blocks of {type(root).__name__}:"
            f" {names}"
        )
    if found.left:
        partly = _partly(verb, root, found)
        if strict:
            raise BlocksNotFoundError(partly)
        warned = _warned.setdefault(root, set())
        if partly not in warned:
            warned.add(partly)
            warnings.warn(partly, IncompleteCoverageWarning, stacklevel=3)
    return Blocks(found)


def _partly(verb: str, root: nn.Module, found: Coverage) -> str:
    """The message where some MLPs are in no block."""
    blocks = [*found.blocks, *found.excluded]
    layers = [layer for block in blocks for layer in block.layers]
    return (
        f"{verb}: {share_of(layers, found.left):.0%} of the MLP parameters of"
        f" {type(root).__name__} are in the {len(blocks)} blocks that were found. Not"
        f" covered:\n{listed(found.left)}\n"
        f"To cover what a pattern can name:\n{listed(found.left, Candidate.pattern)}"
    )


def _refuse_record(root: nn.Module) -> None:
    """Refuse a model without the plug-ins of its config, as a loader without steppe leaves it."""
    model = unapplied(root)
    if model is not None:
        raise SparsificationError(
            f"{type(model).__name__}: its config has the record of plug-ins that the model does not"
            " have, so it is another function than the one that was saved, or it was made of the"
            " config of one with plug-ins. Load the folder with steppe.load_pretrained(...); for a"
            " plain model, first: steppe.restore_(model)"
        )
