"""Ways to damage a file, each the same for the same seed."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_BLOCK = 64  # bytes that are zeroed, doubled or taken out together
_HUGE = 10**400  # more than a double holds
_DEEP = 3000  # lists within each other: more than Python's own reader of JSON takes
_WORDS = ("../../../../etc/passwd", "a" * 5000, "", "\x1b[31mred\x00", "NaN", "1e400", "null")
_ODD_NUMBERS = (0, -1, -0.0, 1e308, 1e-320, _HUGE, -_HUGE, 2**63, 10**12, 0.5, True, False)

Tree = Any
"""What JSON or YAML holds."""


@dataclass(frozen=True)
class Dumped:
    """Text that stands in a tree as it is: what no value of Python is written as."""

    text: str


def damage_bytes(content: bytes, draw: random.Random) -> bytes:
    """A file cut short, overwritten, shuffled, or with something added."""
    ways: list[Callable[[bytes, random.Random], bytes]] = [
        _truncated,
        _zeroed,
        _flipped,
        _inserted,
        _removed,
        _doubled,
        _header_flipped,
        _overwritten_number,
    ]
    for _ in range(draw.choice((1, 1, 1, 3))):
        content = draw.choice(ways)(content, draw)
    return content


def damage_tree(tree: Tree, draw: random.Random) -> Tree:
    """A tree with one of its values or keys changed, removed, doubled, or nested deeply."""
    tree = json.loads(json.dumps(tree))
    places = [place for place in _places(tree) if place[0] is not None]
    if not places:
        return _other(tree, draw)
    holder, key = draw.choice(places)
    way = draw.randrange(10)
    if way < 6:
        holder[key] = _other(holder[key], draw)
    elif way == 6:
        del holder[key]
    elif way == 7 and isinstance(holder, dict):
        holder[draw.choice(["", str(key).upper(), "a" * 3000, f"{key}.0"])] = holder.pop(key)
    elif way == 8:
        same = json.dumps(holder[key])
        holder[key] = Dumped(f"{same}, {json.dumps(str(key))}: {same}")  # twice, or no JSON at all
    else:
        holder[key] = Dumped("[" * _DEEP + "]" * _DEEP)
    return tree


def as_json(tree: Tree) -> str:
    """JSON with the odd pieces in it."""
    if isinstance(tree, Dumped):
        return tree.text
    if isinstance(tree, Mapping):
        return "{" + ", ".join(f"{json.dumps(k)}: {as_json(v)}" for k, v in tree.items()) + "}"
    if isinstance(tree, list):
        return "[" + ", ".join(map(as_json, tree)) + "]"
    if isinstance(tree, int) and not isinstance(tree, bool) and abs(tree) >= _HUGE:
        return ("-" if tree < 0 else "") + "1" + "0" * 400
    return json.dumps(tree)


def replace_file(path: Path, way: str) -> None:
    """Put something else in a file's place."""
    path.unlink()
    if way == "nothing":
        return
    if way == "empty":
        path.touch()
    elif way == "folder":
        path.mkdir()
    elif way == "fifo":
        os.mkfifo(path)
    else:
        path.symlink_to(path if way == "itself" else way)


FILE_WAYS = (
    "nothing",
    "empty",
    "folder",
    "fifo",
    "itself",
    "/dev/zero",
    "/dev/full",
    "/etc/passwd",
    "/proc/self/mem",
    "/nowhere/at/all",
)
"""Of `replace_file`; a path is linked to."""


def _places(tree: Tree, holder: Any = None, key: Any = None) -> list[tuple[Any, Any]]:
    """Every value of a tree, by what holds it and where."""
    found = [(holder, key)]
    if isinstance(tree, dict):
        return found + [place for own in tree for place in _places(tree[own], tree, own)]
    if isinstance(tree, list):
        return found + [
            place for own, value in enumerate(tree) for place in _places(value, tree, own)
        ]
    return found


def _other(value: Any, draw: random.Random) -> Any:
    """A value of another kind or size."""
    others: list[Any] = [
        draw.choice(_ODD_NUMBERS),
        draw.choice(_ODD_NUMBERS),
        draw.choice(_WORDS),
        Dumped(draw.choice(("NaN", "Infinity", "-Infinity", "1e999"))),
        None,
        [],
        {},
        [value],
        {"a": value},
        [[1, 2], "x"],
    ]
    if isinstance(value, int | float) and not isinstance(value, bool):
        others += [-value, value * 10**8, str(value), value + 0.5]
    elif isinstance(value, list):
        others += [value[:-1], value + value, dict.fromkeys(map(str, range(len(value))), 0)]
    elif isinstance(value, str):
        others += [value[:-1], value * 50, value.encode().hex()]
    return draw.choice(others)


def _truncated(content: bytes, draw: random.Random) -> bytes:
    return content[: draw.randrange(len(content) + 1)]


def _zeroed(content: bytes, draw: random.Random) -> bytes:
    at = draw.randrange(len(content) + 1)
    return content[:at] + bytes(len(content[at : at + _BLOCK])) + content[at + _BLOCK :]


def _flipped(content: bytes, draw: random.Random) -> bytes:
    changed = bytearray(content)
    for _ in range(draw.choice((1, 4, 32)) if changed else 0):
        changed[draw.randrange(len(changed))] ^= 1 << draw.randrange(8)
    return bytes(changed)


def _header_flipped(content: bytes, draw: random.Random) -> bytes:
    return _flipped(content[:_BLOCK], draw) + content[_BLOCK:]


def _inserted(content: bytes, draw: random.Random) -> bytes:
    at = draw.randrange(len(content) + 1)
    pieces = (b"null\n", b"[" * 100_000, b"\xff\xfe\x00", b"\n", b'"', draw.randbytes(_BLOCK))
    return content[:at] + draw.choice(pieces) + content[at:]


def _removed(content: bytes, draw: random.Random) -> bytes:
    at = draw.randrange(len(content) + 1)
    return content[:at] + content[at + draw.randrange(1, _BLOCK) :]


def _doubled(content: bytes, draw: random.Random) -> bytes:
    at = draw.randrange(len(content) + 1)
    return content[: at + _BLOCK] + content[at:]


def _overwritten_number(content: bytes, draw: random.Random) -> bytes:
    at = draw.randrange(len(content) + 1)
    number = draw.choice((0, 1, 2**31 - 1, 2**31, 2**32 - 1, 2**63 - 1))
    raw = number.to_bytes(8, draw.choice(("little", "big")))
    return content[:at] + raw[-draw.choice((2, 4, 8)) :] + content[at + 8 :]
