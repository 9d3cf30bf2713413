"""The command line: each subcommand parses, calls one public function and prints."""

from __future__ import annotations

import errno
import importlib.util
import logging
import os
import shlex
import signal
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Column, Table
from typer.core import TyperGroup

import steppe
from steppe.commands.flags import in_flags
from steppe.commands.terminal import (
    complain,
    prepare_streams,
    progress_bars,
    say,
    say_path,
    show_table,
)
from steppe.errors import MissingExtraError, OutputError, SteppeError
from steppe.files import expanded, prepare_file, write_json
from steppe.printable import printable

if TYPE_CHECKING:
    from rich.progress import TaskID

USAGE_ERROR = 2
MOST_THREADS = 4096
INTERRUPTED = 130  # as in steppe.cli
# What can be wrong with a file that somebody names, wherever it is opened.
_OF_THE_WORLD = (
    *(errno.EACCES, errno.EIO, errno.ELOOP, errno.ENAMETOOLONG, errno.ENOSPC, errno.EPERM),
    *(errno.EROFS, errno.ESTALE),
)
# typer has a click of its own since version 0.26; in either, this is what a wrong flag raises.
_UsageError: Any = typer.BadParameter.__bases__[0]


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
            complain(in_flags(error, str(ctx.invoked_subcommand)))
        except OSError as error:
            if error.errno not in _OF_THE_WORLD or error.filename is None:
                raise
            complain(f"{error.filename}: {error.strerror}")
        raise typer.Exit(USAGE_ERROR)


_Patterns = Annotated[
    list[str] | None,
    typer.Option(
        "--pattern",
        help="A BlockPattern(...) as `steppe blocks` prints it, tried first; repeat for more.",
        show_default=False,
    ),
]

app = typer.Typer(
    cls=_Commands,
    help="Measure why Transformer MLP activations are sparse, and train them sparser.",
    invoke_without_command=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def run() -> int:
    """Run the command that the arguments of the process name.

    Returns:
        The exit code.
    """
    prepare_streams()
    try:
        return app(standalone_mode=False) or 0
    except _UsageError as error:
        context = error.ctx
        complain(error.format_message())
        if context is not None:
            complain(f"{context.command_path} --help", "see:")
        return USAGE_ERROR


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"steppe {steppe.__version__}")
        raise typer.Exit


@app.callback()
def _options(
    context: typer.Context,
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version."
        ),
    ] = False,
) -> None:
    """Measure why Transformer MLP activations are sparse, and train them sparser."""
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())
        raise typer.Exit(USAGE_ERROR)


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
    with _extra("demo", "demo"):
        from steppe.report import (
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
    with _interruptible("no summary was written"), progress_bars() as progress:
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
        "threshold: control with a rising threshold, which is ours and not the paper's.",
        style="dim",
    )
    show_table(speed_table(summary))
    logs = f"tensorboard --logdir {shlex.quote(str(out))}"
    for line in (out / "summary.json", plot, logs, page):
        say_path(line)


@app.command(
    add_help_option=False,
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
)
def train(
    context: typer.Context,
    recipe: Annotated[
        str | None,
        typer.Argument(help="A YAML file, or the name of one of --list.", show_default=False),
    ] = None,
    list_them: Annotated[
        bool, typer.Option("--list", help="The recipes that come with steppe.")
    ] = False,
    help_wanted: Annotated[
        bool, typer.Option("--help", help="Show this, or behind a RECIPE all its keys, and exit.")
    ] = False,
) -> None:
    """Train by a recipe: steppe train RECIPE [--any_key value] [--arm ARM] [--resume].

    Every key of the recipe and every one of transformers' TrainingArguments is a flag. On several
    devices: torchrun --nproc_per_node 8 -m steppe.cli train RECIPE
    """
    if help_wanted and recipe is None:
        typer.echo(context.get_help())
        return
    _quieten_libraries()
    with _extra("train", "recipes"):
        from steppe.report import find_runs, recipe_table, write_report
        from steppe.training.recipe import read_recipe
        from steppe.training.recipe_file import list_recipes
        from steppe.training.recipe_keys import keys_of
        from steppe.training.run_recipe import run_recipe
    if list_them or recipe is None:
        table = Table.grid(Column(no_wrap=True, style="bold"), Column(), padding=(0, 2, 0, 0))
        for name, about in list_recipes().items():
            table.add_row(name, about)
        show_table(table)
        return
    if help_wanted:
        for title, keys in keys_of(recipe).items():
            say(title, style="bold")
            for key in keys:
                say(f"  --{key.name} {key.value}".rstrip(), f"      {key.help}")
        return
    asked = read_recipe(recipe, context.args)
    folder = Path(str(asked.training.output_dir))
    page = prepare_file(folder / "report.html", "output_dir")
    consequence = f"go on with the same command and --resume ({folder} has what was saved)"
    with _interruptible(consequence), progress_bars() as progress:
        bar = progress.add_task(f"{asked.name}/{asked.arm.arm}", total=None, visible=False)

        def show(step: int, total: int) -> None:
            progress.update(bar, completed=step, total=total, visible=True)

        def tell(line: str) -> None:
            say(line)

        summary = run_recipe(asked, on_step=show, on_log=tell)
    if asked.training.process_index != 0:
        return
    write_report(find_runs([folder]), page)
    show_table(recipe_table(summary))
    logs = f"tensorboard --logdir {shlex.quote(str(folder))}"
    for line in (folder / "summary.json", summary["model"], logs, page):
        say_path(line)


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
    pattern: _Patterns = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write it all there; `steppe report` reads it.")
    ] = None,
) -> None:
    """Measure checkpoints on held-out data: densities, augmented flatness and its factors."""
    _quieten_libraries()
    with _extra("measure", "data"):
        from steppe.checkpoints.held_out import measure_checkpoints
        from steppe.data.sources import Source
        from steppe.report import curve_table, measure_table
        from steppe.runs import write_run
    if json_file is not None:
        json_file = prepare_file(expanded(json_file), "json_file")
    from steppe.blocks.pattern_values import pattern_from_text  # loads torch

    patterns = [pattern_from_text(text) for text in pattern or ()]
    source = Source(
        data=_at_home(data),
        split=split,
        batch_size=batch_size,
        max_length=max_length,
        text_column=text_column,
        target_column=target_column,
        label_column=label_column,
        processor=None if processor is None else _at_home(processor),
    )
    with _interruptible("nothing was written"), progress_bars() as progress:
        bars: dict[str, TaskID] = {}

        def show(checkpoint: str, done: int, total: int | None) -> None:
            if checkpoint not in bars:
                bars[checkpoint] = progress.add_task(printable(checkpoint), total=total)
            progress.update(bars[checkpoint], completed=done)

        run = measure_checkpoints(
            [_at_home(checkpoint) for checkpoint in checkpoints],
            source,
            labels=None if labels is LabelChoice.none else labels.value,
            max_batches=max_batches,
            device=device,
            on_batch=show,
            patterns=patterns,
        )
    if json_file is not None:
        write_run(run, json_file)
    say(*run.settings["notes"], style="dim")
    if len(run.held_out) > 1:
        say(f"the last of them, step {run.held_out_steps[-1]}:")
    show_table(measure_table(run.held_out[-1]))
    if len(run.held_out) > 1:
        show_table(curve_table(run))
    say(*(f"held-out {name}: {value:.4g}" for name, value in run.quality.items()))
    if json_file is not None:
        say_path(json_file)


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

    out, files = expanded(out), [expanded(run) for run in runs]
    with _interruptible("nothing was written"):
        found = find_runs(files)
        if out.resolve() in [file.resolve() for file in files]:
            raise OutputError(f"{out}: the page would replace a run. Name another", {"out": "PAGE"})
        prepare_file(out, "out")
        write_report(found, out)
    say_path(out)


@app.command()
def bench(
    quick: Annotated[bool, typer.Option("--quick", help="A first look, in seconds.")] = False,
    threads: Annotated[
        int | None,
        typer.Option(min=1, max=MOST_THREADS, help="Of torch and the kernels; as torch has it."),
    ] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the rows there.")] = None,
    plot: Annotated[
        Path | None, typer.Option(help="Draw ratio against density there, a PNG.")
    ] = None,
) -> None:
    """Time an MLP block on the sparse kernels against the same block dense, on this machine."""
    import torch

    from steppe.bench import surroundings, time_blocks, usual_settings
    from steppe.report import bench_table, plot_bench

    if plot is not None and importlib.util.find_spec("matplotlib") is None:
        raise MissingExtraError(
            "`steppe bench --plot` needs matplotlib: pip install 'steppe[demo]'"
        )
    if json_file is not None:
        json_file = prepare_file(expanded(json_file), "json_file")
    if plot is not None:
        plot = prepare_file(expanded(plot), "plot")
    if json_file is not None and plot is not None and json_file.resolve() == plot.resolve():
        raise OutputError(f"{plot}: expected two files for rows and plot", {"plot": "PNG"})
    found = steppe.kernels()
    said = f"{found.name} kernels, {found.isa}" if found.isa else f"no kernels: {found.reason}"
    if found.isa and found.unscreened:
        said += f"; unscreened: {found.unscreened}"
    say(said)
    settings = usual_settings(threads or torch.get_num_threads(), quick)
    with _interruptible("nothing was written"), progress_bars() as progress:
        bar = progress.add_task("timing", total=len(settings))
        rows = time_blocks(
            settings,
            seconds=0.2 if quick else 3.0,
            least_rounds=3 if quick else 5,
            on_row=lambda _: progress.advance(bar),
        )
    if json_file is not None:
        write_json(json_file, {**surroundings(), "rows": rows})
    if plot is not None:
        plot_bench(rows, plot)
    show_table(bench_table(rows))
    say(
        "ratio: dense time / sparse time, the median of rounds in which they took turns.",
        "candidates: what the int8 screen cannot tell to be zero; unscreened: without it.",
        "bound: what sparse products alone could give with a dense first product. Screening passes"
        " it,",
        "and decode can: its dense product is another one, too.",
        style="dim",
    )
    for path in (json_file, plot):
        if path is not None:
            say_path(path)


@app.command()
def blocks(
    model: Annotated[str, typer.Argument(help="A folder, a config.json, or an id on the hub.")],
    pattern: _Patterns = None,
) -> None:
    """Show the MLP blocks of a model, and what looks like one and is not found; without weights."""
    _quieten_libraries()
    with _extra("blocks", "recipes"):
        from steppe.checkpoints.load_by_config import empty_model
        from steppe.report import blocks_table
    from steppe.blocks.candidates import Candidate, listed
    from steppe.blocks.coverage import coverage
    from steppe.blocks.pattern_values import pattern_from_text  # loads torch

    patterns = [pattern_from_text(text) for text in pattern or ()]
    with _interruptible("nothing was written"):
        found = coverage(empty_model(_at_home(model)), patterns)
    if found.blocks:
        show_table(blocks_table(found))
    said = f"{found.share:.0%} of the MLP parameters are in {len(found.blocks)} blocks"
    say(said if found.blocks or found.left else "nothing in it looks like an MLP")
    if found.left:
        say("not covered:", listed(found.left))
        say(
            "to cover what a pattern can name: find_blocks(model, patterns=[...]), or --pattern:",
            listed(found.left, Candidate.pattern),
        )


@app.command()
def calibrate(
    dtype: Annotated[
        DtypeChoice | None, typer.Option(help="Of the blocks; both by default.")
    ] = None,
    threads: Annotated[
        int | None,
        typer.Option(min=1, max=MOST_THREADS, help="Of torch and the kernels; as torch has it."),
    ] = None,
) -> None:
    """Measure from which density on dense is faster on this machine; accelerate_ goes by it.

    It is not needed: without, accelerate_ has built-in thresholds. Run it while nothing else runs.
    """
    import torch

    from steppe.ops.cpu.calibration import calibrate as measure_thresholds
    from steppe.report import calibration_summary, calibration_table

    if threads is not None:
        torch.set_num_threads(threads)
    names = [dtype.value] if dtype is not None else [choice.value for choice in DtypeChoice]
    for name in names:
        with (
            _interruptible(f"the thresholds for {name} are as they were"),
            progress_bars() as progress,
        ):
            bar = progress.add_task(name, total=None)

            def show(done: int, total: int) -> None:
                progress.update(bar, completed=done, total=total)  # noqa: B023

            measured = measure_thresholds(getattr(torch, name), on_threshold=show)
        show_table(calibration_table(measured))
        say(calibration_summary(measured))
        if measured.path is not None:
            say_path(measured.path)
    say(
        "built-in: the threshold without a calibration; used: from now on, for these threads.",
        "evidence: dense time / sparse time at the densities around it, the median of the rounds",
        "and its bounds. Where they leave a doubt, the built-in threshold stays.",
        style="dim",
    )


@contextmanager
def _interruptible(consequence: str) -> Iterator[None]:
    """Let Ctrl-C end a command with one line that says what it left."""
    outside = signal.getsignal(signal.SIGINT)
    if outside is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    except KeyboardInterrupt:
        complain(consequence, "interrupted;")
        raise typer.Exit(INTERRUPTED) from None
    finally:
        signal.signal(signal.SIGINT, outside)


@contextmanager
def _extra(command: str, extra: str) -> Iterator[None]:
    """Tell which extra has the packages that a command imports."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise MissingExtraError(
            f"`steppe {command}` needs {error.name}: pip install 'steppe[{extra}]'"
        ) from None


def _at_home(name: str) -> str:
    """A hub id or data set as it is, a path without its ``~``."""
    if not name:
        raise SteppeError("expected a path or an id, got an empty one")
    return str(expanded(name)) if name.startswith("~") else name


def _quieten_libraries() -> None:
    """Keep the libraries' own bars and notes out of ours; errors still show."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    logging.getLogger("transformers").setLevel(logging.ERROR)
    # It prints what went wrong before raising it; our error says it once.
    logging.getLogger("datasets").setLevel(logging.CRITICAL)
    warnings.filterwarnings("ignore", module="torch|transformers|accelerate")
