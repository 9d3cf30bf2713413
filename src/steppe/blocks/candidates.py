"""Modules that look like an MLP and are in no block, and the patterns that would name them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from steppe.blocks.experts import Expert, ExpertLayer
from steppe.blocks.linear import PartOfLinear, linear_shape, linear_weight

_ATTENTION = ("attn", "attention", "lora_", "base_layer")  # in a dotted name
_MLP = ("mlp", "feedforward", "ffn")  # in the name of a class
_LEVELS = 2  # modules above the last layer that are looked at for the first one
_SHOWN = 6  # of many, in a message


@dataclass(frozen=True)
class Candidate:
    """Modules that look like an MLP.

    Attributes:
        owner: dotted name of the module that holds its parts; empty for the model itself.
        up: path of the first linear layer below it, or names of expert tensors.
        down: path of the last one; empty for expert tensors.
        gate: path of a second layer of the first one's shape, before it; empty for none.
        act: path of the activation; empty where the forward calls a function.
        widths: D and F.
        parameters: number of entries of the weights.
        is_fused: whether the first layer is gate and up in one.
    """

    owner: str
    up: str
    down: str
    gate: str
    act: str
    widths: tuple[int, int]
    parameters: int
    is_fused: bool = False

    def __str__(self) -> str:
        """A line: its owner, its parts and its widths."""
        width, hidden = self.widths
        shape = f"{width} → {hidden} → {width}"
        where = self.owner or "the model"
        if not self.down:
            return f"{where}: expert tensors {self.up} ({shape})"
        kind = "gate and up in one, " if self.is_fused else ""
        gate = f"{self.gate}, " if self.gate else ""
        act = self.act or "an activation that is no module"
        return f"{where}: {kind}{gate}{self.up}, {act}, {self.down} ({shape})"

    def pattern(self) -> str:
        """A `BlockPattern` to paste, if a pattern can name it; else why not."""
        if not self.down:
            return "# experts in one tensor, with a layout or a gate that steppe does not know"
        if not self.act:
            return (
                f"# {self.owner or 'the model'}: its forward calls more than a function between"
                " its layers, or takes more than x"
            )
        first = f"gate_up={self.up!r}" if self.is_fused else f"up={self.up!r}"
        gate = f" gate={self.gate!r}," if self.gate else ""
        return f"BlockPattern(family='mine',{gate} {first}, act={self.act!r}, down={self.down!r})"


def candidates(root: nn.Module, covered: Collection[nn.Module] = ()) -> list[Candidate]:
    """Everything in a model that looks like an MLP.

    That is a linear layer D → F and, later, one F → D in one module or in two of one module, not in
    attention, F greater than D unless there is a gate or the class is named an MLP; or two tensors
    of experts. With F = D nothing else distinguishes it from attention.

    Args:
        root: the model.
        covered: linear layers that are known already.

    Returns:
        The candidates, in the order of the model's modules.
    """
    known = {id(getattr(module, "whole", module)) for module in covered}
    linears = {
        name: shape
        for name, module in _without_attention(root)
        if (shape := linear_shape(module)) is not None
        and id(module) not in known
        and not isinstance(module, PartOfLinear)
    }
    found: list[Candidate] = []
    used: set[str] = set()
    earlier: defaultdict[str, list[str]] = defaultdict(list)  # by the modules above
    for down, (hidden, width) in linears.items():
        owners = _above(down)
        for owner in owners:
            if not _may_be_mlp(root.get_submodule(owner), hidden != width):
                continue
            inside = [name for name in earlier[owner] if name not in used]
            ups = [name for name in inside if linears[name] == (width, hidden)]
            fused = [name for name in inside if linears[name] == (width, 2 * hidden)]
            # Of two narrower layers, without a gate, most are an adapter or a projection.
            if not ups and not fused:
                continue
            is_named = _is_named_mlp(root.get_submodule(owner))
            if len(ups) > 1 or fused or hidden > width or is_named:
                first = (ups or fused)[-2:]
                used.update((*first, down))
                found.append(_candidate(root, owner, first, down, (width, hidden), not ups))
                break
        for owner in owners:
            earlier[owner].append(down)
    return [*found, *_experts(root, known)]


def share_of(
    blocks_layers: Iterable[nn.Module],
    left: Iterable[Candidate],
    others: Iterable[nn.Module] = (),
) -> float:
    """The share of a model's MLP parameters that its blocks have, in [0, 1].

    Args:
        blocks_layers: the blocks' linear layers.
        left: the candidates that are in no block.
        others: linear layers that are left out too.
    """
    inside = sum(linear_weight(layer).numel() for layer in blocks_layers)
    outside = sum(candidate.parameters for candidate in left)
    outside += sum(linear_weight(layer).numel() for layer in others)
    return inside / max(inside + outside, 1)


def listed(found: Collection[Candidate], line: Callable[[Candidate], str] = str) -> str:
    """Lines of a message; of many candidates the first of each kind.

    Args:
        found: the candidates.
        line: makes the line of one.
    """
    kinds: dict[tuple[Any, ...], list[Candidate]] = {}
    for one in found:
        kinds.setdefault((one.up, one.gate, one.act, one.down, one.widths), []).append(one)
    lines = [
        f"  {line(alike[0])}" + (f" and {len(alike) - 1} more like it" if len(alike) > 1 else "")
        for alike in kinds.values()
    ]
    if len(lines) > _SHOWN:
        lines[_SHOWN:] = [f"  and {len(lines) - _SHOWN} other kinds"]
    return "\n".join(lines)


def _may_be_mlp(owner: nn.Module, widens: bool) -> bool:
    """Whether layers of a module can be those of one MLP: not those of two layers in a list."""
    if isinstance(owner, nn.ModuleList) and any(any(one.children()) for one in owner):
        return False
    return widens or _is_named_mlp(owner)


def _is_named_mlp(owner: nn.Module) -> bool:
    """Whether a module of two linear layers is an MLP by its class; heads have more of them."""
    name = type(owner).__name__.lower().replace("_", "")
    layers = [module for module in owner.modules() if linear_shape(module) is not None]
    return len(layers) == 2 and any(part in name for part in _MLP)


def _without_attention(root: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Modules outside of attention and of state space models, which have a ``conv1d``."""
    beside = ""
    for name, module in root.named_modules():
        if beside and name.startswith(beside):
            continue
        if hasattr(module, "conv1d") or type(module).__name__.endswith("Attention"):
            beside = f"{name}."
        elif not any(part in name.lower() for part in _ATTENTION):
            yield name, module


def _above(name: str) -> list[str]:
    """The names of the modules above one, nearest first, as many as are looked at."""
    names: list[str] = []
    while name and len(names) < _LEVELS:
        name = name.rpartition(".")[0]
        names.append(name)
    return names


def _candidate(
    root: nn.Module,
    owner: str,
    first: list[str],
    down: str,
    widths: tuple[int, int],
    is_fused: bool,
) -> Candidate:
    """A candidate of two layers, or of three, the first one being the gate."""
    start = len(owner) + 1 if owner else 0
    if is_fused:
        first = first[-1:]
    layers = [*first, down]
    return Candidate(
        owner=owner,
        up=first[-1][start:],
        down=down[start:],
        gate=first[0][start:] if len(first) > 1 else "",
        act=_activation(root.get_submodule(owner), first[-1][start:]),
        widths=widths,
        parameters=sum(linear_weight(root.get_submodule(name)).numel() for name in layers),
        is_fused=is_fused,
    )


def _activation(owner: nn.Module, up: str) -> str:
    """The path of the activation beside the first layer or in the owner; empty for none."""
    for path in dict.fromkeys((up.rpartition(".")[0], "")):
        parent = owner.get_submodule(path)
        for name, value in (*parent.named_children(), *vars(parent).items()):
            if is_activation(value) and not name.startswith("_"):
                return f"{path}.{name}" if path else name
    return ""


def is_activation(value: object) -> bool:
    """Whether something is a function of single entries, by where it comes from."""
    kind = value if callable(value) and not isinstance(value, nn.Module) else type(value)
    module = getattr(kind, "__module__", "") or ""
    name = getattr(kind, "__name__", "")
    return callable(value) and (
        module in ("torch.nn.modules.activation", "transformers.activations")
        or (module.startswith("torch") and name in ("relu", "gelu", "silu"))
        or module.startswith("steppe.activations")
    )


def _experts(root: nn.Module, known: Collection[int]) -> Iterator[Candidate]:
    """Modules with experts in tensors of three dimensions, ``[experts, *, *]``."""
    for owner, module in root.named_modules():
        is_convolution = type(module).__name__ == "ParametrizationList"  # its weight is 3-d too
        if id(module) in known or is_convolution or isinstance(module, Expert | ExpertLayer):
            continue
        tensors = {
            name: tuple(parameter.shape)
            for name, parameter in module.named_parameters(recurse=False)
            if parameter.ndim == 3
        }
        counts = {shape[0] for shape in tensors.values()}
        is_named = "expert" in type(module).__name__.lower()
        # LongCat's experts without weights are counted in one of the tensors only.
        if len(tensors) >= 2 and (len(counts) == 1 or is_named) and counts != {1}:
            sides = sorted(side for shape in tensors.values() for side in shape[1:])
            width = max(set(sides), key=sides.count)
            hidden = next((side for side in sides if side != width), width)
            is_pair = set(sides) <= {width, hidden, 2 * hidden} and max(sides) > 1
            if not is_pair or (hidden == width and not is_named):
                continue
            yield Candidate(
                owner=owner,
                up=", ".join(tensors),
                down="",
                gate="",
                act="",
                widths=(width, hidden),
                parameters=sum(module.get_parameter(name).numel() for name in tensors),
            )
