"""The interface of a backend: a plan for each call of a block, and kernels that follow it.

steppe/ops/backend.py chooses the backend; `steppe.ops.mlp` says which ops it registers kernels for.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from steppe.ops.bitmask import Packed
from steppe.ops.outcome import Outcome
from steppe.ops.reference import Weights

Coefficients = tuple[float, float, Tensor | None]  # α, β, and the factor of β or None


class Limits(NamedTuple):
    """The largest shares at which the sparse kernels run; None for those measured.

    Attributes:
        max_density: share of active entries, in [0, 1].
        max_candidates: share of entries that the screen leaves as candidates; 0 for no screen.
    """

    max_density: float | None = None
    max_candidates: float | None = None


class Shape(NamedTuple):
    """What a block computes with, apart from its numbers.

    Attributes:
        width: D.
        hidden: F.
        is_gated: whether the activation's output is multiplied by a second product.
    """

    width: int
    hidden: int
    is_gated: bool


class Plan(NamedTuple):
    """How one call of a block runs; decided once, by the first of its modules that is called.

    Attributes:
        reason: why the block's own modules run; empty if the kernels do.
        max_density: the sparse kernels run up to this density, in [0, 1].
        max_candidates: the first product is screened up to this share of candidates; 0 for never.
        is_measured: whether `max_density` is measured, and not given by the user.
        screen_is_measured: whether `max_candidates` is.
        packs: whether the products are dense, and the activations packed for the backward pass
            (`steppe.ops.packing`): the limits mean nothing then.
    """

    reason: str = ""
    max_density: float = 0.0
    max_candidates: float = 0.0
    is_measured: bool = False
    screen_is_measured: bool = False
    packs: bool = False


class BlockSource(Protocol):
    """A block as a backend sees it that lays its weights out for decoding."""

    def layer_parameters(self) -> Sequence[tuple[dict[str, Any], str]]:
        """The dict that holds each parameter of its layers, and the parameter's name there."""

    def layer_tensors(self) -> Sequence[Tensor | None]:
        """The tensors that the layers compute with now, in the same order."""

    def bias_sources(self) -> list[Tensor]:
        """The tensors that the activated bias is computed from; empty if it is the layer's own."""

    def weights(self) -> Weights:
        """The weights that the kernels compute with now."""


class BlockKernels(Protocol):
    """The calls of one block on one device."""

    def is_again(self, x: Tensor) -> bool:
        """Whether a call is a decoding step like the last one, which was checked in full."""

    def run_again(self, x: Tensor) -> Tensor | None:
        """The output of such a call; None if it ended another way than the last one."""

    def take_repeated(self) -> tuple[Outcome, int] | None:
        """How the calls of `run_again` ran since the last time, and their number; None for 0."""

    def plan_and_count(self, rows: int, dtype: torch.dtype, trains: bool) -> Plan:
        """The plan of a call, which counts in the back-off of a block that was too dense."""

    def decode(
        self,
        x: Tensor,
        source: BlockSource,
        coefficients: Coefficients,
        plan: Plan,
        may_repeat: bool,
    ) -> Tensor | None:
        """The output for few tokens, without gradients and dropout.

        Args:
            x: ``[*, D]``, contiguous, at most `decode_rows` tokens.
            source: of the weights.
            coefficients: of the activation.
            plan: of the call.
            may_repeat: whether the next call may repeat this one, since `is_again` checks all that
                the result depends on.

        Returns:
            ``[*, D]``; None if the block is not laid out, or has changed.
        """

    def mlp(
        self,
        x: Tensor,
        weights: Weights,
        coefficients: Coefficients,
        dropout: float,
        plan: Plan,
    ) -> tuple[Tensor, Sequence[Tensor]]:
        """Z and `saved`, see `steppe.ops.mlp`, without gradients and without the dispatcher."""

    def forget(self) -> None:
        """Free all that is kept between calls, except cached copies of weights."""

    def prepare(self, source: BlockSource, number: int) -> str:
        """Make ready for calls in compiled code, where only decoding has kernels.

        Args:
            source: of the weights.
            number: of the block in the ops of `steppe.ops.decoding`.

        Returns:
            Why no such call runs on the kernels; empty if some may.
        """

    def in_graphs(self) -> str:
        """How the block runs in captured CUDA graphs, in words; empty if none was captured."""


class Packer(Protocol):
    """What packs activations on a kind of device; `steppe.ops.bitmask` defines each function."""

    def act_pack(self, p: Tensor, coefficients: Tensor, capacity: int) -> tuple[Tensor, Packed]:
        """σ(p), and a pack of p."""

    def unpack_grad(
        self, grad_a: Tensor, packed: Packed, coefficients: Tensor
    ) -> tuple[Tensor, Tensor]:
        """∂ℓ/∂p and σ(p) of the rows that are kept."""

    def recompute_lost_(
        self,
        grad_p: Tensor,
        a: Tensor,
        grad_a: Tensor,
        packed: Packed,
        coefficients: Tensor,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
    ) -> None:
        """Write the other rows."""


class Backend(Protocol):
    """The kernels of a kind of device."""

    @property
    def name(self) -> str:
        """Type of the device in torch, such as ``cpu``."""

    @property
    def dtypes(self) -> Collection[torch.dtype]:
        """The dtypes that it has kernels for."""

    @property
    def decode_rows(self) -> int:
        """The most tokens that `BlockKernels.decode` takes."""

    @property
    def only_decodes(self) -> bool:
        """Whether there is only `BlockKernels.decode`, and that only for weights that are final.

        Such a backend has no kernels for the ops of `steppe.ops.mlp`; compiled calls take those of
        `steppe.ops.decoding`.
        """

    def reason(self) -> str:
        """Why there are no kernels; empty if there are."""

    def block(self, shape: Shape, limits: Limits) -> BlockKernels:
        """The kernels of a block.

        Args:
            shape: of the block.
            limits: of all its calls.
        """

    def too_little(self, rows: int, shape: Shape, asked: Limits) -> str:
        """Why a call has not the work for which the kernels pay; empty if it has, or is forced.

        Args:
            rows: number of tokens.
            shape: of the block.
            asked: the limits that the user has given.
        """

    def prepare(self, dtype: torch.dtype) -> None:
        """Read the thresholds that were measured on this machine for blocks of a dtype."""

    def declare_final(self, weight: Tensor) -> None:
        """Take it that nobody writes to a weight past PyTorch's version counter."""

    def forget(self, weight: Tensor) -> None:
        """Free the cached copies of a weight, which is then no longer final."""

    def limits(
        self, rows: int, shape: Shape, dtype: torch.dtype, trains: bool, asked: Limits
    ) -> Plan:
        """The limits that hold for such calls; changes nothing and counts nothing."""

    def source(self, dtype: torch.dtype) -> str:
        """Where the measured limits come from."""
