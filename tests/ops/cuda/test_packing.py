"""The packed training step on the kernels, in the interpreter: the bits of its twin."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ops.cuda import interpreter
from ops.cuda.test_pack import DTYPES, same_bits, whole_numbers
from steppe.ops import packing
from steppe.ops.cuda import pack
from steppe.ops.packing import packed_mlp
from steppe.ops.room import NO_ROOM

pytestmark = [interpreter.NEEDED, pytest.mark.usefixtures("poisoned")]


def results(leaves: list[Tensor | None], capacity: int) -> list[Tensor]:
    """z, Σ|a|, the mask, where rows start, and the gradients."""
    for leaf in leaves:
        if leaf is not None:
            leaf.requires_grad_().grad = None
    mix = torch.tensor(0.5)
    z, l1, words, starts, _ = packed_mlp(*leaves, 1.0, 0.5, mix, capacity, NO_ROOM, True)
    (z.sum() + l1.sum()).backward()
    return [z, l1, words, starts, *(leaf.grad for leaf in leaves if leaf is not None)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("biases", [True, False])
@pytest.mark.parametrize(("rows", "width", "hidden"), [(0, 4, 40), (1, 4, 40), (20, 6, 70)])
@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_forward_and_backward_are_the_twins(
    share: float,
    rows: int,
    width: int,
    hidden: int,
    biases: bool,
    dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    x, up, bias = whole_numbers(rows, width, hidden, dtype)
    down = torch.randn(width, hidden).to(dtype).T
    leaves = [x, up, bias if biases else None, down, down[0].clone() if biases else None]
    p = x @ up.T + (bias if biases else 0)
    capacity = int(share * int((p > 0).sum()))
    expected = results(leaves, capacity)
    calls = []

    def packer_of(tensor: Tensor) -> object:
        calls.append(tensor)
        return pack

    monkeypatch.setattr(packing, "packer_of", packer_of)
    got = results(leaves, capacity)
    assert len(calls) == 2
    assert all(same_bits(one, other) for one, other in zip(got, expected, strict=True))
