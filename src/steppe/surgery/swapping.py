"""Swapped classes and marked hooks, by which copies of an edited module are plain again.

A module's class is swapped for a subclass of the same name. It may have another behaviour, it is
another type for ``torch.compile``, and it says how the module is copied (``copy.deepcopy``,
``torch.save``, a process that is spawned): as an object of its own class, without the edits that
belong to whoever made them.
"""

from __future__ import annotations

import copy
import copyreg
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import nn
from torch.utils.hooks import RemovableHandle

_SWAPPED = "_steppe_swapped"  # on a module with a swapped class

Reviver = Callable[[nn.Module], object]

# Each class made here → the class that it stands for; class and behaviours → the class made of
# them; class → the class of its unfinished copies.
_BASES: dict[type[nn.Module], type[nn.Module]] = {}
_SUBCLASSES: dict[tuple[type[nn.Module] | None, ...], type[nn.Module]] = {}
_COPIES: dict[type[nn.Module], type[nn.Module]] = {}


class OwnHook:
    """A forward hook or pre-hook that a `Journal` has registered.

    Args:
        hook: the function that it calls.
        transient: a copy of it does nothing.

    Attributes:
        handle: takes it out. It is copied along with the hook: loading a handle keeps torch from
            giving its number, which is a hook's key in the module, to the next hook of a fresh
            process.
    """

    def __init__(self, hook: Callable[..., Any], transient: bool = False) -> None:
        self._hook = hook
        self._transient = transient
        self.handle: RemovableHandle | None = None

    def __call__(self, *args: Any) -> Any:
        """The result of the hook."""
        return self._hook(*args)

    @property
    def is_gone(self) -> bool:
        """Whether this stands in a copy in place of a transient hook."""
        return self._hook is _say_nothing

    def __reduce_ex__(self, protocol: Any) -> Any:
        """As an object is copied by default; a transient one as one that does nothing."""
        return (OwnHook, (_say_nothing,)) if self._transient else super().__reduce_ex__(protocol)


def _say_nothing(*args: Any) -> None:
    """The hook of a copy of a transient one."""


def is_own_hook(hook: object) -> bool:
    """Whether steppe has registered a hook that stands in a module's dicts of hooks."""
    return isinstance(hook, OwnHook)


class Undoable(Protocol):
    """An edit that a copy takes back."""

    def undo_on(self, module: nn.Module) -> None:
        """Take the edit back.

        Args:
            module: the module, or one with the same attributes.
        """


@dataclass(eq=False)
class Swap:
    """One swap of a module's class.

    Attributes:
        behaviour: the class that is mixed in; None for another class and nothing more.
    """

    behaviour: type[nn.Module] | None


@dataclass(eq=False)
class _Level:
    """Swaps of a module's class on top of a class that is not made here."""

    base: type[nn.Module]
    swaps: list[Swap] = field(default_factory=list)

    @property
    def kind(self) -> type[nn.Module]:
        """The class with all of the swaps."""
        return _subclass(self.base, tuple(swap.behaviour for swap in self.swaps))


@dataclass(eq=False)
class Swapped:
    """The swaps and edits of a module with a swapped class.

    Attributes:
        levels: its swaps; a level of its own above each class that others have put on top.
        edits: the edits that copies take back.
        reviver: called with each copy.
    """

    levels: list[_Level] = field(default_factory=list)
    edits: list[Undoable] = field(default_factory=list)
    reviver: Reviver | None = None


def swapped_of(module: nn.Module) -> Swapped | None:
    """The swaps and edits of a module with a swapped class, or None."""
    return module.__dict__.get(_SWAPPED)


def push_swap(module: nn.Module, behaviour: type[nn.Module] | None) -> Swap:
    """Swap a module's class.

    Args:
        module: the module.
        behaviour: overrides methods and calls ``super()``; None for another class and nothing more.

    Returns:
        The swap, for `pull_swap`.
    """
    swapped = module.__dict__.setdefault(_SWAPPED, Swapped())
    if not swapped.levels or swapped.levels[-1].kind is not type(module):
        swapped.levels.append(_Level(plain_class(type(module))))
    level = swapped.levels[-1]
    swap = Swap(behaviour)
    level.swaps.append(swap)
    module.__class__ = level.kind
    return swap


def pull_swap(module: nn.Module, swap: Swap) -> None:
    """Take a swap back, in any order; the class stays where others have put one on top.

    Args:
        module: the module.
        swap: of its class.
    """
    swapped: Swapped = module.__dict__[_SWAPPED]
    level = next(level for level in swapped.levels if swap in level.swaps)
    is_on_top = type(module) is level.kind
    level.swaps.remove(swap)
    if is_on_top:
        module.__class__ = level.kind
    if not level.swaps:
        swapped.levels.remove(level)
    if not swapped.levels:
        del module.__dict__[_SWAPPED]


def plain_class(kind: type[nn.Module]) -> type[nn.Module]:
    """The class that a swapped class stands for; `kind` itself if it is not swapped."""
    return _BASES.get(kind, kind)


def _subclass(
    base: type[nn.Module], behaviours: tuple[type[nn.Module] | None, ...]
) -> type[nn.Module]:
    """A class with some behaviours on top of another, the last one first."""
    if not behaviours:
        return base
    key = (base, *behaviours)
    if key not in _SUBCLASSES:
        below = _subclass(base, behaviours[:-1])
        behaviour = behaviours[-1]
        members: dict[str, Any] = {
            "__module__": base.__module__,
            "__qualname__": base.__qualname__,
            "__reduce_ex__": _reduce_ex,
        }
        if hasattr(base, "__deepcopy__"):
            members["__deepcopy__"] = _deepcopy
        # A class that others have put on top of one made here may have the behaviour already.
        is_new = behaviour is not None and not issubclass(below, behaviour)
        bases: tuple[Any, ...] = (behaviour, below) if is_new else (below,)
        _SUBCLASSES[key] = type(base.__name__, bases, members)
        _BASES[_SUBCLASSES[key]] = base
    return _SUBCLASSES[key]


class _Revival:
    """A reviver on its way into a copy; `copied` is true of the copy of it."""

    def __init__(self, reviver: Reviver | None, copied: bool = False) -> None:
        self.reviver = reviver
        self.copied = copied

    def __reduce__(self) -> tuple[Any, ...]:
        """Copied as one that has been copied; ``copy.copy`` of a module hands on the original."""
        return _Revival, (self.reviver, True)


def _view(module: nn.Module) -> nn.Module:
    """A module as an object of its own class, without the transient edits; it shares the rest.

    The dicts of hooks are the module's: handles refer to them, also those of others.
    """
    view = object.__new__(plain_class(type(module)))
    state = dict(module.__dict__)
    for name in ("_parameters", "_buffers", "_modules"):
        state[name] = dict(state[name])
    swapped: Swapped | None = state.pop(_SWAPPED, None)
    view.__dict__.update(state)
    for edit in reversed([] if swapped is None else swapped.edits):
        edit.undo_on(view)
    return view


def _reduce_ex(self: Any, protocol: int) -> Any:
    """``__reduce_ex__`` of a swapped class: an object of the module's own class."""
    if type(self) not in _BASES:  # of somebody else's class on top, which has its own rules
        return object.__reduce_ex__(self, protocol)
    swapped: Swapped | None = self.__dict__.get(_SWAPPED)
    reduced: Any = _view(self).__reduce_ex__(max(protocol, 2))
    make, *rest = reduced
    if make is not copyreg.__newobj__:  # type: ignore[attr-defined]
        return make, *rest  # the class says itself how it is made
    arguments, state = rest[:2]
    revival = _Revival(None if swapped is None else swapped.reviver)
    return _blank, arguments, (state, revival)


def _deepcopy(self: Any, memo: dict[Any, Any]) -> Any:
    """``__deepcopy__`` of a swapped class with a base that has one: that of the base, on a view."""
    if type(self) not in _BASES:
        base: Any = next(_BASES[kind] for kind in type(self).__mro__ if kind in _BASES)
        return base.__deepcopy__(self, memo)
    key = _SWAPPED, id(self)
    if key in memo:  # a part of it refers to it, and it is not complete yet
        return copy.deepcopy(memo[key], memo)
    view = memo[key] = _view(self)
    replica = copy.deepcopy(view, memo)
    swapped: Swapped | None = self.__dict__.get(_SWAPPED)
    _finish(replica, _Revival(None if swapped is None else swapped.reviver, copied=True))
    return replica


def _blank(kind: type[nn.Module]) -> nn.Module:
    """An object of a class, which finishes itself once it has its state.

    ``copy.deepcopy`` takes no function that sets the state, and calls ``__setstate__``.
    """
    if kind not in _COPIES:
        members = {
            "__module__": kind.__module__,
            "__qualname__": kind.__qualname__,
            "__setstate__": _setstate,
        }
        _COPIES[kind] = type(kind.__name__, (kind,), members)
    return object.__new__(_COPIES[kind])


def _setstate(self: Any, state: tuple[dict[str, Any], _Revival]) -> None:
    """``__setstate__`` of a copy that is about to become an object of the module's own class."""
    own, revival = state
    self.__class__ = type(self).__mro__[1]
    self.__setstate__(own)
    _finish(self, revival)


def _finish(replica: nn.Module, revival: _Revival) -> None:
    """Take out the remains of transient hooks, and revive."""
    for hooks, flags in (
        (replica._forward_pre_hooks, replica._forward_pre_hooks_with_kwargs),
        (replica._forward_hooks, replica._forward_hooks_with_kwargs),
    ):
        for key, hook in list(hooks.items()):
            if isinstance(hook, OwnHook) and hook.is_gone:
                del hooks[key]
                flags.pop(key, None)
    if revival.copied and revival.reviver is not None:
        revival.reviver(replica)
