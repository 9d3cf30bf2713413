"""`accelerate_`: routes a model's MLP blocks through the sparse kernels.

How a routed block works. No import shows it, because the model's own code makes the calls: its
forward, which may be anybody's, still calls the block's modules one after the other. `accelerate_`
swaps their classes, so that in a routed call each does something else:

    gate, or up without a gate    hands its input x on             `routing.parts.Entering`
    up beside a gate              returns 1: x times 1 is x        `routing.parts.Multiplying`
    activation, dropout           hand x on                        `routing.parts.Passing`
    down                          gets x, computes z = MLP(x)      `routing.parts.Arriving`

So the first layer hands its input on, the rest hand it on, and the last layer computes the whole
block and returns its result. That works wherever the modules hang, also in a layer whose MLP is no
module of its own. The call begins and ends with the forward of the owner, the innermost module that
holds all of them (`routing.parts.Owning`); its first module decides whether it is routed
(`routing.calls`), by what `Route.plan` knows of the block and `Computation` of the kernels. In all
other calls each module runs its own forward. docs/kernels.md has the picture.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import nn

from steppe.acceleration.computation import Computation, is_conv1d
from steppe.acceleration.dry_run import check_routes
from steppe.blocks.block import MLPBlock, Slot
from steppe.blocks.find import blocks_for, find_blocks
from steppe.blocks.fused import Half
from steppe.blocks.linear import is_linear, linear_weight
from steppe.blocks.patterns import BlockPattern
from steppe.blocks.wrappers import unwrap
from steppe.errors import AccelerationError
from steppe.ops.backend import backend_of
from steppe.plugins.applied import restore_ as take_out_plugins_
from steppe.plugins.applied import sparsification_of
from steppe.record import APPLIED
from steppe.routing.foreign import has_foreign_forward
from steppe.routing.laying import lay
from steppe.routing.places import owners_of, places_of
from steppe.routing.route import Route
from steppe.surgery.journal import Journal, forget_compiled_code
from steppe.surgery.pattern_notes import forget_patterns_, note_patterns_
from steppe.surgery.swapping import plain_class
from steppe.wiring.first_pass import not_looking

_ATTRIBUTE = "_steppe_acceleration"


@dataclass
class Acceleration:
    """An accelerated model: its routes, and how to take them back.

    Attributes:
        routes: of the blocks.
        settings: the other arguments of `accelerate_`.
        journal: takes all edits back.
    """

    routes: list[Route]
    settings: Settings
    journal: Journal

    @property
    def blocks(self) -> list[MLPBlock]:
        """The blocks that are routed."""
        return [route.block for route in self.routes]


@dataclass(frozen=True)
class Settings:
    """Arguments of `accelerate_`, under the same names."""

    max_density: float | None = None
    max_candidates: float | None = None
    weights_are_final: bool = False
    check: bool = True
    pack: bool = False

    def __post_init__(self) -> None:
        """Refuse a limit that is no share."""
        for name in ("max_density", "max_candidates"):
            share = getattr(self, name)
            if share is not None and not 0.0 <= share <= 1.0:
                raise ValueError(f"accelerate_: expected {name} in 0 … 1, got {share}")


def accelerate_(
    model: nn.Module,
    where: Callable[[MLPBlock], bool] | None = None,
    patterns: Sequence[BlockPattern] = (),
    max_density: float | None = None,
    max_candidates: float | None = None,
    weights_are_final: bool = False,
    check: bool = True,
    strict: bool = False,
    pack: bool = False,
) -> nn.Module:
    """Run the MLP blocks of a ReLU-type model on exact sparse kernels, forward and backward.

    The same function at any density: nothing is dropped and nothing is predicted. The kernels
    compute only the terms that a block's active entries need. The first product finds these
    entries, or, where few can be active, an int8 product and a bound that misses none. For backward
    a block keeps its active entries as column-tiled CSR. Call it after `sparsify_`; calling it
    again starts over.

    Parameters stay the same objects under the same names. A block runs its own modules, dense,
    where too many entries are active or there is too little to do, and wherever the kernels would
    compute something else: while a hook that is not steppe's is on one of its modules, a module or
    its ``forward`` has been replaced, or torch.func transforms the call. The same holds for dtypes
    other than float32 and bfloat16 and for devices other than the CPU, with two exceptions for CUDA
    devices: `pack`, and decoding 1 to 16 tokens in a CUDA graph, with `weights_are_final`, and for
    several tokens or a gate with `max_density` (docs/gpu.md).
    `explain` says how each block ran last, and why. `watch` and `measure` go on working.

    In inference the kernels read copies of some weights in another layout. A copy is used only
    while nothing was written to its weight, through PyTorch, ``.data`` or NumPy; the system's page
    protection shows writes (Linux 6.7 and newer). Elsewhere no copies are kept, and decoding runs
    dense, unless `weights_are_final`.

    Args:
        model: the model; wrappers are seen through.
        where: which blocks; all by default.
        patterns: patterns of your own for `find_blocks`, which are noted with the model.
        max_density: highest density at which a block runs sparse, in [0, 1], however little there
            is to do; in a CUDA graph of several tokens the share of units that are active for any
            of them. By default the limit that `steppe calibrate` has measured on this machine,
            else that of a built-in table.
        max_candidates: highest share of candidates, the entries that the int8 product cannot rule
            out, at which the first product is screened, in [0, 1], 0 for never; by default as
            above.
        weights_are_final: nobody changes weights from now on past PyTorch's own counter, as through
            ``.data`` or NumPy; changes that PyTorch counts, as an optimizer's, are always noticed.
            On CUDA devices also that none is changed while a graph is replayed that was captured
            before: capture another one after it.
        check: run each block once on random input through its own modules and on the kernels,
            forward and backward, in evaluation and in training, and refuse it where they differ.
            Otherwise the first call of each mode compares the tensors that flow between a block's
            modules.
        strict: refuse a model if some of its MLPs are not found, instead of warning once.
        pack: train with less memory, not faster: where there are no kernels that keep active
            entries only, as on CUDA devices, a block keeps for its backward pass one bit an entry
            and the values of the active ones, in the place of a hidden tensor. Its products are
            dense. Not for blocks with a gate, nor for calls with dropout between the layers.

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
    settings = Settings(max_density, max_candidates, weights_are_final, check, pack)
    root = unwrap(model)
    old = acceleration_of(root)
    if old is not None:
        decelerate(old)
    try:
        blocks = blocks_for("accelerate_", root, where, patterns, strict)
        for block in blocks:
            _check(block)
        with not_looking(root):
            _route(root, blocks, settings, patterns)
    except BaseException:  # also Ctrl-C: never half a model
        if old is not None:
            _route(root, old.blocks, replace(old.settings, check=False))
        raise
    if patterns and (sparsification := root.__dict__.get(APPLIED)) is not None:
        sparsification.keep()  # with them
    return model


def _route(
    root: nn.Module,
    blocks: list[MLPBlock],
    settings: Settings,
    patterns: Sequence[BlockPattern] = (),
) -> None:
    """Lay the routes of some blocks, check them, and note the patterns that found the blocks."""
    for weight in [linear_weight(block.down) for block in blocks]:
        backend = backend_of(weight)
        if backend is not None and settings.max_density is None:
            backend.prepare(weight.dtype)
    journal = Journal(transient=True)
    try:
        journal.hold_nested_tensors_off(root)
        journal.hold_parts(blocks)
        computations = [
            Computation(
                block,
                settings.max_density,
                settings.max_candidates,
                settings.pack,
                settings.weights_are_final,
            )
            for block in blocks
        ]
        routes = []
        places = places_of(root)
        for owner, computation in zip(owners_of(root, blocks), computations, strict=True):
            route = Route(computation.block, owner, computation)
            lay(route, places, journal)
            routes.append(route)
        if settings.check:
            check_routes(routes)
        for weight in [linear_weight(layer) for block in blocks for layer in block.layers]:
            backend = backend_of(weight)
            if backend is not None and settings.weights_are_final:
                backend.declare_final(weight)
        journal.add_attribute(Slot(root, _ATTRIBUTE), Acceleration(routes, settings, journal))
        journal.revive(root, _Again(tuple(block.name for block in blocks), settings))
        note_patterns_(root, patterns)
    except BaseException:
        journal.undo()
        forget_compiled_code()
        raise
    forget_compiled_code()


@dataclass(frozen=True)
class _Again:
    """Accelerates a copy of an accelerated model in the same way.

    The copy's weights are other memory, so nobody has said that they are final.
    """

    names: tuple[str, ...]
    settings: Settings

    def __call__(self, replica: nn.Module) -> None:
        blocks = find_blocks(replica, lambda block: block.name in self.names)
        settings = replace(self.settings, check=False, weights_are_final=False)
        _route(replica, blocks, settings)


def restore_(model: nn.Module) -> nn.Module:
    """Take everything back that `accelerate_` and `sparsify_` did: the exact inverse.

    Values that training has given to the model's own parameters stay; the plug-ins' parameters and
    the noted patterns go.

    Args:
        model: a model that `accelerate_` or `sparsify_` changed.

    Returns:
        The model.

    Raises:
        SparsificationError: it is neither accelerated nor carries a plug-in.
    """
    acceleration = acceleration_of(model)
    if acceleration is None:
        return take_out_plugins_(model)
    decelerate(acceleration)
    if sparsification_of(model) is not None:
        return take_out_plugins_(model)
    forget_patterns_(model)
    return model


def acceleration_of(model: nn.Module) -> Acceleration | None:
    """The acceleration of a model, or of the one in it (an ``AveragedModel``'s), or None.

    Raises:
        AccelerationError: several models in it are accelerated.
    """
    root = unwrap(model)
    if _ATTRIBUTE in vars(root):
        return cast(Acceleration, vars(root)[_ATTRIBUTE])
    found = {name: one for name, one in root.named_modules() if _ATTRIBUTE in vars(one)}
    if len(found) > 1:
        raise AccelerationError(
            f"{type(root).__name__} holds {len(found)} accelerated models: {', '.join(found)}. Name"
            " one of them"
        )
    return next((vars(one)[_ATTRIBUTE] for one in found.values()), None)


def decelerate(acceleration: Acceleration) -> None:
    """Take an acceleration back and free the memory that it kept."""
    for route in acceleration.routes:
        route.computation.forget()
    acceleration.journal.undo()
    forget_compiled_code()


def _check(block: MLPBlock) -> None:
    """Refuse a block that the kernels cannot compute."""
    leave_out = "Leave this block out: accelerate_(model, where=...)"
    if block.d_model == block.d_hidden:
        raise AccelerationError(
            f"{block.name}: expected a hidden width other than the model's, got {block.d_model} for"
            f" both. {leave_out}"
        )
    for layer in block.layers:
        computes = layer.whole if isinstance(layer, Half) else layer
        if not is_linear(plain_class(type(computes))) and not is_conv1d(computes):
            raise AccelerationError(
                f"{block.name}: expected nn.Linear or Conv1D, got {_described(computes)}, which may"
                " compute something else. Of a PEFT model merge the adapters first: model ="
                f" model.merge_and_unload(). {leave_out}"
            )
        weight = linear_weight(layer)
        if weight.dtype != linear_weight(block.down).dtype:
            raise AccelerationError(
                f"{block.name}: expected one dtype, got {weight.dtype} and"
                f" {linear_weight(block.down).dtype}. Convert the model: model.to({weight.dtype})"
            )
        with torch.no_grad():
            is_finite = weight.is_meta or bool(torch.isfinite(weight).all())
        if not is_finite:
            raise AccelerationError(
                f"{block.name}: a weight is NaN or infinite, and zero times that is not zero."
                " Load the model again, or start training again from an earlier checkpoint"
            )
    dropout = block.dropout
    if dropout is not None and plain_class(type(dropout)) not in (nn.Dropout, nn.Identity):
        raise AccelerationError(
            f"{block.name}: expected nn.Dropout, got {_described(dropout)}. {leave_out}"
        )
    fused = {layer.whole for layer in block.layers if isinstance(layer, Half)}
    others = [part for part in (block.act, dropout) if part is not None]
    parts = [*block.layers, *fused, *others]
    replaced = list(filter(has_foreign_forward, parts))
    if replaced:
        raise AccelerationError(
            f"{block.name}: the forward of {_described(replaced[0])} was replaced, and may compute"
            f" something else. Take that back first, or: {leave_out}"
        )


def _described(module: Any) -> str:
    """A module's class, and the class of torch's that it is a subclass of."""
    kind = plain_class(type(module))
    base = next((base for base in (nn.Linear, nn.Dropout) if issubclass(kind, base)), kind)
    return kind.__name__ if base is kind else f"{kind.__name__}, a subclass of nn.{base.__name__}"
