"""Match the table of patterns against the modules of a model."""

from __future__ import annotations

from collections.abc import Container, Iterator, Sequence
from itertools import islice, takewhile
from typing import NamedTuple

from torch import nn

from steppe.blocks.block import MLPBlock, Slot
from steppe.blocks.experts import Expert, experts_of
from steppe.blocks.fused import halves_of
from steppe.blocks.huggingface import stack_of
from steppe.blocks.inline import Inline, inline_of
from steppe.blocks.linear import PartOfLinear, linear_shape
from steppe.blocks.pattern_values import pattern_noted_on
from steppe.blocks.patterns import OTHER_MLP_NORMS, PATTERNS, BlockPattern
from steppe.blocks.wrappers import (
    ancestors,
    owner_name,
    part_at,
    place_of,
    see_through,
    slot_at,
    wrapped_in,
)

# Norms whose output a layer's router and experts read, where none of the others is beside them.
_EXPERTS_NORMS = (
    *("post_attention_layernorm", "pre_ff_layernorm", "ffn_norm", "layer_norm", "ff_layer_norm"),
)


def matches(
    root: nn.Module, patterns: Sequence[BlockPattern]
) -> Iterator[tuple[str, nn.Module, BlockPattern | None, MLPBlock]]:
    """Every block that a pattern names, in forward order.

    Args:
        root: the model.
        patterns: tried first; then the one that is noted on an owner, then the built-in ones.

    Yields:
        Name of the owner, the owner, the pattern that matched (None where a block is found without
        one), the block.
    """
    seen: set[int] = set()
    for name, owner in root.named_modules():
        if wrapped_in(owner) is not None or isinstance(owner, Expert | PartOfLinear | Inline):
            continue
        for expert in _expert_blocks(root, name, owner):
            seen.add(id(expert.up))
            yield name, owner, None, expert
        if not owner._modules:
            continue
        for pattern in (*patterns, *pattern_noted_on(owner), *PATTERNS):
            if pattern.down.partition(".")[0] not in owner._modules:
                continue  # most rows: in a large model this loop takes the time
            block = _match(root, name, owner, pattern, seen)
            if block is not None:
                seen.add(id(block.up))
                yield name, owner, pattern, block
                break


class _Layers(NamedTuple):
    """The linear layers of a block, and its widths D and F."""

    gate: nn.Module | None
    up: nn.Module
    down: nn.Module
    widths: tuple[int, int]


def _layers_of(owner: nn.Module, pattern: BlockPattern) -> _Layers | None:
    """The linear layers that hang below `owner` by `pattern`, or None if they do not fit."""
    down = part_at(owner, pattern.down)
    if pattern.gate_up is None:
        up = part_at(owner, pattern.up)
        gate = None if pattern.gate is None else part_at(owner, pattern.gate)
        if pattern.gate is not None and not isinstance(gate, nn.Module):
            return None
    else:
        fused = part_at(owner, pattern.gate_up)
        halves = halves_of(fused) if isinstance(fused, nn.Module) else None
        if halves is None:
            return None
        gate, up = halves.both if pattern.gate_first else halves.both[::-1]
    if not isinstance(up, nn.Module) or not isinstance(down, nn.Module):
        return None
    widths, down_shape = linear_shape(up), linear_shape(down)
    if widths is None or down_shape != widths[::-1]:
        return None
    return _Layers(gate, up, down, widths)


def _act_slot(owner: nn.Module, pattern: BlockPattern, layers: _Layers) -> Slot | None:
    """The attribute that holds the activation, made where the forward calls a function."""
    if pattern.act:
        return slot_at(owner, pattern.act)
    mlp = part_at(owner, _shared_path(pattern))
    inline = inline_of(mlp, layers.gate, layers.up, layers.down)
    return None if inline is None else Slot(inline, "act")


def _match(
    root: nn.Module, name: str, owner: nn.Module, pattern: BlockPattern, seen: Container[int]
) -> MLPBlock | None:
    """The block that hangs below `owner` by `pattern`; None for none, and if its `up` was seen."""
    layers = _layers_of(owner, pattern)
    norm = None if pattern.norm is None else part_at(owner, pattern.norm)
    if layers is None or (pattern.norm is not None and not isinstance(norm, nn.Module)):
        return None
    # A layer's MLP is an owner too, of the same block: asked here, since evaluation takes long.
    if id(layers.up) in seen:
        return None
    if pattern.act and slot_at(owner, pattern.act) is None:
        return None
    if pattern.when is not None and not pattern.when(owner):  # which may count on all the parts
        return None
    act_slot = _act_slot(owner, pattern, layers)
    router = _router_of(root, name) if pattern.is_expert else None
    if act_slot is None or (pattern.is_expert and router is None):
        return None
    if router is not None:
        norm = _experts_norm(root, name.rpartition(".")[0])
    dropout = None if pattern.dropout is None else part_at(owner, pattern.dropout)
    dropout_slot = None
    if pattern.dropout and isinstance(dropout, float):
        dropout_slot = Slot(*place_of(owner, pattern.dropout))
    sequence_first = pattern.sequence_first is not None and pattern.sequence_first(owner)
    return MLPBlock(
        name=owner_name(name, owner),
        norm=norm,
        up=layers.up,
        gate=layers.gate,
        act=see_through(act_slot.value),
        down=layers.down,
        dropout=dropout if isinstance(dropout, nn.Module) else None,
        d_model=layers.widths[0],
        d_hidden=layers.widths[1],
        family=pattern.family,
        norm_is_shared=pattern.norm_is_shared or (router is not None and norm is not None),
        token_dim=0 if sequence_first else 1,
        act_slot=act_slot,
        act_flags=tuple((Slot(owner, flag), value) for flag, value in pattern.act_flags),
        stack=stack_of(root, name),
        routed_in=router,
        dropout_slot=dropout_slot,
    )


def _expert_blocks(root: nn.Module, name: str, owner: nn.Module) -> Iterator[MLPBlock]:
    """The blocks of the experts that `owner` has the weights of, if it has any."""
    experts = experts_of(owner)
    if experts is None:
        return
    stack = stack_of(root, name)
    norm = _experts_norm(root, name)
    for number, expert in enumerate(experts.each):
        act_slot = Slot(expert, "act")
        yield MLPBlock(
            name=f"{owner_name(name, owner)}.{number}",
            norm=norm,
            up=expert.up,
            gate=expert.gate,
            act=see_through(act_slot.value),
            down=expert.down,
            dropout=None,
            d_model=expert.width,
            d_hidden=expert.hidden,
            family=f"experts of {type(owner).__name__}",
            norm_is_shared=norm is not None,  # by the router
            token_dim=1,
            act_slot=act_slot,
            act_flags=(),
            stack=stack,
            routed_in=owner,
        )


def _experts_norm(root: nn.Module, name: str) -> nn.Module | None:
    """The norm whose output the experts in a module read, with the router; None if unknown."""
    norms = (
        norm
        for ancestor in islice(ancestors(root, name), 1, 3)
        if not any(hasattr(ancestor, other) for other in OTHER_MLP_NORMS)
        for path in _EXPERTS_NORMS
        if isinstance(norm := part_at(ancestor, path), nn.Module)
    )
    return next(norms, None)


def _router_of(root: nn.Module, name: str) -> nn.Module | None:
    """The module that runs the list of modules that `name` is in; None if it is in none."""
    parent, _, _ = name.rpartition(".")
    listed = root.get_submodule(parent)
    if not isinstance(listed, nn.ModuleList | nn.ModuleDict) or not parent:
        return None
    if type(listed).forward not in (nn.ModuleList.forward, nn.ModuleDict.forward):
        return listed
    return root.get_submodule(parent.rpartition(".")[0])


def _shared_path(pattern: BlockPattern) -> str:
    """Path of the innermost module that has the layers of a pattern."""
    paths = [path.split(".") for path in (pattern.gate_up or pattern.up, pattern.down)]
    shared = takewhile(lambda level: len(set(level)) == 1, zip(*paths, strict=False))
    return ".".join(level[0] for level in shared)
