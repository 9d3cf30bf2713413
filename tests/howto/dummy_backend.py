"""A backend in miniature: it computes each block by the definition, in plain torch.

The whole errand for a new device: a package like this beside ``ops/cpu``, and one line in
``ops/backend.py``. Models, plug-ins and measures ask `backend_of(tensor)` and know no device.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from steppe.ops import reference
from steppe.ops.outcome import SPARSE, Outcome, note
from steppe.ops.plan import BlockSource, Coefficients, Limits, Plan, Shape
from steppe.ops.reference import Rule, Weights


class PlainBlock:
    """The calls of one block; a `steppe.ops.plan.BlockKernels`."""

    def __init__(self) -> None:
        self.calls = 0

    def is_again(self, x: Tensor) -> bool:
        return False  # no call is repeated without a look at all that it depends on

    def run_again(self, x: Tensor) -> Tensor | None:
        return None

    def take_repeated(self) -> tuple[Outcome, int] | None:
        return None

    def plan_and_count(self, rows: int, dtype: torch.dtype, trains: bool) -> Plan:
        self.calls += 1
        return Plan("its backward pass is not written yet" if trains else "", max_density=1.0)

    def decode(
        self,
        x: Tensor,
        source: BlockSource,
        coefficients: Coefficients,
        plan: Plan,
        may_repeat: bool,
    ) -> Tensor | None:
        return None  # no kernel of its own for few tokens: `mlp` has them too

    def mlp(
        self,
        x: Tensor,
        weights: Weights,
        coefficients: Coefficients,
        dropout: float,
        plan: Plan,
    ) -> tuple[Tensor, Sequence[Tensor]]:
        alpha, beta, mix = coefficients
        rule = Rule(alpha, beta if mix is None else beta * float(mix), dropout)
        z, r, up, kept = reference.mlp(x, weights, rule)
        density = (r != 0).double().mean().item()
        note(Outcome(SPARSE, rows=len(x), density=density))
        return z, (r, up, kept)

    def forget(self) -> None:
        pass  # it keeps nothing

    def prepare(self, source: BlockSource, number: int) -> str:
        return ""  # compiled calls take the ops of `steppe.ops.mlp`

    def in_graphs(self) -> str:
        return ""


class PlainBackend:
    """The device; a `steppe.ops.plan.Backend`."""

    name = "cpu"  # in the place of the CPU's own: the one device that every machine has
    dtypes = (torch.float32,)
    decode_rows = 0
    only_decodes = False

    def __init__(self) -> None:
        self.blocks: list[PlainBlock] = []

    def reason(self) -> str:
        return ""

    def block(self, shape: Shape, limits: Limits) -> PlainBlock:
        self.blocks.append(PlainBlock())
        return self.blocks[-1]

    def too_little(self, rows: int, shape: Shape, asked: Limits) -> str:
        return ""

    def prepare(self, dtype: torch.dtype) -> None:
        pass  # no thresholds were measured

    def declare_final(self, weight: Tensor) -> None:
        pass  # it caches no copies of weights

    def forget(self, weight: Tensor) -> None:
        pass

    def limits(
        self, rows: int, shape: Shape, dtype: torch.dtype, trains: bool, asked: Limits
    ) -> Plan:
        return Plan(max_density=1.0)

    def source(self, dtype: torch.dtype) -> str:
        return "built-in"
