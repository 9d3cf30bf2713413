"""The calls of one block on a CUDA device, and the choice of their way.

Outside of a capture a call runs dense. The first ones, and one in `EVERY` after that, also count:
how many entries are active, and how many the screen would leave. The numbers come by themselves
(`steppe.ops.arrival`), so no call waits. In eager Python the other calls run the block's own
modules; such calls are looked at no further than to see that no weight has changed.

While a graph is captured, the numbers that have arrived decide, once for all replays: dense, the
kernels without a screen, or with it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from steppe.ops import reference
from steppe.ops.arrival import Arrival
from steppe.ops.decoding import dense, dense_from, register
from steppe.ops.graphs.copies import Copies, State, copies_of, mixed
from steppe.ops.graphs.device import card_of, is_capturing, kernels
from steppe.ops.graphs.limits import limits_for
from steppe.ops.outcome import DENSE, SCREENED, SPARSE, Outcome, note
from steppe.ops.plan import BlockSource, Coefficients, Limits, Plan
from steppe.ops.reference import Rule, Weights, linear

EVERY = 64  # calls
OUTSIDE = "the call is not in a CUDA graph that is captured: its launches would take longer"


class GraphBlock:
    """See `steppe.ops.plan.BlockKernels`, and `steppe.ops.decoding.Decoder`.

    Args:
        shape: D and F.
        limits: of all calls.
    """

    def __init__(self, shape: tuple[int, int], limits: Limits) -> None:
        self._shape, self._asked = shape, limits
        self._state: State | None = None
        self._copies: Copies | None = None
        self._unkept = ""  # why there are no copies
        self._is_kept = False  # whether a graph was captured with the copies
        self._limits = Plan()
        self._active, self._candidates = Arrival(), Arrival()
        self._tried: set[tuple[int, torch.dtype]] = set()  # calls that the kernels are compiled for
        self._calls = 0
        self._captured = ""  # how the last captured call ran

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
        flat = x.view(-1, self._shape[0])
        if is_capturing():
            z = self._run_kernels(flat, coefficients)
            how, reason = self._captured, ""
        else:
            self._lay_out(source)
            z = self._count(flat, source.weights(), coefficients)
            how, reason = DENSE, self._unkept or OUTSIDE
        shares = self._active.read(), self._candidates.read()
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
        self._tried.clear()

    def in_graphs(self) -> str:
        """How the block runs in a captured graph, in words."""
        if self._captured:
            return self._captured
        return f"dense: {self._unkept}" if self._unkept else "not captured yet"

    def _holds(self) -> bool:
        return self._state is not None and self._state.holds()

    def _counts(self, rows: int, dtype: torch.dtype) -> bool:
        """Whether a call counts its entries, which also makes the copies and tries the kernels."""
        self._calls += 1
        if not self._holds():
            return True
        return not self._unkept and (
            math.isnan(self._active.read())
            or (rows, dtype) not in self._tried
            or self._calls % EVERY == 0
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
            self._limits = limits_for(self._shape[0], dtype, card_of(device), self._asked)
            self._unkept = self._limits.reason
        if not self._unkept:
            self._copies = copies_of(weights, self._limits.max_candidates > 0.0)

    def _count(self, x: Tensor, weights: Weights, coefficients: Coefficients) -> Tensor:
        """The output, dense; the numbers of active entries and of candidates go on their way."""
        p = linear(x, weights.activated, weights.activated_bias)
        self._active.send((~(p <= 0.0)).any(0).sum() / p.shape[1])
        copies = self._copies
        if copies is not None and copies.weight.dtype == x.dtype:
            x = aligned(x)
            if (len(x), x.dtype) not in self._tried:
                # What a kernel needs is compiled when it runs first, which no capture allows.
                alpha, beta, _ = coefficients
                for screen in {None: None, id(copies.screen): copies.screen}.values():
                    kernels().decode_token(x, *copies[:4], screen, alpha, beta)
                self._tried.add((len(x), x.dtype))
            if copies.screen is not None:
                self._candidates.send(candidates_of(x, copies))
        return dense_from(p, weights, coefficients)

    def _why_dense(self, rows: int, dtype: torch.dtype) -> str:
        """Why a call that is captured runs dense, which is noted; empty if it may not."""
        reason = self._unkept or self._unready(rows, dtype)
        if not reason:
            density, most = self._active.read(), self._limits.max_density
            if density > most:
                reason = f"{density:.1%} of the entries are active, and it pays up to {most:.1%}"
            elif math.isnan(density) and most < 1.0:
                reason = "the number of active entries had not arrived: capture it once more"
        if reason:
            self._captured = f"dense: {reason}"
        return reason

    def _unready(self, rows: int, dtype: torch.dtype) -> str:
        if not self._holds():
            return "no call came before the capture, or a weight has changed since"
        if (rows, dtype) not in self._tried:
            return f"no call of {rows} tokens in {dtype} came before the capture"
        return ""

    @property
    def _way(self) -> str:
        """How the kernels run."""
        has_screen = self._copies is not None and self._copies.screen is not None
        few = self._candidates.read() <= self._limits.max_candidates
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
        self._captured = self._way
        screen = copies.screen if self._captured == SCREENED else None
        z: Tensor = kernels().decode_token(aligned(x), *copies[:4], screen, alpha, beta)
        return z


def aligned(x: Tensor) -> Tensor:
    """A tensor, contiguous and at an address for which the kernels were compiled.

    Triton compiles a kernel again for an address that is no multiple of 16 bytes.
    """
    x = x.contiguous()
    return x.clone() if x.data_ptr() % 16 else x


def candidates_of(x: Tensor, copies: Copies) -> Tensor:
    """The share of units that the screen leaves, 0-dim: with an infinite bias all are active."""
    decode = kernels()
    bias = torch.full_like(copies.bias, math.inf)
    config = decode.config_of(x.shape[1], True)
    with torch.cuda.device_of(x):
        lists = decode.launch_find(x, copies.weight, bias, copies.screen, (1.0, 0.0), config)
    share: Tensor = lists.counts.sum() / len(bias)
    return share
