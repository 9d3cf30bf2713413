"""Print as JSON what torch offers that steppe calls by name: run in an environment with the floor.

`tests/test_registration.py` compares steppe's own calls with it, so that what only a newer torch
takes is seen without the oldest one. Names are listed of whole modules; signatures of what is
registered, compiled or transformed, where versions of torch differ.
"""

from __future__ import annotations

import importlib
import inspect
import json
import types
import typing
from collections.abc import Callable, Iterator
from typing import Any

import torch

# The modules of torch that steppe names anything of.
MODULES = (
    "torch",
    "torch._C",
    "torch.autograd",
    "torch.autograd.graph",
    "torch.backends",
    "torch.compiler",
    "torch.distributed",
    "torch.func",
    "torch.library",
    "torch.multiprocessing.reductions",
    "torch.nn",
    "torch.nn.functional",
    "torch.nn.init",
    "torch.optim",
    "torch.utils.data",
    "torch.utils.hooks",
    "torch.utils.tensorboard",
)
WITH_SIGNATURES = ("torch.compiler", "torch.func", "torch.library")
# The classes whose methods `register_…` steppe calls; without the object they are called on.
REGISTRARS: dict[str, Callable[[], type]] = {
    "torch.library.CustomOpDef": lambda: type(_custom_op()),
    "torch.nn.Module": lambda: torch.nn.Module,
    "torch.optim.Optimizer": lambda: torch.optim.Optimizer,
    "torch.Tensor": lambda: torch.Tensor,
}


def record() -> dict[str, Any]:
    """The version, the names of each module, and signatures by full name."""
    names, signatures = {}, {}
    for module_name in MODULES:
        try:
            module = importlib.import_module(module_name)
        except ModuleNotFoundError:  # tensorboard itself is not there
            continue
        names[module_name] = " ".join(sorted(set(dir(module))))
        if module_name in WITH_SIGNATURES:
            signatures |= dict(_signatures(module_name, module, lambda name: name[0] != "_"))
    for class_name, find in REGISTRARS.items():
        found = _signatures(class_name, find(), lambda name: name.startswith("register_"))
        signatures |= {
            name: parameters[1:] if parameters[0]["name"] == "self" else parameters
            for name, parameters in found
        }
    return {"torch": torch.__version__.split("+")[0], "names": names, "signatures": signatures}


def _custom_op() -> object:
    @torch.library.custom_op("steppe_floor::nothing", mutates_args=())
    def nothing(x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    return nothing


def _signatures(
    owner_name: str, owner: object, wanted: Callable[[str], bool]
) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """The parameters of each function of a module or class that is written in Python."""
    for name in sorted(filter(wanted, dir(owner))):
        function = getattr(owner, name)
        if inspect.isfunction(function):
            yield f"{owner_name}.{name}", _parameters(function)


def _parameters(function: Callable[..., object]) -> list[dict[str, Any]]:
    """Name, kind, whether it may be left out, and the types it takes; None for any."""
    try:
        types_by_name = typing.get_type_hints(function)
    except (NameError, TypeError):  # types that are imported for checkers only
        types_by_name = {}
    return [
        {
            "name": parameter.name,
            "kind": parameter.kind.name,
            "optional": parameter.default is not inspect.Parameter.empty,
            "takes": _alternatives(types_by_name.get(parameter.name)),
        }
        for parameter in inspect.signature(function).parameters.values()
    ]


def _alternatives(annotation: Any) -> list[str] | None:
    """The types of a union by name; None where nothing is said."""
    if annotation is None or annotation is Any or isinstance(annotation, str | typing.TypeVar):
        return None
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return [_name(one) for one in typing.get_args(annotation)]
    return [_name(annotation)]


def _name(annotation: Any) -> str:
    plain = typing.get_origin(annotation) or annotation
    return getattr(plain, "__qualname__", str(plain))


if __name__ == "__main__":
    print(json.dumps(record()))
