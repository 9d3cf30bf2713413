"""The cases that are timed, the block of a case, and the settings that `steppe bench` takes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from steppe.blocks.patterns import BlockPattern

DENSITIES = (0.9, 0.5, 0.1, 0.05, 0.03, 0.01)


@dataclass(frozen=True)
class Case:
    """A use of a block: training, prefill or decode.

    Attributes:
        name: as in tables.
        trains: whether a call is a forward and a backward pass.
        is_cold: whether the weights come from memory and not from a cache.
        products: number of matrix products; all but the first get sparse.
    """

    name: str
    trains: bool
    is_cold: bool
    products: int

    def bound(self, density: float) -> float:
        """By how much sparse arithmetic can be faster: n / (1 + (n − 1) ρ) for n products.

        Args:
            density: ρ, in [0, 1].

        Returns:
            Dense time / sparse time, if a product took a time in proportion to its density and
            nothing else took any. It holds against a dense block with the same first product.

        Example:
            >>> [case.bound(0.5) for case in (TRAINING, PREFILL)]
            [1.7142857142857142, 1.3333333333333333]
        """
        return self.products / (1.0 + (self.products - 1) * density)


TRAINING = Case("training", trains=True, is_cold=False, products=6)
PREFILL = Case("prefill", trains=False, is_cold=False, products=2)
DECODE = Case("decode", trains=False, is_cold=True, products=2)


@dataclass(frozen=True)
class Setting:
    """A block and a case to time.

    Attributes:
        case: the use.
        density: share of the hidden entries that are active, in [0, 1].
        d_model: D.
        d_hidden: F, other than D.
        tokens: T, in one call.
        dtype: of weights and inputs.
        threads: of torch and of the kernels.
        outliers: how many features of the input are 15 times as large as the others.
    """

    case: Case
    density: float
    d_model: int = 768
    d_hidden: int = 3072
    tokens: int = 1024
    dtype: torch.dtype = torch.float32
    threads: int = 1
    outliers: int = 0

    def __post_init__(self) -> None:
        if not 0.0 <= self.density <= 1.0:
            raise ValueError(f"Setting: expected a density in 0 … 1, got {self.density}")
        for name in ("d_model", "d_hidden", "tokens", "threads"):
            if getattr(self, name) < 1:
                raise ValueError(f"Setting: expected {name} ≥ 1, got {getattr(self, name)}")


class Block(nn.Module):
    """An MLP block with biases, alone.

    Args:
        d_model: D.
        d_hidden: F.
        act: the activation; ReLU by default.
        gated: whether the activated layer is a third one, `gate`.
    """

    def __init__(
        self, d_model: int, d_hidden: int, act: nn.Module | None = None, gated: bool = False
    ) -> None:
        super().__init__()
        self.gate = nn.Linear(d_model, d_hidden) if gated else None
        self.up = nn.Linear(d_model, d_hidden)
        self.act = nn.ReLU() if act is None else act
        self.down = nn.Linear(d_hidden, d_model)

    def hidden(self, x: Tensor) -> Tensor:
        """a, ``[T, F]``."""
        return self.act(self.up(x)) if self.gate is None else self.act(self.gate(x)) * self.up(x)

    def forward(self, x: Tensor) -> Tensor:
        """``[T, D]`` to ``[T, D]``."""
        return self.down(self.hidden(x))


PATTERNS = tuple(
    BlockPattern(
        family="steppe.bench",
        up="up",
        act="act",
        down="down",
        gate="gate" if gated else None,
        when=lambda owner, gated=gated: (  # type: ignore[misc]  # the default binds it now
            isinstance(owner, Block) and (owner.gate is not None) is gated
        ),
    )
    for gated in (False, True)
)


def usual_settings(threads: int, quick: bool = False) -> list[Setting]:
    """The settings of `steppe bench`: a block of width 768, as in BERT-base, OPT-125m or ViT-B.

    Args:
        threads: of torch and of the kernels.
        quick: fewer densities and tokens, float32 only.

    Returns:
        By case, densities falling.
    """
    kinds = [
        (TRAINING, 256 if quick else 1024, torch.float32),
        (PREFILL, 256 if quick else 1024, torch.float32),
        (DECODE, 1, torch.float32),
    ]
    if not quick:
        kinds.append((PREFILL, 1024, torch.bfloat16))
    return [
        Setting(case, density, tokens=tokens, dtype=dtype, threads=threads)
        for case, tokens, dtype in kinds
        for density in ((0.9, 0.3, 0.05) if quick else DENSITIES)
    ]
