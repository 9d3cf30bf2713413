"""`accelerate_`: routes a model's MLP blocks through the sparse kernels."""

from __future__ import annotations

import math
import operator
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from steppe import plugins
from steppe.activations import Rectifier, is_relu, name_of
from steppe.blocks import BlockPattern, MLPBlock, Slot, find_blocks, linear_weight, unwrap
from steppe.errors import AccelerationError
from steppe.ops import cpu
from steppe.ops.calibration import use_remembered
from steppe.ops.calls import DECODE_ROWS, scratch
from steppe.ops.dispatch import Habit, max_density_for, pays
from steppe.ops.few import FewBlock
from steppe.ops.packing import forget
from steppe.ops.reference import Rule, Weights, mlp_from
from steppe.ops.registry import mlp, rule_of, scatter
from steppe.plugins.jumping_relu import JUMPING_SQUARED_RELU, MixedActivation
from steppe.plugins.penalty import is_penalized
from steppe.plugins.rising_threshold import activated_bias, threshold_of
from steppe.plugins.sparsify import sparsification_of
from steppe.routing import Route
from steppe.surgery import Journal, forget_compiled_code

_ATTRIBUTE = "_steppe_acceleration"


@dataclass
class Acceleration:
    """What `accelerate_` did to a model.

    Attributes:
        blocks: those that are routed.
        journal: takes it back.
    """

    blocks: list[MLPBlock]
    journal: Journal


def accelerate_(
    model: nn.Module,
    where: Callable[[MLPBlock], bool] | None = None,
    patterns: Sequence[BlockPattern] = (),
    max_density: float | None = None,
    max_candidates: float | None = None,
) -> nn.Module:
    """Run the MLP blocks of a ReLU-type model on exact sparse kernels, forward and backward.

    The same function at any density: nothing is dropped and nothing is predicted. Of a block's
    products only what its active entries need is computed; which they are is told from the first
    product, or, where few can be, from an int8 product and a bound that misses none. Where too many
    are active, or there is too little to do, the block runs dense. Parameters stay the same objects
    under the same names, and hooks, `watch` and `measure` go on working. For backward a block keeps
    the list of its active entries. Call it after `sparsify_`; calling it again starts over.

    The kernels are for float32 and bfloat16 on the CPU, see `kernels`; anything else runs dense.

    Args:
        model: the model; wrappers are seen through.
        where: which blocks; all by default.
        patterns: patterns of your own for `find_blocks`.
        max_density: up to which density a block runs sparse, in [0, 1], however little there is to
            do; by default what `steppe calibrate` has measured on this machine, else a table.
        max_candidates: up to which share of candidates, the entries that the int8 product cannot
            tell to be zero, the first product is screened, in [0, 1], 0 for never; by default as
            above.

    Returns:
        The model.

    Raises:
        BlocksNotFoundError: there is no MLP block.
        AccelerationError: a block does not fit; the model is as it was.
        KernelError: the native library is there and cannot be loaded.
        ValueError: `max_density` or `max_candidates` is outside [0, 1].

    Example:
        >>> layer = nn.TransformerEncoderLayer(8, 2, 32, dropout=0.0, batch_first=True)
        >>> x = torch.randn(2, 5, 8)
        >>> expected = layer(x)
        >>> torch.allclose(accelerate_(layer)(x), expected, atol=1e-5)
        True
    """
    for name, share in (("max_density", max_density), ("max_candidates", max_candidates)):
        if share is not None and not 0.0 <= share <= 1.0:
            raise ValueError(f"accelerate_: expected {name} in 0 … 1, got {share}")
    root = unwrap(model)
    blocks = find_blocks(root, where, patterns)
    for block in blocks:
        _check(block)
    if max_density is None:
        for dtype in {linear_weight(block.down).dtype for block in blocks if _is_on_cpu(block)}:
            use_remembered(dtype)
    old = acceleration_of(root)
    if old is not None:
        _decelerate(old)
        blocks = find_blocks(root, where, patterns)
    journal = Journal()
    try:
        journal.hold_nested_tensors_off(root)
        for block in blocks:
            compute = _Computation(max_density, max_candidates)
            Route(block, compute, partial(compute.pays, block)).lay(journal)
        journal.add_attribute(Slot(root, _ATTRIBUTE), Acceleration(blocks, journal))
    except BaseException:  # also Ctrl-C: never half a model
        journal.undo()
        raise
    forget_compiled_code()
    return model


def restore_(model: nn.Module) -> nn.Module:
    """Take everything back that `accelerate_` and `sparsify_` did: the exact inverse.

    Values that training has given to the model's own parameters stay; the zeroth biases are gone.

    Args:
        model: a model that `accelerate_` or `sparsify_` changed.

    Returns:
        The model.

    Raises:
        SparsificationError: it is neither accelerated nor carries a plug-in.
    """
    acceleration = acceleration_of(model)
    if acceleration is None:
        return plugins.restore_(model)
    _decelerate(acceleration)
    return model if sparsification_of(model) is None else plugins.restore_(model)


def acceleration_of(model: nn.Module) -> Acceleration | None:
    """What `accelerate_` did to a model, or None."""
    return getattr(unwrap(model), _ATTRIBUTE, None)


def _decelerate(acceleration: Acceleration) -> None:
    """Take an acceleration back and free what it kept."""
    for block in acceleration.blocks:
        for layer in _layers(block):
            forget(linear_weight(layer))
    acceleration.journal.undo()
    forget_compiled_code()


def _layers(block: MLPBlock) -> list[nn.Module]:
    return [block.up, block.down] if block.gate is None else [block.gate, block.up, block.down]


def _check(block: MLPBlock) -> None:
    """Refuse a block that the kernels cannot compute."""
    act = getattr(block.act_slot.module, block.act_slot.name)
    if not isinstance(act, Rectifier) and not _is_mixed_relu(act) and not is_relu(act):
        raise AccelerationError(
            f"{block.name}: accelerate_ needs an activation that is zero for negative inputs, ReLU"
            f" or its kind; got {name_of(act)}. Train or finetune the model with ReLU, or with"
            " steppe.sparsify_(model, [steppe.JumpingSquaredReLU()]); or leave this block out:"
            " accelerate_(model, where=...)"
        )
    if block.d_model == block.d_hidden:
        raise AccelerationError(
            f"{block.name}: expected a hidden width other than the model's, got {block.d_model} for"
            " both. Leave this block out: accelerate_(model, where=...)"
        )
    for layer in _layers(block):
        if not (isinstance(layer, nn.Linear) or _is_conv1d(layer)):
            raise AccelerationError(
                f"{block.name}: expected nn.Linear or Conv1D, got {type(layer).__name__}. Of a PEFT"
                " model merge the adapters first: model = model.merge_and_unload()"
            )
        weight = linear_weight(layer)
        if weight.dtype != linear_weight(block.down).dtype:
            raise AccelerationError(
                f"{block.name}: expected one dtype, got {weight.dtype} and"
                f" {linear_weight(block.down).dtype}. Convert the model: model.to({weight.dtype})"
            )
        if not weight.is_meta and not bool(torch.isfinite(weight).all()):
            raise AccelerationError(
                f"{block.name}: a weight is NaN or infinite, and zero times that is not zero."
                " Load the model anew, or start training again from an earlier checkpoint"
            )


def _is_on_cpu(block: MLPBlock) -> bool:
    return linear_weight(block.down).device.type == "cpu"


def _is_mixed_relu(act: object) -> bool:
    return isinstance(act, MixedActivation) and is_relu(act.original)


def _is_conv1d(layer: nn.Module) -> bool:
    """Whether a layer is Transformers' Conv1D, a linear layer with its weight ``[in, out]``."""
    return hasattr(layer, "nf") and hasattr(layer, "nx") and not hasattr(layer, "base_layer")


class _Computation:
    """Computes a block from its input.

    What it has laid out for few rows it uses again, as long as the block's parameters are the same:
    of a decoding step, looking at everything anew would take half.

    Args:
        max_density: as of `accelerate_`.
        max_candidates: likewise.
    """

    def __init__(self, max_density: float | None, max_candidates: float | None) -> None:
        self._limits = max_density, max_candidates
        self._few: FewBlock | None = None
        self._parameters: list[tuple[dict[str, Any], str, Tensor | None]] = []
        self._habits: defaultdict[float, Habit] = defaultdict(Habit)  # by threshold

    def pays(self, block: MLPBlock, x: Tensor) -> bool:
        """Whether a call is worth the detour; not where the loss needs the activations themselves.

        In inference a block that was too dense runs its own modules for a while, a gated one
        excepted, of which more than one module asks.
        """
        if is_penalized(block):
            return False
        rows = x.numel() // block.d_model
        if self._limits[0] is not None:
            return True
        if not pays(rows, block.d_model, block.d_hidden):
            return False
        if torch.compiler.is_compiling():
            return True  # the op decides when it is called, not when it is traced
        dtype = x.dtype
        if torch.is_autocast_enabled(x.device.type):
            dtype = torch.get_autocast_dtype(x.device.type)
        trains = torch.is_grad_enabled() and (
            x.requires_grad
            or any(part.requires_grad for layer in _layers(block) for part in layer.parameters())
        )
        most = max_density_for(rows, block.d_model, dtype, trains)
        if trains or block.gate is not None or most <= 0.0:
            return most > 0.0
        return self._habits[most].limit(most) > 0.0

    def __call__(self, route: Route, x: Tensor) -> Tensor:
        """The block's output, and its support for whoever watches."""
        if self._takes_few(route, x):
            z = self._compute_few(route.block, x)
            if z is not None:
                return z
        return self._compute(route, x)

    def __deepcopy__(self, memo: dict[int, Any]) -> _Computation:
        """Of a copied model's block; what is laid out is of the other's parameters."""
        return _Computation(*self._limits)

    def _takes_few(self, route: Route, x: Tensor) -> bool:
        """Whether a call has few rows, and nothing else to it."""
        block = route.block
        return (
            not torch.is_grad_enabled()
            and x.numel() <= DECODE_ROWS * block.d_model
            and not route.observers
            and _is_plain(x)
            and x.is_contiguous()
            and not torch.is_autocast_enabled("cpu")
            and not _dropout(block)
            and (not block.activated.training or threshold_of(block) is None)
        )

    def _compute_few(self, block: MLPBlock, x: Tensor) -> Tensor | None:
        """The output; None where the parameters are not those of the last call, or do not fit."""
        few = self._few
        if few is None or not self._are_the_same() or not few.holds():
            few = self._few = self._lay_out(block, x)
        if few is None or x.dtype != few.weights.down.dtype:
            return None
        rows = x.numel() // block.d_model
        density, candidates = self._limits
        if density is None:
            density = max_density_for(rows, block.d_model, x.dtype, trains=False)
        if density <= 0.0:
            return None
        candidates = cpu.screen_limit(rows, block.d_model, x.dtype, False, candidates)
        alpha, beta, mix = _coefficients(block)
        if mix is not None:
            beta *= float(mix)
        z = torch.empty_like(x)
        r = scratch("r", (rows, block.d_hidden), x)
        up_values = r if block.gate is None else scratch("up", (rows, block.d_hidden), x)
        done = few.run(x, (alpha, beta), density, candidates, (z, r, up_values))
        if done is None:
            self._few = None
            return None
        if not done:
            flat = x.view(-1, block.d_model)
            return mlp_from(r, flat, few.weights, Rule(alpha, beta, 0.0))[0].view_as(x)
        return z

    def _are_the_same(self) -> bool:
        """Whether the block's parameters are those of the last call."""
        for held, name, parameter in self._parameters:
            if held.get(name) is not parameter:
                return False
        return bool(self._parameters)

    def _lay_out(self, block: MLPBlock, x: Tensor) -> FewBlock | None:
        """The block for few rows, if its parameters are those of the last call."""
        if not self._are_the_same():
            self._parameters = [
                (layer._parameters, name, layer._parameters.get(name))
                for layer in _layers(block)
                for name in ("weight", "bias")
            ]
            return None
        layers: list[Any] = _layers(block)
        actual = [tensor for layer in layers for tensor in (layer.weight, layer.bias)]
        known = [parameter for _, _, parameter in self._parameters]
        weights = _weights(block)
        if (
            not all(map(operator.is_, known, actual))  # a parametrization makes them anew each time
            or not cpu.runs(x, *weights)
            or any(weight is not None and weight.is_inference() for weight in weights)  # no version
        ):
            return None
        limit = cpu.screen_limit(DECODE_ROWS, block.d_model, x.dtype, False, self._limits[1])
        threshold = threshold_of(block)
        of_bias = () if threshold is None else (threshold.multiple, threshold.deviation)
        return FewBlock(weights, screens=limit > 0.0, stays=True, follows=of_bias)

    def _compute(self, route: Route, x: Tensor) -> Tensor:
        """A block from its input, and its support for whoever watches."""
        block = route.block
        weights = _weights(block)
        alpha, beta, mix = _coefficients(block)
        dropout = _dropout(block)
        flat = x.reshape(-1, block.d_model)
        tensors = [flat, *weights]
        if torch.is_autocast_enabled(x.device.type):
            dtype = torch.get_autocast_dtype(x.device.type)
            tensors = [None if tensor is None else tensor.to(dtype) for tensor in tensors]
        threshold = threshold_of(block)
        if threshold is not None and block.activated.training:
            threshold.see_x(flat, weights.activated, _bias(block.activated))
        trains = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
        goes_past = not trains and _is_plain(x)
        op = cpu.mlp if goes_past else mlp
        z, r, up, _, index, offsets = op(*tensors, alpha, beta, mix, dropout, trains, *self._limits)
        if goes_past and self._limits[0] is None and len(flat) > DECODE_ROWS:
            most = max_density_for(len(flat), block.d_model, z.dtype, trains=False)
            self._habits[most].note(math.nan, bool(offsets.numel()))
        if route.observers:
            listed = r, up, index, offsets
            active, slopes = _support(listed, block, rule_of(alpha, beta, mix, 0.0), len(flat))
            shape = (*x.shape[:-1], block.d_hidden)
            for observer in route.observers:
                observer.see_support(x, active.view(shape), slopes.view(shape))
        return z.view(*x.shape[:-1], block.d_model)


def _is_plain(x: Tensor) -> bool:
    """Whether a call without gradients may go past the dispatcher, a tenth of a decoding step."""
    return (
        type(x) is Tensor
        and x.is_cpu
        and not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()  # type: ignore[attr-defined]  # it is documented
    )


def _support(
    listed: tuple[Tensor, ...], block: MLPBlock, rule: Rule, rows: int
) -> tuple[Tensor, Tensor]:
    """Where a ≠ 0 and where σ′ ≠ 0, bool ``[T, F]`` each, from what the op has listed."""
    r, up, index, offsets = (tensor.detach() for tensor in listed)
    active = rule.activation(r) != 0
    if block.gate is not None:
        active &= up != 0
    slopes = torch.as_tensor(rule.slope(r) != 0) & (r != 0)
    if not offsets.numel():
        return active, slopes
    width = block.d_hidden
    return scatter(active, index, offsets, rows, width), scatter(
        slopes, index, offsets, rows, width
    )


def _weights(block: MLPBlock) -> Weights:
    """The block's parameters as the op takes them, each ``[F, D]``."""
    first, up = block.activated, None if block.gate is None else block.up
    return Weights(
        activated=_outputs_first(first),
        activated_bias=activated_bias(block),
        up=None if up is None else _outputs_first(up),
        up_bias=None if up is None else _bias(up),
        down=_outputs_first(block.down).T,
        down_bias=_bias(block.down),
    )


def _outputs_first(layer: nn.Module) -> Tensor:
    """The weight, with a row per output."""
    weight = linear_weight(layer)
    return weight.T if _is_conv1d(layer) else weight


def _bias(layer: Any) -> Tensor | None:
    bias: Tensor | None = layer.bias
    return bias


def _coefficients(block: MLPBlock) -> tuple[float, float, Tensor | None]:
    """α, β and what β is multiplied by, as the activation has them now."""
    act: Any = getattr(block.act_slot.module, block.act_slot.name)
    if isinstance(act, Rectifier):
        return act.alpha, act.beta, None
    if isinstance(act, MixedActivation):
        return *JUMPING_SQUARED_RELU, act.mix
    return 1.0, 0.0, None


def _dropout(block: MLPBlock) -> float:
    """The probability that a hidden entry is dropped now."""
    layer: Any = block.dropout
    return float(layer.p) if isinstance(layer, nn.Dropout) and layer.training else 0.0
