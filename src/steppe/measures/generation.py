"""Which rows of ``generate`` have ended: it goes on feeding them padding that no mask tells of."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from steppe.blocks import Slot, unwrap
from steppe.surgery import Journal
from steppe.tokens import TokenContext

_METHOD = "generate"


def listen_to_generation(
    model: nn.Module,
    contexts: Sequence[TokenContext],
    journal: Journal,
    passed_by: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> None:
    """Have contexts know, during ``generate``, which rows have ended.

    A row ends with an end-of-sequence token of the call. With beams the rows are those of the beams
    that go on, so none has ended.

    Args:
        model: the model; each Hugging Face model in it that can generate is listened to.
        contexts: of its blocks.
        journal: takes the edits down.
        passed_by: makes the context that each call runs in.
    """
    for module in unwrap(model).modules():
        if callable(getattr(module, _METHOD, None)) and _METHOD not in vars(module):
            journal.add_attribute(Slot(module, _METHOD), _Generate(module, contexts, passed_by))


class _Generate:
    """The method of a model, which it is given in place of its own."""

    def __init__(
        self,
        module: Any,
        contexts: Sequence[TokenContext],
        passed_by: Callable[[], AbstractContextManager[None]],
    ) -> None:
        self._passed_by = passed_by
        self._generate: Callable[..., Any] = getattr(type(module), _METHOD).__get__(module)
        self._defaults = getattr(module, "generation_config", None)
        self._contexts = contexts
        self.__signature__ = inspect.signature(self._generate)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Generate."""
        with self._passed_by():
            return self._run(*args, **kwargs)

    def _run(self, *args: Any, **kwargs: Any) -> Any:
        given = self.__signature__.bind(*args, **kwargs).arguments
        settings = {**given.pop("kwargs", {}), **given}
        config = settings.get("generation_config") or self._defaults
        ends = _ends(settings.get("eos_token_id", getattr(config, "eos_token_id", None)))
        beams = settings.get("num_beams", getattr(config, "num_beams", None)) or 1
        if not ends or beams > 1 or settings.get("assistant_model") is not None:
            return self._generate(*args, **kwargs)
        criteria = [*(settings.pop("stopping_criteria", None) or []), _Ended(ends, self._contexts)]
        try:
            return self._generate(**settings, stopping_criteria=criteria)
        finally:
            for context in self._contexts:
                context.finished.set(None)


class _Ended:
    """A stopping criterion that stops nothing."""

    def __init__(self, ends: Sequence[int], contexts: Sequence[TokenContext]) -> None:
        self._ends = ends
        self._contexts = contexts
        self._ended: Tensor | None = None

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        """Tell the contexts, after each token, which of the rows ``[B, T]`` have ended."""
        ends = torch.tensor(self._ends, device=input_ids.device)
        ended = torch.isin(input_ids[:, -1], ends)
        self._ended = ended if self._ended is None else self._ended | ended
        for context in self._contexts:
            context.finished.set(self._ended)
        return torch.zeros_like(ended)


def _ends(tokens: Any) -> list[int]:
    """End-of-sequence tokens, of which there may be none, one or several."""
    if tokens is None:
        return []
    if isinstance(tokens, Tensor):
        return list(tokens.flatten().tolist())
    return list(tokens) if isinstance(tokens, list | tuple) else [int(tokens)]
