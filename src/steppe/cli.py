"""The command line: each subcommand parses, calls one public function and prints."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

import steppe
from steppe.errors import MissingExtraError, SteppeError

USAGE_ERROR = 2
INTERRUPTED = 130  # 128 + SIGINT, as shells have it

app = typer.Typer(
    help="Measure why Transformer MLP activations are sparse, and train them sparser.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
_console = Console()


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"steppe {steppe.__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version."
        ),
    ] = False,
) -> None:
    """Measure why Transformer MLP activations are sparse, and train them sparser."""


@app.command()
def demo(
    out: Annotated[
        Path, typer.Option(help="Folder for the summary, the plot, the logs and the models.")
    ] = Path("runs/demo"),
    seeds: Annotated[int, typer.Option(min=1, help="Repeat, and show mean ± std.")] = 1,
    max_steps: Annotated[
        int | None, typer.Option(min=1, help="Stop each run early; for a quick look only.")
    ] = None,
) -> None:
    """Train a tiny Transformer on two real data sets: vanilla, control, and with the plug-ins."""
    _quieten_libraries()
    try:
        from steppe.report import demo_table, plot_training_density
        from steppe.training.demo import labels_of_runs, run_demo
    except ModuleNotFoundError as error:
        raise MissingExtraError(
            f"`steppe demo` needs {error.name}: pip install 'steppe[demo]'"
        ) from None
    labels = labels_of_runs(seeds)
    with (
        _interruptible("no summary was written"),
        Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=_console,
        ) as progress,
    ):
        bars: dict[str, TaskID] = {}

        def show(label: str, step: int, total: int) -> None:
            if label not in bars:
                place = f"[{labels.index(label) + 1}/{len(labels)}]"
                bars[label] = progress.add_task(f"{_escape(place)} {label}", total=total)
            progress.update(bars[label], completed=step)

        summary = run_demo(out, seeds=seeds, max_steps=max_steps, on_step=show)
    plot = plot_training_density(summary, out / "density.png")
    _console.print(demo_table(summary))
    _console.print(
        "In brackets: the change against vanilla.\n"
        "control: vanilla without weight decay on the norm scales, which alone gives much of the"
        " effect.\nsteppe: zeroth bias + restricted norm + J-SquaredReLU, the paper's three.",
        style="dim",
    )
    _console.print(f"{out / 'summary.json'}\n{plot}\ntensorboard --logdir {out}", highlight=False)


def main() -> None:
    """Run the command line; errors made on purpose end with one message and exit code 2."""
    try:
        app()
    except SteppeError as error:
        Console(stderr=True).print(f"[bold red]error:[/] {_escape(str(error))}", highlight=False)
        sys.exit(USAGE_ERROR)


@contextmanager
def _interruptible(consequence: str) -> Iterator[None]:
    """Let Ctrl-C end a command with one line that says what it left."""
    try:
        yield
    except KeyboardInterrupt:
        Console(stderr=True).print(f"interrupted; {consequence}")
        raise typer.Exit(INTERRUPTED) from None


def _escape(text: str) -> str:
    """Text that Rich prints as it is."""
    return text.replace("[", r"\[")


def _quieten_libraries() -> None:
    """Keep the libraries' own bars and notes out of ours; errors still show."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    logging.getLogger("transformers").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="torch|transformers|accelerate")


if __name__ == "__main__":
    main()
