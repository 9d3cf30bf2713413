"""Decoding: a whole block on a few tokens in one native call, its weights laid out once.

Reading the weights from memory is all that takes time, so each is read once, and of the second one
only the rows of active units. Before each call the native function checks that no copy is stale;
Python checks addresses and versions (`DecodeBlock.holds`).
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence

from torch import Tensor

from steppe.ops.cpu.calls import (
    DECODE_ROWS,
    check_rows,
    check_vector,
    dtype_code,
    pointer,
    refuse,
    rows_are_contiguous,
)
from steppe.ops.cpu.copies import (
    CachedScreen,
    cached_rows,
    cached_screen,
    is_final,
    marks_of,
    why_not_cached,
)
from steppe.ops.cpu.library import library
from steppe.ops.cpu.memory import prefer_large_pages
from steppe.ops.cpu.structures import BlockStructure, DecodeCallStructure
from steppe.ops.cpu.team import threads
from steppe.ops.cpu.writes import Mark
from steppe.ops.outcome import DENSE, SCREENED, SPARSE, Outcome, note
from steppe.ops.reference import Weights

_NO_MEMORY, _CHANGED, _TOO_MANY = -1, -2, -3  # of steppe_native.h


class DecodeCall:
    """A call of a `DecodeBlock`, which may be repeated with another input.

    Args:
        few: the block.
        rows: T.
        coefficients: α and β of the activation.
        max_density: of the entries of r.
        max_candidates: the share of candidates up to which it is screened; 0 for no screen.

    Attributes:
        reference: first argument of `function`.
        function: computes the block, see ``steppe_decode_mlp`` in steppe_native.h.
        told: result of the last call, from which `outcome` is made.
        times: number of repeated calls that ended as usual, since it was last set to 0.
    """

    def __init__(
        self,
        few: DecodeBlock,
        rows: int,
        coefficients: tuple[float, float],
        max_density: float,
        max_candidates: float,
    ) -> None:
        self._few, self._rows = few, rows
        self._entries = rows * few.hidden
        self._max_density = max_density
        self._most_candidates = int(max_candidates * self._entries) if few.back_off else 0
        self._structure = DecodeCallStructure(
            few.address,
            rows,
            self._most_candidates,
            int(max_density * self._entries),
            *coefficients,
            threads(),
        )
        self.reference = ctypes.byref(self._structure)
        self.function = library().steppe_decode_mlp
        # A usual result is below: no candidates were counted, or at most as many as the limit.
        self.end = (self._most_candidates + 2 if self._most_candidates else 1) << 32
        self.told, self.times = 0, 0

    def run(self, x: Tensor, outputs: tuple[Tensor, Tensor, Tensor]) -> bool | None:
        """Compute the block, see `DecodeBlock.run`, and record how it ran."""
        z, r, up_values = outputs
        self.told = told = self.function(
            self.reference, x.data_ptr(), r.data_ptr(), up_values.data_ptr(), z.data_ptr()
        )
        if told == _NO_MEMORY:
            raise MemoryError("decode_mlp: no memory for the entries")
        if told == _CHANGED:
            return None
        note(self.outcome())
        back_off = self._few.back_off
        if back_off is not None and self._most_candidates:
            candidates = self._candidates()
            share = candidates / max(self._entries, 1)
            back_off.record(share, candidates <= self._most_candidates)
        return bool(told >= 0)

    def outcome(self) -> Outcome:
        """How the last call ran."""
        if self.told < 0:
            reason = f"more than {self._max_density:.0%} of the entries are active"
            return Outcome(DENSE, self._rows, is_few=True, reason=reason, is_too_dense=True)
        active, candidates = self.told & 0xFFFFFFFF, self._candidates()
        share = math.nan if candidates < 0 else candidates / max(self._entries, 1)
        how = SCREENED if 0 <= candidates <= self._most_candidates else SPARSE
        return Outcome(how, self._rows, active / max(self._entries, 1), share, is_few=True)

    def _candidates(self) -> int:
        """Number of candidates in the last call; -1 if they were not counted."""
        return int(_TOO_MANY - self.told if self.told < 0 else self.told >> 32) - 1


class DecodeBlock:
    """A block laid out for at most `DECODE_ROWS` tokens, without dropout and gradients.

    Args:
        weights: of the block; all of one dtype that the kernels take.
        screens: whether to screen the first product where it pays.
        stays: whether it serves more than one call, so that changes of weights must be noticed.
        derived: the tensors that computed weights, such as a bias with a threshold, were made of,
            and their state before that.

    Raises:
        KernelError: the rows of a weight are not contiguous, and it cannot be cached.

    Attributes:
        weights: as given.
        hidden: F.
        width: D.
        back_off: of the screen; None for a block that is not screened.
        address: of the structure that the native function reads.
        addresses: the weights that may be given other memory, and their addresses.
        versions: the final weights, and their PyTorch version.
    """

    def __init__(
        self,
        weights: Weights,
        screens: bool,
        stays: bool,
        derived: tuple[Sequence[Tensor], Mark] = ((), Mark(())),
    ) -> None:
        self.weights = weights
        self.hidden, self.width = weights.down.shape
        # Before anything is copied, so that no write in between is missed.
        mark = marks_of(_copied(weights, screens) if stays else []).joined(derived[1])
        laid_out = weights._replace(
            activated=_rows_of(weights.activated),
            up=None if weights.up is None else _rows_of(weights.up),
            down=_rows_of(weights.down),
        )
        _check(laid_out)
        for weight, rows in zip(weights, laid_out, strict=True):
            if stays and rows is weight and weight is not None and weight.ndim == 2:
                prefer_large_pages(weight)
        screen = cached_screen(weights.activated) if screens else None
        self.back_off = None if screen is None else screen.few
        self._structure = _structure_of(laid_out, screen, mark)
        self._keeps_alive = laid_out, screen, mark
        self.address = ctypes.addressof(self._structure)
        # A transposed weight is a view of its parameter, and other ``.data`` moves only the latter.
        given = [
            weight if weight._base is None else weight._base
            for weight in weights
            if stays and weight is not None
        ]
        given += derived[0]
        self.addresses = [(weight, weight.data_ptr()) for weight in given]
        # The mark sees writes to the others, or the kernel reads the weight itself.
        self.versions = [
            (weight, weight._version)
            for weight in given
            if is_final(weight) and not weight.is_inference()
        ]

    def holds(self) -> bool:
        """Whether the weights are where they were, and final ones of the same version."""
        for weight, address in self.addresses:
            if weight.data_ptr() != address:
                return False
        return all(weight._version == version for weight, version in self.versions)

    def run(
        self,
        x: Tensor,
        coefficients: tuple[float, float],
        max_density: float,
        max_candidates: float,
        outputs: tuple[Tensor, Tensor, Tensor],
    ) -> bool | None:
        """Compute the block.

        Args:
            x: ``[*, D]``, contiguous, of the weights' dtype, at most `DECODE_ROWS` rows.
            coefficients: α and β of the activation.
            max_density: of the entries of r.
            max_candidates: the share of candidates up to which screening pays.
            outputs: to be written to: z, shape of x; r ``[T, F]``; in a gated block the factor of
                σ(r), ``[T, F]``.

        Returns:
            True; False if more are active, and only r is written; None if the weights have changed,
            and nothing is written.
        """
        rows = x.numel() // self.width
        if rows > DECODE_ROWS or x.dtype != self.weights.down.dtype or not x.is_contiguous():
            refuse(
                f"at most {DECODE_ROWS} contiguous rows of {self.weights.down.dtype},"
                f" got {tuple(x.shape)} of {x.dtype}"
            )
        screened = self.screen_limit_and_count(max_candidates)
        return DecodeCall(self, rows, coefficients, max_density, screened).run(x, outputs)

    def screen_limit_and_count(self, max_candidates: float) -> float:
        """The largest share of candidates for this call, which counts in the back-off; 0 for none.

        Args:
            max_candidates: the share up to which screening pays.
        """
        if self.back_off is None or max_candidates <= 0.0:
            return 0.0
        return self.back_off.limit_and_count(max_candidates)


def _structure_of(laid_out: Weights, screen: CachedScreen | None, mark: Mark) -> BlockStructure:
    """The block as the native function reads it; all three have to live as long."""
    activated, activated_bias, up, up_bias, down, down_bias = laid_out
    hidden, width = down.shape
    return BlockStructure(
        w=activated.data_ptr(),
        w_bias=pointer(activated_bias),
        up=pointer(up),
        up_bias=pointer(up_bias),
        v=down.data_ptr(),
        v_bias=pointer(down_bias),
        w_stride=activated.stride(0),
        up_stride=0 if up is None else up.stride(0),
        v_stride=down.stride(0),
        width=width,
        hidden=hidden,
        bytes=None if screen is None else screen.screen.integers.data_ptr(),
        bounds=None if screen is None else screen.screen.bounds.data_ptr(),
        copies=ctypes.addressof(mark.copies),
        copy_count=len(mark.copies),
        dtype=dtype_code(down),
    )


def why_not_laid_out(weights: Weights) -> str:
    """Why a block cannot be laid out for decoding: a weight has to be copied, and cannot be cached.

    Args:
        weights: of the block.

    Returns:
        A clause; empty if it can be.
    """
    reasons = [why_not_cached(weight) for weight in _copied(weights, screens=False)]
    return next(filter(None, reasons), "")


def _rows_of(weight: Tensor) -> Tensor:
    """A weight with its rows contiguous."""
    rows = cached_rows(weight)
    if rows is None:
        refuse(f"contiguous rows, or a weight that may be copied, got strides {weight.stride()}")
    return rows


def _copied(weights: Weights, screens: bool) -> list[Tensor]:
    """The weights that copies are made of."""
    copied = [
        weight
        for weight in (weights.activated, weights.up, weights.down)
        if weight is not None and not rows_are_contiguous(weight)
    ]
    if screens and rows_are_contiguous(weights.activated):
        copied.append(weights.activated)
    return copied


def _check(weights: Weights) -> None:
    """Refuse weights that do not go together."""
    hidden, width = weights.down.shape
    like = weights.down
    for matrix in (weights.activated, weights.up, weights.down):
        if matrix is not None:
            check_rows(matrix, hidden, like)
            if matrix.shape[1] != width:
                refuse(f"{width} columns, got {matrix.shape[1]}")
    for bias, length in (
        (weights.activated_bias, hidden),
        (weights.up_bias, hidden),
        (weights.down_bias, width),
    ):
        if bias is not None:
            check_vector(bias, length, like)
