"""The layout of design.md, section 3: imports point downwards, and `import steppe` stays light."""

from __future__ import annotations

import ast
import inspect
import json
import os
import re
import subprocess
import sys
from collections.abc import Mapping
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import steppe

PACKAGE = Path(steppe.__file__).parent

# A module imports from its own floor and from those above it in this list, and no two import each
# other, by whatever way. A new file in a package needs no place here, one at the top does.
FLOORS: tuple[tuple[str, ...], ...] = (
    (
        "steppe.checkpointing",
        "steppe.errors",
        "steppe.files",
        "steppe.per_thread",
        "steppe.printable",
        "steppe.schema",
        "steppe.sharding",
        "steppe.tables",
        "steppe.timing",
    ),
    ("steppe.ops",),
    ("steppe.activations", "steppe.blocks", "steppe.record"),  # a model as it is
    ("steppe.routing", "steppe.surgery", "steppe.tokens", "steppe.wiring"),  # edits, and watching
    ("steppe.measures", "steppe.plugins"),
    ("steppe.data", "steppe.runs"),
    ("steppe.checkpoints",),
    ("steppe.acceleration",),
    ("steppe", "steppe.public"),
    ("steppe.bench", "steppe.report", "steppe.training"),
    ("steppe.study",),
    ("steppe.cli", "steppe.commands"),
)
# Neither of a pair sees the other.
STRANGERS = (("steppe.measures", "steppe.plugins"), ("steppe.report", "steppe.training"))
# Who may know of one kind of device; all others ask `steppe.ops.backend`.
DEVICES: dict[str, tuple[str, ...]] = {
    "steppe.ops.cpu": (
        "steppe.ops.backend",
        "steppe.ops.cpu",
        "steppe.bench",
        "steppe.commands.calibrate",
        "steppe.acceleration.explanation",
        "steppe.public",
        "steppe.report.calibration_table",
    ),
    "steppe.ops.cuda": ("steppe.ops.backend", "steppe.ops.cuda", "steppe.ops.graphs.device"),
    "steppe.ops.graphs": ("steppe.ops.backend", "steppe.ops.graphs"),
}
# Who may import what is heavy, or belongs to one job.
HOMES: dict[str, tuple[str, ...]] = {
    "accelerate": ("steppe.training",),
    "datasets": ("steppe.data", "steppe.checkpoints.held_out", "steppe.training"),
    "hessian_eigenthings": ("steppe.measures",),
    "huggingface_hub": ("steppe.checkpoints",),
    "kornia": ("steppe.data",),
    "lightning": ("steppe.training.lightning",),
    "matplotlib": ("steppe.report", "steppe.study.plot"),
    "peft": ("steppe.training", "steppe.checkpoints"),
    "plotly": ("steppe.report",),
    "pydantic": ("steppe.schema",),
    "pytorch_lightning": ("steppe.training.lightning",),
    "rich": ("steppe.commands", "steppe.acceleration.explanation", "steppe.tables"),
    "safetensors": (
        "steppe.checkpoints",
        "steppe.files",
        "steppe.training.trainer",
    ),
    "scipy": ("steppe.study.statistics",),
    "sklearn": ("steppe.data",),
    "torch._dynamo": (),
    "torch.distributed.tensor": (),
    "transformers": ("steppe.data", "steppe.checkpoints", "steppe.training"),
    "triton": ("steppe.ops.cuda",),
    "typer": ("steppe.commands",),
    "wrapt": ("steppe", "steppe.checkpoints"),
}
HEAVY = (
    "accelerate",
    "datasets",
    "hessian_eigenthings",
    "huggingface_hub",
    "kornia",
    "lightning",
    "matplotlib",
    "peft",
    "pandas",
    "plotly",
    "pytorch_lightning",
    "rich",
    "scipy",
    "sklearn",
    "tensorboard",
    "torch._dynamo",
    "torch.distributed.tensor",
    "transformers",
    "triton",
    "typer",
)
PUBLIC = [
    "ActivationPenalty",
    "BlockCurvature",
    "BlockExplanation",
    "BlockPattern",
    "BlockReport",
    "Explanation",
    "IncompleteCoverageWarning",
    "JumpingSquaredReLU",
    "Kernels",
    "MLPBlock",
    "Monitor",
    "Plugin",
    "Rectifier",
    "Report",
    "RestrictedNorm",
    "RisingThreshold",
    "SShapedActivation",
    "SShapedSquaredReLU",
    "SteppeError",
    "WiringError",
    "ZerothBias",
    "accelerate_",
    "added_parameters",
    "advance_",
    "constrain_",
    "explain",
    "find_blocks",
    "fold_",
    "kernels",
    "load_pretrained",
    "measure",
    "penalize",
    "project_",
    "restore_",
    "sparsify_",
    "watch",
]


def name_of(path: Path) -> str:
    """Dotted name of a module of the package."""
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


SOURCES = {
    name_of(path): path.read_text(encoding="utf-8") for path in sorted(PACKAGE.rglob("*.py"))
}


def is_below(name: str, package: str) -> bool:
    """Whether a dotted name is a package or something in it."""
    return name == package or name.startswith(package + ".")


def imports_of(source: str, modules: Mapping[str, object] = SOURCES) -> set[str]:
    """What a source imports, at its top, in functions and under TYPE_CHECKING.

    ``from steppe.blocks import find`` is the module ``steppe.blocks.find`` if `modules` has it.
    Relative imports are given as ``.``.
    """
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level:
            found.add(".")
        elif isinstance(node, ast.ImportFrom):
            assert node.module is not None
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            if is_below(node.module, "steppe"):
                found |= {name if name in modules else node.module for name in inner}
            else:
                found |= {node.module} | inner  # `from torch import distributed` too
    return found


def dynamic_imports_of(source: str) -> set[str]:
    """Calls that can import what no checker of imports sees; an empty text can not."""
    calls = {
        ast.unparse(node.func)
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Call) and ast.unparse(node) != "exec('')"
    }
    hidden = {"__import__", "exec", "eval", "import_module", "importlib.import_module"}
    return calls & hidden


def floor_of(name: str) -> int | None:
    """Which line of `FLOORS` a module stands on; None for none."""
    for floor, names in enumerate(FLOORS):
        if name in names or any(is_below(name, one) for one in names if one != "steppe"):
            return floor
    return None


def wrong_imports(sources: Mapping[str, str]) -> list[str]:
    """Every import that breaks a rule above, as ``importer → imported``."""
    wrong = []
    for importer, source in sources.items():
        own = floor_of(importer)
        for imported in sorted(imports_of(source)):
            if is_below(imported, "steppe"):
                floor = floor_of(imported)
                bad = imported not in SOURCES or own is None or floor is None or floor > own
                bad |= any(
                    is_below(imported, device) and not any(is_below(importer, h) for h in homes)
                    for device, homes in DEVICES.items()
                )
                bad |= any(
                    (is_below(importer, one) and is_below(imported, other))
                    or (is_below(importer, other) and is_below(imported, one))
                    for one, other in STRANGERS
                )
            else:
                bad = imported == "." or any(
                    is_below(imported, foreign) and not any(is_below(importer, h) for h in homes)
                    for foreign, homes in HOMES.items()
                )
            if bad:
                wrong.append(f"{importer} → {imported}")
    return wrong


def cycle_in(sources: Mapping[str, str]) -> list[str]:
    """Modules that import each other in a circle; empty for none."""
    imports = {name: imports_of(source) & set(SOURCES) for name, source in sources.items()}
    try:
        TopologicalSorter(imports).prepare()
    except CycleError as error:
        circle: list[str] = error.args[1]
        return circle
    return []


def unsafe_loads(source: str) -> list[str]:
    """Imports of unpicklers, and ``torch.load`` without ``weights_only=True``."""
    unsafe = [
        name
        for name in sorted(imports_of(source))
        if name.split(".")[0] in ("pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve")
    ]
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        keywords = {word.arg: ast.unparse(word.value) for word in node.keywords}
        if called == "torch.load" and keywords.get("weights_only") != "True":
            unsafe.append(ast.unparse(node))
        if keywords.get("allow_pickle", "False") != "False":
            unsafe.append(ast.unparse(node))
    # torch.load under another name.
    return unsafe + [name for name in imports_of(source) if name == "torch.load"]


def loaded_by(statement: str, after: str = "torch") -> set[str]:
    """What a fresh interpreter loads for a statement beyond what another import loads."""
    program = (
        f"import json, sys, {after}\n"
        "before = set(sys.modules)\n"
        f"{statement}\n"
        "print(json.dumps(sorted(set(sys.modules) - before)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "PYTHONPATH": str(PACKAGE.parent)},
        capture_output=True,
        text=True,
        check=True,
    )
    return set(json.loads(done.stdout))


def heavy(loaded: set[str]) -> list[str]:
    return sorted(name for name in loaded if any(is_below(name, package) for package in HEAVY))


def test_every_module_has_one_floor() -> None:
    listed = [name for names in FLOORS for name in names]
    assert len(listed) == len(set(listed))
    assert all(name in SOURCES for name in listed)
    assert [name for name in SOURCES if floor_of(name) is None] == []


def test_the_guide_shows_these_floors() -> None:
    guide = (Path(__file__).parents[1] / "CONTRIBUTING.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\d+) \| ([^|]+) \|", guide, re.MULTILINE)
    shown = {int(floor): tuple(re.findall(r"`([^`]+)`", names)) for floor, names in rows}
    assert shown == dict(enumerate(FLOORS))


def test_imports_only_point_downwards() -> None:
    assert wrong_imports(SOURCES) == []


def test_no_modules_import_each_other() -> None:
    assert cycle_in(SOURCES) == []


@pytest.mark.parametrize(
    ("importer", "line"),
    [
        ("steppe.errors", "import steppe.errors"),
        ("steppe.errors", "import steppe.files"),
        ("steppe.blocks.block", "from steppe.surgery.journal import Journal"),
        ("steppe.blocks.block", "from steppe.surgery import journal"),
        ("steppe.surgery.journal", "def f():\n    from steppe.tokens import listen"),
        ("steppe.ops.reference", "from steppe.ops.cpu.calls import spmm"),
    ],
)
def test_the_check_for_cycles_can_fail(importer: str, line: str) -> None:
    circle = cycle_in({**SOURCES, importer: line})
    assert circle[0] == circle[-1]
    assert importer in circle


@pytest.mark.parametrize(
    ("importer", "line", "shown"),
    [
        ("steppe.errors", "import steppe.ops.cpu.team", "steppe.ops.cpu.team"),
        ("steppe.ops.cpu.calls", "from steppe.blocks import find", "steppe.blocks.find"),
        ("steppe.blocks.find", "from steppe import find_blocks", "steppe"),
        ("steppe.blocks.find", "def f():\n    from steppe.cli import main", "steppe.cli"),
        ("steppe.errors", "from steppe.nowhere import thing", "steppe.nowhere"),
        ("steppe.errors", "from .files import write_file", "."),
        (
            "steppe.acceleration.computation",
            "from steppe.ops.cpu import calls",
            "steppe.ops.cpu.calls",
        ),
        ("steppe.ops.mlp", "from steppe.ops.cpu import calls", "steppe.ops.cpu.calls"),
        ("steppe.ops.cpu.calls", "import steppe.ops.cuda.pack", "steppe.ops.cuda.pack"),
        ("steppe.measures.watch", "import steppe.plugins.base", "steppe.plugins.base"),
        ("steppe.plugins.constrain", "from steppe.measures import density", "steppe.measures.d"),
        ("steppe.training.demo", "from steppe.report import demo_table", "steppe.report"),
        ("steppe.report", "import steppe.training.resuming", "steppe.training.resuming"),
        ("steppe.blocks.find", "import transformers.models.opt", "transformers.models.opt"),
        ("steppe.blocks.find", "from transformers import OPTModel", "transformers"),
        ("steppe.cli", "def f():\n    if TYPE_CHECKING:\n        import transformers", "transf"),
        ("steppe.ops.bitmask", "import triton.language as tl", "triton.language"),
        ("steppe.sharding", "from torch.distributed import tensor", "torch.distributed.tensor"),
        ("steppe.training", "import torch._dynamo.config", "torch._dynamo.config"),
    ],
)
def test_the_check_of_imports_can_fail(importer: str, line: str, shown: str) -> None:
    wrong = wrong_imports({importer: line})
    assert wrong
    assert wrong[0].startswith(f"{importer} → {shown}")


def test_the_check_of_imports_lets_pass_what_is_right() -> None:
    right = {
        "steppe.cli": "import steppe\nfrom steppe.training import demo",
        "steppe.training.demo": "from transformers import Trainer\nfrom steppe.files import x",
        "steppe.plugins.sparsify": "from steppe.plugins.base import Plugin\nimport torch",
        "steppe.measures.watch": "from torch import distributed as dist",
    }
    assert wrong_imports(right) == []


@pytest.mark.parametrize("name", SOURCES)
def test_nothing_is_imported_behind_the_checkers_back(name: str) -> None:
    assert dynamic_imports_of(SOURCES[name]) == set()


def test_the_check_for_dynamic_imports_can_fail() -> None:
    source = "importlib.import_module('a'); model.eval(); exec(''); exec('import steppe.cli')"
    assert dynamic_imports_of(source) == {"importlib.import_module", "exec"}


def test_ops_know_no_module() -> None:
    for name, source in SOURCES.items():
        if is_below(name, "steppe.ops"):
            assert not {i for i in imports_of(source) if is_below(i, "torch.nn")}, name


def test_importing_steppe_loads_nothing_heavy() -> None:
    loaded = loaded_by("import steppe; steppe.find_blocks")
    assert set(SOURCES) & loaded >= {"steppe", "steppe.plugins.sparsify"}
    assert heavy(loaded) == []


def test_the_public_names_are_imported_at_the_first_use() -> None:
    assert set(SOURCES) & loaded_by("import steppe", after="json") == {"steppe"}
    assert "steppe.plugins.sparsify" in loaded_by("import steppe; steppe.find_blocks", after="json")
    assert "steppe.plugins.sparsify" in loaded_by("import steppe"), "torch is there already"


def test_no_public_name_is_a_modules_too() -> None:
    """Whichever is imported last would hide the other."""
    assert not {f"steppe.{name}" for name in PUBLIC} & set(SOURCES)


@pytest.mark.parametrize("name", SOURCES)
def test_modules_below_import_each_other_past_the_public_names(name: str) -> None:
    """`from steppe import tokens` asks steppe for a public name, which imports all of them."""
    found = [
        node
        for node in ast.walk(ast.parse(SOURCES[name]))
        if isinstance(node, ast.ImportFrom) and node.module == "steppe"
    ]
    assert not found


def test_the_check_of_what_is_loaded_can_fail() -> None:
    assert "torch._dynamo" in heavy({"torch._dynamo", "torch._dynamo_not", "json"})
    assert heavy(loaded_by("import rich.table"))


def test_the_public_names_are_these() -> None:
    assert steppe.__all__ == PUBLIC
    assert sorted(PUBLIC) == PUBLIC
    assert all(hasattr(steppe, name) for name in PUBLIC)


@pytest.mark.parametrize("name", PUBLIC)
def test_public_names_and_their_public_members_have_docstrings(name: str) -> None:
    thing = getattr(steppe, name)
    undocumented = []
    # A dataclass without a docstring is given its signature for one.
    if not thing.__doc__ or thing.__doc__.startswith(f"{name}("):
        undocumented.append(name)
    for member, value in vars(thing).items() if inspect.isclass(thing) else []:
        is_code = inspect.isfunction(value) or isinstance(value, property)
        if is_code and not member.startswith("_") and not value.__doc__:
            undocumented.append(f"{name}.{member}")
    assert undocumented == []


@pytest.mark.parametrize("name", SOURCES)
def test_nothing_is_ever_unpickled(name: str) -> None:
    assert unsafe_loads(SOURCES[name]) == []
    assert not re.search(r"\bpickle\b", SOURCES[name])


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from pickle import loads",
        "import joblib",
        "torch.load('model.bin')",
        "torch.load('model.bin', weights_only=False)",
        "from torch import load",
        "numpy.load('a.npy', allow_pickle=True)",
    ],
)
def test_the_check_for_unpickling_can_fail(source: str) -> None:
    assert unsafe_loads(source)


def test_the_check_for_unpickling_lets_weights_pass() -> None:
    assert unsafe_loads("torch.load('model.bin', weights_only=True)") == []
