"""Wrappers, which hold a module and leave its behaviour alone, and dotted paths below them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from steppe.blocks.block import Slot

# Wrappers that hold one inner module under a name of their own.
_WRAPPER_ATTRIBUTES = ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module")


def unwrap(model: nn.Module) -> nn.Module:
    """The user's own model below torch.compile, DDP and PEFT wrappers.

    Args:
        model: any module.

    Returns:
        The innermost model; `model` itself if nothing wraps it.
    """
    while True:
        if isinstance(
            model, nn.parallel.DistributedDataParallel | nn.parallel.DataParallel
        ) and isinstance(model.module, nn.Module):
            model = model.module
        elif hasattr(model, "peft_config") and callable(getattr(model, "get_base_model", None)):
            model = model.get_base_model()  # type: ignore[operator]  # a PeftModel's
        elif (inner := wrapped_in(model)) is not None:
            model = inner
        else:
            return model


def wrapped_in(module: nn.Module) -> nn.Module | None:
    """The module that a wrapper holds, or None if `module` is no wrapper."""
    for name in _WRAPPER_ATTRIBUTES:
        inner = module._modules.get(name)
        if inner is not None:
            return inner
    return None


def see_through(part: Any) -> Any:
    """The module below any wrappers, or `part` itself."""
    while isinstance(part, nn.Module) and (inner := wrapped_in(part)) is not None:
        part = inner
    return part


def owner_name(name: str, owner: nn.Module) -> str:
    """The name of a block.

    Args:
        name: of the module that owns it, with the names of wrappers.
        owner: that module.
    """
    plain = ".".join(part for part in name.split(".") if part not in _WRAPPER_ATTRIBUTES)
    return plain or type(owner).__name__


def part_at(owner: nn.Module, path: str) -> Any:
    """The part at the end of a dotted path, below any wrapper, or None."""
    part: Any = owner
    for name in filter(None, path.split(".")):
        part = see_through(getattr(part, name, None))
    return part


def place_of(owner: nn.Module, path: str) -> tuple[Any, str]:
    """The parent of the attribute at the end of a dotted path, or None, and its name."""
    above, _, name = path.rpartition(".")
    return part_at(owner, above), name


def slot_at(owner: nn.Module, path: str) -> Slot | None:
    """The attribute at the end of a dotted path, or None if it holds nothing that can be called."""
    parent, name = place_of(owner, path)
    if isinstance(parent, nn.Module) and callable(getattr(parent, name, None)):
        return Slot(parent, name)
    return None


def ancestors(root: nn.Module, name: str) -> Iterator[nn.Module]:
    """The module `name` and those above it, deepest first."""
    while name:
        yield see_through(root.get_submodule(name))
        name = name.rpartition(".")[0]
    yield root
