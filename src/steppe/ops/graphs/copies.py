"""A block's weights as the kernels read them, and whether they are still what was copied."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from steppe.ops.graphs.device import kernels, wait_for
from steppe.ops.plan import BlockSource
from steppe.ops.reference import Weights

# Copies that a graph was captured with, by a weight of their block: a replay reads them wherever
# the model is by then, so they stay as long as that weight does.
_captured: WeakIdKeyDictionary = WeakIdKeyDictionary()


class Copies(NamedTuple):
    """The weights of a block, each contiguous; itself where it was.

    Attributes:
        weight: K, ``[F, D]``.
        bias: ``[F]``, zeros for none.
        down: V, ``[F, D]``.
        down_bias: ``[D]``, zeros for none.
        screen: `steppe.ops.cuda.decode.Screen` of K and its bias, or None.
        up: U of a gated block, ``[F, D]``, else None.
        up_bias: ``[F]``; None for zeros.
    """

    weight: Tensor
    bias: Tensor
    down: Tensor
    down_bias: Tensor
    screen: Any
    up: Tensor | None
    up_bias: Tensor | None

    @property
    def tensors(self) -> list[Tensor]:
        """All of them."""
        screen = () if self.screen is None else self.screen
        return [part for part in (*self[:4], *screen, self.up, self.up_bias) if part is not None]

    def candidates(self, x: Tensor) -> Tensor:
        """The share of units that the screen leaves for any token, 0-dim."""
        share: Tensor = kernels().candidates_of(x, self.weight, self.bias, self.screen, self.up)
        return share

    def run(self, x: Tensor, screen: Any, alpha: float, beta: float) -> Tensor:
        """The output of the kernels, ``[T, D]``; `screen` is its own or None."""
        z: Tensor = kernels().decode_token(x, *self[:4], screen, alpha, beta, self.up, self.up_bias)
        return z


def copies_of(weights: Weights, screens: bool) -> Copies:
    """Copy what is not as the kernels read it; waits for the device.

    Args:
        weights: of the block, all of one dtype.
        screens: whether to make the int8 words.
    """
    # Later calls may be in inference mode or not, and take either way only ordinary tensors.
    with torch.inference_mode(False), torch.no_grad():
        weight, down = (part.detach().contiguous() for part in (weights.activated, weights.down))
        biases = weights.activated_bias, weights.down_bias
        bias, down_bias = (
            like.new_zeros(length) if own is None else own.detach().clone()
            for own, like, length in zip(biases, (weight, down), weight.shape, strict=True)
        )
        up = None if weights.up is None else weights.up.detach().contiguous()
        up_bias = None if weights.up_bias is None else weights.up_bias.detach().clone()
        screen = kernels().screen_of(weight, bias) if screens else None
    wait_for(weight.device)  # a graph may be captured and replayed on other streams
    return Copies(weight, bias, down, down_bias, screen, up, up_bias)


class State:
    """The tensors that a block computes with, as they were when its weights were copied.

    Args:
        source: of the block.
    """

    def __init__(self, source: BlockSource) -> None:
        self._places = [(held, name, held.get(name)) for held, name in source.layer_parameters()]
        tensors = source.layer_tensors()
        self._are_parameters = all(
            map(operator.is_, (known for *_, known in self._places), tensors)
        )
        self.tensors = [part for part in (*tensors, *source.bias_sources()) if part is not None]
        self._seen = [(part, part.data_ptr(), _version(part)) for part in self.tensors]

    def unfit(self) -> str:
        """Why no copies can be made of them; empty if they can."""
        if not self._are_parameters:
            return "a parametrization makes a weight in each call"
        kinds = {type(part) for part in self.tensors} - {Tensor, torch.nn.Parameter}
        if kinds:
            return f"a weight is a {kinds.pop().__name__}"
        return ""

    def holds(self) -> bool:
        """Whether all are the same tensors in the same memory, and PyTorch has seen no change."""
        return all(held.get(name) is known for held, name, known in self._places) and all(
            part.data_ptr() == address and _version(part) == version
            for part, address, version in self._seen
        )

    def keep(self, copies: Copies) -> None:
        """Keep copies for a graph, as long as the first of the tensors lives."""
        own = {part.untyped_storage().data_ptr() for part in self.tensors}
        made = [part for part in copies.tensors if part.untyped_storage().data_ptr() not in own]
        _captured.setdefault(self.tensors[0], []).append(made)


def mixed(weights: Weights) -> str:
    """Why the kernels cannot take weights together; empty if they can."""
    parts: Sequence[Tensor | None] = weights
    kinds = {(part.dtype, part.device) for part in parts if part is not None}
    return "" if len(kinds) == 1 else "its weights are of several dtypes or devices"


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version
