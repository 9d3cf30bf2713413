"""A tiny GPT in plain torch and the arms it is trained in, for the tests in `gpu/`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

import steppe
from gpu_steps.gpt import GPT, PATTERNS, Sizes, loss_of
from steppe import (
    ActivationPenalty,
    JumpingSquaredReLU,
    Plugin,
    RestrictedNorm,
    RisingThreshold,
    ZerothBias,
)

SIZES = Sizes(d_model=32, d_hidden=96, layers=2, heads=2, tokens=16, vocabulary=64)
THREE = (ZerothBias(max_tokens=SIZES.tokens), RestrictedNorm(), JumpingSquaredReLU())
THRESHOLD = RisingThreshold(multiple=0.5, ramp=0.9)
ARMS: dict[str, tuple[Plugin, ...]] = {
    "vanilla": (),
    "steppe": THREE,
    "finetuning": (*THREE[:1], RestrictedNorm(ramp=0.5), JumpingSquaredReLU(ramp=0.5)),
    "threshold": (THRESHOLD,),
    "penalty": (ActivationPenalty(1e-3, ramp=0.5),),
    "all": (*THREE, THRESHOLD, ActivationPenalty(1e-3)),
}
STEPS = 6  # of a run


def gpt(device: str, arm: str = "vanilla", dtype: torch.dtype = torch.float32) -> GPT:
    """The same weights for every arm and device."""
    torch.manual_seed(0)
    model = GPT(SIZES)
    for layer in model.layers:
        # With biases at zero the density is ½ in every block, whatever a mistake would do.
        torch.nn.init.normal_(layer.up.bias, mean=-0.1, std=0.2)
        torch.nn.init.uniform_(layer.norm2.weight, 1.0, 1.2)
    model = model.to(device, dtype)
    if ARMS[arm]:
        steppe.sparsify_(model, ARMS[arm], patterns=PATTERNS)
    return model


def token_ids(device: str, seed: int = 0, rows: int = 4) -> Tensor:
    """int64 ``[rows, T]``, an eighth of the vocabulary, so that there is something to learn."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(SIZES.vocabulary // 8, (rows, SIZES.tokens), generator=generator)
    return ids.to(device)


def padding(device: str) -> Tensor:
    """int64 ``[4, T]``, 0 for padding: on the left, on the right, and none."""
    mask = torch.ones(4, SIZES.tokens, dtype=torch.int64)
    mask[0, :3] = 0
    mask[1, -5:] = 0
    return mask.to(device)


def loss_on(model: torch.nn.Module, arm: str, ids: Tensor, mask: Tensor | None = None) -> Tensor:
    """Of a batch, with the penalty if the arm has one."""
    loss = loss_of(model(ids, mask), ids)
    return steppe.penalize(loss, model) if arm in ("penalty", "all") else loss


def fused_adamw(model: torch.nn.Module) -> torch.optim.Optimizer:
    """As most train with on a GPU."""
    return torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True)


@contextmanager
def no_waits(device: str) -> Iterator[None]:
    """An error where the CPU waits for the device."""
    if device != "cuda":
        yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def train_without_waits(
    model: GPT, arm: str, device: str, autocast: torch.dtype | None = None
) -> Tensor:
    """The losses of a run, ``[STEPS]``; an error where its last steps wait for the device."""
    optimizer = fused_adamw(model)
    if arm != "vanilla":
        steppe.constrain_(model, optimizer, total_steps=STEPS)
    batches = [token_ids(device, seed=step) for step in range(STEPS)]
    losses = []
    for step, ids in enumerate(batches):
        # The first steps make what lasts: the optimizer's state, the library's workspaces.
        with no_waits(device if step >= STEPS - 3 else "cpu"):
            with torch.autocast(device, autocast, enabled=autocast is not None):
                loss = loss_on(model, arm, ids)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.detach())
    return torch.stack(losses)


def train(model: GPT, arm: str, device: str, first: int = 0, last: int = STEPS) -> list[float]:
    """The losses of some steps of a run in float32."""
    optimizer = fused_adamw(model)
    if arm != "vanilla":
        link = steppe.constrain_(model, optimizer, total_steps=STEPS)
        link.load_state_dict({"step": first})
    losses = []
    for step in range(first, last):
        loss = loss_on(model, arm, token_ids(device, seed=step))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    return torch.stack(losses).tolist()
