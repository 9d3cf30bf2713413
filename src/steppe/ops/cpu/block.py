"""The calls of one block on the CPU: the plan of each, and the layout that decoding reuses.

A decoding step takes tens of microseconds, and to check everything that it depends on would take as
long again. So the first step checks all of it and notes what it saw: `_Step`. While the parameters
are the same objects at the same addresses, and the input, the mode and the number of threads are as
they were, the next step repeats the native call with another input (`is_again`, `run_again`).
"""

from __future__ import annotations

import math
import operator
from collections import defaultdict
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from steppe.ops.cpu import native_ops
from steppe.ops.cpu.back_off import BackOff
from steppe.ops.cpu.calls import DECODE_ROWS
from steppe.ops.cpu.copies import marks_of, why_not_cached
from steppe.ops.cpu.decode import DecodeBlock, DecodeCall, why_not_laid_out
from steppe.ops.cpu.dispatch import generation
from steppe.ops.cpu.memory import scratch
from steppe.ops.cpu.product_kernels import runs
from steppe.ops.cpu.scalar import read_scalar
from steppe.ops.cpu.team import threads
from steppe.ops.outcome import Outcome, noted
from steppe.ops.plan import BlockSource, Coefficients, Limits, Plan, Shape
from steppe.ops.reference import Rule, Weights, mlp_from


class _Step(NamedTuple):
    """A decoding step that ran sparse, and what has to be the same for the next one."""

    call: DecodeCall
    few: DecodeBlock
    dtype: torch.dtype
    shape: torch.Size  # of the input
    back_offs: tuple[BackOff, BackOff]  # of the block's density, and of its screen
    context: tuple[int, int]  # number of threads, generation of the thresholds


class CpuBlock:
    """See `steppe.ops.plan.BlockKernels`.

    Args:
        shape: of the block.
        limits: of all calls.
    """

    def __init__(self, shape: Shape, limits: Limits) -> None:
        self._shape, self._limits = shape, limits
        self._few: DecodeBlock | None = None
        self._last: _Step | None = None
        self._repeated: DecodeCall | None = None  # the last call that may be repeated
        self._unkept = ""  # why the block cannot be laid out for decoding
        self._parameters: list[tuple[dict[str, Any], str, Tensor | None]] = []
        self._back_offs: defaultdict[float, BackOff] = defaultdict(BackOff)  # by threshold

    def is_again(self, x: Tensor) -> bool:
        """Whether a call is a decoding step like the last one, which was checked in full.

        Nothing is checked twice here, and no function is called that can be avoided: between two
        steps the caches are full of weights, so the code of each function comes from memory.
        """
        last = self._last
        if (
            last is None
            or type(x) is not Tensor
            or not x.is_cpu
            or x.dtype is not last.dtype
            or x.shape != last.shape
            or not x.is_contiguous()
            or torch.is_grad_enabled()
            or torch.is_autocast_enabled("cpu")
            or torch._C._is_tracing()
            or torch._C._functorch.peek_interpreter_stack() is not None
            or forward_ad._current_level >= 0
            or last.context != (threads(), generation())
        ):
            return False
        for back_off in last.back_offs:
            if not back_off.held:
                return False
        for held, name, parameter in self._parameters:
            if held.get(name) is not parameter:
                return False
        for weight, address in last.few.addresses:
            if weight.data_ptr() != address:
                return False
        return not last.few.versions or last.few.holds()

    def run_again(self, x: Tensor) -> Tensor | None:
        """The output of such a call; None if it ended another way than the last one."""
        last = self._last
        if last is None:
            return None
        call, z = last.call, torch.empty_like(x)
        told = call.function(call.reference, x.data_ptr(), None, None, z.data_ptr())
        if 0 <= told < call.end:
            call.told = told
            call.times += 1
            return z
        self._last = None
        return None

    def take_repeated(self) -> tuple[Outcome, int] | None:
        """How the calls of `run_again` ran since the last time, and their number; None for 0."""
        call = self._repeated
        if call is None or not call.times:
            return None
        times, call.times = call.times, 0
        return call.outcome(), times

    def plan_and_count(self, rows: int, dtype: torch.dtype, trains: bool) -> Plan:
        """The plan of a call, which counts in the back-off: a block that was too dense waits."""
        plan = native_ops.plan_for(rows, self._shape.width, dtype, trains, self._limits)
        if not plan.is_measured:
            return plan
        is_decoding = rows <= DECODE_ROWS and not trains
        if self._unkept and is_decoding and self._are_the_same():
            return Plan(self._unkept)
        most = plan.max_density
        if most <= 0.0:
            return Plan(f"at {rows} tokens no density gains")
        if not trains and self._back_offs[most].limit_and_count(most) <= 0.0:
            return Plan("the last calls were too dense")
        return plan

    def decode(
        self,
        x: Tensor,
        source: BlockSource,
        coefficients: Coefficients,
        plan: Plan,
        may_repeat: bool,
    ) -> Tensor | None:
        """The output of a decoding call; None if the block is not laid out, or has changed."""
        few = self._few
        if few is None or not self._are_the_same() or not few.holds():
            self._last = None
            few = self._few = self._lay_out(x, source)
        if few is None or x.dtype != few.weights.down.dtype or plan.max_density <= 0.0:
            return None
        width, hidden, _ = self._shape
        rows = x.numel() // width
        alpha, beta, mix = coefficients
        if mix is not None:
            beta *= read_scalar(mix)
        self._last = None
        share = few.screen_limit_and_count(plan.max_candidates)
        call = DecodeCall(few, rows, (alpha, beta), plan.max_density, share)
        z = torch.empty_like(x)
        r = scratch("r", (rows, hidden), x)
        up_values = r if few.weights.up is None else scratch("up", (rows, hidden), x)
        done = call.run(x, (z, r, up_values))
        if done is None:
            self._few = None
            return None
        back_off = self._back_offs[plan.max_density] if plan.is_measured else BackOff()
        if back_off.held is not done:
            back_off.record(math.nan, done)
        if not done:
            flat = x.view(-1, width)
            return mlp_from(r, flat, few.weights, Rule(alpha, beta, 0.0))[0].view_as(x)
        if may_repeat:
            of_screen = BackOff() if few.back_off is None else few.back_off
            context = threads(), generation()
            self._last = _Step(call, few, x.dtype, x.shape, (back_off, of_screen), context)
            self._repeated = call
        return z

    def mlp(
        self,
        x: Tensor,
        weights: Weights,
        coefficients: Coefficients,
        dropout: float,
        plan: Plan,
    ) -> tuple[Tensor, Sequence[Tensor]]:
        """Z and `saved` without gradients and without the dispatcher; records its density."""
        rule = native_ops.rule_of(*coefficients, dropout)
        z, saved = native_ops.compute(x, weights, rule, plan, trains=False)
        if plan.is_measured and len(x) > DECODE_ROWS:
            outcome = noted()
            is_too_dense = outcome is not None and outcome.is_too_dense
            if saved.is_sparse or is_too_dense:  # no first call, before anything is cached
                self._back_offs[plan.max_density].record(math.nan, not is_too_dense)
        return z, saved

    def forget(self) -> None:
        """Free the layout for decoding."""
        self._few = self._last = self._repeated = None
        self._parameters = []

    def prepare(self, source: BlockSource, number: int) -> str:
        """Nothing: compiled calls take the ops, which have kernels of their own."""
        return ""

    def in_graphs(self) -> str:
        """Empty: the CPU has no such graphs."""
        return ""

    def _are_the_same(self) -> bool:
        """Whether the block's parameters are those of the last call."""
        for held, name, parameter in self._parameters:
            if held.get(name) is not parameter:
                return False
        return bool(self._parameters)

    def _lay_out(self, x: Tensor, source: BlockSource) -> DecodeBlock | None:
        """The block laid out for decoding, if its parameters are those of the last call."""
        if not self._are_the_same():
            self._unkept = ""
            self._parameters = [
                (held, name, held.get(name)) for held, name in source.layer_parameters()
            ]
            return None
        sources = source.bias_sources()
        self._unkept = next(filter(None, map(why_not_cached, sources)), "")
        if self._unkept:
            return None
        mark = marks_of(sources)  # before the bias is computed from them
        actual = source.layer_tensors()
        known = [parameter for _, _, parameter in self._parameters]
        weights = source.weights()
        if (
            # A parametrization makes other tensors in each call.
            not all(map(operator.is_, known, actual)) or not runs(x, *weights)
        ):
            return None
        asked = self._limits.max_candidates
        limit = native_ops.screen_limit(DECODE_ROWS, self._shape.width, x.dtype, False, asked)
        self._unkept = why_not_laid_out(weights)
        if self._unkept:
            return None
        return DecodeBlock(weights, screens=limit > 0.0, stays=True, derived=(sources, mark))
