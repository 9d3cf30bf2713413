"""When the sparse kernels are faster, and the screen: thresholds by machine, dtype and threads.

Densities go by the width of the block too: the narrower, the more of the time goes into making the
CSR. The thresholds are those that `steppe calibrate` has measured on this machine, see
`steppe.ops.cpu.calibration`, else the built-in ones of `steppe.ops.cpu.thresholds`.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path

import torch

from steppe.ops.cpu.library import kernels
from steppe.ops.cpu.thresholds import (
    Tables,
    candidate_tables,
    density_tables,
    family_of,
    reached,
    tables_at,
)

# Multiply-adds of the first product below which calling an op costs more than it can gain: with one
# thread a block of so many takes about 0.3 ms, an op about 0.05 ms of Python.
_LEAST_WORK = 2**23
# Elements of a weight that take longer to read from memory than calling an op, however few the
# tokens: a thread reads about 10 GB/s, so two weights of 4 MB take 0.8 ms.
_LARGE_WEIGHT = 2**20
# Threads that read memory together until it is busy: server processors have 15 to 25 times what one
# core reads. More threads read no faster, so beyond that a call takes no less time.
_READERS = 16
_measured: dict[tuple[torch.dtype, int], dict[int, Tables]] = {}
_screened: dict[tuple[torch.dtype, int], Tables] = {}
_files: dict[tuple[torch.dtype, int], Path] = {}
_found: dict[tuple[object, ...], float] = {}  # a cache of look-ups in these
_MOST_FOUND = 4096
_generation = 0


def pays(rows: int, d_model: int, d_hidden: int) -> bool:
    """Whether a call has so much work that calling an op costs little beside it.

    With t threads dense products take a t-th of the time at best, but the Python of a call takes as
    long as before: for the same share of the time there has to be t times the work. Decoding waits
    for the weights to be read from memory, which gets faster up to `_READERS` threads.

    Args:
        rows: tokens of the call.
        d_model: width of the model.
        d_hidden: width of the hidden layer.
    """
    weight, threads = d_model * d_hidden, _threads()
    return rows * weight >= _LEAST_WORK * threads or weight >= _LARGE_WEIGHT * min(
        threads, _READERS
    )


def _threads() -> int:
    """The number of threads of torch, which is a constant of a compiled graph."""
    return torch.get_num_threads()


# torch.compile does not trace torch.get_num_threads itself. As in `steppe.routing.route`.
_threads._dynamo_marked_constant = True  # type: ignore[attr-defined]


def max_density_for(rows: int, width: int, dtype: torch.dtype, trains: bool) -> float:
    """The largest density at which the sparse kernels pay.

    Args:
        rows: tokens of the call.
        width: d_model of the block.
        dtype: of the block.
        trains: whether a backward pass follows.

    Returns:
        A density; 0 for never, as for a dtype or a machine without kernels.
    """
    threads = torch.get_num_threads()
    key = rows, width, dtype, trains, threads, id(_measured)
    most = _found.get(key)
    if most is None:
        widths = _measured.get((dtype, threads)) or defaults_for(dtype, threads)
        most = _remember(key, reached(tables_at(widths, width)[trains], rows))
    return most


def max_candidates_for(rows: int, dtype: torch.dtype, trains: bool) -> float:
    """The largest share of candidates at which the screen pays.

    Args:
        rows: tokens of the call.
        dtype: of the block.
        trains: whether a backward pass follows.

    Returns:
        A share; 0 for never.
    """
    if kernels().unscreened:
        return 0.0
    threads = torch.get_num_threads()
    key = rows, dtype, trains, threads, id(_screened)
    most = _found.get(key)
    if most is None:
        tables = _screened.get((dtype, threads)) or screened_defaults_for(dtype, threads)
        most = _remember(key, reached(tables[trains], rows))
    return most


def generation() -> int:
    """How often the thresholds have changed so far."""
    return _generation


def _remember(key: tuple[object, ...], found: float) -> float:
    """Cache a look-up, which takes 5 µs, for the next call with as many rows."""
    if len(_found) >= _MOST_FOUND:
        _found.clear()
    _found[key] = found
    return found


def defaults_for(dtype: torch.dtype, threads: int) -> Mapping[int, Tables]:
    """The built-in thresholds of the density, by the width from which on they hold.

    Args:
        dtype: of the blocks.
        threads: that torch uses.
    """
    return density_tables(dtype, _family(dtype), threads)


def screened_defaults_for(dtype: torch.dtype, threads: int) -> Tables:
    """The built-in thresholds of the share of candidates.

    Args:
        dtype: of the blocks.
        threads: that torch uses.
    """
    return candidate_tables(dtype, _family(dtype), threads)


def source(dtype: torch.dtype, threads: int) -> str:
    """Where the thresholds come from.

    Args:
        dtype: of the blocks.
        threads: that torch uses.

    Returns:
        ``built-in``, or that they were measured by `steppe calibrate`, and the file.
    """
    if (dtype, threads) not in _measured:
        return "built-in"
    path = _files.get((dtype, threads))
    where = "" if path is None else f" ({path})"
    return f"measured on this machine by `steppe calibrate`{where}"


def _family(dtype: torch.dtype) -> str:
    """The name of the built-in tables that hold on this machine."""
    described = _processor()
    is_zen4 = "vendor_id: AuthenticAMD" in described and "cpu family: 25" in described
    return family_of(dtype, kernels().isa, "amx_bf16" in described, is_zen4)


@cache
def _processor() -> frozenset[str]:
    """The lines of ``/proc/cpuinfo`` about the first processor, and each of its flags."""
    information = Path("/proc/cpuinfo")
    if not information.is_file():
        return frozenset()
    first = information.read_text(errors="replace").partition("\n\n")[0]
    facts: set[str] = set()
    for line in first.splitlines():
        name, _, value = (part.strip() for part in line.partition(":"))
        facts.add(f"{name}: {value}")
        if name == "flags":
            facts.update(value.split())
    return frozenset(facts)


def use(
    dtype: torch.dtype,
    threads: int,
    densities: dict[int, Tables],
    candidates: Tables,
    path: Path | None = None,
) -> None:
    """Dispatch by thresholds from now on.

    Args:
        dtype: of the blocks they hold for.
        threads: the number of threads they hold for.
        densities: the tables from each width on.
        candidates: of shares of candidates.
        path: the file that they are from.
    """
    global _generation
    _generation += 1
    _found.clear()
    _measured[dtype, threads] = densities
    _screened[dtype, threads] = candidates
    _files.pop((dtype, threads), None)
    if path is not None:
        _files[dtype, threads] = path
