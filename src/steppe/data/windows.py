"""Windows of running text: the texts of the rows, one after the other, cut to one length.

Training and measuring cut the same way (`WindowLayout.cut`) and differ in three things, each an
argument: measured windows stand between the tokenizer's special tokens (`layout_of`), keep the rest
at the end (`keep_rest`), and have the lines of a text file tokenised many together (`texts_of`).
Trained windows are cut from so many rows at once that they can be cached, sharded and streamed
(`pack`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from steppe.data.rows import Rows

_CHARACTERS = 100_000  # of plain text that are tokenised at once


@dataclass(frozen=True)
class WindowLayout:
    """How token ids fill a window.

    Attributes:
        room: number of tokens of text in a window.
        between: ids that end each text.
        before: ids at the start of each window.
        after: ids at its end.
    """

    room: int
    between: tuple[int, ...] = ()
    before: tuple[int, ...] = ()
    after: tuple[int, ...] = ()

    def cut(self, texts: Iterable[Sequence[int]], keep_rest: bool) -> Iterator[list[int]]:
        """The windows of some texts.

        Args:
            texts: ids of each.
            keep_rest: give the ids at the end, too few for a window, as a shorter one; a single id
                is left out, since it predicts nothing.
        """
        pending: list[int] = []
        for ids in texts:
            pending += [*ids, *self.between]
            whole = len(pending) // self.room * self.room
            for start in range(0, whole, self.room):
                yield [*self.before, *pending[start : start + self.room], *self.after]
            pending = pending[whole:]
        if keep_rest and len(pending) > 1:
            yield [*self.before, *pending, *self.after]


def layout_of(tokenizer: Any, length: int, is_plain_text: bool, with_special: bool) -> WindowLayout:
    """The layout of windows of a length.

    The tokenizer's end token stands between texts, unless they are lines of a text file, which
    belong together, or it ends each window anyway.

    Args:
        tokenizer: of Transformers.
        length: tokens per window, the special ones included.
        is_plain_text: whether texts are lines with their line breaks.
        with_special: put the special tokens that the tokenizer puts around a text around each
            window, as measuring does; training leaves them out.

    Returns:
        The layout; its `WindowLayout.room` is below 1 if the special tokens leave none.
    """
    before, after = special_around(tokenizer) if with_special else ((), ())
    end = tokenizer.eos_token_id
    joined = is_plain_text or end is None or end in after
    between = () if joined else (int(end),)
    return WindowLayout(length - len(before) - len(after), between, before, after)


def texts_of(rows: Rows, column: str) -> Iterator[str]:
    """Texts that are tokenised as a whole: rows, or many lines of a text file.

    Args:
        rows: the data.
        column: of the text; rows without one are left out.
    """
    lines: list[str] = []
    size = 0
    for row in rows:
        text = row[column]
        if not text:
            continue
        if not rows.is_plain_text:
            yield text
            continue
        lines.append(text)
        size += len(text)
        if size >= _CHARACTERS:
            yield "".join(lines)
            lines, size = [], 0
    if lines:
        yield "".join(lines)


def pack(
    rows: Mapping[str, Sequence[str]], tokenizer: Any, column: str, layout: WindowLayout
) -> dict[str, list[list[int]]]:
    """Whole windows of a batch of rows, as ``datasets.Dataset.map`` asks for them.

    Args:
        rows: the columns of the batch.
        tokenizer: of Transformers.
        column: of the text.
        layout: of the windows.

    Returns:
        ``input_ids`` of each window; the tokens left over at the end are dropped.
    """
    texts = [text for text in rows[column] if text]
    ids = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"] if texts else []
    return {"input_ids": list(layout.cut(ids, keep_rest=False))}


def special_around(tokenizer: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The special tokens that a tokenizer puts before and after a text.

    Args:
        tokenizer: of Transformers.
    """
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    whole = tokenizer("a")["input_ids"]
    for start in range(len(whole) - len(bare) + 1 if bare else 0):
        if whole[start : start + len(bare)] == bare:
            return tuple(whole[:start]), tuple(whole[start + len(bare) :])
    return (), ()
