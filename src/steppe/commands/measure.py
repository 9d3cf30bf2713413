"""`steppe measure`: measure checkpoints on held-out data."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from steppe.commands.guards import at_home, interruptible, needing, quieten_libraries
from steppe.commands.options import Patterns
from steppe.commands.terminal import progress_bars, say, say_path, show_table
from steppe.files import expanded, prepare_file
from steppe.printable import printable

if TYPE_CHECKING:
    from rich.progress import TaskID

    from steppe.runs import Run


class LabelChoice(str, Enum):
    """The values of `steppe measure --labels`."""

    data = "data"
    model = "model"
    none = "none"


_Checkpoints = Annotated[
    list[str],
    typer.Argument(
        metavar="CHECKPOINT...",
        help="Folders that save_pretrained wrote, or hub ids; several of one run give curves.",
        show_default=False,
    ),
]
_Data = Annotated[
    str,
    typer.Option(
        help="digits, pydoc, a file or folder (text, JSON lines, parquet, imagefolder,"
        " save_to_disk), or a hub data set as id or id:config.",
        show_default=False,
    ),
]
_Split = Annotated[str | None, typer.Option(help="Which split; the held-out one by default.")]
_Labels = Annotated[
    LabelChoice, typer.Option(help="The data's, sampled by the model, or none: densities alone.")
]
_Count = Annotated[int | None, typer.Option(min=1, help="Stop after so many.")]
_Samples = Annotated[int, typer.Option(min=1, help="Samples per batch.")]
_Length = Annotated[
    int | None, typer.Option(min=1, help="Tokens per sample; the model's limit or 512.")
]
_Text = Annotated[str | None, typer.Option(help="Column of the text.")]
_Target = Annotated[
    str | None, typer.Option(help="Column of what an encoder-decoder model answers.")
]
_Classes = Annotated[str | None, typer.Option(help="Column of the classes.")]
_Processor = Annotated[
    str | None, typer.Option(help="Folder or hub id of the tokenizer or image processor.")
]
_Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, ...")]
_Json = Annotated[
    Path | None, typer.Option("--json", help="Write it all there; `steppe report` reads it.")
]


def measure(
    checkpoints: _Checkpoints,
    data: _Data,
    split: _Split = None,
    labels: _Labels = LabelChoice.data,
    max_batches: _Count = None,
    batch_size: _Samples = 8,
    max_length: _Length = None,
    text_column: _Text = None,
    target_column: _Target = None,
    label_column: _Classes = None,
    processor: _Processor = None,
    device: _Device = None,
    pattern: Patterns = None,
    json_file: _Json = None,
) -> None:
    """Measure checkpoints on held-out data: densities, augmented flatness and its factors."""
    quieten_libraries()
    with needing("measure", "data"):
        from steppe.checkpoints.held_out import measure_checkpoints
        from steppe.data.sources import Source
        from steppe.runs import write_run
    if json_file is not None:
        json_file = prepare_file(expanded(json_file), "json_file")
    from steppe.blocks.pattern_values import pattern_from_text  # loads torch

    patterns = [pattern_from_text(text) for text in pattern or ()]
    source = Source(
        data=at_home(data),
        split=split,
        batch_size=batch_size,
        max_length=max_length,
        text_column=text_column,
        target_column=target_column,
        label_column=label_column,
        processor=None if processor is None else at_home(processor),
    )
    bars = progress_bars("density", on_stderr=True)
    with interruptible("nothing was written"), bars as progress:
        tasks: dict[str, TaskID] = {}

        def show_loading(checkpoint: str) -> None:
            text = f"loading {_short(checkpoint)}"
            tasks[checkpoint] = progress.add_task(text, total=None, density="")

        def show(checkpoint: str, done: int, total: int | None, density: float) -> None:
            task = tasks[checkpoint]
            if done == 0:
                progress.reset(task, total=total, description=_short(checkpoint))
            else:
                progress.update(task, completed=done, density=f"density {100 * density:.2f} %")

        run = measure_checkpoints(
            [at_home(checkpoint) for checkpoint in checkpoints],
            source,
            labels=None if labels is LabelChoice.none else labels.value,
            max_batches=max_batches,
            device=device,
            on_batch=None if progress.disable else show,
            patterns=patterns,
            on_load=show_loading,
        )
    if json_file is not None:
        write_run(run, json_file)
    _show(run)
    if json_file is not None:
        say_path(json_file)


def _short(checkpoint: str) -> str:
    """A hub id, or the last two folders of a path, so that the bar has room beside it."""
    return printable("/".join(Path(checkpoint).parts[-2:]))


def _show(run: Run) -> None:
    """Print the tables of a run."""
    from steppe.report import curve_table, measure_table

    say(*run.settings["notes"], style="dim")
    if len(run.held_out) > 1:
        say(f"the last of them, step {run.held_out_steps[-1]}:")
    show_table(measure_table(run.held_out[-1]))
    if len(run.held_out) > 1:
        show_table(curve_table(run))
    say(*(f"held-out {name}: {value:.4g}" for name, value in run.quality.items()))
