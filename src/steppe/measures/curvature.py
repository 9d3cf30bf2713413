"""Curvature of single blocks: trace and top eigenvalue of the Hessian, by hessian-eigenthings.

Flatness is an expectation of squared gradients, and stands for the Hessian. The library has
the products of the Hessian with vectors, Hutchinson's trace and Lanczos; this
file runs them on one weight of one block of any model, and leaves the model as it was.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from steppe.blocks.block import MLPBlock
from steppe.blocks.linear import linear_weight
from steppe.errors import EmptyLoaderError, LossError, MissingExtraError, UnfitBlockError
from steppe.sharding import is_sharded
from steppe.surgery.journal import Journal

NAN = float("nan")
_LAYERS = ("up", "gate", "down")
# In half precision the second derivative of a Transformer is mostly rounding.
_DTYPES = (torch.float32, torch.float64)


@dataclass(frozen=True)
class BlockCurvature:
    """Curvature of the mean loss in the weights of one block, each weight alone.

    H is the Hessian of the mean loss with respect to one weight matrix, all else held fixed. Its
    unit is that of the loss over that of the weight, squared. The gate's values are NaN in a block
    without one.

    Attributes:
        name: name of the block.
        trace_up: tr H for the weight of `up`, an unbiased estimate.
        trace_up_standard_error: its standard error over the random vectors.
        top_eigenvalue_up: the largest eigenvalue of H, approached from below.
        top_eigenvalue_up_residual: ‖H v − λ v‖ for that eigenvalue λ and its unit vector v; H has
            an eigenvalue within so much of λ.
        trace_gate: the same for the gate.
        trace_gate_standard_error: as of `up`.
        top_eigenvalue_gate: as of `up`.
        top_eigenvalue_gate_residual: as of `up`.
        trace_down: the same for `down`.
        trace_down_standard_error: as of `up`.
        top_eigenvalue_down: as of `up`.
        top_eigenvalue_down_residual: as of `up`.
    """

    name: str
    trace_up: float
    trace_up_standard_error: float
    top_eigenvalue_up: float
    top_eigenvalue_up_residual: float
    trace_gate: float
    trace_gate_standard_error: float
    top_eigenvalue_gate: float
    top_eigenvalue_gate_residual: float
    trace_down: float
    trace_down_standard_error: float
    top_eigenvalue_down: float
    top_eigenvalue_down_residual: float


def samples_of(batch: Any) -> int:
    """Number of samples in a batch: the first dimension of its first tensor.

    Args:
        batch: a tensor, or a mapping, tuple or list with tensors in it.

    Raises:
        LossError: there is no tensor with a dimension.

    Example:
        >>> samples_of({"input_ids": torch.zeros(4, 7)})
        4
    """
    values: Any = (batch,)
    if isinstance(batch, Mapping):
        values = batch.values()
    elif isinstance(batch, tuple | list):
        values = batch
    for value in values:
        if isinstance(value, Tensor) and value.dim() > 0:
            return len(value)
    raise LossError(
        f"hessian_curvature: expected a batch with a tensor [samples, ...] in it, got"
        f" {type(batch).__name__}. Say how much each batch counts: size=lambda batch: ..."
    )


def hessian_curvature(
    model: nn.Module,
    batches: Sequence[Any],
    loss: Callable[[nn.Module, Any], Tensor],
    blocks: Sequence[MLPBlock],
    num_matvecs: int = 32,
    seed: int = 0,
    size: Callable[[Any], float] = samples_of,
) -> tuple[BlockCurvature, ...]:
    """Trace and top eigenvalue of the Hessian for each weight matrix of each block.

    H = ∂²/∂W² Σ_b n_b L_b / Σ_b n_b, over batches b of size n_b and mean loss L_b, for W the weight
    of `up`, `gate` or `down` and not its bias. The trace is Hutchinson's estimate, the mean of
    vᵀ H v over random signs v; the eigenvalue is that of as many Lanczos steps. Each takes
    `num_matvecs` passes over the batches, forward and twice backward, for each weight.

    Call it in evaluation mode: with dropout the products would be of different functions. The
    forward passes run without fused attention and without ``torch.compile``, which have no second
    derivative; attention by other packages must be switched off
    (``attn_implementation="sdpa"`` or ``"eager"``). Every process measures its own batches.

    Args:
        model: the model; wrappers are seen through. Its parameters, their ``.grad`` and their
            ``requires_grad`` are afterwards as they were.
        batches: passed over many times, so no loader that shuffles.
        loss: mean loss of the model on a batch, scalar, differentiable twice. It gets the batch as
            it is, and takes it to the model's device.
        blocks: of `find_blocks`.
        num_matvecs: number of random vectors, and of Lanczos steps; at least 2. The latter keep so
            many vectors of the weight's size in memory.
        seed: of the random vectors; the global generator is left alone.
        size: how much a batch counts: by default its samples. For a loss that is a mean over
            tokens, the number of its tokens.

    Returns:
        One for each block, in their order.

    Raises:
        EmptyLoaderError: there is no batch.
        LossError: the loss is no finite scalar, or does not depend on a block's weight.
        MissingExtraError: hessian-eigenthings is not installed.
        UnfitBlockError: a weight is sharded, on the meta device, an inference tensor, of half
            precision, or no parameter of the model.
        ValueError: `num_matvecs` is less than 2.

    Source: Hutchinson (1990), doi:10.1080/03610919008812866; products with H, Pearlmutter (1994),
    doi:10.1162/neco.1994.6.1.147.

    Example:
        >>> from steppe.blocks.find import find_blocks
        >>> layer = nn.TransformerEncoderLayer(8, 2, 32)
        >>> def half_squares(model, batch):  # its Hessian is the identity
        ...     return sum(w.square().sum() for w in model.parameters()) / 2
        >>> (found,) = hessian_curvature(layer, [torch.zeros(1)], half_squares, find_blocks(layer))
        >>> found.trace_up, found.trace_up_standard_error, round(found.top_eigenvalue_up, 5)
        (256.0, 0.0, 1.0)
    """
    if num_matvecs < 2:
        raise ValueError(
            f"hessian_curvature: expected num_matvecs ≥ 2 (one random vector has no standard"
            f" error), got {num_matvecs}"
        )
    for block in blocks:
        for layer in _LAYERS:
            _require_twice_differentiable(model, block, layer)
    objective = _MeanLoss(loss, batches, size)
    with _differentiable_twice(model):
        return tuple(
            _curvature_of_block(model, block, objective, num_matvecs, seed) for block in blocks
        )


class _MeanLoss:
    """Losses of the batches, by their index, such that their plain mean is the mean over all."""

    def __init__(
        self,
        loss: Callable[[nn.Module, Any], Tensor],
        batches: Sequence[Any],
        size: Callable[[Any], float],
    ) -> None:
        sizes = [float(size(batch)) for batch in batches]
        whole = sum(sizes)
        if not whole > 0:  # NaN too
            raise EmptyLoaderError(
                f"hessian_curvature: {len(batches)} batches of size {whole:g} in all; expected a"
                " list of batches. Was an iterator used up before?"
            )
        # A mean over nothing would be NaN.
        self.indices = [index for index, one in enumerate(sizes) if one > 0]
        self._loss = loss
        self._batches = batches
        # The library takes the plain mean over batches, whatever their sizes.
        self._weights = [len(self.indices) * one / whole for one in sizes]

    def __call__(self, where: str, weight: Tensor, model: nn.Module, index: int) -> Tensor:
        """One batch's share, as a function of `weight`, which is called `where`."""
        value = self._loss(model, self._batches[index])
        if not isinstance(value, Tensor) or value.numel() != 1:
            got = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise LossError(f"{where}: batch {index}: expected a scalar loss, got {got}")
        if not value.requires_grad:
            raise LossError(
                f"{where}: batch {index}: the loss does not depend on this weight. Is the block"
                " not run by this loss, or the loss detached or under torch.no_grad()? Choose"
                " blocks with where=..."
            )
        if not bool(torch.isfinite(value.detach()).all()):
            raise LossError(f"{where}: batch {index}: the loss is {value.item()}, expected finite")
        # Nothing, but twice differentiable: the library fails on a loss linear in the weight.
        nothing = (0.0 * weight).square().sum()
        return self._weights[index] * value.reshape(()) + nothing.to(value)


def _curvature_of_block(
    model: nn.Module, block: MLPBlock, objective: _MeanLoss, num_matvecs: int, seed: int
) -> BlockCurvature:
    """All weights of one block."""
    found: dict[str, float] = {}
    for layer in _LAYERS:
        values = (NAN,) * 4
        if (module := getattr(block, layer)) is not None:
            where = f"{block.name}.{layer}"
            with _alone_requiring_grad(model, linear_weight(module)) as weight:
                values = _curvature_of_weight(model, where, weight, objective, num_matvecs, seed)
        trace, error, top, residual = values
        found |= {
            f"trace_{layer}": trace,
            f"trace_{layer}_standard_error": error,
            f"top_eigenvalue_{layer}": top,
            f"top_eigenvalue_{layer}_residual": residual,
        }
    return BlockCurvature(name=block.name, **found)


def _curvature_of_weight(
    model: nn.Module,
    where: str,
    weight: Tensor,
    objective: _MeanLoss,
    num_matvecs: int,
    seed: int,
) -> tuple[float, float, float, float]:
    """Trace and its standard error, top eigenvalue and its residual."""
    try:
        from hessian_eigenthings import HessianOperator, hutchinson, lanczos
    except ImportError:
        raise MissingExtraError(
            "the Hessian needs hessian-eigenthings, 1.0 or later: pip install 'steppe[curvature]'"
        ) from None
    hessian = HessianOperator(
        model,
        objective.indices,
        partial(objective, where, weight),
        param_filter=partial(_is_weight, weight),
    )
    trace = hutchinson(hessian, num_samples=num_matvecs, seed=seed)
    top = lanczos(
        hessian,
        k=1,
        max_iter=min(num_matvecs, hessian.size),
        which="LA",  # the largest, not the largest in size, which may be negative
        reorthogonalize=True,
        seed=seed,
    )
    return trace.estimate, trace.stderr, top.eigenvalues[0].item(), top.residuals[0].item()


def _is_weight(weight: Tensor, name: str, parameter: Tensor) -> bool:
    """The library's filter; by identity, since wrappers change names and not parameters."""
    return parameter is weight


def _require_twice_differentiable(model: nn.Module, block: MLPBlock, layer: str) -> None:
    """Refuse a weight without a Hessian that can be computed.

    Raises:
        UnfitBlockError: see `hessian_curvature`.
    """
    module = getattr(block, layer)
    if module is None:
        return
    weight = linear_weight(module)
    where = f"hessian_curvature: {block.name}.{layer}"
    if is_sharded(weight):
        raise UnfitBlockError(
            f"{where}: the weight is sharded. Measure a model that is not: save a checkpoint, load"
            " it in one process"
        )
    if weight.is_meta:
        raise UnfitBlockError(
            f"{where}: the weight is on the meta device. Load the model's weights first"
        )
    if weight.is_inference():
        raise UnfitBlockError(
            f"{where}: the weight was made under torch.inference_mode() and has no derivatives."
            " Load or build the model outside of it"
        )
    if weight.dtype not in _DTYPES:
        raise UnfitBlockError(
            f"{where}: expected float32 or float64, got {weight.dtype}. Measure model.float()"
        )
    if not any(parameter is weight for parameter in model.parameters()):
        raise UnfitBlockError(
            f"{where}: the weight is no parameter of this {type(model).__name__}. Take the blocks"
            " of find_blocks(model) of the same model; remove parametrizations"
            " (torch.nn.utils.parametrize.remove_parametrizations)"
        )


@contextmanager
def _differentiable_twice(model: nn.Module) -> Iterator[None]:
    """Whatever has no second derivative is off: fused attention, compiled graphs, no_grad."""
    journal = Journal()
    with ExitStack() as stack:
        stack.callback(journal.undo)
        # A layer above frozen ones does not know that it will be differentiated.
        journal.hold_nested_tensors_off(model)
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        yield


@contextmanager
def _alone_requiring_grad(model: nn.Module, weight: Tensor) -> Iterator[Tensor]:
    """One parameter that requires grad, so that no graph is kept below its block."""
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        for parameter, required in flags:
            if required:
                parameter.requires_grad_(False)
        weight.requires_grad_(True)
        yield weight
    finally:
        for parameter, required in flags:
            parameter.requires_grad_(required)
