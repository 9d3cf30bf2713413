"""Journalled, reversible in-place edits of a model.

Every edit goes through a `Journal`, which can take all of them back in reverse order. Nothing here
copies or replaces a Parameter: an optimizer that holds them goes on.
"""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from steppe.blocks import Slot, find_nested_tensor_encoders

_HOLDS = "_steppe_holds"  # on a module: attribute → (number of holders, old value)


class _Edit(ABC):
    """One change that can be taken back."""

    @abstractmethod
    def undo(self) -> None:
        """Take the change back."""


@dataclass
class _AttributeEdit(_Edit):
    slot: Slot
    old: object

    def undo(self) -> None:
        _set(self.slot, self.old)


@dataclass
class _AddedEdit(_Edit):
    slot: Slot

    def undo(self) -> None:
        delattr(self.slot.module, self.slot.name)


@dataclass
class _ParameterEdit(_AddedEdit):
    """A new parameter."""


@dataclass
class _ItemEdit(_Edit):
    items: list[Any]
    item: object

    def undo(self) -> None:
        self.items.remove(self.item)


@dataclass
class _HookEdit(_Edit):
    handle: RemovableHandle

    def undo(self) -> None:
        self.handle.remove()


@dataclass
class _FreezeEdit(_Edit):
    parameter: nn.Parameter
    required_grad: bool

    def undo(self) -> None:
        self.parameter.requires_grad_(self.required_grad)


@dataclass
class _HoldEdit(_Edit):
    slot: Slot

    def undo(self) -> None:
        holds = self.slot.module.__dict__[_HOLDS]
        holders, old = holds[self.slot.name]
        holds[self.slot.name] = (holders - 1, old)
        if holders == 1:
            del holds[self.slot.name]
            setattr(self.slot.module, self.slot.name, old)
        if not holds:
            del self.slot.module.__dict__[_HOLDS]


class Journal:
    """The edits made to a model, in order."""

    def __init__(self) -> None:
        self._edits: list[_Edit] = []

    def set_attribute(self, slot: Slot, value: object) -> None:
        """Give an attribute another value; a module may take the place of a function."""
        old = getattr(slot.module, slot.name)
        _set(slot, value)
        self._edits.append(_AttributeEdit(slot, old))

    def add_attribute(self, slot: Slot, value: object) -> None:
        """Give a module an attribute that it does not have; no Parameter, buffer or module."""
        setattr(slot.module, slot.name, value)
        self._edits.append(_AddedEdit(slot))

    def append(self, items: list[Any], item: object) -> None:
        """Put an object at the end of a list."""
        items.append(item)
        self._edits.append(_ItemEdit(items, item))

    def hold_attribute(self, slot: Slot, value: object) -> None:
        """Give an attribute another value for as long as any journal wants it so.

        All must want the same value; the last one to let go brings the old one back.
        """
        holds = slot.module.__dict__.setdefault(_HOLDS, {})
        holders, old = holds.get(slot.name, (0, getattr(slot.module, slot.name)))
        setattr(slot.module, slot.name, value)
        holds[slot.name] = (holders + 1, old)
        self._edits.append(_HoldEdit(slot))

    def hold_nested_tensors_off(self, model: nn.Module) -> None:
        """Keep ``nn.TransformerEncoder`` from nested tensors, on which layers with hooks fail."""
        for encoder in find_nested_tensor_encoders(model):
            self.hold_attribute(Slot(encoder, "use_nested_tensor"), False)

    def added_parameters(self) -> list[Slot]:
        """Where the registered parameters are."""
        return [edit.slot for edit in self._edits if isinstance(edit, _ParameterEdit)]

    def add_parameter(self, slot: Slot, parameter: nn.Parameter) -> None:
        """Register a new parameter beside the existing ones."""
        slot.module.register_parameter(slot.name, parameter)
        self._edits.append(_ParameterEdit(slot))

    def add_module(self, slot: Slot, module: nn.Module) -> None:
        """Register a new module beside the existing ones."""
        slot.module.register_module(slot.name, module)
        self._edits.append(_AddedEdit(slot))

    def add_forward_pre_hook(
        self, module: nn.Module, hook: Callable[..., Any], with_kwargs: bool = False
    ) -> None:
        """Register a forward pre-hook."""
        handle = module.register_forward_pre_hook(hook, with_kwargs=with_kwargs)
        self._edits.append(_HookEdit(handle))

    def add_forward_hook(
        self, module: nn.Module, hook: Callable[..., Any], with_kwargs: bool = False
    ) -> None:
        """Register a forward hook."""
        handle = module.register_forward_hook(hook, with_kwargs=with_kwargs)
        self._edits.append(_HookEdit(handle))

    def freeze(self, parameter: nn.Parameter) -> None:
        """Take a parameter out of training.

        Its gradient goes: an optimizer with momentum would move it even by zeros.
        """
        self._edits.append(_FreezeEdit(parameter, parameter.requires_grad))
        parameter.grad = None
        parameter.requires_grad_(False)

    def followed_by(self, later: Journal) -> Journal:
        """A journal of these edits and then those of another."""
        joined = Journal()
        joined._edits = self._edits + later._edits
        return joined

    def undo(self) -> None:
        """Take all edits back, last one first."""
        while self._edits:
            self._edits.pop().undo()


def _set(slot: Slot, value: object) -> None:
    """Setattr that lets a plain function follow a module, which nn.Module refuses."""
    if not isinstance(value, nn.Module):
        slot.module._modules.pop(slot.name, None)
    setattr(slot.module, slot.name, value)


def forget_compiled_code() -> None:
    """Make torch.compile look again: it does not notice hooks added after the first call."""
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()
