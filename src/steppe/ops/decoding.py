"""A block on few tokens as ops of compiled code, where a CUDA graph is what decides.

While torch.compile traces, nobody knows whether the code will be captured, nor how many entries
will be active. So a compiled graph holds one op for the block, and the way is chosen when it runs:

- `decode_block` is what the compiler meets first. It decomposes: where the compiler makes CUDA
  graphs, into the other op; elsewhere into a dense block, which is then compiled as any.
- ``steppe::decode_in_graph`` asks the block's `Decoder` when it runs: dense in the warm-up, and
  when it is captured the way that pays. What is chosen there is what the graph replays.

Shapes are static and nothing waits for the device. Neither has a gradient.
"""

from __future__ import annotations

import sys
import weakref
from typing import Protocol

import torch
from torch import Tensor

from steppe.ops.plan import Coefficients
from steppe.ops.reference import Rule, Weights, linear

# What the GPU's kernels take, for those who ask without Triton.
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MOST_TOKENS = 16  # of a call: the rows of a tile of tensor cores
MOST_WIDTH = 4096  # D

_SCHEMA = (
    "(Tensor x, Tensor activated, Tensor? activated_bias, Tensor? up, Tensor? up_bias, Tensor down,"
    " Tensor? down_bias, float alpha, float beta, int number) -> Tensor"
)


class Decoder(Protocol):
    """Chooses the way of a block's calls when they run."""

    def run(self, x: Tensor, weights: Weights, coefficients: Coefficients) -> Tensor:
        """The output of a call in compiled code; arguments as of `dense`."""


# An op cannot take an object of ours, but it takes a number. The table is weak: decoders go with
# their models.
_decoders: weakref.WeakValueDictionary[int, Decoder] = weakref.WeakValueDictionary()


def register(number: int, decoder: Decoder) -> None:
    """Have the calls of a block decided by a decoder from now on.

    Args:
        number: name of the block in the ops.
        decoder: of the block.
    """
    _decoders[number] = decoder


def makes_cuda_graphs() -> bool:
    """Whether what is being compiled will be captured, as in the mode ``reduce-overhead``."""
    config = sys.modules.get("torch._inductor.config")  # loaded if anything is compiled by it
    return config is not None and bool(config.triton.cudagraphs)


def dense(x: Tensor, weights: Weights, coefficients: Coefficients) -> Tensor:
    """A block by its products, the bits of its own modules.

    Args:
        x: ``[T, D]``.
        weights: of the block, in x's dtype.
        coefficients: of the activation, numbers.

    Returns:
        ``[T, D]``.
    """
    p = linear(x, weights.activated, weights.activated_bias)
    return dense_from(p, x, weights, coefficients)


def dense_from(p: Tensor, x: Tensor, weights: Weights, coefficients: Coefficients) -> Tensor:
    """The same from the pre-activations ``[T, F]``."""
    alpha, beta, _ = coefficients
    a = Rule(alpha, beta, 0.0).activation(torch.relu(p))
    if weights.up is not None:
        a = a * linear(x, weights.up, weights.up_bias)
    return linear(a, weights.down.T, weights.down_bias)


def decode_block(x: Tensor, weights: Weights, coefficients: Coefficients, number: int) -> Tensor:
    """A block in code that is compiled; see above.

    Args:
        x: ``[T, D]``.
        weights: of the block.
        coefficients: of the activation, numbers.
        number: that its decoder was registered with.

    Returns:
        ``[T, D]``.
    """
    alpha, beta, _ = coefficients
    z: Tensor = torch.ops.steppe.decode_block(x, *weights, alpha, beta, number)
    return z


torch.library.define("steppe::decode_block", _SCHEMA)
torch.library.define("steppe::decode_in_graph", _SCHEMA)


@torch.library.impl("steppe::decode_block", "CompositeImplicitAutograd")
def _decode_block(
    x: Tensor,
    activated: Tensor,
    activated_bias: Tensor | None,
    up: Tensor | None,
    up_bias: Tensor | None,
    down: Tensor,
    down_bias: Tensor | None,
    alpha: float,
    beta: float,
    number: int,
) -> Tensor:
    weights = Weights(activated, activated_bias, up, up_bias, down, down_bias)
    if not makes_cuda_graphs():
        return dense(x, weights, (alpha, beta, None))
    z: Tensor = torch.ops.steppe.decode_in_graph(x, *weights, alpha, beta, number)
    return z


@torch.library.impl("steppe::decode_in_graph", ("cuda", "cpu"))
def _decode_in_graph(
    x: Tensor,
    activated: Tensor,
    activated_bias: Tensor | None,
    up: Tensor | None,
    up_bias: Tensor | None,
    down: Tensor,
    down_bias: Tensor | None,
    alpha: float,
    beta: float,
    number: int,
) -> Tensor:
    weights = Weights(activated, activated_bias, up, up_bias, down, down_bias)
    decoder = _decoders.get(number)
    run = dense if decoder is None else decoder.run
    return run(x, weights, (alpha, beta, None))


@torch.library.register_fake("steppe::decode_in_graph")
def _(x: Tensor, *_: object) -> Tensor:
    return x.new_empty(x.shape)
