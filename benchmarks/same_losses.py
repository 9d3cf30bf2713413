"""How far losses part that should be the same: screened, unscreened, dense and in float64.

Two hundred steps on the pydoc texts from one seed, with the same batches. Besides, a dense model
whose hidden units stand in another order: the same function and the same gradients, and sums that
are added in another order. Where a pre-activation is as near to zero as that rounding goes, the
gradient jumps, and the runs part; how far dense and dense part so is what no kernel can better.

    python benchmarks/same_losses.py --json benchmarks/results/same_losses.json
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor, nn

from steppe import accelerate_, find_blocks
from steppe.bench import surroundings
from steppe.data.embedded import load_pydoc_split
from steppe.files import write_json
from steppe.training.demo import language_model

WIDTHS = (64, 256)
STEPS = 200
SAMPLES = 8  # of 64 bytes, a step
NEAR = 1e-5


def new_model(width: int) -> nn.Module:
    """A GPT-2 of bytes, two layers."""
    torch.manual_seed(0)
    return language_model(width)


def in_another_order(model: nn.Module) -> nn.Module:
    """A copy with the hidden units of each block permuted."""
    model = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for block in find_blocks(model):
            up: Any = block.up
            down: Any = block.down
            order = torch.randperm(block.d_hidden, generator=generator)
            up.weight.copy_(up.weight[:, order])  # Conv1D: [in, out]
            up.bias.copy_(up.bias[order])
            down.weight.copy_(down.weight[order])
    return model


def accelerated(model: nn.Module, max_candidates: float) -> nn.Module:
    """A copy on the sparse kernels, whatever the density, screened up to a share of candidates."""
    return accelerate_(copy.deepcopy(model), max_density=1.0, max_candidates=max_candidates)


def batches(steps: int) -> list[dict[str, Tensor]]:
    """What all of them are trained on."""
    torch.manual_seed(0)
    split = load_pydoc_split()
    picked = [torch.randint(len(split.train), (SAMPLES,)).tolist() for _ in range(steps)]
    return [
        {
            key: torch.stack([torch.as_tensor(split.train[index][key]) for index in indices])
            for key in split.train[0]
        }
        for indices in picked
    ]


def train(model: nn.Module, steps: Sequence[dict[str, Tensor]]) -> Tensor:
    """The losses, float64."""
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    for batch in steps:
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return torch.tensor(losses, dtype=torch.float64)


def apart(losses: Tensor, others: Tensor) -> dict[str, Any]:
    """How far losses are from others, relative to these."""
    distance = (losses / others - 1.0).abs()
    far = (distance > NEAR).nonzero()
    return {
        "largest": distance.max().item(),
        "median": distance.median().item(),
        "steps_to_1e-5": int(far[0]) if len(far) else len(losses),
    }


def rows_for(width: int, steps: Sequence[dict[str, Tensor]]) -> list[dict[str, Any]]:
    """A row for each way to compute the same."""
    model = new_model(width)
    losses = {
        "float64": train(copy.deepcopy(model).double(), steps),
        "dense": train(copy.deepcopy(model), steps),
        "dense, units in another order": train(in_another_order(model), steps),
        "sparse, unscreened": train(accelerated(model, 0.0), steps),
        "sparse, screened": train(accelerated(model, 1.0), steps),
    }
    return [
        {
            "d": width,
            "f": 4 * width,
            "how": how,
            "first_loss": of_run[0].item(),
            "last_loss": of_run[-1].item(),
            "to_dense": apart(of_run, losses["dense"]),
            "to_float64": apart(of_run, losses["float64"]),
        }
        for how, of_run in losses.items()
    ]


def main(
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the rows there.")] = None,
    steps: Annotated[int, typer.Option("--steps", help="Of each run.")] = STEPS,
) -> None:
    """Train them all, and tell how far their losses part."""
    rows = []
    given = batches(steps)
    for width in WIDTHS:
        for row in rows_for(width, given):
            rows.append(row)
            typer.echo(
                f"d {width:4} {row['how']:30} loss {row['last_loss']:.4f}"
                f" largest distance to dense {row['to_dense']['largest']:.1e}"
                f" to float64 {row['to_float64']['largest']:.1e}"
            )
    if json_file is not None:
        write_json(json_file, {**surroundings(), "steps": steps, "rows": rows})


if __name__ == "__main__":
    typer.run(main)
