"""What each process of test_distributed.py runs; spawned processes import it by name."""

from __future__ import annotations

import datetime
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

import models
import steppe
from steppe import (
    ActivationPenalty,
    JumpingSquaredReLU,
    RestrictedNorm,
    RisingThreshold,
    ZerothBias,
)
from steppe.errors import UnfitBlockError

WORLD = 2
STEPS = 4
PADDING = torch.tensor([0, 2, 0, 5])  # on the left of each row of the whole batch
TOKENS = 9  # odd, so that the rows of the zeroth bias are not shared out evenly


def train(wrap: Callable[[nn.Module], nn.Module], rank: int, world: int) -> dict[str, Any]:
    """Train on this process's rows; parameters, densities and how far the projections went."""
    torch.manual_seed(0)
    inner = models.gpt2().double()
    steppe.sparsify_(
        inner, [RestrictedNorm(), ZerothBias(max_tokens=TOKENS), JumpingSquaredReLU(ramp=0.5)]
    )
    model = wrap(inner)
    optimizer = torch.optim.SGD(model.parameters(), lr=20.0, momentum=0.9)
    link = steppe.constrain_(model, optimizer, total_steps=STEPS)
    densities = []
    with steppe.watch(model) as monitor:
        for step in range(STEPS):
            loss_of_share(model, step, rank, world).backward()
            optimizer.step()
            optimizer.zero_grad()
            report = monitor.report(dist.group.WORLD if world > 1 else None).to_dict()
            report.pop("standard_errors_per_block")  # not exact, other than counts
            densities.append(report)
    return {
        "parameters": {name: whole(p) for name, p in inner.named_parameters()},
        "added": list(steppe.added_parameters(model)),
        "densities": densities,
        "counts": monitor.counts(dist.group.WORLD if world > 1 else None),
        "own tokens": monitor.counts()[0, 3].item(),
        "mix": inner.transformer.h[0].mlp.act.mix.item(),
        "link": link.state_dict(),
    }


def loss_of_share(model: nn.Module, step: int, rank: int, world: int) -> Tensor:
    """This process's share of the whole batch's mean loss, times the number of processes."""
    rows = slice(rank * len(PADDING) // world, (rank + 1) * len(PADDING) // world)
    return loss_of_rows(model, step, rows) * world


def loss_of_rows(model: nn.Module, step: int, rows: slice) -> Tensor:
    """Some rows' part of the whole batch's mean loss."""
    ids = models.token_ids(len(PADDING), TOKENS, seed=step)
    mask = torch.arange(TOKENS) >= PADDING[:, None]
    targets = ids.masked_fill(~mask, -100)[:, 1:]
    predicted = int((targets != -100).sum())
    logits = model(input_ids=ids[rows], attention_mask=mask[rows].long()).logits
    total = F.cross_entropy(logits[:, :-1].flatten(0, 1), targets[rows].flatten(), reduction="sum")
    return total / predicted


def accelerated(
    wrap: Callable[[nn.Module], nn.Module], rank: int, world: int, max_candidates: float = 0.0
) -> dict[str, Any]:
    """Train on the sparse kernels, in float32; parameters at the end."""
    torch.manual_seed(0)
    inner = steppe.sparsify_(models.gpt2(), [ZerothBias(max_tokens=TOKENS), JumpingSquaredReLU()])
    steppe.accelerate_(inner, max_density=1.0, max_candidates=max_candidates)
    model = wrap(inner)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    for step in range(STEPS):
        loss_of_share(model, step, rank, world).backward()
        optimizer.step()
        optimizer.zero_grad()
    return {name: whole(p) for name, p in inner.named_parameters()}


def packed(wrap: Callable[[nn.Module], nn.Module], rank: int, world: int) -> dict[str, Any]:
    """Train with packed activations, in float64; parameters at the end."""
    torch.manual_seed(0)
    inner = models.gpt2().double()
    steppe.sparsify_(inner, [ZerothBias(max_tokens=TOKENS), JumpingSquaredReLU()])
    steppe.accelerate_(inner, pack=True)
    model = wrap(inner)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    for step in range(STEPS):
        loss_of_share(model, step, rank, world).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert all(block.calls == {"packed": STEPS} for block in steppe.explain(inner).blocks)
    return {name: whole(p) for name, p in inner.named_parameters()}


def thresholded(wrap: Callable[[nn.Module], nn.Module], rank: int, world: int) -> dict[str, Any]:
    """Train with our plug-ins on micro-batches of one row each; state and own statistics."""
    torch.manual_seed(0)
    inner = models.gpt2().double()
    steppe.sparsify_(inner, [RisingThreshold(ramp=1.0), ActivationPenalty(2.0**-8)])
    model = wrap(inner)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    steppe.constrain_(model, optimizer, total_steps=STEPS)
    threshold = inner.transformer.h[0].mlp.c_fc.threshold
    own_tokens = []
    for step in range(STEPS):
        share = len(PADDING) // world
        for row in range(rank * share, (rank + 1) * share):  # gradients are reduced each time
            loss = loss_of_rows(model, step, slice(row, row + 1))
            penalty = steppe.penalize(torch.zeros((), dtype=loss.dtype), model)
            weight = (TOKENS - int(PADDING[row])) / int((TOKENS - PADDING).sum())
            ((loss + weight * penalty) * world).backward()
        own_tokens.append(threshold.sums[0, 0].item())
        optimizer.step()
        optimizer.zero_grad()
    state = {**dict(inner.named_parameters()), **dict(inner.named_buffers())}
    return {"state": {n: whole(t) for n, t in state.items()}, "own tokens": own_tokens}


def measured(wrap: Callable[[nn.Module], nn.Module], rank: int, world: int) -> dict[str, Any]:
    """What measure says of this process's rows, summed over processes; twice, as users do."""
    torch.manual_seed(0)
    model = wrap(models.gpt2().double())
    batches = []
    for seed in range(3):
        ids = models.token_ids(len(PADDING), TOKENS, seed=seed)
        mask = torch.arange(TOKENS) >= PADDING[:, None]
        rows = slice(rank * len(PADDING) // world, (rank + 1) * len(PADDING) // world)
        batch = {"input_ids": ids, "attention_mask": mask.long()}
        batch["labels"] = ids.masked_fill(~mask, -100)
        batches.append({key: value[rows] for key, value in batch.items()})
    group = dist.group.WORLD if world > 1 else None
    steppe.measure(model, batches, group=group, max_batches=1)
    return steppe.measure(model, batches, group=group).to_dict()


def alone(model: nn.Module) -> nn.Module:
    """One process."""
    return model


def ddp(model: nn.Module) -> nn.Module:
    """Each process has the whole model."""
    return DistributedDataParallel(model)


def fsdp(model: nn.Module) -> nn.Module:
    """Each process has its rows of every parameter."""
    mesh = init_device_mesh("cpu", (WORLD,))
    for layer in model.transformer.h:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def whole(parameter: Tensor) -> Tensor:
    """A parameter, gathered if it is sharded."""
    full_tensor = getattr(parameter, "full_tensor", None)
    return (parameter if full_tensor is None else full_tensor()).detach().clone()


def sparsify_too_late(rank: int) -> str:
    """The error for a model that is sharded already."""
    model = fsdp(models.gpt2())
    keys = list(model.state_dict())
    try:
        steppe.sparsify_(model, [JumpingSquaredReLU(), ZerothBias()])
    except UnfitBlockError as error:
        assert list(model.state_dict()) == keys
        return str(error)
    return "no error"


@contextmanager
def process_group(rank: int, folder: Path) -> Iterator[None]:
    """Gloo, meeting at a file."""
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=WORLD,
        timeout=datetime.timedelta(seconds=60),
    )
    try:
        yield
    finally:
        dist.destroy_process_group()


def work(rank: int, folder: Path) -> None:
    """Everything in one go, since starting a process takes longer than all of it."""
    torch.set_num_threads(1)
    with process_group(rank, folder):
        results = {
            "ddp": train(ddp, rank, WORLD),
            "fsdp2": train(fsdp, rank, WORLD),
            "ddp measured": measured(ddp, rank, WORLD),
            "fsdp2 measured": measured(fsdp, rank, WORLD),
            "ddp accelerated": accelerated(ddp, rank, WORLD),
            "fsdp2 accelerated": accelerated(fsdp, rank, WORLD),
            "ddp screened": accelerated(ddp, rank, WORLD, max_candidates=1.0),
            "fsdp2 screened": accelerated(fsdp, rank, WORLD, max_candidates=1.0),
            "ddp packed": packed(ddp, rank, WORLD),
            "fsdp2 packed": packed(fsdp, rank, WORLD),
            "ddp thresholded": thresholded(ddp, rank, WORLD),
            "fsdp2 thresholded": thresholded(fsdp, rank, WORLD),
            "too late": sparsify_too_late(rank),
        }
    torch.save(results, folder / f"{rank}.pt")
