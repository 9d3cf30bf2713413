"""Processes that start in a moment: a server imports the libraries once, and forks them."""

from __future__ import annotations

import multiprocessing
import os
import socket
from collections.abc import Callable
from multiprocessing.context import ForkServerContext
from typing import Any

import torch

# Of installed packages: Python 3.11 looks for them without the test's sys.path.
PRELOADED = ["steppe.training.run_recipe", "transformers.models.gpt2.modeling_gpt2"]


def forked() -> ForkServerContext:
    """The context of such processes."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    return context


def run_together(work: Callable[..., None], world: int, *arguments: Any) -> None:
    """Run a function in several processes, with the environment that torchrun would give them."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port = one.getsockname()[1]
    context = forked()
    processes = [
        context.Process(target=_run_rank, args=(work, rank, world, port, arguments))
        for rank in range(world)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(300)
        process.kill()
    assert [process.exitcode for process in processes] == [0] * world


def _run_rank(
    work: Callable[..., None], rank: int, world: int, port: int, arguments: tuple[Any, ...]
) -> None:
    """One of the processes."""
    torch.set_num_threads(1)
    os.environ |= {
        **{"RANK": str(rank), "LOCAL_RANK": str(rank)},
        **{"WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world)},
        **{"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)},
    }
    work(*arguments)
    os._exit(0)
