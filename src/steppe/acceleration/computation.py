"""Computation: a routed block from its input on the kernels, or the reason why not."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from steppe.acceleration.sigma import sigma_of
from steppe.blocks.block import MLPBlock
from steppe.blocks.fused import Half
from steppe.blocks.linear import PartOfLinear, held_by, is_transposed, linear_weight
from steppe.ops.backend import backend_of, why_not_packed
from steppe.ops.bitmask import active_of
from steppe.ops.decoding import decode_block
from steppe.ops.mlp import mlp, support
from steppe.ops.outcome import PACKED, Outcome, noted
from steppe.ops.packing import packed_mlp
from steppe.ops.plan import BlockKernels, Limits, Plan, Shape
from steppe.ops.reference import Weights
from steppe.ops.room import NO_ROOM, Room
from steppe.plugins.base import effective_bias, l1_readers, needs_hidden, shifts_of
from steppe.routing.route import Route
from steppe.surgery.swapping import plain_class

_PLAIN = (Tensor, nn.Parameter)
NOT_ASKED = "packing was not asked for"
_ASKED = "packed, as it was asked for: all products are dense"
_NOT_FINAL = (
    "a graph would go on with copies of weights that have changed:"
    " accelerate_(model.eval(), weights_are_final=True) says that none does"
)
_numbers = itertools.count()  # the names of blocks in the ops of `steppe.ops.decoding`


def _never(x: Tensor) -> bool:
    return False


def _nothing(x: Tensor) -> Tensor | None:
    return None


class Computation:
    """Computes a block from its input, on the kernels of the device that the input is on.

    Three ways lead to the kernels, the cheapest first. A decoding step like the last one takes
    `run_again`: the backend compares a few addresses and versions and calls the kernel, since at
    10 µs a step every attribute that Python looks up shows. Another call of few tokens takes
    `decode`, one kernel for the whole block. All others take the op `steppe::mlp`, or, without
    gradients, the same function past the dispatcher. A call that trains takes `steppe::packed_mlp`
    if that was asked for, where there are no kernels that keep active entries only. On a device
    whose kernels only decode, calls take `decode`, `steppe::decode_block` in compiled code, or the
    block's own modules.

    Args:
        block: the block.
        max_density: as `accelerate_` takes it.
        max_candidates: as `accelerate_` takes it.
        pack: as `accelerate_` takes it.
        weights_are_final: as `accelerate_` takes it.

    Attributes:
        shape: of the block.
        limits: that were asked for.
        is_again: whether a call is a decoding step like the last one, apart from foreign hooks,
            which the route checks.
        run_again: the output of such a call; None where it did not end as the last one.
    """

    def __init__(
        self,
        block: MLPBlock,
        max_density: float | None,
        max_candidates: float | None,
        pack: bool = False,
        weights_are_final: bool = False,
    ) -> None:
        self.block = block
        self._pack = pack
        self._weights_are_final = weights_are_final
        self._number = next(_numbers)
        self._room = Room()
        self.limits = Limits(max_density, max_candidates)
        self.is_again: Callable[[Tensor], bool] = _never
        self.run_again: Callable[[Tensor], Tensor | None] = _nothing
        self._sigma = sigma_of(block)
        self._is_transposed = [is_conv1d(layer) for layer in block.layers]
        self.shape = Shape(block.d_model, block.d_hidden, block.gate is not None)
        self._held = [held_by(layer) for layer in block.layers]
        self._places = [place for held in self._held for place in held]
        self._kernels: BlockKernels | None = None
        self._device = ""  # that the kernels are of

    def take_stock(self, route: Route) -> None:
        """Note on a route the repeated calls since the last time that this was asked."""
        if self._pack:
            self._room.refresh()  # which the replay of a CUDA graph does not do
        repeated = None if self._kernels is None else self._kernels.take_repeated()
        if repeated is not None:
            route.note(*repeated)

    def has_too_little(self, x: Tensor) -> str:
        """Why a call has too little to do to be routed; empty if it has enough, or is forced."""
        if self._packs(x):
            return ""
        backend = backend_of(x)
        if backend is None or backend.only_decodes:
            if self._pack and torch.is_grad_enabled():
                return self.why_not_packed(x)
            if backend is None:
                return f"there are no kernels for {x.device.type}"
            reason = self._why_not_decoded()
            if reason:
                return reason
        return backend.too_little(x.numel() // self.shape.width, self.shape, self.limits)

    def plan_and_count(self, route: Route, x: Tensor, traced: bool) -> Plan:
        """The plan of a call, which is counted; a compiled op decides later, when it is called."""
        is_cast, dtype, packs = _is_cast(x), _dtype(x), self._packs(x)
        if not packs and _only_decodes(x):
            return self._plan_decoding(route, x, traced)
        reason = self._cannot(x, dtype, is_cast, traced, packs) or needs_hidden(self.block)
        if packs and route.drops():
            reason = reason or "packing has no dropout"
        if reason or traced:
            return Plan(reason, packs=packs)
        trains = torch.is_grad_enabled() and (
            x.requires_grad
            or any(
                (part := parameters.get(name)) is not None and part.requires_grad
                for parameters, name in self._places
            )
        )
        if packs:
            return Plan("" if trains else "nothing in it has a gradient", packs=True)
        kernels = self._kernels_for(x)
        assert kernels is not None  # `_cannot` has said so
        return kernels.plan_and_count(x.numel() // self.block.d_model, dtype, trains)

    def _plan_decoding(self, route: Route, x: Tensor, traced: bool) -> Plan:
        """The plan of a call where the kernels only decode, and `has_too_little` had no reason."""
        plan = Plan()
        if not traced:
            kernels = self._kernels_for(x)
            assert kernels is not None
            plan = kernels.plan_and_count(x.numel() // self.block.d_model, x.dtype, False)
            if plan.reason:  # most calls of eager Python: nothing else is asked of them
                return plan
        is_cast = _is_cast(x)
        reason = self._cannot(x, _dtype(x), is_cast, traced, False) or needs_hidden(self.block)
        if not reason and is_cast:
            reason = "autocast makes other weights in each call"
        if not reason and route.observers:
            reason = "it is watched"
        if not reason and not traced and not self._decodes(route, x):
            reason = "its input is not contiguous"
        return plan._replace(reason=reason)

    def _why_not_decoded(self) -> str:
        """Why no call runs on kernels that only decode, whatever its input; empty if some may."""
        block = self.block
        if block.down.training:
            return "the kernels of this device only decode: model.eval()"
        if torch.is_grad_enabled():
            return "the kernels of this device only decode: torch.no_grad()"
        if not self._weights_are_final:
            return _NOT_FINAL
        if isinstance(block.up, Half):
            return "its gate and up are one layer, of which the output would have to be read"
        if self._sigma.coefficients()[2] is not None:
            return "its activation changes from step to step"
        return ""

    def prepare(self) -> str:
        """Make ready for calls in compiled code; why none runs on kernels, empty if some may."""
        reason, weight = self.unfit(), linear_weight(self.block.down)
        if reason or not _only_decodes(weight) or self._packs(weight):
            return reason
        if not self.can_be_tried(weight):
            return f"there are no kernels for {weight.dtype}"
        kernels = self._kernels_for(weight)
        assert kernels is not None
        return kernels.prepare(self, self._number)

    def in_graphs(self, rows: int) -> str:
        """How the block runs in a captured CUDA graph, in words; empty off such devices.

        Args:
            rows: number of tokens of the last call.
        """
        weight = linear_weight(self.block.down)
        backend = backend_of(weight)
        if backend is None or not backend.only_decodes:
            return ""
        captured = "" if self._kernels is None else self._kernels.in_graphs()
        if captured or rows > backend.decode_rows:
            rows = 1
        with torch.no_grad():
            reason = self._why_not_decoded()
        reason = reason or backend.too_little(max(rows, 1), self.shape, self.limits)
        reason = reason or backend.reason()
        return f"dense: {reason}" if reason else captured or "not captured yet"

    def trial(self, x: Tensor) -> Plan:
        """The plan of a call in a trial: packed if it may be, else sparse at any density."""
        if not self.why_not_packed(x):
            return Plan(packs=True)
        backend = backend_of(x)
        assert backend is not None  # a trial is made where there are kernels
        rows = x.numel() // self.block.d_model
        asked = self.limits._replace(max_density=1.0)
        trains = torch.is_grad_enabled()
        return backend.limits(rows, self.shape, x.dtype, trains, asked)

    def unfit(self) -> str:
        """Why there are no kernels for the block now, whatever its input; empty if there are."""
        weight = linear_weight(self.block.down)
        backend = backend_of(weight)
        reason = "" if backend is None or self._packs(weight) else backend.reason()
        return reason or self._sigma.unfit()

    def can_be_tried(self, weight: Tensor) -> bool:
        """Whether `trial` has a plan for an input on the device and in the dtype of a weight."""
        backend = backend_of(weight)
        has_kernels = (
            backend is not None
            and weight.dtype in backend.dtypes
            and (self._weights_are_final or not backend.only_decodes)
        )
        return has_kernels or not self.why_not_packed(weight)

    def why_not_packed(self, x: Tensor) -> str:
        """Why calls that train do not pack their activations; empty if they do.

        Args:
            x: an input, or another tensor on its device and in its dtype.
        """
        if not self._pack:
            return NOT_ASKED
        if self.block.gate is not None:
            return "packing has no gate"
        return why_not_packed(x.device.type, _dtype(x))

    def _packs(self, x: Tensor) -> bool:
        """Whether a call packs its activations, if anything has a gradient."""
        return torch.is_grad_enabled() and not self.why_not_packed(x)

    def forget(self) -> None:
        """Free the memory that the kernels keep between calls."""
        if self._kernels is not None:
            self._kernels.forget()
        for weight in map(linear_weight, self.block.layers):
            backend = backend_of(weight)
            if backend is not None:
                backend.forget(weight)

    def layer_parameters(self) -> list[tuple[dict[str, Any], str]]:
        """Where the parameters of the block's layers are."""
        return self._places

    def layer_tensors(self) -> list[Tensor | None]:
        """The tensors that the layers compute with; a parametrization makes new ones each time.

        For a layer that is a part of a larger one, they are the larger one's.
        """
        tensors: list[Tensor | None] = []
        layers: list[Any] = self.block.layers
        for layer, held in zip(layers, self._held, strict=True):
            if isinstance(layer, PartOfLinear):
                tensors += [getattr(layer.whole, name, None) for _, name in held]
            else:
                tensors += [layer.weight, layer.bias]
        return tensors

    def _kernels_for(self, x: Tensor) -> BlockKernels | None:
        """The block's kernels on a tensor's device, or None."""
        if self._device != x.device.type:
            if self._kernels is not None:
                self._kernels.forget()
            self._device, backend = x.device.type, backend_of(x)
            self._kernels = None
            self.is_again, self.run_again = _never, _nothing
            if backend is not None:
                self._kernels = backend.block(self.shape, self.limits)
                self.is_again, self.run_again = self._kernels.is_again, self._kernels.run_again
        return self._kernels

    def _cannot(
        self, x: Tensor, dtype: torch.dtype, is_cast: bool, traced: bool, packs: bool
    ) -> str:
        """Why the kernels cannot take a call; empty if they can.

        Args:
            x: the block's input.
            dtype: of the computation.
            is_cast: whether autocast casts to that.
            traced: whether torch.compile traces the call, with tensors of a class of its own.
            packs: whether it is packed, for which no kernels are needed.
        """
        if type(x) not in _PLAIN and not traced:
            return f"its input is a {type(x).__name__}"
        backend = None if packs else backend_of(x)
        if not packs and (backend is None or dtype not in backend.dtypes):
            return f"there are no kernels for {dtype}"
        for (parameters, name), *_ in self._held:
            weight = parameters.get(name)
            if weight is None:  # a parametrization makes it
                continue
            if type(weight) not in _PLAIN and not traced:
                return f"a weight is a {type(weight).__name__}"
            if weight.dtype != dtype and not is_cast:
                return f"its input is of {dtype}, a weight of {weight.dtype}"
        if traced:
            return ""
        return (backend.reason() if backend else "") or self._sigma.unfit() or _transformed()

    def __call__(self, route: Route, x: Tensor, plan: Plan | None) -> Tensor:
        """The block's output ``[*, D]``; the observers get its support."""
        if plan is not None and self._decodes(route, x):
            assert self._kernels is not None
            may_repeat = (
                not (self.block.dropout or route.dropout)
                and not (shifts_of(self.block) or l1_readers(self.block))
                and self._sigma.is_fixed
            )
            coefficients = self._sigma.coefficients()
            z = self._kernels.decode(x, self, coefficients, plan, may_repeat)
            if z is not None:
                route.note(noted())
                return z
        if plan is None and not self._packs(x) and _only_decodes(x):
            weights, coefficients = self.weights(), self._sigma.coefficients()
            flat = x.reshape(-1, self.block.d_model)
            return decode_block(flat, weights, coefficients, self._number).view(x.shape)
        return self._compute(route, x, plan)

    def _decodes(self, route: Route, x: Tensor) -> bool:
        """Whether a call is a plain decoding step, for `BlockKernels.decode`."""
        block, backend = route.block, backend_of(x)
        return (
            backend is not None
            and not torch.is_grad_enabled()
            and x.numel() <= backend.decode_rows * block.d_model
            and not route.observers
            and not route.trial
            and not torch.jit.is_tracing()  # type: ignore[attr-defined]  # it is documented
            and type(x) is Tensor
            and x.is_contiguous()
            and not torch.is_autocast_enabled(x.device.type)
            and not route.drops()
            and not (block.activated.training and shifts_of(block))
            and not (block.down.training and l1_readers(block))
        )

    def bias_sources(self) -> list[Tensor]:
        """The tensors that the effective bias is computed from; none for the layer's own bias."""
        sources = [tensor for shift in shifts_of(self.block) for tensor in shift.sources()]
        if not sources and not self._sigma.shift:
            return []
        bias = _bias(self.block.activated)
        return sources if bias is None else [*sources, bias]

    def _compute(self, route: Route, x: Tensor, plan: Plan | None) -> Tensor:
        """The block's output by the op ``[*, D]``; the observers get its support."""
        block = route.block
        # A trial runs without hooks, by which the block's own modules have the shifts.
        weights = self._weights(with_shifts=not route.trial)
        alpha, beta, mix = self._sigma.coefficients()
        dropout = route.drops()
        flat = x.reshape(-1, block.d_model)
        tensors: list[Any] = [flat, *weights]
        if _is_cast(x):
            dtype = _dtype(x)
            tensors = [None if tensor is None else tensor.to(dtype) for tensor in tensors]
        if block.activated.training and not route.trial:
            for shift in shifts_of(block):
                shift.see_x(flat, weights.activated, _bias(block.activated))
        trains = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
        readers = l1_readers(block) if block.down.training and not route.trial else ()
        with_l1 = len(readers) > 0  # torch 2.11 does not trace bool(readers)
        is_plain = not (trains or with_l1) and _is_plain(x)
        outcome = None
        packs = self._packs(x) if plan is None else plan.packs
        if packs:
            first, activated, activated_bias, _, _, *others = tensors
            arguments = first, activated, activated_bias, *others, alpha, beta, mix
            capacity = self._room.capacity(len(flat) * block.d_hidden)
            room = NO_ROOM if route.trial else self._room.number
            z, l1, words, *_ = packed_mlp(*arguments, capacity, room, with_l1)
            if plan is not None:
                outcome = Outcome(PACKED, len(flat), self._room.share, trains=trains, reason=_ASKED)
        elif is_plain and plan is not None and self._kernels is not None:
            first, *others = tensors
            coefficients = alpha, beta, mix
            z, saved = self._kernels.mlp(first, Weights(*others), coefficients, dropout, plan)
        else:
            limits = self.limits
            if plan is not None and trains:  # nothing is cached, so the plan holds as it is
                limits = Limits(plan.max_density, plan.max_candidates)
            arguments = alpha, beta, mix, dropout, trains, *limits, with_l1
            z, l1, *saved = mlp(*tensors, *arguments)
        if plan is not None:
            route.note(outcome or noted())
        if route.observers and not route.trial:
            if packs:
                active = slopes = active_of(words, block.d_hidden)
            else:
                parts = [part.detach() for part in saved]
                active, slopes = support(parts, len(flat), block.d_hidden, alpha, beta, mix)
            shape = (*x.shape[:-1], block.d_hidden)
            for observer in route.observers:
                observer.see_support(x, active.view(shape), slopes.view(shape))
        z = z.view(*x.shape[:-1], block.d_model)
        for reader in readers:
            z = reader.see_l1(block, l1.view(x.shape[:-1]), z)
        return z

    def weights(self) -> Weights:
        """The block's parameters as they are now, plug-ins applied."""
        return self._weights(with_shifts=True)

    def _weights(self, with_shifts: bool) -> Weights:
        """The block's parameters as the op takes them, each ``[F, D]``."""
        block, shift = self.block, self._sigma.shift
        layers = zip(block.layers, self._is_transposed, strict=True)
        matrices = [
            w.T if turned else w for w, turned in ((linear_weight(a), b) for a, b in layers)
        ]
        up = None if block.gate is None else block.up
        weight = matrices[0]
        bias = effective_bias(block) if with_shifts else _bias(block.activated)
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
    return definer.__name__ == "Conv1D" and is_transposed(layer)


def _transformed() -> str:
    """Why a call inside a transform of torch.func runs the block's own modules; empty outside."""
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return "torch.func transforms the call"
    if forward_ad._current_level >= 0:
        return "the call is differentiated in forward mode"
    return ""


def _only_decodes(x: Tensor) -> bool:
    """Whether the kernels of a tensor's device only decode."""
    backend = backend_of(x)
    return backend is not None and backend.only_decodes


def _dtype(x: Tensor) -> torch.dtype:
    """The dtype that a layer computes in, with an input or a weight."""
    return torch.get_autocast_dtype(x.device.type) if _is_cast(x) else x.dtype


def _is_cast(x: Tensor) -> bool:
    """Whether a layer's input is cast by autocast, which leaves float64 as it is."""
    return torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64


def _is_plain(x: Tensor) -> bool:
    """Whether a call without gradients may go past the dispatcher, a tenth of a decoding step."""
    return type(x) is Tensor and not torch.jit.is_tracing()  # type: ignore[attr-defined]  # it is documented


def _bias(layer: Any) -> Tensor | None:
    bias: Tensor | None = layer.bias
    return bias
