"""How many model types of Transformers have MLPs, and of how many all are found.

Each type is built from its default config on the meta device, by the first auto class that knows
it, in a process of its own. What looks like an MLP is counted here by two rules that share no code
with `steppe.blocks.candidates`: pairs of linear layers by their shapes, and modules by the names
of their classes; expert tensors by their dimensions. Of each kind of block, the module that holds
its parts is run on the meta device, and which operation made what `down` receives is compared with
the pattern (not which norm it reads: tests/checks.py). A type is

    full      every MLP is in a block
    wrong     something else flows in a block than its pattern says: must not be
    warned    some are in blocks, and `find_blocks` warns of the others
    silent    some are in blocks, and of others nothing is said: must not be
    shown     none is in a block, and the error shows them
    hidden    none is in a block, and of some the error says nothing
    none      there is no MLP in it
    unbuilt   it cannot be built, with the reason

    python benchmarks/model_types.py --json benchmarks/results/model_types.json

A run takes up where an earlier one was cut off; with --fresh, or after a change of versions, all
are counted again.
"""

from __future__ import annotations

import json
import multiprocessing
import re
import resource
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from itertools import takewhile
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Annotated, Any

import torch
import transformers
import typer
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from steppe.blocks.block import MLPBlock
from steppe.blocks.coverage import coverage
from steppe.blocks.linear import linear_weight
from steppe.files import write_json
from steppe.runs import versions

FOUND = ("full", "wrong", "warned", "silent", "shown", "hidden")  # of types with MLPs
SECONDS = 120
MEMORY = 12 * 2**30  # bytes of address space, which torch alone takes a part of
_SAME = ("view", "reshape", "_unsafe_view", "_to_copy", "clone", "alias", "detach", "expand")
_MLP = re.compile(r"mlp|ffn|feed_?forward|swiglu|geglu|experts$", re.IGNORECASE)
_NO_MLP = re.compile(
    r"mla$|(attention|attn)(?!.*(layer|block|model)$)|mixer|mamba|ssm|deltanet|recurrent|lstm",
    re.IGNORECASE,
)


def model_of(config: Any) -> nn.Module:
    """The model that the first auto class which knows a config makes of it, without weights."""
    others = [auto for name, auto in vars(modeling_auto).items() if name.startswith("AutoModelFor")]
    for auto in (modeling_auto.AutoModel, *others):
        if type(config) in getattr(auto, "_model_mapping", ()):
            with torch.device("meta"):
                return auto.from_config(config)
    raise LookupError("no auto class makes a model of it")


def looks_like_mlps(model: nn.Module) -> Iterator[tuple[str, list[nn.Parameter]]]:
    """What looks like an MLP by its shapes or the name of its class, with its weights."""
    used: set[str] = set()
    linears: dict[str, nn.Module] = {}
    beside: list[str] = []  # modules in which no MLP is looked for
    for name, module in model.named_modules():
        if any(name.startswith(outer) for outer in beside):
            continue
        kind = type(module).__name__
        if _NO_MLP.search(kind):
            beside.append(f"{name}.")
        elif shape_of(module):
            linears[name] = module
    shapes = {name: shape_of(module) for name, module in linears.items()}
    by_owner: defaultdict[str, list[str]] = defaultdict(list)
    for name in linears:
        for owner in above(name):
            by_owner[owner].append(name)
    for down, (hidden, width) in shapes.items():
        for owner in above(down):
            if isinstance(model.get_submodule(owner), nn.ModuleList):
                continue  # of a layer and the next one
            before = by_owner[owner][: by_owner[owner].index(down)]
            free = [name for name in before if name not in used]
            ups = [name for name in free if shapes[name] == (width, hidden)][-2:]
            fused = [name for name in free if shapes[name] == (width, 2 * hidden)][-1:]
            if hidden != width and (len(ups) == 2 or fused or (ups and hidden > width)):
                used.update((*(ups or fused), down))
                yield down, [linears[name].weight for name in (*(ups or fused), down)]
                break
    for name, module in model.named_modules():
        if not _MLP.search(type(module).__name__):
            continue
        inside = [f"{name}.{child}" for child, layer in module.named_modules() if shape_of(layer)]
        inside = [child for child in inside if child in linears]
        ends = [shapes[child] for child in inside]
        is_head = len(ends) > 2 and ends[0][0] == ends[0][1]  # three square layers have no gate
        is_alike = len(set(ends[:-1])) == 1 and ends[0] == ends[-1][::-1]
        if is_alike and not is_head and not used.intersection(inside):
            used.update(inside)
            yield inside[-1], [linears[child].weight for child in inside]
        stacked = [
            weight
            for weight in module.parameters(recurse=False)
            if weight.ndim == 3 and len(weight) > 1
        ]
        if len(stacked) >= 2:
            yield name, stacked


def shape_of(module: nn.Module) -> tuple[int, int] | None:
    """Widths of what has a matrix and no entries to look up: input, output."""
    weight = getattr(module, "weight", None)
    if not isinstance(weight, nn.Parameter) or weight.ndim != 2:
        return None
    if isinstance(module, nn.Linear):
        return weight.shape[1], weight.shape[0]
    return tuple(weight.shape) if type(module).__name__ == "Conv1D" else None


def above(name: str) -> list[str]:
    """The two modules above one."""
    parts = name.split(".")
    return [".".join(parts[:-depth]) for depth in (1, 2) if depth <= len(parts)]


def count(model_type: str) -> dict[str, Any]:
    """What is found of a type."""
    kind = CONFIG_MAPPING[model_type]
    try:
        model = model_of(kind())
    except ImportError:  # its default backbone is one of timm's
        model = model_of(kind(backbone_config=transformers.ResNetConfig()))
    found = coverage(model)
    inside = {id(weight) for block in found.blocks for weight in weights_of(block)}
    told_of = {f"{one.owner}.{one.down}".strip(".") for one in found.left}
    mlps = list(looks_like_mlps(model))
    missing = [(where, weights) for where, weights in mlps if not {*map(id, weights)} <= inside]
    unsaid = [where for where, _ in missing if where not in told_of]
    wiring = flows(model, found.blocks)
    if not {"right", "not run"}.issuperset(wiring.values()):
        status = "wrong"
    elif found.blocks:
        status = "silent" if unsaid else "warned" if found.left else "full"
    elif mlps or found.left:
        status = "hidden" if unsaid else "shown"
    else:
        status = "none"
    return {
        "model": type(model).__name__,
        "status": status,
        "mlps": len(mlps),
        "covered": len(mlps) - len(missing),
        "blocks": dict(Counter(block.family for block in found.blocks)),
        "wiring": wiring,
        "left": dict(Counter(kind_of(str(one), one.owner, model) for one in found.left)),
        "unsaid": dict(Counter(re.sub(r"\d+", "N", where) for where in unsaid)),
    }


class Makers(TorchDispatchMode):
    """Which operation made a tensor, of which ones, while this lasts."""

    def __init__(self) -> None:
        super().__init__()
        self.of: dict[int, tuple[str, list[Tensor]]] = {}
        self.kept: list[Any] = []  # an id is of one tensor while that lives

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation and note its output."""
        output = func(*args, **(kwargs or {}))
        inputs = [value for value in args if isinstance(value, Tensor)]
        if isinstance(output, Tensor) and all(output is not value for value in inputs):
            self.of[id(output)] = func.overloadpacket.__name__, inputs
            self.kept.append((output, inputs))
        return output

    def origin(self, tensor: Tensor) -> Tensor:
        """What a tensor is another shape or dtype of."""
        while (made := self.of.get(id(tensor))) and made[0] in _SAME:
            tensor = made[1][0]
        return tensor


def mismatch(root: nn.Module, block: MLPBlock) -> str | None:
    """What is not as the pattern says, empty for nothing; None where it cannot be run."""
    act = block.act if isinstance(block.act, nn.Module) else None
    parts = {id(part) for part in (*block.layers, act) if part is not None}
    names = [name for name, module in root.named_modules() if id(module) in parts]
    levels = zip(*(name.split(".") for name in names), strict=False)
    common = takewhile(lambda level: len(set(level)) == 1, levels)
    owner = root.get_submodule(".".join(level[0] for level in common))
    seen: dict[str, Tensor] = {}

    def see(name: str) -> Callable[..., None]:
        return lambda module, args, output: seen.update({f"{name} in": args[0], name: output})

    named = {"p": block.activated, "act": act, "up": block.up, "down": block.down}
    handles = [module.register_forward_hook(see(name)) for name, module in named.items() if module]
    try:
        with torch.no_grad(), Makers() as makers:
            owner.eval()(torch.empty(1, 4, block.d_model, device="meta"))
            origin = {name: makers.origin(value) for name, value in seen.items()}
            hidden = origin["down in"]
            if act is None:
                return None
            if origin["act in"] is not origin["p"]:
                return "the activation does not get the output of the layer before it"
            if block.gate is None:
                return "" if hidden is origin["act"] else "act(p) is not what down gets"
            maker, of = makers.of.get(id(hidden), ("nothing", []))
            made_of = {id(makers.origin(value)) for value in of}
            is_product = maker == "mul" and made_of == {id(origin["act"]), id(origin["up"])}
            return "" if is_product else f"down gets what {maker} made, not act(gate) · up"
    except Exception:  # of a forward that wants more than an input, or values
        return None
    finally:
        for handle in handles:
            handle.remove()


def flows(root: nn.Module, blocks: list[MLPBlock]) -> dict[str, str]:
    """For each kind of block whether it is wired as its pattern says."""
    kinds = {}
    for block in blocks:
        kinds.setdefault(
            (block.family, type(block.act_slot.module).__name__, block.d_hidden), block
        )
    told: dict[str, str] = {}
    for (family, kind, _), block in kinds.items():
        found = mismatch(root, block)
        told[f"{family}: {kind}"] = "not run" if found is None else found or "right"
    return told


def weights_of(block: MLPBlock) -> Iterator[Tensor]:
    """The weights of a block's linear layers; of a part of a tensor, the whole."""
    for layer in block.layers:
        weight = linear_weight(layer)
        yield weight if weight._base is None else weight._base


def kind_of(line: str, owner: str, model: nn.Module) -> str:
    """What is alike in candidates that are alike: the class in place of the name."""
    _, _, rest = line.partition(": ")
    return f"{type(model.get_submodule(owner)).__name__}: {rest.rpartition(' (')[0]}"


def work(model_type: str, pipe: Connection) -> None:
    """Count a type and send what is found."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    warnings.simplefilter("ignore")
    try:
        pipe.send(count(model_type))
    except BaseException as error:  # of other people's configs and models: it is the answer
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        pipe.send({"status": "unbuilt", "reason": reason[:160]})


def count_apart(model_type: str) -> dict[str, Any]:
    """Count a type in a process of its own, within time and memory."""
    context = multiprocessing.get_context("fork")  # with Transformers imported
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=work, args=(model_type, sender))
    process.start()
    sender.close()
    try:
        if not receiver.poll(SECONDS):
            return {"status": "unbuilt", "reason": f"takes more than {SECONDS} s"}
        return receiver.recv()
    except EOFError:
        return {"status": "unbuilt", "reason": "its process died"}
    finally:
        process.kill()
        process.join()


def summary(types: dict[str, Any]) -> dict[str, Any]:
    """How many types of each kind, and the share of those with MLPs that are found in full."""
    number = Counter(one["status"] for one in types.values())
    with_mlps = sum(number[one] for one in FOUND)
    return {
        **{one: number[one] for one in (*FOUND, "none", "unbuilt")},
        "with_mlps": with_mlps,
        "share_in_full": round(number["full"] / max(with_mlps, 1), 4),
    }


def main(
    json_file: Annotated[Path, typer.Option("--json", help="Write here after each type.")],
    only: Annotated[str, typer.Option(help="Types whose name has this regular expression.")] = "",
    fresh: Annotated[bool, typer.Option(help="Count again what the file has.")] = False,
) -> None:
    """Count the types."""
    torch.set_num_threads(1)
    model_of(transformers.BertConfig())  # what each process would import
    transformers.logging.set_verbosity_error()
    known = {**versions(), "transformers": transformers.__version__}
    measured = json.loads(json_file.read_text("utf-8")) if json_file.exists() else {}
    types = measured.get("types", {}) if measured.get("versions") == known else {}
    for model_type in sorted(CONFIG_MAPPING):
        if (model_type in types and not fresh) or not re.search(only, model_type):
            continue
        types[model_type] = count_apart(model_type)
        told = types[model_type]
        print(model_type, told["status"], told.get("reason") or told["mlps"], flush=True)
        ordered = dict(sorted(types.items()))
        write_json(json_file, {"versions": known, **summary(types), "types": ordered})
    print(summary(types))


if __name__ == "__main__":
    typer.run(main)
