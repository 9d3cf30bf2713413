"""Computes a routed block from its input: on the kernels, or says why it cannot."""

from __future__ import annotations

import math
import operator
from collections import defaultdict
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from steppe.blocks import MLPBlock
from steppe.experts import ExpertLayer
from steppe.linear import held_by, linear_weight
from steppe.ops import cpu
from steppe.ops.calls import DECODE_ROWS, DTYPES, scratch, threads
from steppe.ops.dispatch import Habit, generation, max_density_for, pays
from steppe.ops.few import FewBlock, FewCall, why_not_laid_out
from steppe.ops.native import kernels
from steppe.ops.outcome import noted
from steppe.ops.packing import forget, marks_of, why_not_kept
from steppe.ops.reference import Rule, Weights, mlp_from
from steppe.ops.registry import mlp, support
from steppe.plugins.penalty import is_penalized
from steppe.plugins.rising_threshold import activated_bias, threshold_of
from steppe.routing import Route
from steppe.sigma import sigma_of
from steppe.swapping import plain_class

_PLAIN = (Tensor, nn.Parameter)


class _Step(NamedTuple):
    """A call with few rows that ran sparse; good for others like it."""

    call: FewCall
    few: FewBlock
    dtype: torch.dtype
    shape: torch.Size  # of the input
    habits: tuple[Habit, Habit]  # of the block, and of its screen
    context: tuple[int, int]  # number of threads, generation of the thresholds


class Computation:
    """Computes a block from its input.

    What it has laid out for few rows it uses again, as long as the block's parameters are the same:
    of a decoding step, looking at everything anew would take half.

    Args:
        block: the block.
        max_density: as of `accelerate_`.
        max_candidates: likewise.
    """

    def __init__(
        self, block: MLPBlock, max_density: float | None, max_candidates: float | None
    ) -> None:
        self.block = block
        self.limits = max_density, max_candidates
        self._sigma = sigma_of(block)
        self._is_transposed = [is_conv1d(layer) for layer in block.layers]
        self._shape = block.d_model, block.d_hidden
        self._held = [held_by(layer) for layer in block.layers]
        self._few: FewBlock | None = None
        self._last: _Step | None = None
        self._stock: FewCall | None = None  # the last call that may be made again
        self._unkept = ""  # why nothing can be laid out for few rows
        self._parameters: list[tuple[dict[str, Any], str, Tensor | None]] = []
        self._habits: defaultdict[float, Habit] = defaultdict(Habit)  # by threshold

    def is_again(self, x: Tensor) -> bool:
        """Whether a call is a decoding step like the last one, of which all was looked at.

        Nothing is asked twice, and no function called that can be done without: of a decoding step
        each costs what its code takes to come from memory.
        """
        last = self._last
        if (
            last is None
            or type(x) is not Tensor
            or not x.is_cpu
            or x.dtype is not last.dtype
            or x.shape != last.shape
            or not x.is_contiguous()
            or torch.is_grad_enabled()
            or torch.is_autocast_enabled("cpu")
            or torch._C._is_tracing()
            or torch._C._functorch.peek_interpreter_stack() is not None
            or forward_ad._current_level >= 0
            or last.context != (threads(), generation())
        ):
            return False
        for habit in last.habits:
            if not habit.held:
                return False
        for held, name, parameter in self._parameters:
            if held.get(name) is not parameter:
                return False
        for weight, address in last.few.addresses:
            if weight.data_ptr() != address:
                return False
        return not last.few.versions or last.few.holds()

    def run_again(self, route: Route, x: Tensor) -> Tensor | None:
        """The output of such a call; None where it did not end as the last one."""
        last = self._last
        if last is None:
            return None
        call, z = last.call, torch.empty_like(x)
        told = call.function(call.reference, x.data_ptr(), None, None, z.data_ptr())
        if 0 <= told < call.end:
            call.told = told
            call.times += 1
            return z
        self._last = None
        return None

    def take_stock(self, route: Route) -> None:
        """Tell a route of the calls like the last one that were made since it was told."""
        call = self._stock
        if call is not None and call.times:
            times, call.times = call.times, 0
            route.note(call.outcome(), times)

    def has_too_little(self, x: Tensor) -> str:
        """Why a call has too little to do for a detour; empty if it has enough or was asked for."""
        if not x.is_cpu:
            return f"there are no kernels for {x.device.type}"
        if self.limits[0] is not None:
            return ""
        width, hidden = self._shape
        if pays(x.numel() // width, width, hidden):
            return ""
        return "these are too few tokens for so small a block"

    def refuses(self, x: Tensor, traced: bool) -> str:
        """Why a call is not possible or gains nothing; empty if it does.

        In inference a block that was too dense runs its own modules for a while.
        """
        is_cast = torch.is_autocast_enabled("cpu")
        dtype = torch.get_autocast_dtype("cpu") if is_cast else x.dtype
        reason = self._cannot(x, dtype, is_cast, traced)
        if reason:
            return reason
        if is_penalized(self.block):
            return "its loss has a penalty on the activations themselves"
        if self.limits[0] is not None or traced:
            return ""  # a compiled op decides when it is called, not when it is traced
        width = self._shape[0]
        rows = x.numel() // width
        trains = torch.is_grad_enabled() and (
            x.requires_grad
            or any(
                (part := parameters.get(name)) is not None and part.requires_grad
                for held in self._held
                for parameters, name in held
            )
        )
        if self._unkept and rows <= DECODE_ROWS and not trains and self._are_the_same():
            return self._unkept
        most = max_density_for(rows, width, dtype, trains)
        if most <= 0.0:
            return f"at {rows} tokens no density gains"
        if trains:
            return ""
        return "" if self._habits[most].limit(most) > 0.0 else "the last calls were too dense"

    def unfit(self) -> str:
        """Why there are no kernels for the block now, whatever its input; empty if there are."""
        return kernels().reason or self._sigma.unfit()

    def forget(self) -> None:
        """Free what was laid out for few rows, and the copies of weights."""
        self._few = self._last = self._stock = None
        self._parameters = []
        for layer in self.block.layers:
            forget(linear_weight(layer))

    def _cannot(self, x: Tensor, dtype: torch.dtype, is_cast: bool, traced: bool) -> str:
        """Why the kernels cannot take a call; empty if they can.

        Args:
            x: the block's input.
            dtype: that it is computed in.
            is_cast: whether autocast casts to that.
            traced: whether torch.compile traces the call, which may be with tensors of its own.
        """
        if type(x) not in _PLAIN and not traced:
            return f"its input is a {type(x).__name__}"
        if dtype not in DTYPES:
            return f"there are no kernels for {dtype}"
        for (parameters, name), *_ in self._held:
            weight = parameters.get(name)
            if weight is None:  # a parametrization makes it
                continue
            if type(weight) not in _PLAIN and not traced:
                return f"a weight is a {type(weight).__name__}"
            if weight.dtype != dtype and not is_cast:
                return f"its input is of {dtype}, a weight of {weight.dtype}"
        return "" if traced else self.unfit() or _transformed()

    def __call__(self, route: Route, x: Tensor, traced: bool) -> Tensor:
        """The block's output, and its support for whoever watches."""
        if not traced and self._takes_few(route, x):
            z = self._compute_few(route, x)
            if z is not None:
                return z
        return self._compute(route, x, traced)

    def _limits_of(self, route: Route) -> tuple[float | None, float | None]:
        """The limits of a call; in a trial it runs sparse at any density."""
        return (1.0, self.limits[1]) if route.trial else self.limits

    def _takes_few(self, route: Route, x: Tensor) -> bool:
        """Whether a call has few rows, and nothing else to it."""
        block = route.block
        return (
            not torch.is_grad_enabled()
            and x.numel() <= DECODE_ROWS * block.d_model
            and not route.observers
            and not torch.jit.is_tracing()  # type: ignore[attr-defined]  # it is documented
            and type(x) is Tensor
            and x.is_contiguous()
            and not torch.is_autocast_enabled("cpu")
            and not _dropout(block)
            and (not block.activated.training or threshold_of(block) is None)
        )

    def _compute_few(self, route: Route, x: Tensor) -> Tensor | None:
        """The output; None where the parameters are not those of the last call, or do not fit."""
        block, few = route.block, self._few
        if few is None or not self._are_the_same() or not few.holds():
            self._last = None
            few = self._few = self._lay_out(route, x)
        if few is None or x.dtype != few.weights.down.dtype:
            return None
        rows = x.numel() // block.d_model
        asked, candidates = self._limits_of(route)
        density = asked
        if density is None:
            density = max_density_for(rows, block.d_model, x.dtype, trains=False)
        if density <= 0.0:
            return None
        candidates = cpu.screen_limit(rows, block.d_model, x.dtype, False, candidates)
        alpha, beta, mix = self._sigma.coefficients()
        if mix is not None:
            beta *= float(mix)
        self._last = None
        call = FewCall(few, rows, (alpha, beta), density, few.limit_of_candidates(candidates))
        z = torch.empty_like(x)
        hidden = rows, block.d_hidden
        r = scratch("r", hidden, x)
        up_values = r if block.gate is None else scratch("up", hidden, x)
        done = call.run(x, (z, r, up_values))
        if done is None:
            self._few = None
            return None
        route.note(noted())
        habit = Habit() if asked is not None else self._habits[density]
        if habit.held is not done:
            habit.note(math.nan, done)
        if not done:
            flat = x.view(-1, block.d_model)
            return mlp_from(r, flat, few.weights, Rule(alpha, beta, 0.0))[0].view_as(x)
        if not (route.trial or block.dropout or threshold_of(block)) and self._sigma.is_fixed:
            screens = Habit() if few.habit is None else few.habit
            context = threads(), generation()
            self._last = _Step(call, few, x.dtype, x.shape, (habit, screens), context)
            self._stock = call
        return z

    def _are_the_same(self) -> bool:
        """Whether the block's parameters are those of the last call."""
        for held, name, parameter in self._parameters:
            if held.get(name) is not parameter:
                return False
        return bool(self._parameters)

    def _lay_out(self, route: Route, x: Tensor) -> FewBlock | None:
        """The block for few rows, if its parameters are those of the last call."""
        block = self.block
        if not self._are_the_same():
            self._unkept = ""
            self._parameters = [
                (parameters, name, parameters.get(name))
                for held in self._held
                for parameters, name in held
            ]
            return None
        sources = self._bias_sources()
        self._unkept = next(filter(None, map(why_not_kept, sources)), "")
        if self._unkept:
            return None
        mark = marks_of(sources)  # before the bias is made of them
        layers: list[Any] = block.layers
        # What an expert's are parts of is looked at in `_are_the_same`.
        own = [layer for layer in layers if not isinstance(layer, ExpertLayer)]
        actual = [tensor for layer in own for tensor in (layer.weight, layer.bias)]
        known = [layer._parameters.get(name) for layer in own for name in ("weight", "bias")]
        weights = self._weights(with_threshold=not route.trial)
        if (
            not all(map(operator.is_, known, actual))  # a parametrization makes them anew each time
            or not cpu.runs(x, *weights)
        ):
            return None
        limit = cpu.screen_limit(DECODE_ROWS, block.d_model, x.dtype, False, self.limits[1])
        self._unkept = why_not_laid_out(weights)
        if self._unkept:
            return None
        return FewBlock(weights, screens=limit > 0.0, stays=True, derived=(sources, mark))

    def _bias_sources(self) -> list[Tensor]:
        """What the bias of the activated layer is made of, if it is not that layer's own."""
        threshold = threshold_of(self.block)
        sources = [] if threshold is None else [threshold.multiple, threshold.deviation]
        if not sources and not self._sigma.shift:
            return []
        bias = _bias(self.block.activated)
        return sources if bias is None else [*sources, bias]

    def _compute(self, route: Route, x: Tensor, traced: bool) -> Tensor:
        """A block from its input, and its support for whoever watches."""
        block = route.block
        # A trial runs without hooks, by which the block's own modules have the threshold.
        weights = self._weights(with_threshold=not route.trial)
        alpha, beta, mix = self._sigma.coefficients()
        dropout = _dropout(block)
        flat = x.reshape(-1, block.d_model)
        tensors = [flat, *weights]
        if torch.is_autocast_enabled(x.device.type):
            dtype = torch.get_autocast_dtype(x.device.type)
            tensors = [None if tensor is None else tensor.to(dtype) for tensor in tensors]
        threshold = threshold_of(block)
        if threshold is not None and block.activated.training and not route.trial:
            threshold.see_x(flat, weights.activated, _bias(block.activated))
        trains = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
        goes_past = not trains and not traced and _is_plain(x)
        op = cpu.mlp if goes_past else mlp
        limits = self._limits_of(route)
        z, r, up, _, index, offsets = op(*tensors, alpha, beta, mix, dropout, trains, *limits)
        if not traced:
            route.note(noted())
        if goes_past and limits[0] is None and len(flat) > DECODE_ROWS:
            most = max_density_for(len(flat), block.d_model, z.dtype, trains=False)
            outcome = noted()
            is_too_dense = outcome is not None and outcome.is_too_dense
            if offsets.numel() or is_too_dense:  # not a first call, before copies are kept
                self._habits[most].note(math.nan, not is_too_dense)
        if route.observers and not route.trial:
            listed = [tensor.detach() for tensor in (r, up, index, offsets)]
            active, slopes = support(*listed, len(flat), block.d_hidden, alpha, beta, mix)
            shape = (*x.shape[:-1], block.d_hidden)
            for observer in route.observers:
                observer.see_support(x, active.view(shape), slopes.view(shape))
        return z.view(*x.shape[:-1], block.d_model)

    def _weights(self, with_threshold: bool) -> Weights:
        """The block's parameters as the op takes them, each ``[F, D]``."""
        block, shift = self.block, self._sigma.shift
        layers = zip(block.layers, self._is_transposed, strict=True)
        matrices = [
            w.T if turned else w for w, turned in ((linear_weight(a), b) for a, b in layers)
        ]
        up = None if block.gate is None else block.up
        weight = matrices[0]
        bias = activated_bias(block) if with_threshold else _bias(block.activated)
        if shift:
            bias = weight.new_full((len(weight),), -shift) if bias is None else bias - shift
        return Weights(
            activated=weight,
            activated_bias=bias,
            up=None if up is None else matrices[1],
            up_bias=None if up is None else _bias(up),
            down=matrices[-1].T,
            down_bias=_bias(block.down),
        )


def is_conv1d(layer: nn.Module) -> bool:
    """Whether a layer is Transformers' Conv1D, a linear layer with its weight ``[in, out]``.

    A subclass with a ``forward`` of its own is not.
    """
    definer = next(kind for kind in plain_class(type(layer)).__mro__ if "forward" in vars(kind))
    return definer.__name__ == "Conv1D" and hasattr(layer, "nf") and hasattr(layer, "nx")


def _transformed() -> str:
    """Why a call inside a transform of torch.func runs the block's own modules; empty outside."""
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return "torch.func transforms the call"
    if forward_ad._current_level >= 0:
        return "the call is differentiated in forward mode"
    return ""


def _is_plain(x: Tensor) -> bool:
    """Whether a call without gradients may go past the dispatcher, a tenth of a decoding step."""
    return (
        type(x) is Tensor and x.is_cpu and not torch.jit.is_tracing()  # type: ignore[attr-defined]  # it is documented
    )


def _bias(layer: Any) -> Tensor | None:
    bias: Tensor | None = layer.bias
    return bias


def _dropout(block: MLPBlock) -> float:
    """The probability that a hidden entry is dropped now."""
    layer: Any = block.dropout
    return float(layer.p) if isinstance(layer, nn.Dropout) and layer.training else 0.0
