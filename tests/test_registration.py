"""What steppe calls of torch is what the oldest supported torch offers, as recorded from it.

`tests/versions/floor.json` was written by an environment with that version (`make test-versions`);
here it is compared with the calls in the sources, so that no test needs that environment.
"""

from __future__ import annotations

import ast
import inspect
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
FLOOR: dict[str, Any] = json.loads((ROOT / "tests/versions/floor.json").read_text(encoding="utf-8"))
NAMES: dict[str, frozenset[str]] = {
    module: frozenset(names.split()) for module, names in FLOOR["names"].items()
}
SIGNATURES: dict[str, list[dict[str, Any]]] = FLOOR["signatures"]
SOURCES = {
    str(path.relative_to(ROOT)): path.read_text(encoding="utf-8")
    for folder in ("src", "benchmarks", "docs")
    for path in sorted((ROOT / folder).rglob("*.py"))
}
# What an annotation of torch takes, by the type of a value that is written out.
TAKEN_BY = {
    "str": ("str", "Sequence", "Iterable"),
    "tuple": ("tuple", "Sequence", "Iterable", "Collection"),
    "list": ("list", "Sequence", "Iterable", "Collection"),
    "bool": ("bool", "int", "float"),
    "int": ("int", "float"),
    "float": ("float",),
    "NoneType": ("NoneType",),
}
METHODS = {name for name in SIGNATURES if name.split(".")[-2][0].isupper()}  # of classes


def faults_of(source: str) -> list[str]:
    """What of a source the floor does not offer or take, as ``line: what``."""
    tree = ast.parse(source)
    imported = imports_of(tree)
    own_methods = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
    faults = [
        f"{line}: {name} is not in torch {FLOOR['torch']}"
        for name, line in names_of(tree, imported)
        if not is_offered(name)
    ]
    for call in ast.walk(tree):
        if not isinstance(call, ast.Call):
            continue
        full = full_name(call.func, imported)
        if full is not None:
            candidates = [full] if full in SIGNATURES else []
        elif is_registration(call.func) and call.func.attr not in own_methods:
            candidates = [name for name in METHODS if name.endswith(f".{call.func.attr}")]
            if not candidates:
                faults.append(f"{call.lineno}: {call.func.attr} is not in torch {FLOOR['torch']}")
        else:
            continue
        found = [misfit(call, SIGNATURES[candidate], imported) for candidate in candidates]
        if found and all(found):
            faults.append(f"{call.lineno}: {ast.unparse(call.func)}: {found[0]}")
    return faults


def is_registration(function: ast.expr) -> bool:
    return (
        isinstance(function, ast.Attribute)
        and function.attr.startswith("register_")
        and ast.unparse(function.value) != "os"
    )


def imports_of(tree: ast.AST) -> dict[str, str]:
    """The full names of what a source imports of torch, by the names it uses."""
    names = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == "torch":
                    names[alias.asname or "torch"] = alias.name if alias.asname else "torch"
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "torch":
            for alias in node.names:
                names[alias.asname or alias.name] = f"{node.module}.{alias.name}"
    return names


def full_name(node: ast.expr, imported: Mapping[str, str]) -> str | None:
    """The dotted name of something of torch, or None."""
    if isinstance(node, ast.Name):
        return imported.get(node.id)
    if isinstance(node, ast.Attribute):
        owner = full_name(node.value, imported)
        return None if owner is None else f"{owner}.{node.attr}"
    return None


def names_of(tree: ast.AST, imported: Mapping[str, str]) -> Iterator[tuple[str, int]]:
    """Every dotted name of torch that a source mentions, with its line."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Name | ast.Attribute):
            name = full_name(node, imported)
            if name is not None:
                yield name, node.lineno
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "torch":
            yield from ((f"{node.module}.{alias.name}", node.lineno) for alias in node.names)


def is_offered(name: str) -> bool:
    """Whether the recorded modules have a name; what lies in a class is taken to be there."""
    if name in NAMES:
        return True
    parts = name.split(".")
    for end in range(len(parts) - 1, 0, -1):
        module = ".".join(parts[:end])
        if module in NAMES:
            return parts[end] in NAMES[module]
    return False


def misfit(
    call: ast.Call, parameters: list[dict[str, Any]], imported: Mapping[str, str]
) -> str | None:
    """Why a call does not fit recorded parameters, or None."""
    signature = inspect.Signature(
        [
            inspect.Parameter(
                parameter["name"],
                getattr(inspect.Parameter, parameter["kind"]),
                default=None if parameter["optional"] else inspect.Parameter.empty,
            )
            for parameter in parameters
        ]
    )
    positional = [value for value in call.args if not isinstance(value, ast.Starred)]
    named = {word.arg: word.value for word in call.keywords if word.arg is not None}
    is_whole = len(positional) == len(call.args) and len(named) == len(call.keywords)
    try:
        bound = (signature.bind if is_whole else signature.bind_partial)(*positional, **named)
    except TypeError as error:
        return str(error)
    takes = {parameter["name"]: parameter["takes"] for parameter in parameters}
    for name, value in bound.arguments.items():
        given = type_of(value, imported)
        if takes[name] is None or given is None:
            continue
        if not set(TAKEN_BY.get(given, (given,))) & {"object", *takes[name]}:
            return f"{name} takes {' or '.join(takes[name])}, not {ast.unparse(value)}"
    return None


def type_of(value: ast.expr, imported: Mapping[str, str]) -> str | None:
    """The type of an argument that is written out, or None where it has to be run to be known."""
    if isinstance(value, ast.Constant):
        return type(value.value).__name__
    if isinstance(value, ast.Tuple):
        return "tuple"
    if isinstance(value, ast.List):
        return "list"
    name = full_name(value, imported) if isinstance(value, ast.Attribute) else None
    return "Tag" if name is not None and name.startswith("torch.Tag.") else None


@pytest.mark.parametrize("path", SOURCES)
def test_the_oldest_torch_offers_and_takes_what_is_called(path: str) -> None:
    assert faults_of(SOURCES[path]) == []


def test_the_registrations_are_seen() -> None:
    seen: set[str] = set()
    for source in SOURCES.values():
        tree = ast.parse(source)
        imported = imports_of(tree)
        for call in ast.walk(tree):
            if isinstance(call, ast.Call):
                name = full_name(call.func, imported)
                if name in SIGNATURES:
                    seen.add(name.rsplit(".", 1)[1])
                elif name is None and is_registration(call.func):
                    seen.add(call.func.attr)
    assert seen >= {
        "custom_op",
        "register_autograd",
        "register_kernel",
        "register_forward_hook",
        "register_forward_pre_hook",
        "register_step_post_hook",
        "is_compiling",
        "grad",
    }


@pytest.mark.parametrize(
    ("line", "shown"),
    [
        # What `import steppe` failed with up to torch 2.10.
        (
            "torch.library.custom_op('a::b', mutates_args=(), tags=torch.Tag.pointwise)",
            "tags takes Sequence or NoneType, not torch.Tag.pointwise",
        ),
        ("library.custom_op('a::b', mutates_args=(), tags=Tag.core)", "tags takes Sequence"),
        ("torch.library.custom_op('a::b')", "missing a required"),
        ("torch.library.custom_op('a::b', mutates_args=(), stream=1)", "unexpected keyword"),
        ("torch.library.custom_op('a::b', mutates_args=None)", "mutates_args takes str or Iter"),
        ("torch.library.register_nothing('a')", "register_nothing is not in torch"),
        ("torch.library.wrap_triton(1)", "takes Callable, not 1"),
        ("op.register_kernel(None, None, None)", "too many positional"),
        ("op.register_kernel(3)", "takes str or Sequence or NoneType, not 3"),
        ("op.register_autograd(f, context=g)", "unexpected keyword"),
        ("op.register_anything(f)", "register_anything is not in torch"),
        ("module.register_forward_hook(f, once=True)", "unexpected keyword"),
        ("torch.func.grad(f, 0, False, 1)", "too many positional"),
        ("torch.compiler.is_tracing()", "is_tracing is not in torch"),
        ("torch.brand_new(1)", "torch.brand_new is not in torch"),
        ("nn.BrandNew()", "torch.nn.BrandNew is not in torch"),
        ("F.brand_new()", "torch.nn.functional.brand_new is not in torch"),
        ("from torch.library import brand_new", "torch.library.brand_new is not in torch"),
        ("from torch.brand_new import thing", "torch.brand_new.thing is not in torch"),
    ],
)
def test_the_check_can_fail(line: str, shown: str) -> None:
    head = "import torch\nimport torch.nn.functional as F\nfrom torch import Tag, library, nn\n"
    (fault, *_) = faults_of(head + line)
    assert fault.startswith("4: ")
    assert shown in fault


@pytest.mark.parametrize(
    "line",
    [
        "torch.library.custom_op('a::b', mutates_args=(), tags=(torch.Tag.pointwise,))",
        "torch.library.custom_op('a::b', mutates_args='unknown', tags=None)",
        "torch.library.custom_op(name, **options)",
        "op.register_autograd(f, setup_context=g)",
        "module.register_forward_hook(f, with_kwargs=True, always_call=True)",
        "tensor.register_hook(f)",
        "optimizer.register_step_post_hook(f)",
        "torch.nn.functional.linear(x, torch.Tensor.new_method)",
        "model.brand_new()",
    ],
)
def test_the_check_lets_pass_what_the_oldest_torch_takes(line: str) -> None:
    assert faults_of(f"import torch\n{line}") == []
