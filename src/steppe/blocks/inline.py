"""MLPs whose forward calls the activation as a function, as ``F.relu(c_fc(x)).square()``.

Evaluating that forward, with stubs in the place of its layers, shows which function it calls. That
becomes a module beside the layers, and while a verb needs the block the forward is written out with
it: hooks, plug-ins and kernels act on it as on any activation.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from steppe.activations import Rectifier
from steppe.blocks.bare import without_hooks
from steppe.blocks.beside import OneBeside
from steppe.blocks.fused import Half
from steppe.blocks.recognition import Recognised, recognise, undisturbed

AROUND = "around"  # on an `Inline`: a function that calls the written out forward
INLINE = "inline"  # the name below the MLP of the module with the activation
_POINTS = 512
_Layers = tuple[nn.Module | None, nn.Module, nn.Module]
# Activations that are no rectifiers; the first that has the values is taken.
_KNOWN: tuple[Callable[[], nn.Module], ...] = (
    nn.SiLU,
    nn.GELU,
    lambda: nn.GELU("tanh"),
    nn.Sigmoid,
    nn.Tanh,
    nn.Mish,
    nn.ELU,
    nn.Softplus,
    nn.LeakyReLU,
    nn.ReLU6,
)


class Inline(nn.Module):
    """The activation that an MLP calls as a function, and the forward of the MLP written out.

    Args:
        mlp: the module.
        layers: `gate` or None, `up` and `down`.
        act: the activation.
        after: the dropout that the output goes through, or None.

    Attributes:
        act: the activation, which a plug-in may replace.
        mlp: the module; not below this one.
    """

    mlp: nn.Module
    written_out: WrittenOut

    def __init__(
        self,
        mlp: nn.Module,
        layers: _Layers,
        act: nn.Module,
        after: nn.Module | None,
    ) -> None:
        super().__init__()
        self.act = act
        self.__dict__.update(mlp=mlp, written_out=WrittenOut(self, layers, after))


class WrittenOut:
    """In place of the forward of an MLP: ``down(act(gate(x)) ⊙ up(x))``, with an activation module.

    Args:
        inline: which has the activation.
        layers: `gate` or None, `up` and `down`.
        after: the dropout that the output goes through, or None.
    """

    def __init__(
        self,
        inline: Inline,
        layers: _Layers,
        after: nn.Module | None,
    ) -> None:
        self.inline = inline
        self.layers = layers
        self.after = after

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        """As before."""
        if len(args) + len(kwargs) != 1:
            mlp: Any = self.inline.mlp
            output: Tensor = type(mlp).forward(mlp, *args, **kwargs)
            return output
        (x,) = (*args, *kwargs.values())
        around: Callable[..., Tensor] | None = self.inline.__dict__.get(AROUND)
        return self._run(x) if around is None else around(self._run, x)

    def _run(self, x: Tensor) -> Tensor:
        (gate, up, down), act = self.layers, self.inline.act
        if isinstance(gate, Half) and isinstance(up, Half):
            parts = gate.whole(x).chunk(2, dim=-1)
            hidden = act(parts[gate.number]) * parts[up.number]
        elif gate is None:
            hidden = act(up(x))
        else:
            hidden = act(gate(x)) * up(x)
        output: Tensor = down(hidden)
        return output if self.after is None else self.after(output)


# By module: its layers, and the activation with the dropout after `down`, or None for neither.
_Found = tuple[nn.Module, nn.Module | None]
_found: weakref.WeakKeyDictionary[nn.Module, tuple[list[tuple[int, int]], _Found | None]]
_found = weakref.WeakKeyDictionary()
_known: OneBeside[Inline] = OneBeside()


def inline_of(
    mlp: nn.Module, gate: nn.Module | None, up: nn.Module, down: nn.Module
) -> Inline | None:
    """The activation of an MLP that calls it as a function, or None if it computes something else.

    It is the same object as long as the module has these layers. The module is not run: a copy
    without hooks is, whose layers are stubs, on the CPU and with its own random numbers.

    Args:
        mlp: the module, which takes ``[*, D]`` alone.
        gate: the layer whose output is activated, of a gated block, else None.
        up: the other layer, or the only first one.
        down: the last layer.

    Example:
        >>> class MLP(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.c_fc, self.c_proj = nn.Linear(8, 32), nn.Linear(32, 8)
        ...
        ...     def forward(self, x):
        ...         return self.c_proj(self.c_fc(x).relu().square())
        >>> mlp = MLP()
        >>> inline_of(mlp, None, mlp.c_fc, mlp.c_proj).act
        Rectifier(alpha=0.0, beta=1.0)
    """
    written = mlp.__dict__.get("forward")
    layers = gate, up, down
    if isinstance(written, WrittenOut):
        return written.inline if written.layers == layers else None
    if written is not None:
        return None

    def make() -> Inline | None:
        ids = [(id(getattr(one, "whole", one)), getattr(one, "number", 0)) for one in layers]
        cached = _found.get(mlp)
        if cached is None or cached[0] != ids:
            cached = _found[mlp] = ids, _find(mlp, layers)
        if cached[1] is None:
            return None
        act, after = cached[1]
        return Inline(mlp, layers, copy.copy(act), after)

    return _known.get(mlp, make, lambda known: known.written_out.layers == layers)


def _find(mlp: nn.Module, layers: _Layers) -> _Found | None:
    """The activation of an MLP, and the dropout after its last layer or None; None for neither."""
    try:
        with undisturbed(), torch.no_grad():
            trial = _Trial(mlp, layers)
            act = _named(trial.sigma)
            return None if act is None else trial.confirm(act)
    except Exception:  # of somebody else's forward, which wants more than stubs give
        return None


class _Stub(nn.Module):
    """In the place of a layer: gives a tensor, whatever its input, and keeps the input.

    Args:
        gives: the tensor; None for ones.
        width: of the ones.
    """

    def __init__(self, gives: Tensor | None = None, width: int = 0) -> None:
        super().__init__()
        self.gives = gives
        self.width = width
        self.got: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        """The tensor, or ones ``[*, width]``."""
        self.got = x
        return x.new_ones(*x.shape[:-1], self.width) if self.gives is None else self.gives


class _Trial:
    """Evaluates the forward of an MLP, with stubs in the place of its layers.

    Args:
        mlp: the module.
        layers: `gate` or None, `up` and `down`.
    """

    def __init__(self, mlp: nn.Module, layers: _Layers) -> None:
        self.mlp = mlp
        self.gate, self.up, self.down = layers
        self.hidden = int(self.down.in_features)  # type: ignore[arg-type]
        self.width = int(self.down.out_features)  # type: ignore[arg-type]

    def run(self, p: Tensor, u: Tensor, training: bool = False) -> tuple[Tensor, Tensor]:
        """The input of `down` for pre-activations, and the output of the MLP.

        Args:
            p: ``[1, n, F]``, given out by the layer before the activation.
            u: ``[1, n, F]``, given out by `up` of a gated block.
            training: the mode.

        Returns:
            ``[1, n, F]``, ``[1, n, D]``.
        """
        # Not torch.manual_seed, which seeds accelerators too, with a stack trace for each.
        torch.default_generator.manual_seed(1)
        x = torch.randn(1, p.shape[1], self.width, dtype=p.dtype)
        last = _Stub(width=self.width)
        clone: Any = without_hooks(self.mlp, self._stubs(p, u, last)).train(training)
        torch.default_generator.manual_seed(0)
        output = type(clone).forward(clone, x)
        if last.got is None or last.got.shape != p.shape or output.shape != x.shape:
            raise ValueError("the last layer gets something else")
        return last.got, output

    def _stubs(self, p: Tensor, u: Tensor, last: _Stub) -> dict[int, nn.Module]:
        """The stubs, by the layers that they stand for."""
        gate, up = self.gate, self.up
        stubs: dict[int, nn.Module] = {id(self.down): last}
        if isinstance(gate, Half) and isinstance(up, Half):
            parts = (p, u) if gate.number == 0 else (u, p)
            stubs[id(up.whole)] = _Stub(torch.cat(parts, -1))
        elif gate is None:
            stubs[id(up)] = _Stub(p)
        else:
            stubs[id(gate)], stubs[id(up)] = _Stub(p), _Stub(u)
        return stubs

    def sigma(self, p: Tensor) -> Tensor:
        """σ of any number of values, the shape of p."""
        flat = p.reshape(-1)
        rows = -(-len(flat) // self.hidden)
        padded = torch.cat([flat, flat.new_zeros(rows * self.hidden - len(flat))])
        given = padded.view(1, rows, self.hidden)
        return self.run(given, torch.ones_like(given))[0].reshape(-1)[: len(flat)].view(p.shape)

    def confirm(self, act: nn.Module) -> _Found | None:
        """The activation with the dropout after `down`, if both say all that the MLP computes."""
        rows = -(-_POINTS // self.hidden)
        for dtype, room in ((torch.float64, 1e-9), (torch.float32, 1e-5)):
            p, u = torch.randn(2, 1, rows, self.hidden, dtype=dtype).mul(4.0)
            wanted = act(p) if self.gate is None else act(p) * u
            for training in (False, True):
                given = self.run(p, u, training)[0]
                if not torch.allclose(given, wanted, rtol=room, atol=room):
                    return None
        dropouts = [child for child in self.mlp.children() if isinstance(child, nn.Dropout)]
        for after in (None, *dropouts):
            if self._ends_with(after, p, u):
                return act, after
        return None

    def _ends_with(self, after: nn.Module | None, p: Tensor, u: Tensor) -> bool:
        """Whether the output of `down` goes through a dropout, or for None straight out."""
        ones = p.new_ones(1, p.shape[1], self.width)
        for training in (False, True):
            output = self.run(p, u, training)[1]
            torch.default_generator.manual_seed(0)
            expected = ones if after is None else without_hooks(after).train(training)(ones)
            if not torch.equal(output, expected):
                return False
        return True


def _named(sigma: Callable[[Tensor], Tensor]) -> nn.Module | None:
    """The activation module that has the values of a function, or None."""
    with torch.enable_grad():
        found = recognise(sigma)
    if isinstance(found, Recognised):
        if found.shift:
            return None
        is_relu = (found.alpha, found.beta) == (1.0, 0.0)
        return nn.ReLU() if is_relu else Rectifier(found.alpha, found.beta)
    points = torch.linspace(-12.0, 12.0, _POINTS, dtype=torch.float64)
    values = sigma(points)
    for make in _KNOWN:
        act = make()
        if torch.allclose(act(points), values, rtol=1e-11, atol=1e-13):
            return act
    return None
