"""`explain`: how each routed block ran last, and why."""

from __future__ import annotations

import io
import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from torch import nn

from steppe.acceleration.accelerate import acceleration_of
from steppe.acceleration.computation import NOT_ASKED, Computation
from steppe.blocks.linear import linear_weight
from steppe.errors import AccelerationError
from steppe.ops.backend import backend_of
from steppe.ops.cpu.library import Kernels, kernels
from steppe.ops.cpu.writes import unseen
from steppe.ops.outcome import PACKED, SCREENED, SPARSE, Outcome
from steppe.ops.plan import Plan
from steppe.routing.route import Route

if TYPE_CHECKING:
    from steppe.tables import FittingTable

NEVER = "not yet"
_ASKED = "accelerate_'s argument"
_WIDE = 200  # columns of the text, where no terminal says how many


@dataclass(frozen=True)
class BlockExplanation:
    """How one block ran last.

    Attributes:
        name: of the block.
        how: ``sparse``, ``screened`` (sparse, its first product screened), ``dense`` (the kernels
            found too many active entries), ``packed`` (dense products, activations packed for the
            backward pass), ``own modules`` (dense, as without steppe), ``not yet``.
        calls: number of calls since `accelerate_`, by how they ran.
        is_few: whether the call was decoding: few tokens, the block in one kernel.
        trains: whether a backward pass could follow.
        tokens: number of tokens of the call.
        density: share of the hidden entries that were active; NaN where they were not counted. Of
            a packed block on a GPU that of an earlier call, as nothing waits for it. In a CUDA
            graph the share of units that were active for any token.
        candidates: share that the int8 product could not rule out; NaN where it was not used.
        max_density: highest density at which a call like the last one runs sparse.
        max_candidates: highest share of candidates at which its first product is screened.
        source: where these two limits come from.
        reason: why it did not run sparse; empty if it did.
        unpacked: why calls that train do not pack its activations; empty if they do.
        in_graphs: how it runs in a captured CUDA graph: ``sparse``, ``screened``, ``dense: `` and
            why, ``not captured yet``; empty off CUDA devices. Of the last capture, also of one in
            compiled code; by number of tokens where they differ.
    """

    name: str
    how: str
    calls: dict[str, int]
    is_few: bool
    trains: bool
    tokens: int
    density: float
    candidates: float
    max_density: float
    max_candidates: float
    source: str
    reason: str
    unpacked: str = ""
    in_graphs: str = ""

    @property
    def is_sparse(self) -> bool:
        """Whether it ran on the sparse kernels."""
        return self.how in (SPARSE, SCREENED)


@dataclass(frozen=True)
class Explanation:
    """How an accelerated model's blocks ran last; prints as a table.

    Attributes:
        blocks: in forward order.
        kernels: the kernels of this machine.
        unwatched: why copies are kept only of final weights; empty where writes to a weight are
            seen.
    """

    blocks: tuple[BlockExplanation, ...]
    kernels: Kernels = field(repr=False)
    unwatched: str = field(repr=False)

    def __rich__(self) -> FittingTable:
        """The table."""
        from steppe.tables import FittingTable  # Rich takes longer to load than all of steppe

        table = FittingTable("How each block ran last", self._caption())
        table.add_texts("block", "ran")
        table.add_numbers("calls", "tokens", "density", "up to", "candidates", "up to")
        table.add_texts("why not sparse")
        has_graphs = any(block.in_graphs for block in self.blocks)
        if has_graphs:
            table.add_texts("in a CUDA graph")
        for block in self.blocks:
            few = ", few tokens" if block.is_few else ""
            table.add_row(
                block.name,
                block.how + few,
                f"{block.calls.get(block.how, 0)} of {sum(block.calls.values())}",
                str(block.tokens) if block.how != NEVER else "",
                *map(
                    _percent,
                    (
                        block.density,
                        block.max_density,
                        block.candidates,
                        block.max_candidates,
                    ),
                ),
                block.reason,
                *([block.in_graphs] if has_graphs else []),
            )
        return table

    def __str__(self) -> str:
        """The table as text."""
        from rich.console import Console

        text = io.StringIO()
        Console(file=text, width=_WIDE).print(self)
        return text.getvalue()

    def _caption(self) -> str:
        lines = [f"kernels: {self.kernels.isa or self.kernels.reason}"]
        if self.kernels.unscreened and self.kernels.isa:
            lines.append(f"no first product is screened: {self.kernels.unscreened}")
        if self.unwatched and self.kernels.isa:
            lines.append(f"copies of final weights only: {self.unwatched}")
        unpacked = {block.unpacked for block in self.blocks} - {"", NOT_ASKED}
        lines += [f"not packed: {reason}" for reason in sorted(unpacked)]
        lines += [f"limits: {source}" for source in sorted({b.source for b in self.blocks})]
        return "\n".join(lines)


def explain(model: nn.Module) -> Explanation:
    """How each block of an accelerated model ran last: sparse or dense, at which density, and why.

    Args:
        model: a model that `accelerate_` has changed; wrappers are seen through.

    Returns:
        A row for each block that is routed. Compiled code decides by itself and is not seen here,
        but for what a block does in a captured CUDA graph.

    Raises:
        AccelerationError: the model is not accelerated.

    Example:
        >>> from steppe import accelerate_
        >>> layer = nn.TransformerEncoderLayer(8, 2, 32, dropout=0.0, batch_first=True)
        >>> _ = accelerate_(layer)
        >>> explain(layer).blocks[0].how
        'not yet'
    """
    acceleration = acceleration_of(model)
    if acceleration is None:
        raise AccelerationError(
            f"explain: {type(model).__name__} is not accelerated. First: steppe.accelerate_(model)"
        )
    return Explanation(
        blocks=tuple(map(_explain, acceleration.routes)), kernels=kernels(), unwatched=unseen()
    )


def _explain(route: Route) -> BlockExplanation:
    """How one block ran last."""
    block = route.block
    never = Outcome(NEVER, 0, reason=route.foreign() or "no call since accelerate_")
    last = route.last or never
    computation = route.computation
    assert isinstance(computation, Computation)
    asked = computation.limits
    dtype = linear_weight(block.down).dtype
    backend = backend_of(linear_weight(block.down))
    limits = Plan()
    if backend is not None:
        limits = backend.limits(last.rows, computation.shape, dtype, last.trains, asked)
    has_limits = last.how not in (NEVER, PACKED)
    sources = [_ASKED] if asked[0] is not None else []
    if None in asked and backend is not None:
        sources.append(backend.source(dtype))
    return BlockExplanation(
        name=block.name,
        how=last.how,
        calls=dict(route.calls),
        is_few=last.is_few,
        trains=last.trains,
        tokens=last.rows,
        density=last.density,
        candidates=last.candidates,
        max_density=limits.max_density if has_limits else math.nan,
        max_candidates=limits.max_candidates if has_limits else math.nan,
        source=", ".join(sources),
        reason=last.reason,
        unpacked=computation.why_not_packed(linear_weight(block.down)),
        in_graphs=computation.in_graphs(last.rows),
    )


def _percent(share: float) -> str:
    return "" if math.isnan(share) else f"{share:.1%}"
