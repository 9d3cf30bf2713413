"""Looks at the first pass through each block of a model: does it compute as its pattern says?

Hooks on the parts of a block hand its tensors to a `Witness`. They are gone as soon as one call of
the block was seen whole and right; on one that is wrong they stay, and refuse it every time.
"""

from __future__ import annotations

import threading
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from steppe.blocks.bare import HOOKS
from steppe.blocks.block import MLPBlock, Slot
from steppe.blocks.experts import ExpertLayer
from steppe.errors import WiringError
from steppe.per_thread import PerThread
from steppe.surgery.journal import Journal
from steppe.surgery.swapping import is_own_hook
from steppe.wiring.witness import Witness, version_of

_PENDING = "_steppe_first_pass"  # on a block's last layer: who looks at its first pass
# So many calls that begin and are not seen whole (a part is compiled, or called as a function) are
# enough: each of them keeps tensors.
_PATIENCE = 32


@contextmanager
def looking(looks: Sequence[Look]) -> Iterator[None]:
    """Look at blocks while this lasts, until each was seen."""
    try:
        for look in looks:
            look.begin()
        yield
    finally:
        for look in looks:
            look.pause()


def look_later(root: nn.Module, blocks: Sequence[MLPBlock], with_norm: Collection[str]) -> None:
    """Look at the blocks of a model that `sparsify_` has changed in the pass that comes.

    Args:
        root: the model; copies of it are not looked at.
        blocks: of it.
        with_norm: names of the blocks whose norm is used.
    """
    old = {look.block.name: look for look in _pause_all(root)}
    names = names_of(root)
    for block in filter(is_to_be_seen, blocks):
        before = old.pop(block.name, None)
        used = block.name in with_norm or (before is not None and before.with_norm)
        look = Look(root, names, block, "sparsify_", used, "steppe.restore_(model)")
        look.begin(is_kept=True)
    for look in old.values():
        look.begin(is_kept=True)


def stop_looking(root: nn.Module) -> None:
    """End the looks of `look_later`."""
    _pause_all(root)


@contextmanager
def not_looking(root: nn.Module) -> Iterator[None]:
    """Have the hooks of `look_later` off, for edits that are to lie below them."""
    looks = _pause_all(root)
    try:
        yield
    finally:
        for look in looks:
            look.begin(is_kept=True)


def _pause_all(root: nn.Module) -> list[Look]:
    """Take the hooks of `look_later` off, and return their looks."""
    looks = [vars(module)[_PENDING] for module in root.modules() if _PENDING in vars(module)]
    for look in looks:
        look.pause()
    return looks


def names_of(root: nn.Module) -> dict[nn.Module, str]:
    """The names of a model's modules."""
    return {module: name for name, module in root.named_modules()}


def is_to_be_seen(block: MLPBlock) -> bool:
    """Whether somebody else's forward calls the parts of a block; steppe's own is no question."""
    return not isinstance(block.down, ExpertLayer)


class Look:
    """At the first pass through one block.

    Args:
        root: the model.
        names: of its modules, see `names_of`.
        block: of it.
        verb: the function that the user has called.
        with_norm: whether the block's norm is used.
        undo: the call that must come before another try; empty for none.

    Attributes:
        is_over: whether it has seen a whole call.
    """

    def __init__(
        self,
        root: nn.Module,
        names: Mapping[nn.Module, str],
        block: MLPBlock,
        verb: str,
        with_norm: bool = False,
        undo: str = "",
    ) -> None:
        self.block = block
        self.is_over = False
        # An expert gets some tokens of the norm's output.
        self.with_norm = with_norm and block.norm is not None and not block.is_routed
        self._verb = verb
        self._undo = undo
        act = block.current_act
        self._act = act if isinstance(act, nn.Module) else None
        parts = [*block.layers, self._act, block.dropout, block.norm if self.with_norm else None]
        self._parts = [
            (part, _place_of(root, names.get(part, ""))) for part in parts if part is not None
        ]
        self._norm_name = names.get(block.norm, "") if block.norm is not None else ""
        self._journal = Journal(transient=True)
        self._lock = threading.Lock()
        self._begun = 0
        self._forget()

    def begin(self, is_kept: bool = False) -> None:
        """Put the hooks on, unless it is over.

        Args:
            is_kept: by the block, which no copy does.
        """
        if self.is_over:
            return
        block, journal = self.block, self._journal
        if is_kept:
            journal.add_attribute(Slot(block.down, _PENDING), self)
        if self.with_norm:
            assert block.norm is not None
            journal.add_forward_hook(block.norm, self._see_norm)
        for layer in block.layers[:-1]:
            journal.add_forward_pre_hook(layer, self._see_input, first=True)
        journal.add_forward_hook(block.activated, self._see_activated)
        if block.gate is not None:
            journal.add_forward_hook(block.up, self._see_up)
        if self._act is not None:
            journal.add_forward_pre_hook(self._act, self._see_activation_input, first=True)
            journal.add_forward_hook(self._act, self._see_activation)
        if block.dropout is not None:
            journal.add_forward_pre_hook(block.dropout, self._see_dropout_input, first=True)
            journal.add_forward_hook(block.dropout, self._see_dropout)
        journal.add_forward_pre_hook(block.down, self._see_down, first=True)

    def pause(self) -> None:
        """Take the hooks off."""
        with self._lock:
            self._journal.undo()
        self._forget()

    def _forget(self) -> None:
        """Have nothing of a call in any thread."""
        self._call: PerThread[_Call | None] = PerThread(None)
        self._normed: PerThread[tuple[Tensor, int] | None] = PerThread(None)

    def _end(self) -> None:
        """Have seen enough."""
        self.is_over = True
        self.pause()

    def _see_norm(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if torch.compiler.is_compiling():
            return
        normed = output[0] if isinstance(output, tuple) else output
        if isinstance(normed, Tensor):
            self._normed.set((normed, version_of(normed)))

    def _see_input(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        if torch.compiler.is_compiling():
            return
        if not args or not _has_values(args[0]):
            self._call.set(None)
            return
        call = self._call.get()
        if call is None or module in call.entered:
            self._begun += 1
            if self._begun > _PATIENCE:
                self._end()
                return
            call = _Call(Witness(self.block, exactly=False))
            self._call.set(call)
        call.entered.append(module)
        if self.with_norm:
            normed, version = self._normed.get() or (None, 0)
            call.witness.see_input(args[0], normed, version)
        call.x = args[0]

    def _see_activated(self, module: nn.Module, args: tuple[Any, ...], p: Tensor) -> None:
        call = self._current()
        if call is None:
            return
        if p is call.x or p.dim() == 0:  # `accelerate_` leads around the block, and has looked
            call.is_routed = True
            return
        call.witness.see_activated(p)
        if self._act is None:
            with torch.no_grad():
                call.witness.see_activation(self.block.current_act(p.detach().clone()))

    def _see_up(self, module: nn.Module, args: tuple[Any, ...], up: Tensor) -> None:
        call = self._current()
        if call is not None:
            call.witness.see_up(up)

    def _see_activation_input(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        call = self._current()
        if call is not None and args:
            call.witness.see_activation_input(args[0])

    def _see_activation(self, module: nn.Module, args: tuple[Any, ...], a: Tensor) -> None:
        call = self._current()
        if call is not None:
            call.witness.see_activation(a)

    def _see_dropout_input(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        call = self._current()
        if call is not None and args:
            call.witness.see_dropout_input(args[0])

    def _see_dropout(self, module: nn.Module, args: tuple[Any, ...], hidden: Tensor) -> None:
        call = self._current()
        if call is not None:
            call.witness.see_dropout(hidden)

    def _see_down(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        if torch.compiler.is_compiling():
            return
        call = self._call.get()
        self._call.set(None)
        self._normed.set(None)
        is_whole = call is not None and all(one in call.entered for one in self.block.layers[:-1])
        if call is None or not is_whole or not args:
            return
        if not call.is_routed:
            call.witness.see_down(args[0])
        if not call.witness.mismatch:
            if call.x is not None and call.x.numel():  # an expert may get no token
                self._end()
        elif self._is_left_alone():
            self._begun = 0
            raise self._error(call.witness.mismatch)

    def _current(self) -> _Call | None:
        """The call that this thread is in; None for none, and where the kernels compute it."""
        if torch.compiler.is_compiling():
            return None
        call = self._call.get()
        return None if call is None or call.is_routed else call

    def _is_left_alone(self) -> bool:
        """Whether nobody has put hooks on the parts, or others in their places, since."""
        return all(
            (slot is None or slot.module._modules.get(slot.name) is part)
            and all(
                is_own_hook(hook) for kind in HOOKS[:2] for hook in part.__dict__[kind].values()
            )
            for part, slot in self._parts
        )

    def _error(self, mismatch: str) -> WiringError:
        name = self.block.name
        about_norm = "the norm" in mismatch
        norm = f" (it is {self._norm_name})" if about_norm and self._norm_name else ""
        other = (
            "name the norm that it reads: patterns=[BlockPattern(norm=..., ...)], or leave the"
            if about_norm
            else "leave this"
        )
        first = f"First {self._undo}, then " if self._undo else "To go on, "
        text = (
            f"{name}: is not the block that its pattern describes: in the first pass,"
            f" {mismatch}{norm}. {first}{other} block out: {self._verb}(model,"
            f" where=lambda block: block.name != {name!r})"
        )
        return WiringError(text)


class _Call:
    """A call of a block that is looked at."""

    def __init__(self, witness: Witness) -> None:
        self.witness = witness
        self.entered: list[nn.Module] = []
        self.x: Tensor | None = None
        self.is_routed = False


def _place_of(root: nn.Module, name: str) -> Slot | None:
    """The attribute that holds a module; None for the root."""
    parent, _, last = name.rpartition(".")
    return Slot(root.get_submodule(parent), last) if last else None


def _has_values(x: object) -> bool:
    """Whether an input can be compared with another, now."""
    return (
        type(x) is Tensor
        and not x.is_meta
        and not x.is_nested
        and not torch.jit.is_tracing()  # type: ignore[attr-defined]  # it is documented
        and torch._C._functorch.peek_interpreter_stack() is None
        and not (x.is_cuda and torch.cuda.is_current_stream_capturing())
    )
