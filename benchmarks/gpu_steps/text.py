"""Text that is on every machine: the Python sources of the installation, as bytes."""

from __future__ import annotations

import hashlib
import os
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor


@dataclass(frozen=True)
class Text:
    """Bytes to train on, and others to test on.

    Attributes:
        train: uint8 ``[N]``.
        held_out: uint8 ``[N / 20]``, of files that come last.
        digest: the first 12 digits of the SHA-256 of all of it.
    """

    train: Tensor
    held_out: Tensor
    digest: str


def python_sources(size: int) -> Text:
    """The sources of the standard library, and then those of the installed packages.

    Args:
        size: bytes to take; fewer if there are no more.
    """
    content = bytearray()
    paths = sysconfig.get_paths()
    for folder in dict.fromkeys((paths["stdlib"], paths["purelib"])):
        for path in sources_below(folder):
            if len(content) >= size:
                break
            content += path.read_bytes()
    del content[size:]
    all_of_it = torch.frombuffer(content, dtype=torch.uint8)
    cut = len(all_of_it) - len(all_of_it) // 20
    digest = hashlib.sha256(content).hexdigest()[:12]
    return Text(all_of_it[:cut], all_of_it[cut:], digest)


def sources_below(folder: str) -> Iterator[Path]:
    """The Python files of a folder, in the order of their names, without installed packages."""
    for place, folders, files in os.walk(folder):
        folders[:] = sorted(set(folders) - {"site-packages"})
        yield from (Path(place) / file for file in sorted(files) if file.endswith(".py"))


def batch_of(text: Tensor, rows: int, tokens: int, generator: torch.Generator) -> Tensor:
    """Random pieces of a text.

    Args:
        text: uint8 ``[N]``, on any device.
        rows: B.
        tokens: T.
        generator: on the same device.

    Returns:
        int64 ``[B, T]`` on that device.
    """
    starts = torch.randint(len(text) - tokens, (rows, 1), generator=generator, device=text.device)
    return text[starts + torch.arange(tokens, device=text.device)].long()
