"""`steppe bench`: time an MLP block, sparse against dense."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

import steppe
from steppe.commands.guards import interruptible
from steppe.commands.options import Threads
from steppe.commands.terminal import progress_bars, say, say_path, show_table
from steppe.errors import MissingExtraError, OutputError
from steppe.files import expanded, prepare_file, write_json

if TYPE_CHECKING:
    pass


def bench(
    quick: Annotated[bool, typer.Option("--quick", help="A first look, in seconds.")] = False,
    threads: Threads = None,
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
    with interruptible("nothing was written"), progress_bars() as progress:
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
        "candidates: entries that the int8 screen cannot rule out; unscreened: without it.",
        "bound: the limit of sparse products with a dense first product. Screening passes it,",
        "and decode can: its dense product is another one, too.",
        style="dim",
    )
    for path in (json_file, plot):
        if path is not None:
            say_path(path)
