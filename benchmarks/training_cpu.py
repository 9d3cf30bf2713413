"""Whole training runs on the kernels, with the plug-ins, against the dense model: loss and seconds.

    bible -f Gen1:1-Rev22:21 > kjv.txt       # Debian: bible-kjv, bible-kjv-text
    python benchmarks/training_cpu.py kjv.txt --json benchmarks/results/training_cpu.json

A GPT-2 of bytes (4 layers, d 256, 1,024 tokens a step) with one thread. Everything takes turns in
one process, and times are those of the processor: forward, backward, optimizer and plug-ins.

- ``steps``: a step with a plug-in against one without it, both accelerated, at equal density; and
  an accelerated step at a density of one half against a dense one.
- ``runs``: as many steps for each arm: the seconds, and the loss on held-out text.
- ``time``: as many seconds for each arm, of which there are wider ones: the loss. Schedules follow
  the share of the time that is spent. Two budgets.
"""

from __future__ import annotations

import copy
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
import transformers
import typer
from torch import Tensor, nn

import steppe
from steppe.bench import surroundings
from steppe.files import write_json

D_MODEL, LAYERS, HEADS = 256, 4, 4
ROWS, TOKENS = 4, 256  # of a step
PEAK_RATE, FINAL_SHARE, WARM_UP = 1e-3, 0.1, 0.05
HELD_OUT = 0.05  # share of the text, its end
EVALUATED = 16  # batches of it
STRENGTH = 1e-3  # λ of the penalty
TURNS = 25
POINT = 10  # steps whose mean loss is a point of a curve
PARTS = ("steps", "runs", "time")


@dataclass(frozen=True)
class Arm:
    """A way to train.

    Attributes:
        plugins: of the model.
        accelerated: whether it runs on the kernels.
        width: F / d.
    """

    plugins: tuple[steppe.Plugin, ...] = ()
    accelerated: bool = True
    width: int = 4


THRESHOLD = (steppe.RisingThreshold(),)
PENALTY = (steppe.ActivationPenalty(STRENGTH),)
RUNS = {
    "vanilla, dense": Arm(accelerated=False),
    "vanilla": Arm(),
    "threshold": Arm(THRESHOLD),
    "L1": Arm(PENALTY),
}
TIME = {
    "vanilla, dense, 4 d": Arm(accelerated=False),
    "threshold, 4 d": Arm(THRESHOLD),
    "threshold, 8 d": Arm(THRESHOLD, width=8),
    "threshold, 16 d": Arm(THRESHOLD, width=16),
}


class Text:
    """Bytes, and batches of them that are the same for every arm.

    Args:
        path: of the file.
    """

    def __init__(self, path: Path) -> None:
        content = torch.frombuffer(bytearray(path.read_bytes()), dtype=torch.uint8)
        whole = int(len(content) * (1.0 - HELD_OUT))
        self.train, self.held_out = content[:whole], content[whole:]

    def batch(self, number: int, part: Tensor) -> Tensor:
        """int64 ``[ROWS, TOKENS]``."""
        generator = torch.Generator().manual_seed(number)
        starts = torch.randint(len(part) - TOKENS, (ROWS, 1), generator=generator)
        return part[starts + torch.arange(TOKENS)].long()


def new_model(width: int) -> nn.Module:
    """A GPT-2 of bytes with ReLU and no dropout; F = width · d."""
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=256,
        n_positions=TOKENS,
        n_embd=D_MODEL,
        n_layer=LAYERS,
        n_head=HEADS,
        n_inner=width * D_MODEL,
        activation_function="relu",
        bos_token_id=0,
        eos_token_id=0,
        **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0),
    )
    return transformers.GPT2LMHeadModel(config).train()


@dataclass
class Run:
    """A model in training.

    Attributes:
        arm: how.
        seconds: spent so far, of the processor.
        steps: made so far.
        recent: seconds of the last steps.
        curve: seconds so far, and the mean training loss of the last `POINT` steps.
    """

    arm: Arm
    seconds: float = 0.0
    steps: int = 0
    recent: list[float] = field(default_factory=list)
    curve: list[tuple[float, float]] = field(default_factory=list)

    def __post_init__(self) -> None:
        """Make the model."""
        self._losses: list[Tensor] = []
        self.model = new_model(self.arm.width)
        if self.arm.plugins:
            steppe.sparsify_(self.model, list(self.arm.plugins))
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=PEAK_RATE, betas=(0.9, 0.95))
        if self.arm.accelerated:
            steppe.accelerate_(self.model)

    def step(self, ids: Tensor, progress: float) -> None:
        """A step on a batch, at a share of the run that is done."""
        start = time.process_time()
        for group in self.optimizer.param_groups:
            group["lr"] = rate_at(progress)
        if self.arm.plugins:
            steppe.advance_(self.model, progress)
        loss = self.model(input_ids=ids, labels=ids).loss
        of_task = loss.detach()
        if self.arm.plugins == PENALTY:
            loss = steppe.penalize(loss, self.model)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.arm.plugins:
            steppe.project_(self.model)
        taken = time.process_time() - start
        self.seconds += taken
        self.steps += 1
        self.recent = [*self.recent[-99:], taken]
        self._losses.append(of_task)
        if len(self._losses) == POINT:
            self.curve.append((self.seconds, torch.stack(self._losses).mean().item()))
            self._losses.clear()

    def found(self, text: Text) -> dict[str, Any]:
        """The row of this run, with the loss in nats a byte and the density on held-out text."""
        parameters = sum(p.numel() for p in self.model.parameters())
        row = {
            "width": self.arm.width,
            "accelerated": self.arm.accelerated,
            "plugins": [plugin.settings() for plugin in self.arm.plugins],
            "steps": self.steps,
            "seconds": self.seconds,
            "ms_a_step": 1e3 * self.seconds / self.steps,
            "ms_a_step_at_the_end": 1e3 * statistics.median(self.recent),
            "parameters": parameters,
            "bytes_of_training": 16 * parameters,  # weights, gradients, two moments
            "curve": self.curve,
            **evaluated(self.model, text),
        }
        if self.arm.accelerated:
            blocks = steppe.explain(self.model).blocks
            row["calls"] = {block.name: dict(block.calls) for block in blocks}
        return row


def rate_at(progress: float) -> float:
    """The learning rate: linear up, then a cosine down to a tenth."""
    if progress < WARM_UP:
        return PEAK_RATE * (0.02 + progress / WARM_UP)
    left = 0.5 + 0.5 * math.cos(math.pi * (progress - WARM_UP) / (1.0 - WARM_UP))
    return PEAK_RATE * (FINAL_SHARE + (1.0 - FINAL_SHARE) * left)


@torch.no_grad()
def evaluated(model: nn.Module, text: Text) -> dict[str, float]:
    """Loss in nats a byte and density on held-out text."""
    model.eval()
    losses = []
    with steppe.watch(model) as monitor:
        for number in range(EVALUATED):
            ids = text.batch(number, text.held_out)
            losses.append(model(input_ids=ids, labels=ids).loss.item())
        density = monitor.report().density
    model.train()
    return {"loss": statistics.mean(losses), "density": density}


def runs(text: Text, steps: int, arms: Mapping[str, Arm]) -> dict[str, Any]:
    """As many steps for each arm, step by step in turn."""
    running = {name: Run(arm) for name, arm in arms.items()}
    for step in range(steps):
        ids = text.batch(step, text.train)
        for run in running.values():
            run.step(ids, step / steps)
        if step % 50 == 49:
            print(step + 1, {name: round(run.seconds, 1) for name, run in running.items()})
    rows = {name: run.found(text) for name, run in running.items()}
    first = next(iter(rows.values()))["seconds"]
    for row in rows.values():
        row["speedup"] = first / row["seconds"]
    return rows


def in_time(text: Text, seconds: float, arms: Mapping[str, Arm]) -> dict[str, Any]:
    """As many seconds for each arm; the next step is of the arm that has spent least."""
    running = {name: Run(arm) for name, arm in arms.items()}
    while True:
        run = min(running.values(), key=lambda one: one.seconds)
        if run.seconds >= seconds:
            break
        run.step(text.batch(run.steps, text.train), run.seconds / seconds)
    return {name: run.found(text) for name, run in running.items()}


def ratio(texts: Text, first: Run, second: Run) -> dict[str, float]:
    """Time of a step of the first over one of the second, taken in turns; and both densities."""
    taken: list[list[float]] = [[], []]
    for number in range(TURNS + 3):
        ids = texts.batch(number, texts.train)
        for run, times in zip((first, second), taken, strict=True):
            run.step(ids, 1.0)
            times.append(run.recent[-1])
    pairs = [one / other for one, other in zip(*(times[3:] for times in taken), strict=True)]
    low, middle, high = statistics.quantiles(pairs, n=4, method="inclusive")
    densities = [evaluated(run.model, texts)["density"] for run in (first, second)]
    return {
        "ratio": middle,
        "lower_quartile": low,
        "upper_quartile": high,
        "ms": 1e3 * statistics.median(taken[0][3:]),
        "other_ms": 1e3 * statistics.median(taken[1][3:]),
        "density": densities[0],
        "other_density": densities[1],
    }


def steps(text: Text) -> dict[str, Any]:
    """What the plug-ins cost on the kernels, and the kernels at a density of one half."""
    found = {}
    for name, plugins in (("threshold", THRESHOLD), ("L1", PENALTY)):
        run = Run(Arm(plugins))
        for number in range(40):  # until the plug-in has made it sparse
            run.step(text.batch(number, text.train), 0.3)
        steppe.advance_(run.model, 1.0)
        other = Run(Arm())
        with_folded_weights(other, run)
        freeze(run, other)
        found[f"{name} / without it"] = ratio(text, run, other)
    dense, routed = Run(Arm(accelerated=False)), Run(Arm())
    freeze(dense, routed)
    found["accelerated / dense, at first"] = ratio(text, routed, dense)
    return found


def with_folded_weights(plain: Run, run: Run) -> None:
    """Give a plain model the weights of another one, its thresholds in the biases."""
    source = copy.deepcopy(run.model)
    if run.arm.plugins == THRESHOLD:
        steppe.fold_(source)
    plain.model.load_state_dict(source.state_dict())


def freeze(*given: Run) -> None:
    """Let steps change neither weights nor deviations, so that the densities stay."""
    for run in given:
        run.optimizer.step = _do_nothing  # type: ignore[method-assign]
        for block in steppe.find_blocks(run.model):
            threshold = getattr(block.activated, "threshold", None)
            if threshold is not None:
                threshold.take_up = _do_nothing


def _do_nothing(*_: Any) -> None:
    """In place of a step of the optimizer, and of one of the running deviations."""


def main(
    text: Annotated[Path, typer.Argument(help="a text, a few megabytes", exists=True)],
    json: Annotated[Path, typer.Option(help="file for the results")],
    only: Annotated[str, typer.Option(help=f"some of {', '.join(PARTS)}, with commas")] = "",
    number: Annotated[int, typer.Option("--steps", help="of each run")] = 600,
    seconds: Annotated[Sequence[float], typer.Option(help="each budget of `time`")] = (40.0, 160.0),
) -> None:
    """Measure, and write what was found after each part."""
    wanted = only.split(",") if only else list(PARTS)
    if unknown := sorted(set(wanted) - set(PARTS)):
        raise typer.BadParameter(f"--only: expected some of {', '.join(PARTS)}, got {unknown}")
    torch.set_num_threads(1)
    read = Text(text)
    found: dict[str, Any] = {**surroundings(), "threads": 1, "text_bytes": text.stat().st_size}
    measures: dict[str, Callable[[], Any]] = {
        "steps": lambda: steps(read),
        "runs": lambda: runs(read, number, RUNS),
        "time": lambda: {f"{budget:.0f} s": in_time(read, budget, TIME) for budget in seconds},
    }
    for part in wanted:
        found[part] = measures[part]()
        write_json(json, found)
        print(part, found[part])


if __name__ == "__main__":
    typer.run(main)
