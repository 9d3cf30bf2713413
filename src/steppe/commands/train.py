"""`steppe train`: train by a recipe."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Column, Table

from steppe.commands.guards import interruptible, needing, quieten_libraries
from steppe.commands.terminal import progress_bars, say, say_path, show_table
from steppe.files import prepare_file

if TYPE_CHECKING:
    pass


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
    quieten_libraries()
    with needing("train", "recipes"):
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
    with interruptible(consequence), progress_bars() as progress:
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
