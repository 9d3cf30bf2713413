"""What a sparsified block costs at scale: arithmetic, rendered into docs/scale.md.

python docs/scale.py
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from steppe.report import count_flops

PAGE = Path(__file__).with_name("scale.md")
DENSITY = 0.05  # of the tables
BF16, FP32, INDEX = 2, 4, 2  # bytes; a position in a hidden row is 16 bits up to F = 65,536
_COUNTERS, _MOMENTS = 5, 16 + 3 * 72  # int64 and float64 numbers of a tally, beside its units


@dataclass(frozen=True)
class Model:
    """The MLP blocks of a model and a training step of it.

    Attributes:
        name: of the model.
        d_model: D.
        d_hidden: F.
        blocks: how many.
        gated: whether they have a gate.
        tokens: that the blocks see in a step, over all devices (of T5 the mean over its blocks).
        max_tokens: rows of a zeroth bias.
        devices: that share the step.
    """

    name: str
    d_model: int
    d_hidden: int
    blocks: int
    gated: bool
    tokens: int
    max_tokens: int
    devices: int


MODELS = (
    Model("ViT-B/16", 768, 3072, 12, False, 2048 * 197, 197, 8),
    Model("T5-Base", 768, 3072, 24, False, 256 * (512 + 114) // 2, 512, 8),
    Model("7B (Llama-2's shape)", 4096, 11008, 32, True, 1024 * 4096, 4096, 64),
)


def weights_of(model: Model) -> int:
    """Numbers in the matrices of a block: 2 D F, gated 3 D F."""
    return (3 if model.gated else 2) * model.d_model * model.d_hidden


def added_parameters(model: Model) -> int:
    """Numbers that the plug-ins add to a block: the zeroth bias, max_tokens × D, and no other."""
    return model.max_tokens * model.d_model


def step_flops(model: Model, density: float) -> tuple[float, float]:
    """FLOPs of the blocks' products in a step: dense, and of terms that are not zero."""
    flops = count_flops(model.d_model, model.d_hidden, density, density, model.gated)
    many = model.tokens * model.blocks
    return flops.dense_training * many, flops.training * many


def saved_bytes(model: Model, density: float, width: int) -> tuple[float, float]:
    """Bytes a token that a block keeps for its backward pass, beside its input: dense and sparse.

    Dense, ReLU and `down` keep the same tensor, a; gated, the gate's activation, `up`'s output and
    their product are kept. Sparse, a list: a position and a value (two for a gated block) for each
    active unit.
    """
    hidden = model.d_hidden
    kept = 3 if model.gated else 1
    values = 2 if model.gated else 1
    return kept * hidden * width, density * hidden * (INDEX + values * width)


def ddp_bytes(numbers: int, devices: int, width: int) -> float:
    """Bytes a device sends in a ring for the gradients of some parameters: 2 (n − 1)/n of them."""
    return 2 * (devices - 1) / devices * numbers * width


def fsdp_bytes(numbers: int, devices: int, width: int) -> float:
    """The same under FSDP2: weights are gathered twice, gradients scattered once, 3 (n − 1)/n."""
    return 3 * (devices - 1) / devices * numbers * width


def tally_bytes(model: Model) -> int:
    """Bytes of a block's tally on a measured step: what one all-reduce a log sums."""
    return 8 * (_COUNTERS + model.d_hidden + _MOMENTS)


def tables() -> dict[str, str]:
    """The tables of the page by name, in Markdown."""
    return {"work": _work(), "traffic": _traffic(), "added": _added()}


def render(page: str) -> str:
    """The page with each table as the formulas give it.

    Raises:
        SystemExit: a table has no place, or two.
    """
    for name, table in tables().items():
        place = rf"(<!-- table: {name} -->\n).*?(<!-- end -->)"
        page, found = re.subn(place, lambda m, t=table: m[1] + t + m[2], page, flags=re.DOTALL)
        if found != 1:
            raise SystemExit(f"scale.md: expected one <!-- table: {name} -->, got {found}")
    return page


def _work() -> str:
    rows = []
    for model in MODELS:
        dense, sparse = step_flops(model, DENSITY)
        kept, listed = saved_bytes(model, DENSITY, BF16)
        scale = model.tokens * model.blocks / model.devices
        rows.append(
            [
                model.name,
                f"{dense:.2e}",
                f"{sparse:.2e}",
                f"{dense / sparse:.2f}",
                _bytes(kept * scale),
                _bytes(listed * scale),
            ]
        )
    return _table(
        ["", "FLOPs dense", "FLOPs sparse", "bound", "saved, dense", "saved, list"],
        rows,
    )


def _traffic() -> str:
    rows = []
    for model in MODELS:
        weights = weights_of(model) * model.blocks
        rows.append(
            [
                model.name,
                str(model.devices),
                f"{weights / 1e6:,.0f} M",
                _bytes(16 * weights),
                _bytes(ddp_bytes(weights, model.devices, BF16)),
                _bytes(fsdp_bytes(weights, model.devices, BF16)),
            ]
        )
    return _table(
        ["", "devices", "weights", "with AdamW's state", "DDP sends", "FSDP2 sends"], rows
    )


def _added() -> str:
    rows = []
    for model in MODELS:
        added = added_parameters(model) * model.blocks
        share = added / (weights_of(model) * model.blocks)
        rows.append(
            [
                model.name,
                f"{added / 1e6:,.2f} M",
                f"{100 * share:.1f} %",
                _bytes(16 * added),
                _bytes(ddp_bytes(added, model.devices, BF16)),
                _bytes(tally_bytes(model) * model.blocks),
            ]
        )
    head = ["", "zeroth biases", "of the blocks' weights", "with AdamW's state"]
    return _table([*head, "DDP sends a step", "monitor, a measured step"], rows)


def _bytes(number: float) -> str:
    """A number of bytes in the unit that fits."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if number >= size:
            return f"{number / size:,.1f} {unit}"
    return f"{number:.0f} B"


def _table(head: list[str], rows: list[list[str]]) -> str:
    """A table in Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


if __name__ == "__main__":
    PAGE.write_text(render(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
