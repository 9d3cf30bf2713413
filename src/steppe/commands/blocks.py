"""`steppe blocks`: show the MLP blocks of a model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from steppe.commands.guards import at_home, interruptible, needing, quieten_libraries
from steppe.commands.options import Patterns
from steppe.commands.terminal import say, show_table

if TYPE_CHECKING:
    pass


def blocks(
    model: Annotated[str, typer.Argument(help="A folder, a config.json, or an id on the hub.")],
    pattern: Patterns = None,
) -> None:
    """Show the MLP blocks of a model, and what looks like one and is not found; without weights."""
    quieten_libraries()
    with needing("blocks", "recipes"):
        from steppe.checkpoints.load_by_config import empty_model
        from steppe.report import blocks_table
    from steppe.blocks.candidates import Candidate, listed
    from steppe.blocks.coverage import coverage
    from steppe.blocks.pattern_values import pattern_from_text  # loads torch

    patterns = [pattern_from_text(text) for text in pattern or ()]
    with interruptible("nothing was written"):
        found = coverage(empty_model(at_home(model)), patterns)
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
