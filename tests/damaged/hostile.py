"""Files made to do harm, small ones that become large above all: each must be refused clearly."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import os
import struct
import zlib
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import pyarrow
from pyarrow import parquet

from damaged.targets import WHOLE, Target, read_data, read_images, write
from steppe.data.idx import load_idx_folder
from steppe.training.recipe import read_recipe

_MEMBER = 1 << 21  # bytes that are packed once and then repeated
_GIGABYTES = 3
_SIDE = 20_000  # pixels
_LARGE_SIDE = 12_000  # between Pillow's limit and twice that, where it only warns


def _repeated(
    pack: Callable[[bytes], bytes],
    line: bytes,
    folder: Path,
    name: str,
    gigabytes: int = _GIGABYTES,
) -> None:
    """A packed file of some megabytes that unpacks to gigabytes."""
    member = pack(line * (_MEMBER // len(line)))
    write(folder, name, pack(b'{"text": "') + member * (gigabytes * 2**30 // _MEMBER))


def _sparse(folder: Path, name: str, begin: bytes) -> None:
    """A file of gigabytes that takes no place on the disk."""
    write(folder, name, begin)
    os.truncate(folder / name, _GIGABYTES << 30)


def _png(folder: Path, side: int) -> None:
    """A black image of one bit a pixel."""
    rows = zlib.compress(bytes((side // 8 + 1) * side), 1)
    header = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    content = b"\x89PNG\r\n\x1a\n"
    for kind, data in ((b"IHDR", header), (b"IDAT", rows), (b"IEND", b"")):
        content += struct.pack(">I", len(data)) + kind + data
        content += struct.pack(">I", zlib.crc32(kind + data))
    for name in ("cat/a.png", "cat/b.png", "dog/c.png"):
        write(folder, f"images/{name}", content)


def _idx(folder: Path, sizes: tuple[int, ...], packed: bool) -> None:
    """Four files that say they are huge; packed ones unpack to gigabytes."""
    header = bytes((0, 0, 8, len(sizes))) + b"".join(n.to_bytes(4, "big") for n in sizes)
    for part in ("train", "t10k"):
        for kind in ("images-idx3", "labels-idx1"):
            content = header
            if packed:
                zeros = gzip.compress(bytes(_MEMBER))
                content = gzip.compress(header) + zeros * (_GIGABYTES * 2**30 // _MEMBER)
            write(folder, f"idx/{part}-{kind}-ubyte{'.gz' * packed}", content)


def _columns(folder: Path, each: int) -> None:
    """200,000 columns, of which each line has a part."""
    names = [f"c{i}" for i in range(200_000)]
    rows = [dict.fromkeys(names[at : at + each], 1) for at in range(0, len(names), each)]
    write(folder, "a.jsonl", "\n".join(map(json.dumps, rows)).encode())


def _parquet_columns(folder: Path, number: int) -> None:
    table = pyarrow.table({f"c{i}": [1] for i in range(number)})
    parquet.write_table(table, folder / "a.parquet")


def _aliases() -> bytes:
    """A list of lists of lists, by name: 10⁹ words."""
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 9)]
    return "\n".join(lines).encode()


def _lines(name: str, content: bytes) -> Target:
    return Target(
        lambda folder: write(folder, name, content), name, partial(read_data, name=name), (WHOLE,)
    )


def _made(make: Callable[[Path], object], name: str) -> Target:
    return Target(make, name, partial(read_data, name=name), (WHOLE,))


def _idx_target(sizes: tuple[int, ...], packed: bool) -> Target:
    return Target(
        partial(_idx, sizes=sizes, packed=packed),
        "idx",
        lambda folder: load_idx_folder(folder / "idx"),
        (WHOLE,),
    )


def _recipe(content: bytes) -> Target:
    return Target(
        lambda folder: write(folder, "r.yaml", content),
        "r.yaml",
        lambda folder: read_recipe(folder / "r.yaml"),
        (WHOLE,),
    )


def _picture(side: int) -> Target:
    return Target(partial(_png, side=side), "images", read_images, (WHOLE,))


_LONG = b"a" * (2**20 - 1) + b"\n"
_CHUNK = (b'{"text": "' + b"a" * 1000 + b'"}\n') * 11_000  # more than is read at once
_GOOD = b'{"text": "a"}\n'
_DEEP = b'{"text": ' + b"[" * 50_000 + b"]" * 50_000 + b"}\n"
HOSTILE: Mapping[str, Target] = {
    "null-first": _lines("a.jsonl", b"null\n" + _GOOD),
    "null-alone": _lines("a.jsonl", b"  null"),
    "null-after-a-mark": _lines("a.jsonl", b"\xef\xbb\xbfnull\n" + _GOOD),
    "null-after-a-return": _lines("a.jsonl", b"\rnull\r" + _GOOD),
    "null-after-a-chunk": _lines("a.jsonl", _CHUNK + b"null\n" + _CHUNK),
    "null-in-a-list": _lines("a.json", b'[null, {"text": "a"}]'),
    "null-in-json": _lines("a.json", b"null"),
    "null-packed": _lines("a.jsonl.gz", gzip.compress(b"null\n" + _GOOD)),
    "number-first": _lines("a.jsonl", b"1\n" + _GOOD),
    "deep-first": _lines("a.jsonl", _DEEP),
    "deep-later": _lines("a.jsonl", _GOOD * 1000 + _DEEP),
    "deep-after-a-chunk": _lines("a.jsonl", _CHUNK + _DEEP),
    "deep-behind-quotes": _lines("a.jsonl", b'{"a": "\\\\\\"[", ' + _DEEP[1:]),
    "deep-in-a-list": _lines("a.json", b"[" + _DEEP + b"]"),
    "deep-in-many-lines": _lines("a.json", b'{\n"a": 1,\n' + _DEEP[1:]),
    "deep-objects": _lines("a.jsonl", b'{"a":' * 50_000 + b"1" + b"}" * 50_000),
    "empty": _lines("a.jsonl", b""),
    "empty-json": _lines("a.json", b""),
    "blank": _lines("a.jsonl", b"\n\n\n"),
    "empty-packed": _lines("a.jsonl.xz", lzma.compress(b"")),
    "no-utf-8": _lines("a.txt", b"one\n\xff\xfe\n"),
    "line-of-3-gb": _made(partial(_sparse, name="a.jsonl", begin=b'{"text": "'), "a.jsonl"),
    "list-of-3-gb": _made(partial(_sparse, name="a.json", begin=b"["), "a.json"),
    "object-of-3-gb": _made(partial(_sparse, name="a.json", begin=b"{\n"), "a.json"),
    "text-of-3-gb": _made(partial(_sparse, name="a.txt", begin=b"one\n"), "a.txt"),
    "gz-line": _made(partial(_repeated, gzip.compress, b"aaaa", name="a.jsonl.gz"), "a.jsonl.gz"),
    "gz-lines": _made(
        partial(_repeated, gzip.compress, _LONG, name="a.txt.gz", gigabytes=1), "a.txt.gz"
    ),
    "bz2-line": _made(partial(_repeated, bz2.compress, b"aaaa", name="a.txt.bz2"), "a.txt.bz2"),
    "xz-line": _made(partial(_repeated, lzma.compress, b"aaaa", name="a.jsonl.xz"), "a.jsonl.xz"),
    "columns": _made(partial(_columns, each=200_000), "a.jsonl"),
    "columns-by-and-by": _made(partial(_columns, each=50), "a.jsonl"),
    "columns-of-parquet": _made(partial(_parquet_columns, number=20_000), "a.parquet"),
    "png-20000": _picture(_SIDE),
    "png-12000": _picture(_LARGE_SIDE),
    "idx-overflow": _idx_target((2**32 - 1,) * 3, packed=False),
    "idx-255-sizes": _idx_target((2,) * 255, packed=False),
    "idx-huge": _idx_target((60_000, 1_000, 50), packed=True),
    "idx-longer": _idx_target((6, 28, 28), packed=True),
    "idx-nothing": _idx_target((0, 28, 28), packed=False),
    "yaml-aliases": _recipe(_aliases()),
    "yaml-itself": _recipe(b"a: &a [*a]"),
    "yaml-deep": _recipe(b"a: " + b"[" * 2000 + b"]" * 2000),
    "yaml-list-as-key": _recipe(b"[a, b]: 1"),
    "yaml-large": _recipe(b"task: causal-lm\n" * 10**6),
    "yaml-python": _recipe(b"task: !!python/object/apply:os.system ['true']"),
}
"""Each must be refused with one clear error."""
