"""How many threads a kernel runs on."""

from __future__ import annotations

import os

import torch


class _Team:
    """Whether this process has had a team of threads, and whether it has lost it by a fork."""

    def __init__(self) -> None:
        self.has_run = self.is_lost = False

    def fork(self) -> None:
        """Note that this process is a new one."""
        self.is_lost = self.has_run


_team = _Team()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_team.fork)


def threads() -> int:
    """Size of the team: torch's number of threads.

    One in a process that was forked after a team had run: a team's threads do not live on in a
    forked process, where libgomp would wait for them without end. The results are the same bits.
    """
    if _team.is_lost:
        return 1
    number = torch.get_num_threads()
    if number > 1:
        _team.has_run = True
    return number
