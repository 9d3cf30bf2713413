"""`steppe demo`: train small models on two real data sets and compare the arms."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from steppe.commands.guards import interruptible, needing, quieten_libraries
from steppe.commands.terminal import progress_bars, say, say_path, show_table
from steppe.files import expanded, prepare_file

if TYPE_CHECKING:
    from rich.progress import TaskID


def demo(
    out: Annotated[
        Path, typer.Option(help="Folder for the summary, the plot, the logs and the models.")
    ] = Path("runs/demo"),
    seeds: Annotated[int, typer.Option(min=1, help="Repeat, and show mean ± std.")] = 1,
    max_steps: Annotated[
        int | None, typer.Option(min=1, help="Stop each run early; for a quick look only.")
    ] = None,
) -> None:
    """Train tiny Transformers: vanilla, control, with plug-ins; and one dense and accelerated."""
    quieten_libraries()
    with needing("demo", "demo"):
        from steppe.report import (
            accelerated_sentence,
            demo_table,
            find_runs,
            plot_training_density,
            speed_table,
            write_report,
        )
        from steppe.training.demo import labels_of_runs, run_demo
    out = expanded(out)
    plot, page = out / "density.png", out / "report.html"
    for path in (plot, page):
        prepare_file(path, "out")
    labels = labels_of_runs(seeds)
    with interruptible("no summary was written"), progress_bars() as progress:
        bars: dict[str, TaskID] = {}

        def show(label: str, step: int, total: int) -> None:
            if label not in bars:
                place = f"[{labels.index(label) + 1}/{len(labels)}]"
                bars[label] = progress.add_task(f"{place} {label}", total=total)
            progress.update(bars[label], completed=step)

        summary = run_demo(out, seeds=seeds, max_steps=max_steps, on_step=show)
    plot_training_density(summary, plot)
    write_report(find_runs([out / label for label in labels]), page)
    show_table(demo_table(summary))
    say(
        "In brackets: the change against vanilla.",
        "control: vanilla without weight decay on the norm scales, which alone gives much of the"
        " effect.",
        "steppe: zeroth bias + restricted norm + J-SquaredReLU, the paper's three.",
        "best: control with these three and a rising threshold, which is ours.",
        style="dim",
    )
    show_table(speed_table(summary))
    say(
        f"The blocks of {' and '.join(summary['data_sets'])} are too small to gain: not timed.",
        style="dim",
    )
    say(accelerated_sentence(summary), style="bold")
    logs = f"tensorboard --logdir {shlex.quote(str(out))}"
    for line in (out / "summary.json", plot, logs, page):
        say_path(line)
