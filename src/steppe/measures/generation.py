"""Which rows of ``generate`` have ended: it feeds them tokens that no mask marks."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from steppe.surgery.journal import Journal
from steppe.tokens import Generation, current_generation


def follow_generation(root: nn.Module, journal: Journal) -> None:
    """Keep `current_generation` during ``generate``, with the rows that have ended.

    A row ends when the stopping criteria of the call say so (an end-of-sequence token, a string, a
    criterion of the user's). With beams the rows are those of the beams that go on, so none ends.

    Args:
        root: the model without wrappers; each model in it that can generate is followed.
        journal: takes the edits down.
    """
    for module in root.modules():
        if callable(getattr(type(module), "generate", None)):
            journal.swap_class(module, _Generating)


class _Generating(nn.Module):
    """A model that keeps which rows of its generation have ended."""

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Generate."""
        before = current_generation.get()
        current_generation.set(Generation())
        try:
            return super().generate(*args, **kwargs)  # type: ignore[misc]
        finally:
            current_generation.set(before)

    # Of Transformers' generation loop this is the one place that knows when a row ends: criteria
    # that are handed to `generate` see neither each other nor the end-of-sequence tokens.
    def _get_stopping_criteria(self, generation_config: Any, *args: Any, **kwargs: Any) -> Any:
        """The criteria of a call, which keep their results."""
        criteria = super()._get_stopping_criteria(  # type: ignore[misc]
            generation_config, *args, **kwargs
        )
        if (generation_config.num_beams or 1) > 1:
            return criteria
        kind = type(criteria)
        return type(kind.__name__, (_Keeping, kind), {})(criteria)


class _Keeping:
    """Stopping criteria that keep which rows have ended."""

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        """Bool ``[B]``, as without."""
        ended: Tensor = super().__call__(input_ids, scores, **kwargs)  # type: ignore[misc]
        generation = current_generation.get()
        if generation is not None:
            before = generation.ended
            generation.ended = ended if before is None else before | ended
        return ended
