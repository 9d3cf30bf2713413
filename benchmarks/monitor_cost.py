"""What watching costs: a sampled training step against a plain one, and a run with the callback.

Steps of three kinds take turns in one process, in an order that changes each round: plain, watched
by a monitor that is switched off, and sampled. Then whole runs of the Trainer, without and with the
callback, take turns. A row is the median of the ratios of each round.

    python benchmarks/monitor_cost.py --json benchmarks/results/monitor_cost.json
"""

from __future__ import annotations

import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor, nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    PrinterCallback,
    Trainer,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
)

from steppe import watch
from steppe.files import write_json
from steppe.measures.monitor import Monitor
from steppe.runs import versions
from steppe.training import SteppeCallback

EVERY = 50  # steps, SteppeCallback's default
RUN_STEPS = 2 * EVERY
KINDS = ("plain", "switched off", "sampled")
Batch = dict[str, Tensor]


def vit_s() -> tuple[nn.Module, Batch]:
    """Two blocks of ViT-S/16 (d 384, F 1536) on 8 images of 224 × 224: 197 tokens each."""
    config = ViTConfig(
        hidden_size=384,
        intermediate_size=1536,
        num_hidden_layers=2,
        num_attention_heads=6,
        hidden_act="relu",
        num_labels=1000,
    )
    labels = torch.randint(0, 1000, (8,))
    return ViTForImageClassification(config), {
        "pixel_values": torch.randn(8, 3, 224, 224),
        "labels": labels,
    }


def gpt2_small() -> tuple[nn.Module, Batch]:
    """Two blocks of GPT-2 (d 768, F 3072) on 2 sequences of 512 tokens."""
    config = GPT2Config(
        n_layer=2,
        vocab_size=4096,
        n_positions=512,
        activation_function="relu",
        use_cache=False,
        bos_token_id=0,
        eos_token_id=0,
    )
    ids = torch.randint(0, 4096, (2, 512))
    return GPT2LMHeadModel(config), {"input_ids": ids, "labels": ids}


CASES: dict[str, Callable[[], tuple[nn.Module, Batch]]] = {"vit-s": vit_s, "gpt2": gpt2_small}


class Steps:
    """Training steps of one model in the three kinds."""

    def __init__(self, model: nn.Module, batch: Batch) -> None:
        self._model = model.train()
        self._batch = batch
        self._optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)

    def seconds(self, kind: str) -> float:
        """One step, the monitor's own reading of the device included where it is sampled."""
        watching: AbstractContextManager[Monitor | None] = nullcontext()
        if kind != "plain":
            watching = watch(self._model, gradients=True)
        with watching as monitor:
            if monitor is not None:
                monitor.enabled = kind == "sampled"
            start = time.perf_counter()
            self._model(**self._batch).loss.backward()
            self._optimizer.step()
            self._optimizer.zero_grad()
            if monitor is not None and kind == "sampled":
                monitor.report_of([tally.cpu() for tally in monitor.take()])
            return time.perf_counter() - start


def run_seconds(model: nn.Module, batch: Batch, callback: bool, folder: str) -> float:
    """Training time of one run of the stock Trainer, logging as often as the callback measures."""
    args = TrainingArguments(
        folder,
        max_steps=RUN_STEPS,
        per_device_train_batch_size=next(iter(batch.values())).shape[0],
        learning_rate=1e-5,
        logging_steps=EVERY,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
    )
    samples = [
        dict(zip(batch, sample, strict=True)) for sample in zip(*batch.values(), strict=True)
    ]
    trainer = Trainer(
        model, args, train_dataset=samples, callbacks=[SteppeCallback(EVERY)] if callback else []
    )
    trainer.remove_callback(PrinterCallback)
    return trainer.train().metrics["train_runtime"]


def step_rows(name: str, rounds: int) -> list[dict[str, Any]]:
    """Rows of single steps: sampled, and switched off."""
    model, batch = CASES[name]()
    steps = Steps(model, batch)
    for kind in KINDS:
        steps.seconds(kind)
    times: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for number in range(rounds):
        turn = number % len(KINDS)
        for kind in KINDS[turn:] + KINDS[:turn]:
            times[kind].append(steps.seconds(kind))
    plain = times["plain"]
    return [_row(name, f"{kind} step", times[kind], plain) for kind in ("sampled", "switched off")]


def run_row(name: str, runs: int) -> dict[str, Any]:
    """The row of whole runs of the Trainer."""
    model, batch = CASES[name]()
    times: dict[bool, list[float]] = {False: [], True: []}
    with tempfile.TemporaryDirectory() as folder:
        for number in range(runs):
            for callback in (False, True) if number % 2 else (True, False):
                times[callback].append(run_seconds(model, batch, callback, folder))
    return _row(name, f"run measured every {EVERY} steps", times[True], times[False])


def _row(name: str, what: str, times: list[float], plain: list[float]) -> dict[str, Any]:
    ratios = [one / other for one, other in zip(times, plain, strict=True)]
    return {
        "case": name,
        "what": what,
        "ratio": statistics.median(ratios),
        "quartiles": statistics.quantiles(ratios, n=4)[::2],
        "plain_ms": 1e3 * statistics.median(plain),
        "rounds": len(ratios),
        "threads": torch.get_num_threads(),
    }


def main(
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the rows there.")] = None,
    rounds: Annotated[int, typer.Option(min=3, help="Steps of each kind.")] = 60,
    runs: Annotated[int, typer.Option(min=2, help="Runs of the Trainer of each kind.")] = 7,
    threads: Annotated[int, typer.Option(min=1, help="Threads of torch.")] = 2,
) -> None:
    """Measure what watching costs."""
    torch.manual_seed(0)
    torch.set_num_threads(threads)
    rows = [row for name in CASES for row in [*step_rows(name, rounds), run_row(name, runs)]]
    for row in rows:
        typer.echo(
            f"{row['case']:8} {row['what']:28} {row['ratio']:.3f}"
            f"  (quartiles {row['quartiles'][0]:.3f}, {row['quartiles'][1]:.3f})"
        )
    if json_file is not None:
        write_json(json_file, {"versions": versions(), "machine": platform.machine(), "rows": rows})


if __name__ == "__main__":
    typer.run(main)
