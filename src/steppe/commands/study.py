"""`steppe study`: all runs of a study, in parallel processes."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Column, Table

from steppe.commands.guards import interruptible, needing, quieten_libraries
from steppe.commands.terminal import complain, progress_bars, say, say_path, show_table
from steppe.errors import StudyError
from steppe.files import expanded

if TYPE_CHECKING:
    from steppe.study.study import StudyOutcome

FAILED = 1


def study(
    name: Annotated[
        str | None,
        typer.Argument(help="A YAML file, or the name of one of --list.", show_default=False),
    ] = None,
    list_them: Annotated[
        bool, typer.Option("--list", help="The studies that come with steppe.")
    ] = False,
    jobs: Annotated[
        int | None,
        typer.Option(min=1, help="Runs at a time; by default one a core.", show_default=False),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Folder; by default runs/studies/NAME.", show_default=False),
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="A few steps of two seeds, to see that it runs.")
    ] = False,
    only: Annotated[
        str, typer.Option(help="Arms and recipes, with commas; others are left out.")
    ] = "",
    data: Annotated[
        list[str] | None,
        typer.Option(help="RECIPE=FOLDER: where its data is; repeat for more.", show_default=False),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check the study, and print its runs.")
    ] = False,
) -> None:
    """Run arms × seeds × settings; the same command goes on where it was stopped."""
    quieten_libraries()
    with needing("study", "study"):
        from steppe.study.plan import check_runs, plan_runs
        from steppe.study.study import run_study
        from steppe.study.study_file import list_studies, read_study
        from steppe.study.table import study_table
    if list_them or name is None:
        table = Table.grid(Column(no_wrap=True, style="bold"), Column(), padding=(0, 2, 0, 0))
        for known, about in list_studies().items():
            table.add_row(known, about)
        show_table(table)
        return
    asked = read_study(name)
    folders = _folders(data or [])
    words = [word.strip() for word in only.split(",") if word.strip()]
    usual = Path("runs/studies") / (f"{asked.name}-quick" if quick else asked.name)
    folder = usual if out is None else expanded(out)
    if dry_run:
        runs = plan_runs(asked, quick=quick, only=words, data=folders)
        check_runs(asked, runs, folder)
        say(*(run.id for run in runs))
        return
    with interruptible("go on with the same command"), progress_bars() as progress:
        bar = progress.add_task(asked.name, total=None)

        def show(done: float, total: int) -> None:
            progress.update(bar, completed=done, total=total)

        def tell(row: dict[str, Any]) -> None:
            say(f"{row['id']}  {_results(row)}")

        def tell_failure(run: str, lines: list[str]) -> None:
            complain("\n  ".join([run, *lines]), "failed:")

        outcome: StudyOutcome = run_study(
            asked,
            folder,
            jobs or os.cpu_count() or 1,
            quick=quick,
            only=words,
            data=folders,
            on_progress=show,
            on_row=tell,
            on_failure=tell_failure,
        )
    if outcome.rows:
        show_table(study_table(outcome.rows))
    say_path(outcome.file)
    if outcome.failed:
        complain(
            f"{len(outcome.failed)} of {len(outcome.failed) + len(outcome.rows)} runs failed; the"
            " same command tries them again"
        )
        raise typer.Exit(FAILED)


def _folders(given: list[str]) -> dict[str, str]:
    """Folders of data by recipe."""
    folders = {}
    for word in given:
        recipe, equals, folder = word.partition("=")
        if not (recipe and equals and folder):
            raise StudyError(
                f"expected a recipe and its folder, got {word!r}", {"data": "RECIPE=FOLDER"}
            )
        folders[recipe] = folder
    return folders


def _results(row: dict[str, Any]) -> str:
    """The numbers of a run in a line."""
    quality = "  ".join(f"{name} {value:.4g}" for name, value in row["quality"].items() if value)
    return f"{quality}  density {100 * row['density']:.2f} %  {row['seconds']:.0f} s"
