"""Options that several subcommands have."""

from __future__ import annotations

from typing import Annotated, TypeAlias

import typer

MOST_THREADS = 4096

Patterns: TypeAlias = Annotated[
    list[str] | None,
    typer.Option(
        "--pattern",
        help="A BlockPattern(...) as `steppe blocks` prints it, tried first; repeat for more.",
        show_default=False,
    ),
]
Threads: TypeAlias = Annotated[
    int | None,
    typer.Option(min=1, max=MOST_THREADS, help="Of torch and the kernels; as torch has it."),
]
