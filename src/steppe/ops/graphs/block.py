"""The calls of one block on a CUDA device, and the choice of their way.

Outside of a capture a call runs dense. The first ones, and one in `EVERY` after that, also count:
how many units are active for any token, and how many the screen would leave. The numbers come by
themselves (`steppe.ops.arrival`), so no call waits. In eager Python the other calls run the block's
own modules; such calls are looked at no further than to see that no weight has changed.

While a graph is captured, the numbers that have arrived decide, once for all replays: dense, the
kernels without a screen, or with it. Calls of another number of tokens have numbers of their own,
as more tokens have more units active.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from steppe.ops import reference
from steppe.ops.arrival import Arrival
from steppe.ops.decoding import dense, dense_from, register
from steppe.ops.graphs.copies import Copies, State, copies_of, mixed
from steppe.ops.graphs.device import card_of, is_capturing
from steppe.ops.graphs.limits import CARD, limits_for
from steppe.ops.outcome import DENSE, SCREENED, SPARSE, Outcome, note
from steppe.ops.plan import BlockSource, Coefficients, Limits, Plan, Shape
from steppe.ops.reference import Rule, Weights, linear

EVERY = 64  # calls
OUTSIDE = "the call is not in a CUDA graph that is captured: its launches would take longer"


@dataclass
class Counted:
    """What is known of the calls of one number of tokens.

    Attributes:
        active: the share of units that were active for any token.
        candidates: the share that the screen would leave.
        calls: their number.
        tried: the dtypes that the kernels are compiled for.
        captured: how the last captured one ran, in words; empty for none.
    """

    active: Arrival = field(default_factory=Arrival)
    candidates: Arrival = field(default_factory=Arrival)
    calls: int = 0
    tried: set[torch.dtype] = field(default_factory=set)
    captured: str = ""


class GraphBlock:
    """See `steppe.ops.plan.BlockKernels`, and `steppe.ops.decoding.Decoder`.

    Args:
        shape: of the block.
        limits: of all calls.
    """

    def __init__(self, shape: Shape, limits: Limits) -> None:
        self._shape, self._asked = shape, limits
        self._state: State | None = None
        self._copies: Copies | None = None
        self._unkept = ""  # why there are no copies
        self._is_kept = False  # whether a graph was captured with the copies
        self._card = CARD
        # By number of tokens, `MOST_TOKENS` at most.
        self._counted: defaultdict[int, Counted] = defaultdict(Counted)

    def is_again(self, x: Tensor) -> bool:
        """No call is repeated without a look at what it depends on."""
        return False

    def run_again(self, x: Tensor) -> Tensor | None:
        """None, as there is no such call."""
        return None

    def take_repeated(self) -> tuple[Outcome, int] | None:
        """None, as well."""
        return None

    def plan_and_count(self, rows: int, dtype: torch.dtype, trains: bool) -> Plan:
        """The plan of an eager call: the kernels in a capture, a count at times, or a reason."""
        if is_capturing():
            return Plan(self._why_dense(rows, dtype))
        return Plan("" if self._counts(rows, dtype) else self._unkept or OUTSIDE)

    def decode(
        self,
        x: Tensor,
        source: BlockSource,
        coefficients: Coefficients,
        plan: Plan,
        may_repeat: bool,
    ) -> Tensor | None:
        """The output of such a call: by the kernels in a capture, else dense and counted."""
        flat = x.view(-1, self._shape.width)
        if is_capturing():
            z = self._run_kernels(flat, coefficients)
            how, reason = self._counted[len(flat)].captured, ""
        else:
            self._lay_out(source)
            z = self._count(flat, source.weights(), coefficients)
            how, reason = DENSE, self._unkept or OUTSIDE
        counted = self._counted[len(flat)]
        shares = counted.active.read(), counted.candidates.read()
        note(Outcome(how, len(flat), *shares, is_few=True, reason=reason))
        return z.view_as(x)

    def mlp(
        self,
        x: Tensor,
        weights: Weights,
        coefficients: Coefficients,
        dropout: float,
        plan: Plan,
    ) -> tuple[Tensor, Sequence[Tensor]]:
        """The definition, dense: the kernels only decode."""
        alpha, beta, mix = coefficients
        rule = Rule(alpha, beta if mix is None else beta * mix, dropout)
        z, *saved = reference.mlp(x, weights, rule)
        note(Outcome(DENSE, len(x), reason="the kernels only decode"))
        return z, saved

    def prepare(self, source: BlockSource, number: int) -> str:
        """Copy the weights for calls in compiled code, which could not.

        A compiler may run its code in memory of its own before it captures it, and insists that
        nothing stays there.

        Args:
            source: of the weights.
            number: of the block in the ops.

        Returns:
            Why there are no copies; empty if there are.
        """
        if is_capturing():
            return "it was compiled in a capture"
        self._lay_out(source)
        register(number, self)
        return self._unkept

    def run(self, x: Tensor, weights: Weights, coefficients: Coefficients) -> Tensor:
        """The output of a call in compiled code."""
        if is_capturing():
            if not self._why_dense(len(x), x.dtype):
                return self._run_kernels(x, coefficients)
        elif self._counts(len(x), x.dtype):
            return self._count(x, weights, coefficients)
        return dense(x, weights, coefficients)

    def forget(self) -> None:
        """Free the copies; those that a graph was captured with stay as long as the weights."""
        self._state = self._copies = None
        for counted in self._counted.values():
            counted.tried.clear()

    def in_graphs(self) -> str:
        """How the block runs in a captured graph, in words."""
        captured = {rows: one.captured for rows, one in self._counted.items() if one.captured}
        if not captured:
            return f"dense: {self._unkept}" if self._unkept else ""
        ways = set(captured.values())
        if len(ways) == 1:
            return ways.pop()
        return "; ".join(
            f"{rows} token{'s' * (rows > 1)}: {way}" for rows, way in sorted(captured.items())
        )

    def _holds(self) -> bool:
        return self._state is not None and self._state.holds()

    def _counts(self, rows: int, dtype: torch.dtype) -> bool:
        """Whether a call counts its entries, which also makes the copies and tries the kernels."""
        counted = self._counted[rows]
        counted.calls += 1
        if not self._holds():
            return True
        return not self._unkept and (
            math.isnan(counted.active.read())
            or dtype not in counted.tried
            or counted.calls % EVERY == 0
        )

    def _lay_out(self, source: BlockSource) -> None:
        """Copy the weights, unless there are copies of what they are."""
        if self._holds():
            return
        self.forget()
        self._is_kept = False
        self._state = State(source)  # before the weights are read
        weights = source.weights()
        dtype, device = weights.activated.dtype, weights.activated.device
        self._unkept = self._state.unfit() or mixed(weights)
        if not self._unkept:
            self._card = card_of(device)
            limits = self._limits(1, dtype)  # which screen if any do
            self._unkept = limits.reason
        if not self._unkept:
            self._copies = copies_of(weights, limits.max_candidates > 0.0)

    def _limits(self, rows: int, dtype: torch.dtype) -> Plan:
        """Those of calls on the card that the block is on."""
        return limits_for(rows, self._shape, dtype, self._card, self._asked)

    def _count(self, x: Tensor, weights: Weights, coefficients: Coefficients) -> Tensor:
        """The output, dense; the numbers of active entries and of candidates go on their way."""
        counted = self._counted[len(x)]
        p = linear(x, weights.activated, weights.activated_bias)
        counted.active.send((~(p <= 0.0)).any(0).sum() / p.shape[1])
        copies = self._copies
        if copies is not None and copies.weight.dtype == x.dtype:
            x = aligned(x)
            if x.dtype not in counted.tried:
                # What a kernel needs is compiled when it runs first, which no capture allows.
                alpha, beta, _ = coefficients
                for screen in [None] if copies.screen is None else [None, copies.screen]:
                    copies.run(x, screen, alpha, beta)
                counted.tried.add(x.dtype)
            if copies.screen is not None:
                counted.candidates.send(copies.candidates(x))
        return dense_from(p, x, weights, coefficients)

    def _why_dense(self, rows: int, dtype: torch.dtype) -> str:
        """Why a call that is captured runs dense, which is noted; empty if it may not."""
        reason = self._unkept or self._unready(rows, dtype)
        if not reason:
            density = self._counted[rows].active.read()
            most = self._limits(rows, dtype).max_density
            if density > most:
                which = "" if rows == 1 else f" for any of {rows} tokens"
                reason = (
                    f"{density:.1%} of the units are active{which}, and it pays up to {most:.1%}"
                )
            elif math.isnan(density) and most < 1.0:
                reason = "the number of active units had not arrived: capture it once more"
        if reason:
            self._counted[rows].captured = f"dense: {reason}"
        return reason

    def _unready(self, rows: int, dtype: torch.dtype) -> str:
        if not self._holds():
            return "no call came before the capture, or a weight has changed since"
        if dtype not in self._counted[rows].tried:
            return f"no call of {rows} tokens in {dtype} came before the capture"
        return ""

    def _way(self, rows: int, dtype: torch.dtype) -> str:
        """How the kernels run."""
        most = self._limits(rows, dtype).max_candidates
        has_screen = self._copies is not None and self._copies.screen is not None and most > 0.0
        few = self._counted[rows].candidates.read() <= most
        return SCREENED if has_screen and few else SPARSE

    def _run_kernels(self, x: Tensor, coefficients: Coefficients) -> Tensor:
        """The output by the kernels, in a capture."""
        copies, state = self._copies, self._state
        assert copies is not None  # `_why_dense` has said so
        assert state is not None
        if not self._is_kept:
            self._is_kept = True
            state.keep(copies)
        alpha, beta, _ = coefficients
        self._counted[len(x)].captured = way = self._way(len(x), x.dtype)
        screen = copies.screen if way == SCREENED else None
        return copies.run(aligned(x), screen, alpha, beta)


def aligned(x: Tensor) -> Tensor:
    """A tensor, contiguous and at an address for which the kernels were compiled.

    Triton compiles a kernel again for an address that is no multiple of 16 bytes.
    """
    x = x.contiguous()
    return x.clone() if x.data_ptr() % 16 else x
