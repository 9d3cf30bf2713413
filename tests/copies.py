"""Short runs of tiny models, which a model and its copy must go through alike.

Other processes import them from here; a test module they could not import.
"""

from __future__ import annotations

from multiprocessing.connection import Connection
from typing import Any

import torch
from torch import Tensor, nn

import models
import steppe
from steppe import (
    ActivationPenalty,
    JumpingSquaredReLU,
    RestrictedNorm,
    RisingThreshold,
    ZerothBias,
    watch,
)
from steppe.plugins import Plugin
from steppe.plugins.applied import sparsification_of

STEPS = 6  # of a run; it is copied half way
PLUGINS: dict[str, list[Plugin]] = {
    "zeroth bias": [ZerothBias(max_tokens=models.MAX_TOKENS)],
    "norm": [RestrictedNorm(allow_shared=True)],
    "norm, rising": [RestrictedNorm(ramp=0.9, allow_shared=True)],
    "J-SquaredReLU": [JumpingSquaredReLU()],
    "J-SquaredReLU, mixed in": [JumpingSquaredReLU(ramp=0.9)],
    "threshold": [RisingThreshold(multiple=0.5, ramp=0.9)],
    "penalty": [ActivationPenalty(1e-2)],
    "penalty, rising": [ActivationPenalty(1e-2, ramp=0.9)],
    "all": [
        ZerothBias(max_tokens=models.MAX_TOKENS),
        RestrictedNorm(ramp=0.9, allow_shared=True),
        JumpingSquaredReLU(ramp=0.9),
        RisingThreshold(multiple=0.5, ramp=0.9),
        ActivationPenalty(1e-2, ramp=0.9),
    ],
}


def batch_for(model: nn.Module, seed: int = 0) -> dict[str, Tensor]:
    if isinstance(model, nn.TransformerEncoder):
        generator = torch.Generator().manual_seed(seed)
        return {"src": torch.randn(2, 7, models.D_MODEL, generator=generator)}
    if model.config.model_type == "vit":
        return {"pixel_values": models.images(2, seed), "labels": torch.tensor([1, 2])}
    ids = models.token_ids(2, 7, seed)
    return {"input_ids": ids, "labels": ids}


def output_of(model: nn.Module, seed: int = 0) -> Tensor:
    """Logits, or what an encoder gives."""
    out = model(**batch_for(model, seed))
    return out if isinstance(out, Tensor) else out.logits


def loss_of(model: nn.Module, seed: int) -> Tensor:
    out = model(**batch_for(model, seed))
    loss = out.square().mean() if isinstance(out, Tensor) else out.loss
    sparsification = sparsification_of(model)
    applied = [] if sparsification is None else sparsification.applied
    penalized = any(isinstance(one.plugin, ActivationPenalty) for one in applied)
    return steppe.penalize(loss, model) if penalized else loss


def train_(model: nn.Module, first: int, last: int) -> list[Tensor]:
    """The losses of some steps of a run, with the plug-ins' schedules and bounds."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses = []
    with steppe.constrain_(model, optimizer, total_steps=STEPS) as constrained:
        constrained.load_state_dict({"step": first})
        for step in range(first, last):
            optimizer.zero_grad()
            loss = loss_of(model, seed=step)
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
    return losses


def train_in_child(connection: Connection, trained: list[nn.Module]) -> None:
    """What a spawned process does with models."""
    torch.set_num_threads(1)
    for model in trained:
        # A handle that is made here must not take the place of a hook that came along.
        handles = [layer.register_forward_hook(keep) for layer in model.modules() for _ in range(9)]
        losses = [float(loss) for loss in train_(model, STEPS // 2, STEPS)]
        for handle in handles:
            handle.remove()
        connection.send((losses, output_of(model).tolist()))
    connection.close()


def keep(module: nn.Module, args: Any, output: Any) -> None:
    """A hook that does nothing."""


def watched_output(model: nn.Module) -> tuple[list[list[int]], Tensor]:
    """What a worker of joblib does with a model."""
    torch.set_num_threads(1)
    with watch(model) as monitor:
        output = output_of(model)
    return monitor.counts().tolist(), output.detach()
