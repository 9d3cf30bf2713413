"""Make a folder of plain English, some 75 million characters, from packages of Debian.

apt-get install bible-kjv bible-kjv-text dict-foldoc dict-gcide linux-doc wordnet-base
python benchmarks/english.py FOLDER

A paragraph is one line. Each source's last twentieth goes to validation.txt, the rest to train.txt.
"""

from __future__ import annotations

import argparse
import gzip
import re
import subprocess
from collections.abc import Callable, Iterable, Iterator
from itertools import groupby
from pathlib import Path

SHARE = Path("/usr/share")
_HELD_OUT = 20  # the last of so many parts
_DATA = re.compile(r"^data\.(adj|adv|noun|verb)$")


def paragraphs(lines: Iterable[str]) -> Iterator[str]:
    """Lines joined to paragraphs, which blank lines part."""
    for has_words, group in groupby(lines, key=lambda line: bool(line.strip())):
        if has_words:
            yield " ".join(word for line in group for word in line.split()) + "\n"


def up_to(most: int | None, texts: Iterable[str]) -> Iterator[str]:
    """The first texts, with that many characters in all; None for all texts."""
    length = 0
    for text in texts:
        length += len(text)
        if most is not None and length > most:
            return
        yield text


def dictionary(name: str) -> Iterator[str]:
    """The entries of a dictionary of dictd."""
    with gzip.open(
        SHARE / f"dictd/{name}.dict.dz", "rt", encoding="utf-8", errors="replace"
    ) as file:
        yield from paragraphs(file)


def glosses() -> Iterator[str]:
    """The definitions of WordNet, one a line, each behind its words."""
    for path in sorted((SHARE / "wordnet").iterdir()):
        if not _DATA.match(path.name):
            continue
        for line in path.read_text(encoding="utf-8").splitlines():
            entry, bar, gloss = line.partition(" | ")
            if bar:
                words = [w for w in entry.split()[4::2] if not w.isdigit() and len(w) > 2]
                yield f"{words[0].replace('_', ' ') if words else ''}: {gloss.strip()}\n"


def kernel_documentation() -> Iterator[str]:
    """The prose of the Linux kernel's documentation; tables of device trees are left out."""
    folder = next(iter(sorted((SHARE / "doc").glob("linux-doc-*/Documentation"))))
    for path in sorted(folder.rglob("*.rst*")):
        opened = gzip.open if path.suffix == ".gz" else open
        if path.is_file() and "translations" not in path.parts:
            with opened(path, "rt", encoding="utf-8", errors="replace") as file:
                yield from paragraphs(file)


def bible() -> Iterator[str]:
    """The King James Bible, a verse a line."""
    told = subprocess.run(
        ["bible", "-f", "Gen1:1-Rev22:21"], check=True, capture_output=True, text=True
    )
    yield from told.stdout.splitlines(keepends=True)


SOURCES: dict[str, Callable[[], Iterator[str]]] = {
    "gcide": lambda: dictionary("gcide"),
    "foldoc": lambda: dictionary("foldoc"),
    "wordnet": glosses,
    "linux-doc": kernel_documentation,
    "bible": bible,
}


def main() -> None:
    """Write the two files, and tell how long each source is."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--most", type=int, help="characters of a source; the rest is left out")
    options = parser.parse_args()
    folder: Path = options.folder
    folder.mkdir(parents=True, exist_ok=True)
    with (
        (folder / "train.txt").open("w", encoding="utf-8") as train,
        (folder / "validation.txt").open("w", encoding="utf-8") as validation,
    ):
        for name, lines in SOURCES.items():
            read = list(up_to(options.most, lines()))
            cut = len(read) - len(read) // _HELD_OUT
            train.writelines(read[:cut])
            validation.writelines(read[cut:])
            print(f"{name}: {sum(map(len, read)):,} characters")


if __name__ == "__main__":
    main()
