"""Up to which density the kernels pay in a captured graph, from what one card has measured.

An H200 has run blocks of four widths without a gate, on one token, at 5 % active entries and no
other density. So the limits are bounds, from bytes and these times alone:

- All bytes of K are read whatever the density is, and nothing reads faster than `SPEED`. What is
  left of a block's time is at most what grows with the density, in proportion at worst. So at a
  density ρ the block takes at most ``t + (t − bytes of K / speed) (ρ / 5 % − 1)``, and
  `max_density` is where that is 1 / `LEAST_SPEEDUP` times the dense time.
- With a screen the int8 words are what is read in any case, half of K's 16-bit bytes, and the rest
  grows with the candidates at most. `max_candidates` is where the bound is `LEAST_SPEEDUP` times
  the time without a screen, with the same second product; 0 where that is never.

Between two widths the smaller limits of both hold. docs/gpu.md has the numbers that follow.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from steppe.ops.decoding import MOST_WIDTH
from steppe.ops.graphs.device import Card
from steppe.ops.plan import Limits, Plan, Shape

SPEED = 4.2e6  # bytes a µs: copies on that H200, benchmarks/results/gpu-h200.json
LEAST_SPEEDUP = 0.97
# The H200. An H100 is the same chip with a slower memory, where saved bytes are worth more; other
# cards of its compute capability have fewer processors, and may be slower at what is no reading.
CARD = Card((9, 0), 132)
DTYPES = (torch.bfloat16, torch.float16)  # float16 has the same bytes and the same arithmetic
LEAST_HIDDEN = 4  # F over D of the blocks


class Measured(NamedTuple):
    """µs of a block of F = 4 D in a graph, benchmarks/results/gpu-h200-decode.json.

    Attributes:
        width: D.
        dense: µs of cuBLAS.
        unscreened: µs of the kernels that read all of K.
        screened: µs of those that read the int8 words first.
        density: share of active entries.
        candidates: share of them.
    """

    width: int
    dense: float
    unscreened: float
    screened: float
    density: float
    candidates: float

    @property
    def reading(self) -> float:
        """The least µs in which all of K can be read, of 16-bit entries."""
        return 2 * 4 * self.width**2 / SPEED

    @property
    def max_density(self) -> float:
        """The density up to which the kernels are sure to pay, see above."""
        spare = self.dense / LEAST_SPEEDUP - self.unscreened
        return self.density * (1.0 + spare / (self.unscreened - self.reading))

    @property
    def max_candidates(self) -> float:
        """The share of candidates up to which the screen is; 0 for never."""
        spare = LEAST_SPEEDUP * self.unscreened - self.screened
        if spare < 0:
            return 0.0
        return self.candidates * (1.0 + spare / (self.screened - self.reading / 2))


TABLE = (
    Measured(768, 13.81, 8.30, 8.25, 0.0501, 0.0778),
    Measured(1024, 15.04, 8.51, 8.91, 0.0500, 0.0845),
    Measured(2048, 27.66, 17.74, 16.16, 0.0502, 0.0964),
    Measured(4096, 72.83, 44.16, 37.35, 0.0504, 0.1428),
)


def unmeasured(rows: int, is_gated: bool) -> str:
    """What no card has timed of such calls; empty for nothing."""
    tokens = f"for {rows} tokens" if rows > 1 else ""
    return f"{tokens} with a gate".strip() if is_gated else tokens


def too_little(rows: int, shape: Shape, asked: Limits) -> str:
    """Why such calls of a block run dense; empty if they need not.

    Args:
        rows: number of tokens.
        shape: of the block.
        asked: of `accelerate_`; with a density of the user's own the table is not asked.
    """
    width, hidden, is_gated = shape
    if width > MOST_WIDTH:
        return f"the kernels take a width of {MOST_WIDTH} at most, and this is {width}"
    if asked.max_density is not None:
        return ""
    unknown = unmeasured(rows, is_gated)
    if unknown:
        return f"on a GPU it was not measured {unknown}: give max_density"
    if width < TABLE[0].width:
        return f"it is {width} wide, and the narrowest that was measured is {TABLE[0].width}"
    if hidden < LEAST_HIDDEN * width:
        return f"F / D was measured from {LEAST_HIDDEN} on, and this is {hidden / width:.2g}"
    return ""


def limits_for(rows: int, shape: Shape, dtype: torch.dtype, card: Card, asked: Limits) -> Plan:
    """The limits that hold for calls that have enough.

    Args:
        rows: number of tokens.
        shape: of the block; D at most `MOST_WIDTH`.
        dtype: of the block.
        card: that it is on.
        asked: of `accelerate_`; None for the measured ones.

    Returns:
        A plan with the limits, and the reason why nothing is known of such a card or dtype.
    """
    (most, candidates), width = asked, shape.width
    is_like = card.capability == CARD.capability and card.processors >= CARD.processors
    if most is None and dtype not in DTYPES:
        return Plan(f"on a GPU only 16-bit blocks were measured, and this is of {dtype}")
    if most is None and not is_like:
        return Plan("no card of this kind was measured: only the H200 was")
    near = [row for row in TABLE if row.width <= width][-1:]
    near += [row for row in TABLE if row.width >= width][:1]
    if most is None:
        most = min(row.max_density for row in near)
    if candidates is None:
        is_known = (
            is_like
            and dtype in DTYPES
            and width >= TABLE[0].width
            and not unmeasured(rows, shape.is_gated)
        )
        candidates = min(row.max_candidates for row in near) if is_known else 0.0
    return Plan(
        max_density=most,
        max_candidates=candidates,
        is_measured=asked.max_density is None,
        screen_is_measured=asked.max_candidates is None,
    )
