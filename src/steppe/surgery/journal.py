"""Journalled, reversible in-place edits of a model.

Every edit goes through a `Journal`, which can take all of them back in reverse order. Nothing here
copies or replaces a Parameter: an optimizer that holds them goes on.

Some edits are part of the model (a plug-in's), others belong to whoever made them (a monitor's, a
route's around a block): those go through ``Journal(transient=True)``, and no copy of the model has
them, whether by ``copy.deepcopy``, ``torch.save`` or a process that is spawned. The class of each
module that such a journal edits is swapped for a subclass of the same name, which says how to copy
it: as an object of its own class, with the edits taken back.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from steppe.blocks.block import MLPBlock, Slot
from steppe.blocks.experts import ExpertLayer
from steppe.blocks.fused import Half
from steppe.blocks.inline import INLINE, Inline
from steppe.blocks.nested import find_nested_tensor_encoders
from steppe.blocks.routed import ListedTokens
from steppe.surgery.edits import (
    HOLDS,
    AddedEdit,
    AttributeEdit,
    ClassEdit,
    Edit,
    FreezeEdit,
    HoldEdit,
    HookEdit,
    ItemEdit,
    ParameterEdit,
    ReviverEdit,
    SlotEdit,
    Value,
    set_part,
)
from steppe.surgery.swapping import OwnHook, Reviver, Swapped, push_swap, swapped_of


class Journal:
    """The edits made to a model, in order.

    Args:
        transient: no copy of the model has the edits of attributes, classes and hooks.
    """

    def __init__(self, transient: bool = False) -> None:
        self._edits: list[Edit] = []
        self._transient = transient
        self._swapped: set[nn.Module] = set()  # by this journal

    def set_attribute(self, slot: Slot, value: object) -> None:
        """Give an attribute another value; a module may take the place of a function."""
        edit = AttributeEdit(slot, getattr(slot.module, slot.name))
        self._note(edit)
        set_part(slot, value)

    def add_attribute(self, slot: Slot, value: object) -> None:
        """Give a module an attribute that it does not have; no Parameter, buffer or module."""
        setattr(slot.module, slot.name, value)
        self._note(AddedEdit(slot))

    def append(self, items: list[Any], item: object) -> None:
        """Put an object at the end of a list."""
        items.append(item)
        self._edits.append(ItemEdit(items, item))

    def hold_attribute(self, slot: Slot, value: object) -> None:
        """Give an attribute another value for as long as any journal wants it so.

        It may be one that the module itself does not have. All must want the same value; the last
        one to let go brings the old one back.
        """
        holds = slot.module.__dict__.get(HOLDS, {})
        holders, old = holds.get(slot.name, (0, slot.module.__dict__.get(slot.name, Value.ABSENT)))
        setattr(slot.module, slot.name, value)
        slot.module.__dict__[HOLDS] = {**holds, slot.name: (holders + 1, old)}
        self._note(HoldEdit(slot))

    def hold_nested_tensors_off(self, model: nn.Module) -> None:
        """Keep ``nn.TransformerEncoder`` from nested tensors, on which layers with hooks fail."""
        for encoder in find_nested_tensor_encoders(model):
            self.hold_attribute(Slot(encoder, "use_nested_tensor"), False)

    def hold_parts(self, blocks: Sequence[MLPBlock]) -> None:
        """Let layers that are parts of larger ones, and experts, run as layers of blocks.

        Args:
            blocks: those without such layers are left as they are.

        Raises:
            UnfitBlockError: a module with experts computes something else.
        """
        self._hold_experts(blocks)
        for block in blocks:
            inline = block.act_slot.module
            if isinstance(inline, Inline):
                inline.train(inline.mlp.training)
                self.hold_attribute(Slot(inline.mlp, INLINE), inline)
                self.hold_attribute(Slot(inline.mlp, "forward"), inline.written_out)
            gate, up = block.gate, block.up
            if not isinstance(gate, Half) or not isinstance(up, Half):
                continue
            fused = up.whole
            for name, half in (("gate", gate), ("up", up)):
                half.train(fused.training)
                self.hold_attribute(Slot(fused, name), half)
            self.hold_attribute(Slot(fused, "forward"), up.halves.forward)

    def _hold_experts(self, blocks: Sequence[MLPBlock]) -> None:
        """Let experts run as blocks, and know which tokens each gets.

        Those whose weights lie in one tensor come below the module that has it, and it calls them.

        Args:
            blocks: those that are no such experts are left as they are.

        Raises:
            UnfitBlockError: the module computes something else.
        """
        layers = [block.down for block in blocks if isinstance(block.down, ExpertLayer)]
        for experts in {id(layer.experts): layer.experts for layer in layers}.values():
            module = experts.module
            if "forward" not in module.__dict__:
                experts.require_agreement()
            for number, expert in enumerate(experts.each):
                expert.train(module.training)
                self.hold_attribute(Slot(module, str(number)), expert)
            self.hold_attribute(Slot(module, "forward"), experts.forward)
        tokens: dict[nn.Module, ListedTokens] = {}
        for block in blocks:
            router = block.routed_in
            if router is None or isinstance(block.down, ExpertLayer):
                continue
            if router not in tokens:
                tokens[router] = listed = ListedTokens()
                self.add_forward_pre_hook(router, listed.enter, with_kwargs=True)
                self.add_forward_hook(router, listed.leave, always=True)
            for layer in block.layers[:-1]:
                self.add_forward_pre_hook(layer, tokens[router].look_up)

    def added_parameters(self) -> list[Slot]:
        """Where the registered parameters are."""
        return [edit.slot for edit in self._edits if isinstance(edit, ParameterEdit)]

    def added_tensors(self) -> list[Slot]:
        """Where parameters, and modules that may hold tensors, were put."""
        slots = [edit.slot for edit in self._edits if isinstance(edit, AddedEdit | AttributeEdit)]
        return [
            slot
            for slot in slots
            if isinstance(getattr(slot.module, slot.name), nn.Parameter | nn.Module)
        ]

    def add_parameter(self, slot: Slot, parameter: nn.Parameter) -> None:
        """Register a new parameter beside the existing ones."""
        slot.module.register_parameter(slot.name, parameter)
        self._note(ParameterEdit(slot))

    def add_module(self, slot: Slot, module: nn.Module) -> None:
        """Register a new module beside the existing ones."""
        slot.module.register_module(slot.name, module)
        self._note(AddedEdit(slot))

    def add_forward_pre_hook(
        self,
        module: nn.Module,
        hook: Callable[..., Any],
        with_kwargs: bool = False,
        first: bool = False,
    ) -> None:
        """Register a forward pre-hook; with `first` it comes before those that are there."""
        own = OwnHook(hook, self._transient)
        handle = module.register_forward_pre_hook(own, with_kwargs=with_kwargs)
        if first:
            _move_to_front(module._forward_pre_hooks, handle.id)
        self._note_hook(module, own, handle)

    def add_forward_hook(
        self,
        module: nn.Module,
        hook: Callable[..., Any],
        with_kwargs: bool = False,
        always: bool = False,
    ) -> None:
        """Register a forward hook; with `always` it is called also where the forward raises."""
        own = OwnHook(hook, self._transient)
        handle = module.register_forward_hook(own, with_kwargs=with_kwargs, always_call=always)
        self._note_hook(module, own, handle)

    def freeze(self, parameter: nn.Parameter) -> None:
        """Take a parameter out of training.

        Its gradient goes: an optimizer with momentum would move it even by zeros.
        """
        self._edits.append(FreezeEdit(parameter, parameter.requires_grad))
        parameter.grad = None
        parameter.requires_grad_(False)

    def swap_class(self, module: nn.Module, behaviour: type[nn.Module] | None) -> None:
        """Give a module another behaviour; its parameters, hooks and name stay.

        Its new class is the same one every time: a subclass of `behaviour` and of its own class,
        under the name of its own class. Copies of the module are of its own class.

        Others may put a class of their own on top (FSDP2, ``torch.nn.utils.parametrize``), which
        stays when the swap is taken back, and with it the behaviour: it must act as the module's
        own class once there is nothing left for it to do.

        torch.compile does not guard on hooks and would run its old code, but it guards on types:
        with another class it traces the hooks, and with the old one back it runs the old code.

        Args:
            module: the module.
            behaviour: overrides methods and calls ``super()``; None for another class and nothing
                more.
        """
        self._edits.append(ClassEdit(module, push_swap(module, behaviour)))
        self._swapped.add(module)

    def revive(self, module: nn.Module, reviver: Reviver) -> None:
        """Have every copy of a module handed to a function as soon as it is complete.

        A copy has none of the transient edits; this is how to make some of them again. A module
        that says itself how it is copied (by ``__reduce__``) is copied without.

        Args:
            module: a module, the root as a rule: when it is complete, so are all modules below.
            reviver: is copied along; called with the module's copy, at the end of
                ``copy.deepcopy`` or of unpickling it. Not called for ``copy.copy``, whose
                submodules are the same.
        """
        swapped = self._swap_once(module)
        swapped.reviver = reviver
        self._edits.append(ReviverEdit(swapped))

    def followed_by(self, later: Journal) -> Journal:
        """A journal of these edits and then those of another."""
        joined = Journal(self._transient)
        joined._edits = self._edits + later._edits
        joined._swapped = self._swapped | later._swapped
        return joined

    def undo(self) -> None:
        """Take all edits back, last one first."""
        while self._edits:
            self._edits.pop().undo()
        self._swapped.clear()

    def _swap_once(self, module: nn.Module) -> Swapped:
        """See to it that the journal has swapped a module's class."""
        if module not in self._swapped:
            self.swap_class(module, None)
        swapped = swapped_of(module)
        assert swapped is not None
        return swapped

    def _note(self, edit: SlotEdit) -> None:
        """Take an edit down, and let copies take it back if it is transient."""
        if self._transient:
            self._swap_once(edit.slot.module).edits.append(edit)
        self._edits.append(edit)

    def _note_hook(self, module: nn.Module, hook: OwnHook, handle: RemovableHandle) -> None:
        """Take a hook down; the class takes transient ones out of copies of the module."""
        hook.handle = handle
        if self._transient:
            self._swap_once(module)
        self._edits.append(HookEdit(handle))


def forget_compiled_code() -> None:
    """Make torch.compile look again: it does not notice hooks added after the first call."""
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()


def _move_to_front(hooks: dict[int, Any], key: int) -> None:
    """Let a registered hook be called before the others.

    ``prepend=True`` moves it in the order of the OrderedDict alone. torch.compile up to torch 2.12
    finds a hook by its place in the order of the plain dict below, and fails on another one: so
    both orders are made the same.
    """
    others = [(other, hook) for other, hook in hooks.items() if other != key]
    ordered = [(key, hooks[key]), *others]
    hooks.clear()
    hooks.update(ordered)
