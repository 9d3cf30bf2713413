"""The command line: each subcommand parses, calls one public function and prints."""

from __future__ import annotations

import importlib.util
import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import torch
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
from rich.table import Column, Table
from typer.core import TyperGroup

import steppe
from steppe.errors import MissingExtraError, SteppeError
from steppe.files import prepare_folder, write_json
from steppe.flags import in_flags
from steppe.runs import write_run

USAGE_ERROR = 2
INTERRUPTED = 130  # 128 + SIGINT, as shells have it


class DtypeChoice(str, Enum):
    """What `steppe calibrate --dtype` takes."""

    float32 = "float32"
    bfloat16 = "bfloat16"


class LabelChoice(str, Enum):
    """What `steppe measure --labels` takes."""

    data = "data"
    model = "model"
    none = "none"


class _Commands(TyperGroup):
    """Ends a command at an error made on purpose with one message and exit code 2."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command that was asked for."""
        try:
            return super().invoke(ctx)
        except SteppeError as error:
            message = in_flags(error, str(ctx.invoked_subcommand))
            console = Console(stderr=True)
            console.print(f"[bold red]error:[/] {_escape(message)}", highlight=False)
            raise typer.Exit(USAGE_ERROR) from None


app = typer.Typer(
    cls=_Commands,
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
    """Train a tiny Transformer on two real data sets: vanilla, control, and with plug-ins."""
    _quieten_libraries()
    try:
        from steppe.report import (
            demo_table,
            find_runs,
            plot_training_density,
            speed_table,
            write_report,
        )
        from steppe.training.demo import labels_of_runs, run_demo
    except ModuleNotFoundError as error:
        raise MissingExtraError(
            f"`steppe demo` needs {error.name}: pip install 'steppe[demo]'"
        ) from None
    labels = labels_of_runs(seeds)
    with _interruptible("no summary was written"), _progress_bars() as progress:
        bars: dict[str, TaskID] = {}

        def show(label: str, step: int, total: int) -> None:
            if label not in bars:
                place = f"[{labels.index(label) + 1}/{len(labels)}]"
                bars[label] = progress.add_task(f"{_escape(place)} {label}", total=total)
            progress.update(bars[label], completed=step)

        summary = run_demo(out, seeds=seeds, max_steps=max_steps, on_step=show)
    plot = plot_training_density(summary, out / "density.png")
    page = write_report(find_runs([out / label for label in labels]), out / "report.html")
    _console.print(demo_table(summary))
    _console.print(
        "In brackets: the change against vanilla.\n"
        "control: vanilla without weight decay on the norm scales, which alone gives much of the"
        " effect.\nsteppe: zeroth bias + restricted norm + J-SquaredReLU, the paper's three."
        "\nthreshold: control with a rising threshold, which is ours and not the paper's.",
        style="dim",
    )
    _console.print(speed_table(summary))
    for line in (out / "summary.json", plot, f"tensorboard --logdir {out}", page):
        _console.print(str(line), highlight=False, soft_wrap=True)


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def train(
    context: typer.Context,
    recipe: Annotated[
        str | None,
        typer.Argument(help="A YAML file, or the name of one of --list.", show_default=False),
    ] = None,
    list_them: Annotated[
        bool, typer.Option("--list", help="The recipes that come with steppe.")
    ] = False,
) -> None:
    """Train by a recipe: steppe train RECIPE [--any_key value] [--arm ARM] [--resume].

    Every key of the recipe and every one of transformers' TrainingArguments is a flag. On several
    devices: torchrun --nproc_per_node 8 -m steppe.cli train RECIPE
    """
    _quieten_libraries()
    try:
        from steppe.report import find_runs, recipe_table, write_report
        from steppe.training.recipe import list_recipes, read_recipe
        from steppe.training.run_recipe import run_recipe
    except ModuleNotFoundError as error:
        raise MissingExtraError(
            f"`steppe train` needs {error.name}: pip install 'steppe[recipes]'"
        ) from None
    if list_them or recipe is None:
        table = Table.grid(Column(no_wrap=True, style="bold"), Column(), padding=(0, 2, 0, 0))
        for name, about in list_recipes().items():
            table.add_row(name, _escape(about))
        _console.print(table, highlight=False)
        return
    asked = read_recipe(recipe, context.args)
    folder = Path(str(asked.training.output_dir))
    consequence = f"go on with the same command and --resume ({folder} has what was saved)"
    with _interruptible(consequence), _progress_bars() as progress:
        bar = progress.add_task(f"{asked.name}/{asked.arm.arm}", total=None, visible=False)

        def show(step: int, total: int) -> None:
            progress.update(bar, completed=step, total=total, visible=True)

        def tell(line: str) -> None:
            progress.console.print(_escape(line), highlight=False)

        summary = run_recipe(asked, on_step=show, on_log=tell)
    if asked.training.process_index != 0:
        return
    page = write_report(find_runs([folder]), folder / "report.html")
    _console.print(recipe_table(summary))
    for line in (folder / "summary.json", summary["model"], f"tensorboard --logdir {folder}", page):
        _console.print(str(line), highlight=False, soft_wrap=True)


@app.command()
def measure(
    checkpoints: Annotated[
        list[str],
        typer.Argument(
            metavar="CHECKPOINT...",
            help="Folders that save_pretrained wrote, or hub ids; several of one run give curves.",
            show_default=False,
        ),
    ],
    data: Annotated[
        str,
        typer.Option(
            help="digits, pydoc, a file or folder (text, JSON lines, parquet, imagefolder,"
            " save_to_disk), or a hub data set as id or id:config.",
            show_default=False,
        ),
    ],
    split: Annotated[
        str | None, typer.Option(help="Which split; the held-out one by default.")
    ] = None,
    labels: Annotated[
        LabelChoice,
        typer.Option(help="The data's, sampled by the model, or none: densities alone."),
    ] = LabelChoice.data,
    max_batches: Annotated[int | None, typer.Option(min=1, help="Stop after so many.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Samples per batch.")] = 8,
    max_length: Annotated[
        int | None, typer.Option(min=1, help="Tokens per sample; the model's limit or 512.")
    ] = None,
    text_column: Annotated[str | None, typer.Option(help="Column of the text.")] = None,
    target_column: Annotated[
        str | None, typer.Option(help="Column of what an encoder-decoder model answers.")
    ] = None,
    label_column: Annotated[str | None, typer.Option(help="Column of the classes.")] = None,
    processor: Annotated[
        str | None, typer.Option(help="Folder or hub id of the tokenizer or image processor.")
    ] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, ...")] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write it all there; `steppe report` reads it.")
    ] = None,
) -> None:
    """Measure checkpoints on held-out data: densities, augmented flatness and its factors."""
    _quieten_libraries()
    try:
        from steppe.report import curve_table, measure_table
        from steppe.training.held_out import measure_checkpoints
        from steppe.training.sources import Source
    except ModuleNotFoundError as error:
        raise MissingExtraError(
            f"`steppe measure` needs {error.name}: pip install 'steppe[data]'"
        ) from None
    if json_file is not None:
        prepare_folder(json_file.parent, "json_file")
    source = Source(
        data=data,
        split=split,
        batch_size=batch_size,
        max_length=max_length,
        text_column=text_column,
        target_column=target_column,
        label_column=label_column,
        processor=processor,
    )
    with _interruptible("nothing was written"), _progress_bars() as progress:
        bars: dict[str, TaskID] = {}

        def show(checkpoint: str, done: int, total: int | None) -> None:
            if checkpoint not in bars:
                bars[checkpoint] = progress.add_task(_escape(checkpoint), total=total)
            progress.update(bars[checkpoint], completed=done)

        run = measure_checkpoints(
            checkpoints,
            source,
            labels=None if labels is LabelChoice.none else labels.value,
            max_batches=max_batches,
            device=device,
            on_batch=show,
        )
    for note in run.settings["notes"]:
        _console.print(_escape(note), style="dim")
    if len(run.held_out) > 1:
        _console.print(f"the last of them, step {run.held_out_steps[-1]}:", highlight=False)
    _console.print(measure_table(run.held_out[-1]))
    if len(run.held_out) > 1:
        _console.print(curve_table(run))
    for name, value in run.quality.items():
        _console.print(f"held-out {name}: {value:.4g}", highlight=False)
    if json_file is not None:
        write_run(run, json_file)
        _console.print(str(json_file), highlight=False)


@app.command()
def report(
    runs: Annotated[
        list[Path],
        typer.Argument(
            metavar="RUN...",
            help="Training folders (also folders of such), or files of `steppe measure --json`.",
            show_default=False,
        ),
    ],
    out: Annotated[Path, typer.Option(help="The page.")] = Path("report.html"),
) -> None:
    """Compare runs on one page that opens in any browser, offline."""
    from steppe.report import find_runs, write_report

    prepare_folder(out.parent, "out")
    _console.print(str(write_report(find_runs(runs), out)), highlight=False)


@app.command()
def bench(
    quick: Annotated[bool, typer.Option("--quick", help="A first look, in seconds.")] = False,
    threads: Annotated[
        int | None, typer.Option(min=1, help="Of torch and the kernels; as torch has it.")
    ] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the rows there.")] = None,
    plot: Annotated[
        Path | None, typer.Option(help="Draw ratio against density there, a PNG.")
    ] = None,
) -> None:
    """Time an MLP block on the sparse kernels against the same block dense, on this machine."""
    from steppe.bench import surroundings, time_blocks, usual_settings
    from steppe.report import bench_table, plot_bench

    if plot is not None and importlib.util.find_spec("matplotlib") is None:
        raise MissingExtraError(
            "`steppe bench --plot` needs matplotlib: pip install 'steppe[demo]'"
        )
    for path, setting in ((json_file, "json_file"), (plot, "plot")):
        if path is not None:
            prepare_folder(path.parent, setting)
    found = steppe.kernels()
    said = f"{found.name} kernels, {found.isa}" if found.isa else f"no kernels: {found.reason}"
    if found.isa and found.unscreened:
        said += f"; unscreened: {found.unscreened}"
    _console.print(_escape(said), highlight=False)
    settings = usual_settings(threads or torch.get_num_threads(), quick)
    with _interruptible("nothing was written"), _progress_bars() as progress:
        bar = progress.add_task("timing", total=len(settings))
        rows = time_blocks(
            settings,
            seconds=0.2 if quick else 3.0,
            least_rounds=3 if quick else 5,
            on_row=lambda _: progress.advance(bar),
        )
    _console.print(bench_table(rows))
    _console.print(
        "ratio: dense time / sparse time, the median of rounds in which they took turns.\n"
        "candidates: what the int8 screen cannot tell to be zero; unscreened: without it.\n"
        "bound: what sparse products alone could give with a dense first product. Screening passes"
        " it,\nand decode can: its dense product is another one, too.",
        style="dim",
    )
    if json_file is not None:
        write_json(json_file, {**surroundings(), "rows": rows})
        _console.print(str(json_file), highlight=False, soft_wrap=True)
    if plot is not None:
        _console.print(str(plot_bench(rows, plot)), highlight=False, soft_wrap=True)


@app.command()
def blocks(
    model: Annotated[str, typer.Argument(help="A folder, a config.json, or an id on the hub.")],
) -> None:
    """Show the MLP blocks of a model, and what looks like one and is not found; without weights."""
    _quieten_libraries()
    try:
        from steppe.report import blocks_table
        from steppe.training.loading import empty_model
    except ModuleNotFoundError as error:
        raise MissingExtraError(
            f"`steppe blocks` needs {error.name}: pip install 'steppe[recipes]'"
        ) from None
    from steppe.blocks import coverage
    from steppe.candidates import Candidate, listed

    found = coverage(empty_model(model))
    if found.blocks:
        _console.print(blocks_table(found))
    said = f"{found.share:.0%} of the MLP parameters are in {len(found.blocks)} blocks"
    _console.print(said if found.blocks or found.left else "nothing in it looks like an MLP")
    if found.left:
        _console.print("not covered:", f"{_escape(listed(found.left))}", sep="\n", highlight=False)
        _console.print(
            "to cover what a pattern can name: find_blocks(model, patterns=[...]) with",
            _escape(listed(found.left, Candidate.pattern)),
            sep="\n",
            highlight=False,
        )


@app.command()
def calibrate(
    dtype: Annotated[
        DtypeChoice | None, typer.Option(help="Of the blocks; both by default.")
    ] = None,
    threads: Annotated[
        int | None, typer.Option(min=1, help="Of torch and the kernels; as torch has it.")
    ] = None,
) -> None:
    """Measure from which density on dense is faster on this machine; accelerate_ goes by it.

    It is not needed: without, accelerate_ has built-in thresholds. Run it while nothing else runs.
    """
    from steppe.ops.calibration import calibrate as measure_thresholds
    from steppe.report import calibration_summary, calibration_table

    if threads is not None:
        torch.set_num_threads(threads)
    names = [dtype.value] if dtype is not None else [choice.value for choice in DtypeChoice]
    for name in names:
        with (
            _interruptible(f"the thresholds for {name} are as they were"),
            _progress_bars() as progress,
        ):
            bar = progress.add_task(name, total=None)

            def show(done: int, total: int) -> None:
                progress.update(bar, completed=done, total=total)  # noqa: B023

            measured = measure_thresholds(getattr(torch, name), on_threshold=show)
        _console.print(calibration_table(measured))
        _console.print(calibration_summary(measured), highlight=False)
        if measured.path is not None:
            _console.print(str(measured.path), highlight=False, soft_wrap=True)
    _console.print(
        "built-in: the threshold without a calibration; used: from now on, for these threads.\n"
        "evidence: dense time / sparse time at the densities around it, the median of the rounds"
        "\nand its bounds. Where they leave a doubt, the built-in threshold stays.",
        style="dim",
    )


def main() -> None:
    """Run the command line."""
    app()


@contextmanager
def _interruptible(consequence: str) -> Iterator[None]:
    """Let Ctrl-C end a command with one line that says what it left."""
    try:
        yield
    except KeyboardInterrupt:
        Console(stderr=True).print(f"interrupted; {consequence}")
        raise typer.Exit(INTERRUPTED) from None


def _progress_bars() -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=_console,
    )


def _escape(text: str) -> str:
    """Text that Rich prints as it is."""
    return text.replace("[", r"\[")


def _quieten_libraries() -> None:
    """Keep the libraries' own bars and notes out of ours; errors still show."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    logging.getLogger("transformers").setLevel(logging.ERROR)
    # It prints what went wrong before raising it; our error says it once.
    logging.getLogger("datasets").setLevel(logging.CRITICAL)
    warnings.filterwarnings("ignore", module="torch|transformers|accelerate")


if __name__ == "__main__":
    main()
