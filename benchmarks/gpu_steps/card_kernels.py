"""Triton kernels that measure a card."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from gpu_steps.timing import time_one

_BLOCK = 4096  # int32 a program and turn, 16 KiB
_TURNS = 512


@triton.jit
def empty(x):
    """Nothing."""


@triton.jit
def read_blocks(x, out, blocks, turns, programs, BLOCK: tl.constexpr):
    """Sum blocks of x, each program another one in each turn, so that none is in its L1 cache."""
    program = tl.program_id(0)
    total = tl.zeros((BLOCK,), tl.int32)
    for turn in range(turns):
        block = (program + turn * programs) % blocks
        total += tl.load(x + block * BLOCK + tl.arange(0, BLOCK))
    tl.store(out + program, tl.sum(total, 0))


def read_speed(size: int, processors: int) -> float:
    """GB/s at which a buffer is read by all processors.

    Args:
        size: of the buffer, in bytes.
        processors: of the card.
    """
    blocks = max(size // (4 * _BLOCK), 1)
    programs = 4 * processors
    x = torch.ones(blocks * _BLOCK, dtype=torch.int32, device="cuda")
    out = torch.empty(programs, dtype=torch.int32, device="cuda")

    def read() -> None:
        read_blocks[(programs,)](x, out, blocks, _TURNS, programs, BLOCK=_BLOCK, num_warps=8)

    taken = time_one(read, "cuda", 1.0)
    assert out.tolist() == [_TURNS * _BLOCK] * programs, "not all was read"
    return programs * _TURNS * _BLOCK * 4 / taken / 1e3
