"""Step: train a GPT on Python sources, with or without plug-ins: one arm a process."""

from __future__ import annotations

import importlib
import math
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import steppe
from gpu_steps.gpt import GPT, PATTERNS, Sizes, loss_of
from gpu_steps.step import Context
from gpu_steps.text import Text, batch_of, python_sources

TINY = Sizes(d_model=16, d_hidden=48, layers=2, heads=2, tokens=32)
ARMS = ("vanilla", "steppe", "threshold", "steppe + threshold")
_PEAK_RATE = 1e-3
_PROBES = 20  # steps whose time says how many steps there will be
_CURVE = 40  # points of the loss curve
_CLOSING = 8.0  # seconds for held-out data and the weights


@dataclass
class Run:
    """A model in training.

    Attributes:
        model: with the arm's plug-ins.
        text: on the device.
        rows: B.
        sizes: of the model.
        device: ``cuda`` or ``cpu``.
        generator: of the batches.
        curve: tokens seen and mean loss since the point before.
    """

    model: nn.Module
    text: Text
    rows: int
    sizes: Sizes
    device: str
    generator: torch.Generator
    curve: list[tuple[int, float]] = field(default_factory=list)

    def loss(self) -> Tensor:
        """Of the next batch; a batch is the same in every arm."""
        ids = batch_of(self.text.train, self.rows, self.sizes.tokens, self.generator)
        with torch.autocast(self.device, torch.bfloat16):
            logits = self.model(ids)
        return loss_of(logits, ids)

    def optimizer(self, rate: float) -> torch.optim.Optimizer:
        """AdamW, without decay for vectors."""
        matrices = [p for p in self.model.parameters() if p.dim() == 2]
        vectors = [p for p in self.model.parameters() if p.dim() != 2]
        groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors}]
        return torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.95), weight_decay=0.0, fused=True)

    def wait(self) -> None:
        """For the device."""
        if self.device == "cuda":
            torch.cuda.synchronize()


def run(context: Context) -> None:
    """Train, and measure on held-out data."""
    torch.manual_seed(0)
    sizes, rows = (TINY, 2) if context.is_dry else (Sizes(), 32)
    text = python_sources(2**16 if context.is_dry else 32 * 2**20)
    text = Text(text.train.to(context.device), text.held_out.to(context.device), text.digest)
    generator = torch.Generator(context.device).manual_seed(1)
    model = with_plugins(GPT(sizes), context.argument, sizes).to(context.device)
    training = Run(model, text, rows, sizes, context.device, generator)
    context.keep(
        arm=context.argument,
        parameters=sum(p.numel() for p in model.parameters()),
        text={"bytes": len(text.train), "held_out": len(text.held_out), "sha256": text.digest},
        batch=[rows, sizes.tokens],
    )
    compile_layers(training, context)
    train(training, context)
    context.attempt("held_out", lambda: held_out(training, context))
    context.attempt("weights", lambda: save(model, weights_file(context.folder, context.argument)))


def with_plugins(model: GPT, arm: str, sizes: Sizes) -> GPT:
    """Put the plug-ins of an arm in.

    Args:
        model: the model.
        arm: one of `ARMS`.
        sizes: of the model.
    """
    plugins: list[steppe.Plugin] = []
    if "steppe" in arm:
        plugins += [
            steppe.ZerothBias(max_tokens=sizes.tokens),
            steppe.RestrictedNorm(),
            steppe.JumpingSquaredReLU(),
        ]
    if "threshold" in arm:
        plugins.append(steppe.RisingThreshold())
    if plugins:
        steppe.sparsify_(model, plugins, patterns=PATTERNS)
    return model


def compile_layers(training: Run, context: Context) -> None:
    """Compile each layer, which takes less time than the whole model; eager where that fails."""
    if context.is_dry:
        context.keep(compiled="no: a dry run")
        return
    layers: Any = training.model.layers
    compiler: Any = importlib.import_module("torch._dynamo.config")  # no public name sets this
    compiler.recompile_limit = 64  # hooks differ from layer to layer
    torch.set_float32_matmul_precision("high")
    for layer in layers:
        layer.compile(dynamic=False)
    start = time.monotonic()
    try:
        training.loss().backward()
        training.wait()
        context.keep(compiled=True, compile_s=time.monotonic() - start)
    except Exception as error:  # whatever it was, eager is the other way
        for layer in layers:
            layer._compiled_call_impl = None
        torch.compiler.reset()
        text = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        context.errors.append(f"compile: {text}")
        context.keep(compiled=f"no: {text}")
    training.model.zero_grad()


def train(training: Run, context: Context) -> None:
    """Take as many steps as there is time for, on one cycle of the learning rate."""
    step_s = probe(training)
    total = int(max(context.left - _CLOSING, 1.0) / step_s) if not context.is_dry else 6
    training.generator.manual_seed(2)
    optimizer = training.optimizer(_PEAK_RATE)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate_at(step, total))
    if context.argument != "vanilla":
        steppe.constrain_(training.model, optimizer, total_steps=total)
    if context.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    training.wait()
    start = time.monotonic()
    every = max(total // _CURVE, 1)
    since = torch.zeros((), device=context.device)
    for step in range(1, total + 1):
        loss = training.loss()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        since += loss.detach()
        if step % every == 0 or step == total:
            steps = step - (step - 1) // every * every
            tokens = step * training.rows * training.sizes.tokens
            training.curve.append((tokens, since.item() / steps))
            since.zero_()
            taken = time.monotonic() - start
            context.keep(
                steps=step,
                planned_steps=total,
                tokens=tokens,
                train_s=taken,
                tokens_per_s=tokens / taken,
                curve=training.curve,
            )
            if context.left < _CLOSING / 2 and not context.is_dry:
                break  # slower than at first: the rate has not come down, `steps` says so
    if context.device == "cuda":
        context.keep(peak_memory_bytes=torch.cuda.max_memory_allocated())


def probe(training: Run) -> float:
    """Seconds of a step, of steps that change no weight."""
    optimizer = training.optimizer(0.0)
    start = 0.0
    for number in range(_PROBES + 3):
        if number == 3:
            training.wait()
            start = time.monotonic()
        training.loss().backward()
        optimizer.step()
        optimizer.zero_grad()
    training.wait()
    for block in steppe.find_blocks(training.model, patterns=PATTERNS):
        threshold = getattr(block.activated, "threshold", None)
        if threshold is not None:
            threshold.sums.zero_()
    return (time.monotonic() - start) / _PROBES


def rate_at(step: int, total: int) -> float:
    """Share of the peak rate: up over the first 5 %, then down to a tenth by a cosine."""
    done = (step + 1) / total
    return min(done / 0.05, 0.55 + 0.45 * math.cos(math.pi * done))


def held_out(training: Run, context: Context) -> dict[str, Any]:
    """Loss in nats a byte, and density of each block, in evaluation."""
    generator = torch.Generator(context.device).manual_seed(3)
    model, sizes = training.model.eval(), training.sizes
    for layer in model.layers:  # type: ignore[union-attr]
        layer._compiled_call_impl = None  # not to compile again for the hooks
    losses = []
    with torch.no_grad(), steppe.watch(model, patterns=PATTERNS) as monitor:
        for _ in range(2 if context.is_dry else 16):
            ids = batch_of(training.text.held_out, training.rows, sizes.tokens, generator)
            with torch.autocast(context.device, torch.bfloat16):
                logits = model(ids)
            losses.append(loss_of(logits, ids))
        report = monitor.report()
    densities = [block.density for block in report.blocks]
    return {
        "loss": torch.stack(losses).mean().item(),
        "density": sum(densities) / len(densities),
        "derivative_density": sum(block.derivative_density for block in report.blocks)
        / len(densities),
        "density_per_block": densities,
    }


def weights_file(folder: Path, arm: str) -> Path:
    """Where an arm's weights are left for a later step."""
    return folder / f"{arm.replace(' ', '')}.weights"


def save(model: nn.Module, path: Path) -> str:
    """Leave the weights, thresholds folded into biases, as float32 in the order of the model."""
    if any(name.endswith(".threshold") for name, _ in model.named_modules()):
        steppe.fold_(model)
    torch.nn.utils.parameters_to_vector(model.parameters()).detach().cpu().numpy().tofile(path)
    return "left for the next step"


def load(arm: str, folder: Path, sizes: Sizes) -> GPT:
    """The model of an arm as `save` left it.

    Args:
        arm: one of `ARMS`.
        folder: where.
        sizes: of the model.
    """
    plugins = arm.removesuffix("threshold").removesuffix(" + ") or "vanilla"
    model = with_plugins(GPT(sizes), plugins, sizes)
    size = sum(p.numel() for p in model.parameters())
    vector = torch.from_file(str(weights_file(folder, arm)), size=size, dtype=torch.float32)
    torch.nn.utils.vector_to_parameters(vector, model.parameters())
    return model.eval()
