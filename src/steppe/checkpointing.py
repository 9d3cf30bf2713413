"""Gradient checkpointing: a forward pass that runs a second time, within the backward pass."""

from __future__ import annotations

import torch


def in_backward() -> bool:
    """Whether this thread is in a backward pass: a forward pass that begins now was run before.

    torch has no public question for it. Compiled code does not trace this: ask
    ``torch.compiler.is_compiling()`` first.
    """
    return torch._C._current_graph_task_id() != -1
