"""`steppe calibrate`: measure the crossover densities of this machine."""

from __future__ import annotations

from enum import Enum
from typing import TYPE_CHECKING, Annotated

import typer

from steppe.commands.guards import interruptible
from steppe.commands.options import Threads
from steppe.commands.terminal import progress_bars, say, say_path, show_table

if TYPE_CHECKING:
    pass


class DtypeChoice(str, Enum):
    """The values of `steppe calibrate --dtype`."""

    float32 = "float32"
    bfloat16 = "bfloat16"


def calibrate(
    dtype: Annotated[
        DtypeChoice | None, typer.Option(help="Of the blocks; both by default.")
    ] = None,
    threads: Threads = None,
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
            interruptible(f"the thresholds for {name} are as they were"),
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
