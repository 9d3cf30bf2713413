"""What a backend offers for MLP blocks: a plan for each call, and the kernels that follow it."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from steppe.ops.outcome import Outcome
from steppe.ops.reference import Weights

Coefficients = tuple[float, float, Tensor | None]  # α, β, and what β is multiplied by


class Limits(NamedTuple):
    """Up to which shares the sparse kernels run, as the user wants it; None: as measured.

    Attributes:
        max_density: of the entries that may be active.
        max_candidates: of the entries that the screen may leave; 0 for no screen.
    """

    max_density: float | None = None
    max_candidates: float | None = None


class Plan(NamedTuple):
    """How one call of a block runs; decided once, by the first of its modules that is called.

    Attributes:
        reason: why the block's own modules run; empty if the kernels do.
        max_density: the sparse kernels run up to this density, in [0, 1].
        max_candidates: the first product is screened up to this share of candidates; 0 for never.
        is_measured: whether `max_density` is the machine's and not the user's.
        screen_is_measured: whether `max_candidates` is.
    """

    reason: str = ""
    max_density: float = 0.0
    max_candidates: float = 0.0
    is_measured: bool = False
    screen_is_measured: bool = False


class BlockSource(Protocol):
    """What a backend asks of a block whose weights it lays out for decoding."""

    def layer_parameters(self) -> Sequence[tuple[dict[str, Any], str]]:
        """Where the parameters of its layers are: the dict that holds each, and its name there."""

    def layer_tensors(self) -> Sequence[Tensor | None]:
        """What the layers compute with now, in the same order."""

    def bias_sources(self) -> list[Tensor]:
        """What the bias of the activated layer is made of, where it is not the layer's own."""

    def weights(self) -> Weights:
        """What the kernels compute with now."""


class BlockKernels(Protocol):
    """The calls of one block on one device."""

    def is_again(self, x: Tensor) -> bool:
        """Whether a call is a decoding step like the last one, of which all was looked at."""

    def run_again(self, x: Tensor) -> Tensor | None:
        """The output of such a call; None where it did not end as the last one."""

    def take_repeated(self) -> tuple[Outcome, int] | None:
        """How the calls of `run_again` ran since this was asked, and their number; None for 0."""

    def plan_and_count(self, rows: int, dtype: torch.dtype, trains: bool) -> Plan:
        """The plan of a call; counts it as one, while the block waits for its next try."""

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
            may_repeat: whether the next call may be like this one: all that it goes by is looked at
                in `is_again`.

        Returns:
            ``[*, D]``; None where the block is not laid out, or has changed.
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
        """Free what is kept between calls, but for copies of weights."""


class Backend(Protocol):
    """What a kind of device offers."""

    @property
    def name(self) -> str:
        """Of the device, as torch has it."""

    @property
    def dtypes(self) -> Collection[torch.dtype]:
        """Those that it has kernels for."""

    @property
    def decode_rows(self) -> int:
        """The most tokens that `BlockKernels.decode` takes."""

    def reason(self) -> str:
        """Why there are no kernels; empty if there are."""

    def block(self, shape: tuple[int, int], limits: Limits) -> BlockKernels:
        """The kernels of a block.

        Args:
            shape: D and F.
            limits: of all its calls.
        """

    def has_too_little(self, rows: int, shape: tuple[int, int]) -> bool:
        """Whether so few tokens have too little to do for the way to the kernels to pay.

        Args:
            rows: number of tokens.
            shape: D and F.
        """

    def prepare(self, dtype: torch.dtype) -> None:
        """Read what was measured on this machine for blocks of a dtype."""

    def declare_final(self, weight: Tensor) -> None:
        """Take it that nobody writes to a weight past PyTorch's version counter."""

    def forget(self, weight: Tensor) -> None:
        """Free the copies of a weight, which is then no longer final."""

    def limits(
        self, rows: int, width: int, dtype: torch.dtype, trains: bool, asked: Limits
    ) -> Plan:
        """The limits that hold for such calls; changes and counts nothing."""

    def source(self, dtype: torch.dtype) -> str:
        """Where the measured limits come from."""
