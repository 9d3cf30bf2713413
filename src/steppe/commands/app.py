"""The command line: its subcommands, and how an error ends one."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

import steppe
from steppe.commands.bench import bench
from steppe.commands.blocks import blocks
from steppe.commands.calibrate import calibrate
from steppe.commands.demo import demo
from steppe.commands.flags import in_flags
from steppe.commands.measure import measure
from steppe.commands.report import report
from steppe.commands.study import study
from steppe.commands.terminal import (
    complain,
    prepare_streams,
)
from steppe.commands.train import train
from steppe.errors import SteppeError

if TYPE_CHECKING:
    pass

USAGE_ERROR = 2
# What can be wrong with a file that somebody names, wherever it is opened.
_OF_THE_WORLD = (
    *(errno.EACCES, errno.EIO, errno.ELOOP, errno.ENAMETOOLONG, errno.ENOSPC, errno.EPERM),
    *(errno.EROFS, errno.ESTALE),
)
# typer has a click of its own since version 0.26; in either, this is what a wrong flag raises.
_UsageError: Any = typer.BadParameter.__bases__[0]


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


# In the order of `steppe --help`. A recipe's keys are flags of `train`, which parses them itself.
app.command()(demo)
app.command(
    add_help_option=False,
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
)(train)
for command in (measure, report, bench, blocks, calibrate, study):
    app.command()(command)
