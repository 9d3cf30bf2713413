"""Which tokens are routed to an expert, in one call of the module around all experts."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from steppe.per_thread import PerThread


class Routing:
    """Which tokens are routed to which expert, in one call.

    Args:
        index: int64 ``[N, k]``, the experts of each token; any number that is no expert's for none.
        experts: how many there are.

    Attributes:
        order: int64 ``[N·k]``, sorts the flat `index` by expert, tokens in order.
        tokens: N.
    """

    def __init__(self, index: Tensor, experts: int) -> None:
        flat = index.reshape(-1)
        flat = torch.where((flat < 0) | (flat > experts), experts, flat)
        self.order = flat.argsort(stable=True)
        self.tokens = len(index)
        self._index = self.order // max(index.shape[-1], 1)
        self._experts = experts
        self._sorted = flat[self.order]
        counts = torch.bincount(flat, minlength=experts + 1)[:experts]
        self._counts: list[int] = counts.tolist()
        self._padded: tuple[int, Tensor, list[int]] | None = None

    def __iter__(self) -> Iterator[tuple[int, RoutedRows]]:
        """The experts that have tokens, with those."""
        start = 0
        for expert, count in enumerate(self._counts):
            if count:
                span = slice(start, start + count)
                yield expert, RoutedRows(self, expert, self._index[span], span)
            start += count

    def padded(self, samples: int) -> tuple[Tensor, list[int]]:
        """Where each routed token goes if those of a sample stand together; the longest samples.

        Asked for all experts at once, since the second waits for the device.

        Args:
            samples: S; each has as many of the N tokens as the others, one after the other.

        Returns:
            int64 ``[N·k]``, ``sample · longest + place`` in the order of `order`, and for each
            expert how many tokens it has of the sample that it has most of.
        """
        if self._padded is None or self._padded[0] != samples:
            sample = self._index // (self.tokens // samples)
            groups = self._sorted * samples + sample
            counts = torch.bincount(groups, minlength=(self._experts + 1) * samples)
            # Sorted by expert and then by token, so by group.
            place = torch.arange(len(groups), device=groups.device)
            place = place - (counts.cumsum(0) - counts)[groups]
            longest = counts.view(self._experts + 1, samples).amax(1)
            slots = sample * longest[self._sorted] + place
            self._padded = samples, slots, longest.tolist()
        return self._padded[1:]


class Rows(ABC):
    """The tokens that are routed to one expert, in one call.

    Attributes:
        index: int64 ``[n]``, which of the N tokens.
        tokens: N.
    """

    index: Tensor
    tokens: int

    @abstractmethod
    def padded(self, samples: int) -> tuple[Tensor, int]:
        """Where each token goes if the tokens of a sample stand together, and the longest sample.

        Args:
            samples: S; each has as many of the N tokens as the others, one after the other.

        Returns:
            int64 ``[n]``, ``sample · longest + place``, and the longest sample's
            number of tokens.
        """


class RoutedRows(Rows):
    """The rows of an expert in tensors of all experts.

    Args:
        routing: of all experts.
        expert: its number.
        index: as of `Rows`.
        span: where they are in the order of the routing.
    """

    def __init__(self, routing: Routing, expert: int, index: Tensor, span: slice) -> None:
        self.index, self.tokens = index, routing.tokens
        self.span = span
        self._routing, self._expert = routing, expert

    def padded(self, samples: int) -> tuple[Tensor, int]:
        """As of `Rows`; see `Routing.padded`."""
        slots, longest = self._routing.padded(samples)
        return slots[self.span], longest[self._expert]


class ListedRows(Rows):
    """The rows of an expert that is a module in a list.

    Args:
        index: as of `Rows`, in any order.
        tokens: as of `Rows`.
    """

    def __init__(self, index: Tensor, tokens: int) -> None:
        self.index, self.tokens = index, tokens

    def padded(self, samples: int) -> tuple[Tensor, int]:
        """As of `Rows`."""
        sample = self.index // (self.tokens // samples)
        counts = torch.bincount(sample, minlength=samples)
        order = sample.argsort(stable=True)
        place = torch.empty_like(order)
        place[order] = torch.arange(len(order), device=order.device)
        place -= (counts.cumsum(0) - counts)[sample]
        longest = max(int(counts.max()), 1)
        return sample * longest + place, longest


current_rows: PerThread[Rows | None] = PerThread(None)
"""The tokens of the expert whose call a thread is in."""


class ListedTokens:
    """Hooks that find out which tokens each expert in a list of modules gets.

    Nothing but the forward of the module around the list knows, so the rows of an expert's input
    are looked up among those of that module's input. Rows that are equal are routed alike, so which
    of them is which does not matter.
    """

    def __init__(self) -> None:
        self._tokens: PerThread[Tensor | None] = PerThread(None)
        self._sorted: PerThread[tuple[Tensor, Tensor] | None] = PerThread(None)

    def enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Forward pre-hook on the module around the list."""
        values = (*args, *kwargs.values())
        tokens = (v for v in values if isinstance(v, Tensor) and v.is_floating_point())
        found = next(tokens, None)
        self._tokens.set(None if found is None else found.detach().reshape(-1, found.shape[-1]))
        self._sorted.set(None)

    def leave(self, *arguments: Any) -> None:
        """Forward hook on it, called also where its forward has raised."""
        self._tokens.set(None)
        self._sorted.set(None)
        current_rows.set(None)

    def look_up(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        """Forward pre-hook on the first layers of an expert."""
        tokens, x = self._tokens.get(), args[0].detach()
        current_rows.set(None)
        if tokens is None or x.dtype != tokens.dtype or x.shape[-1] != tokens.shape[-1]:
            return
        known = self._sorted.get()
        if known is None:
            known = fingerprints(tokens).sort(stable=True)
            self._sorted.set((known[0], known[1]))
        of_tokens, order = known
        of_x, order_of_x = fingerprints(x.reshape(-1, x.shape[-1])).sort(stable=True)
        # Of equal rows the first one is the first one, and so on.
        first = torch.searchsorted(of_x, of_x)
        place = torch.searchsorted(of_tokens, of_x)
        place = place + torch.arange(len(of_x), device=of_x.device) - first
        place = place.clamp(max=len(of_tokens) - 1)
        if not len(of_x) or bool((of_tokens[place] == of_x).all()):
            index = torch.empty_like(order_of_x)
            index[order_of_x] = order[place]
            current_rows.set(ListedRows(index, len(tokens)))


def fingerprints(rows: Tensor) -> Tensor:
    """A number for each row by all of its bits, the same one for equal rows.

    Args:
        rows: ``[N, D]`` of floats.

    Returns:
        int64 ``[N]``.
    """
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}[rows.element_size()]
    generator = torch.Generator().manual_seed(0)
    factors = torch.randint(-(2**62), 2**62, rows.shape[-1:], generator=generator)
    return (rows.contiguous().view(integers).to(torch.int64) * factors.to(rows.device)).sum(-1)
