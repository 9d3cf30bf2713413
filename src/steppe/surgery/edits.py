"""The edits that a `Journal` can take back, one class for each kind."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from enum import Enum, auto
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle

from steppe.blocks.block import Slot
from steppe.surgery.swapping import Swap, Swapped, pull_swap, swapped_of

HOLDS = "_steppe_holds"  # on a module: attribute → (number of holders, old value)


class Value(Enum):
    """In place of a value that there is none of; the same one in every copy."""

    ABSENT = auto()


class Edit(ABC):
    """One change that can be taken back."""

    @abstractmethod
    def undo(self) -> None:
        """Take the change back."""


@dataclass(eq=False)
class SlotEdit(Edit):
    """A change of one attribute of a module."""

    slot: Slot

    def undo(self) -> None:
        """Take the change back, and a copy need not do so any more."""
        self.undo_on(self.slot.module)
        swapped = swapped_of(self.slot.module)
        if swapped is not None and self in swapped.edits:
            swapped.edits.remove(self)

    @abstractmethod
    def undo_on(self, module: nn.Module) -> None:
        """Take the change back on a module that has the attributes of the slot's."""


@dataclass(eq=False)
class AttributeEdit(SlotEdit):
    """Another value of an attribute that was there."""

    old: object

    def undo_on(self, module: nn.Module) -> None:
        """Set the old value."""
        set_part(Slot(module, self.slot.name), self.old)


@dataclass(eq=False)
class AddedEdit(SlotEdit):
    """An attribute that was not there."""

    def undo_on(self, module: nn.Module) -> None:
        """Remove the attribute."""
        delattr(module, self.slot.name)


@dataclass(eq=False)
class ParameterEdit(AddedEdit):
    """A new parameter."""


@dataclass
class ItemEdit(Edit):
    """An object at the end of a list."""

    items: list[Any]
    item: object

    def undo(self) -> None:
        """Remove the object."""
        self.items.remove(self.item)


@dataclass
class HookEdit(Edit):
    """A hook."""

    handle: RemovableHandle

    def undo(self) -> None:
        """Remove the hook."""
        self.handle.remove()


@dataclass
class FreezeEdit(Edit):
    """A parameter taken out of training."""

    parameter: nn.Parameter
    required_grad: bool

    def undo(self) -> None:
        """Let it train again, if it did."""
        self.parameter.requires_grad_(self.required_grad)


@dataclass(eq=False)
class HoldEdit(SlotEdit):
    """A value that an attribute has for as long as any journal holds it."""

    def undo_on(self, module: nn.Module) -> None:
        """Let go: the last holder brings the old value back."""
        name = self.slot.name
        holds = dict(module.__dict__[HOLDS])  # a new one: the module's view shares the old one
        holders, old = holds.pop(name)
        if holders > 1:
            holds[name] = (holders - 1, old)
        elif old is Value.ABSENT:
            delattr(module, name)
        else:
            setattr(module, name, old)
        if holds:
            module.__dict__[HOLDS] = holds
        else:
            del module.__dict__[HOLDS]


@dataclass
class ClassEdit(Edit):
    """Another class of a module."""

    module: nn.Module
    swap: Swap

    def undo(self) -> None:
        """Take the class back."""
        pull_swap(self.module, self.swap)


@dataclass
class ReviverEdit(Edit):
    """A function that is called with each copy of a module."""

    swapped: Swapped

    def undo(self) -> None:
        """Forget the function."""
        self.swapped.reviver = None


def set_part(slot: Slot, value: object) -> None:
    """Setattr that lets a plain function follow a module, which nn.Module refuses."""
    if not isinstance(value, nn.Module):
        slot.module._modules.pop(slot.name, None)
    setattr(slot.module, slot.name, value)
