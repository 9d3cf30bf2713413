"""Experts in tensors of three dimensions, each as a block with layers of its own.

The weights of many models' experts lie in tensors of three dimensions. A layer of an expert is then
a module whose weight is a part of somebody else's parameter. While a verb needs them, the experts
hang below the module that has their weights, and its forward is a loop that calls one after the
other with the tokens that are routed to it. Nothing is copied: the parameters, their names and
their gradients stay where they are.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from steppe.activations import evaluate
from steppe.blocks.bare import without_hooks
from steppe.blocks.beside import OneBeside
from steppe.blocks.linear import PartOfLinear
from steppe.blocks.routed import Routing, current_rows
from steppe.errors import UnfitBlockError
from steppe.per_thread import PerThread

# Names of the tensors in Transformers: of two layers in one, of one, and of the second layer.
_FIRST, _DOWN = ("gate_up_proj", "up_proj"), "down_proj"
_ACT = "act_fn"
_ARGUMENTS = 3  # of the forward: tokens, the experts of each token, their weights
_TRIED = 4  # tokens on which the loop is compared with the module's own forward
_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}  # of the norm; half precision: _ROUGH
_ROUGH = 5e-2


class Experts:
    """The experts of one module, as `experts_of` finds them.

    Args:
        module: has the tensors ``gate_up_proj [E, 2F, D]`` (or ``up_proj [E, F, D]``) and
            ``down_proj [E, D, F]``, or each with its last two dimensions swapped.
        is_transposed: whether they are swapped.

    Attributes:
        module: the module with the tensors.
        each: the experts, in order.
        forward: runs them all, in place of the module's own forward.
    """

    def __init__(self, module: nn.Module, is_transposed: bool) -> None:
        self.module = module
        self.is_transposed = is_transposed
        self._parts: PerThread[dict[str, tuple[Tensor, ...]] | None] = PerThread(None)
        first = next(name for name in _FIRST if hasattr(module, name))
        down: Tensor = getattr(module, _DOWN)
        hidden, width = down.shape[1:] if is_transposed else down.shape[:0:-1]
        self.each = tuple(
            Expert(self, number, first, (width, hidden)) for number in range(len(down))
        )
        self.forward = ExpertsForward(self, list(inspect.signature(module.forward).parameters))

    @property
    def act(self) -> Callable[[Tensor], Tensor]:
        """The activation of all experts, but for those that were given another."""
        act: Callable[[Tensor], Tensor] = getattr(self.module, _ACT)
        return act

    def tensor(self, name: str, expert: int) -> Tensor:
        """The part of one of the module's tensors that belongs to an expert.

        In a call that is differentiated they are split once for all experts: the gradient of each
        part alone would be as large as the whole.
        """
        parts = self._parts.get()
        if parts is not None and name in parts:
            return parts[name][expert]
        whole: Tensor = getattr(self.module, name)
        return whole[expert]

    def split(self) -> None:
        """Begin a call: split the tensors if gradients are wanted."""
        if torch.is_grad_enabled():
            names = [layer.source for layer in (self.each[0].up, self.each[0].down)]
            names += [name for source in names if has_tensor(self.module, name := f"{source}_bias")]
            self._parts.set({name: getattr(self.module, name).unbind() for name in names})

    def join(self) -> None:
        """End a call."""
        self._parts.set(None)

    def require_agreement(self) -> None:
        """Refuse a module with another forward: compare the results on random tokens.

        Raises:
            UnfitBlockError: they differ; names the relative difference.
        """
        down: Tensor = getattr(self.module, _DOWN)
        if down.is_meta or type(down.data) is not Tensor:
            return
        name = type(self.module).__name__
        experts = len(self.each)
        generator = torch.Generator().manual_seed(0)
        chosen = min(2, experts)
        x = torch.randn(_TRIED, self.each[0].width, generator=generator).to(down)
        index = torch.rand(_TRIED, experts, generator=generator).topk(chosen).indices
        index = index.to(down.device)
        weights = torch.rand(_TRIED, chosen, generator=generator).to(down)
        twin = without_hooks(self.module)
        with torch.no_grad():
            # Without the wrapper of Transformers, which takes fewer dtypes.
            own = inspect.unwrap(type(twin).forward)(twin, x, index, weights)
            ours = Experts(twin, self.is_transposed).forward(x, index, weights)
        error = (own.double() - ours.double()).norm() / own.double().norm().clamp(min=1e-30)
        if not error <= _TOLERANCE.get(down.dtype, _ROUGH):  # NaN too
            raise UnfitBlockError(
                f"{name}: its forward computes something else of an expert than act(gate) · up and"
                f" down: on random tokens it differs by {float(error):.1%}. Leave its blocks out:"
                " where=lambda block: not block.is_routed"
            )


class ExpertLayer(PartOfLinear):
    """A linear layer of an expert: ``x Wᵀ + b`` with W and b parts of tensors of all experts.

    Args:
        experts: the experts that share the tensors.
        expert: its number.
        source: name of the tensor.
        rows: of the output, those that are this layer's.
        shape: input and output width.
    """

    def __init__(
        self,
        experts: Experts,
        expert: int,
        source: str,
        rows: tuple[int, int],
        shape: tuple[int, int],
    ) -> None:
        super().__init__(shape)
        self.experts = experts
        self.expert = expert
        self.source = source
        self.rows = rows

    @property
    def whole(self) -> nn.Module:
        """The module that has the tensors."""
        return self.experts.module

    @property
    def weight(self) -> Tensor:
        """W, ``[out, in]``, a view of the tensor."""
        whole = self.experts.tensor(self.source, self.expert)
        return self._own_rows(whole.T if self.experts.is_transposed else whole)

    @property
    def bias(self) -> Tensor | None:
        """B, ``[out]``, a view of the tensor, or None."""
        name = f"{self.source}_bias"
        if not has_tensor(self.experts.module, name):
            return None
        return self._own_rows(self.experts.tensor(name, self.expert))

    def _own_rows(self, tensor: Tensor) -> Tensor:
        return tensor if self.rows == (0, len(tensor)) else tensor[slice(*self.rows)]

    @property
    def held(self) -> list[tuple[dict[str, Any], str]]:
        """Where the tensors are that W and b are parts of."""
        parameters: dict[str, Any] = self.experts.module._parameters
        return [(parameters, self.source), (parameters, f"{self.source}_bias")]

    def extra_repr(self) -> str:
        """Its widths and where its weight is."""
        return f"{self.in_features}, {self.out_features}, {self.source}[{self.expert}]"


class Expert(nn.Module):
    """One expert: ``down(act(gate(x)) ⊙ up(x))``, or ``down(act(up(x)))``.

    Args:
        experts: all experts of the module.
        number: its place among them.
        first: name of the tensor of its first layer, or of the first two.
        widths: D and F.
    """

    def __init__(self, experts: Experts, number: int, first: str, widths: tuple[int, int]) -> None:
        super().__init__()
        self.experts = experts
        self.width, self.hidden = width, hidden = widths
        self.gate: ExpertLayer | None = None
        start = 0
        if first == _FIRST[0]:
            self.gate = ExpertLayer(experts, number, first, (0, hidden), widths)
            start = hidden
        self.up = ExpertLayer(experts, number, first, (start, start + hidden), widths)
        self.down = ExpertLayer(experts, number, _DOWN, (0, width), (hidden, width))

    def forward(self, x: Tensor) -> Tensor:
        """``[*, D]`` of ``[*, D]``."""
        act: Callable[[Tensor], Tensor] = self.act
        if self.gate is None:
            output: Tensor = self.down(act(self.up(x)))
        else:
            output = self.down(act(self.gate(x)) * self.up(x))
        return output

    def __getattr__(self, name: str) -> Any:
        """The activation is that of all experts until this one gets another."""
        if name == "act" and name not in self._modules:
            return self.experts.act
        return super().__getattr__(name)

    def __setattr__(self, name: str, value: Any) -> None:
        """That of all experts is not kept here too."""
        if name == "act" and value is self.experts.act:
            self._modules.pop(name, None)
            self.__dict__.pop(name, None)
        else:
            super().__setattr__(name, value)


class SharedActivation(nn.Module):
    """The activation of all experts as a module of one of them.

    Args:
        experts: the experts that share the activation.
    """

    def __init__(self, experts: Experts) -> None:
        super().__init__()
        self.experts = experts

    def forward(self, p: Tensor) -> Tensor:
        """σ(p), shape of p."""
        return self.experts.act(p)


class ExpertsForward:
    """In place of the forward of a module with experts: calls each that a token is routed to.

    Args:
        experts: of the module.
        parameters: of its own forward: the tokens, the experts of each, and their weights.
    """

    def __init__(self, experts: Experts, parameters: list[str]) -> None:
        self.experts = experts
        self._parameters = parameters

    def __call__(self, *args: Tensor, **kwargs: Tensor) -> Tensor:
        """The weighted sum of the outputs of each token's experts, ``[N, D]``.

        Called as the module's own forward: with the tokens ``[N, D]``, int64 ``[N, k]``, the
        experts of each token, and the weights of those, ``[N, k]``.
        """
        rest = [kwargs[name] for name in self._parameters[len(args) :]]
        hidden_states, top_k_index, top_k_weights = (*args, *rest)
        output = torch.zeros_like(hidden_states)
        routing = Routing(top_k_index, len(self.experts.each))
        weights = top_k_weights.reshape(-1)[routing.order]
        outside = current_rows.get()
        self.experts.split()
        try:
            for number, rows in routing:
                current_rows.set(rows)
                here = rows.index
                z = self.experts.each[number](hidden_states[here])
                z = z * weights[rows.span].unsqueeze(-1)
                output.index_add_(0, here, z.to(output.dtype))
        finally:
            self.experts.join()
            current_rows.set(outside)
        return output


_known: OneBeside[Experts] = OneBeside()


def experts_of(module: nn.Module) -> Experts | None:
    """The experts of a module that has their weights in its tensors, or None.

    They are the same objects for as long as anybody has one.

    Args:
        module: any.

    Example:
        >>> experts_of(nn.Linear(8, 8)) is None
        True
    """
    forward = module.__dict__.get("forward")
    if isinstance(forward, ExpertsForward):
        return forward.experts

    def make() -> Experts | None:
        is_transposed = _orientation(module)
        return None if is_transposed is None else Experts(module, is_transposed)

    return _known.get(module, make)


def has_tensor(module: nn.Module, name: str) -> bool:
    """Whether an attribute is a tensor."""
    return isinstance(getattr(module, name, None), Tensor)


def _orientation(module: nn.Module) -> bool | None:
    """Whether a module's tensors of experts are transposed; None if it has none that fit."""
    if not has_tensor(module, _DOWN) or getattr(module, _DOWN).ndim != 3:
        return None
    first = next((name for name in _FIRST if has_tensor(module, name)), None)
    act = getattr(module, _ACT, None)
    if first is None or not callable(act) or "forward" in module.__dict__:
        return None
    gate = getattr(type(module), "_apply_gate", None)
    if (
        getattr(gate, "__name__", "") not in ("", "_default_apply_gate")
        or not getattr(module, "is_concatenated", True)
        or getattr(module, "has_post_expert_norm", False)
        or len(inspect.signature(module.forward).parameters) != _ARGUMENTS
        or not _is_elementwise(act)
    ):
        return None
    layers = 2 if first == _FIRST[0] else 1
    (experts, *up), (same, *down) = getattr(module, first).shape, getattr(module, _DOWN).shape
    if experts != same or len(up) != 2:
        return None
    fits = {
        False: up == [layers * down[1], down[0]],
        True: up == [down[1], layers * down[0]],
    }
    said = getattr(module, "is_transposed", None)
    if said is not None:
        return bool(said) if fits[bool(said)] else None
    if all(fits.values()):  # widths swapped fit too: of one layer always
        return None
    return next((turned for turned, fit in fits.items() if fit), None)


def _is_elementwise(act: Callable[[Tensor], Tensor]) -> bool:
    """Whether an activation keeps the shape, and so is no gate and up in one."""
    parameters = list(act.parameters()) if isinstance(act, nn.Module) else []
    if any(parameter.is_meta for parameter in parameters):
        return True
    like = parameters[0] if parameters else torch.empty(())
    try:
        with torch.no_grad():
            return evaluate(act, torch.zeros(4).to(like)).shape == (4,)
    except (IndexError, RuntimeError, ValueError):
        return False
