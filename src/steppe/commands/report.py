"""`steppe report`: compare runs on one page."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from steppe.commands.guards import interruptible
from steppe.commands.terminal import say_path
from steppe.errors import OutputError
from steppe.files import expanded, prepare_file

if TYPE_CHECKING:
    pass


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
    with interruptible("nothing was written"):
        found = find_runs(files)
        if out.resolve() in [file.resolve() for file in files]:
            raise OutputError(f"{out}: the page would replace a run. Name another", {"out": "PAGE"})
        prepare_file(out, "out")
        write_report(found, out)
    say_path(out)
