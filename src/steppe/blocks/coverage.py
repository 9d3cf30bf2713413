"""How much of a model's MLPs its blocks cover, and the messages about the rest."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from torch import nn

from steppe.blocks.block import MLPBlock
from steppe.blocks.candidates import Candidate, candidates, listed, share_of
from steppe.blocks.linear import linear_shape
from steppe.blocks.matching import matches
from steppe.blocks.patterns import BlockPattern
from steppe.blocks.wrappers import part_at, slot_at, unwrap


@dataclass(frozen=True)
class Coverage:
    """The part of a model that its blocks cover, and the rest.

    Attributes:
        blocks: the blocks, in forward order; empty if there are none.
        left: modules that look like an MLP and are in no block.
        share: of the parameters of all MLPs, those in blocks, in [0, 1].
        excluded: blocks that `where` has left out.
    """

    blocks: list[MLPBlock]
    left: list[Candidate]
    share: float
    excluded: list[MLPBlock] = field(default_factory=list)

    def not_covered(self) -> tuple[str, ...]:
        """A line for each kind of candidate in `left`, and one for each excluded block."""
        kinds = tuple(line.strip() for line in listed(self.left).splitlines())
        return (*kinds, *(f"{block.name}: left out by `where`" for block in self.excluded))

    def __str__(self) -> str:
        """The share, and a line for each kind that is not covered."""
        lines = "".join(f"\n  {line}" for line in self.not_covered())
        return f"{self.share:.0%} of the MLP parameters are in {len(self.blocks)} blocks{lines}"


def coverage(
    model: nn.Module,
    patterns: Sequence[BlockPattern] = (),
    where: Callable[[MLPBlock], bool] | None = None,
) -> Coverage:
    """Which MLPs of a model are found, and which are not; also of a model on the meta device.

    Args:
        model: as of `find_blocks`.
        patterns: as there.
        where: as there.

    Example:
        >>> coverage(nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 8))).left[0].pattern()
        "BlockPattern(family='mine', up='0', act='1', down='2')"
    """
    root = unwrap(model)
    found = [block for _, _, _, block in matches(root, patterns)]
    blocks = [block for block in found if where is None or where(block)]
    kept = {id(block) for block in blocks}
    excluded = [block for block in found if id(block) not in kept]
    layers, others = ([la for block in some for la in block.layers] for some in (blocks, excluded))
    left = candidates(root, [*layers, *others])
    return Coverage(blocks, left, share_of(layers, left, others), excluded)


def nothing_found(
    root: nn.Module, patterns: Sequence[BlockPattern], left: Sequence[Candidate]
) -> str:
    """The message where no pattern matches: the candidates, and the patterns to type."""
    own = "".join(f"\n  your pattern {one.family!r}: {_missing(root, one)}" for one in patterns)
    if own:
        own = f" None of your patterns matched:{own}"
    found = f"no MLP block found in {type(root).__name__}.{own}"
    if not left:
        return (
            f"{found}\nNothing in it looks like an MLP: a linear layer D → F and one F → D, with"
            " F > D, in one module or in two of one module. If it has one, name it:\n"
            "  find_blocks(model, patterns=[BlockPattern(family='mine', up='fc_in', act='act',"
            " down='fc_out')])"
        )
    return (
        f"{found}\nThese look like MLPs:\n{listed(left)}\n"
        f"If they are, find_blocks(model, patterns=[...]) with\n{listed(left, Candidate.pattern)}\n"
        "and norm='...', the path of the norm whose output it reads, for RestrictedNorm."
    )


def _missing(root: nn.Module, pattern: BlockPattern) -> str:
    """Why a pattern matches nowhere: the part that the owner which has most of them lacks."""
    paths = pattern.paths()
    best, name = max(
        (
            (sum(slot_at(owner, path) is not None for path in paths), -depth, name)
            for depth, (name, owner) in enumerate(root.named_modules())
        ),
    )[::2]
    owner = root.get_submodule(name)
    where = name or "the model itself"
    if best == 0:
        return f"no module has any of {', '.join(paths)}"
    lacking = [path for path in paths if slot_at(owner, path) is None]
    if lacking:
        return f"{where} has no {', '.join(lacking)}"
    if pattern.when is not None and not pattern.when(owner):
        return f"{where} has all parts, but `when` says no"
    shapes = {
        path: linear_shape(part_at(owner, path))
        for path in (pattern.gate_up or pattern.up, pattern.down)
    }
    return f"in {where}, up and down are no D → F and F → D: {shapes}"
