"""Text of unknown origin made fit for a person and a terminal."""

from __future__ import annotations

import re

_LONGEST_WORD = 300  # characters; a file's name has 255 at most
_LONGEST_TEXT = 4000
_LONG_WORD = re.compile(rf"\S{{{_LONGEST_WORD + 1},}}")


def printable(text: str) -> str:
    r"""The text with escapes in place of what would steer a terminal.

    Args:
        text: of any origin; line ends and tabs stay.

    Example:
        >>> print(printable("a\x1b[2Jb"))
        a\x1b[2Jb
    """
    return "".join(
        character
        if character.isprintable() or character in "\n\t"
        else character.encode("unicode_escape").decode()
        for character in text
    )


def shortened(text: str) -> str:
    """The text without the middle of words, and of a whole, that nobody would read.

    Args:
        text: such as a message that repeats a value.

    Example:
        >>> len(shortened("x" * 100_000))
        300
    """
    text = _LONG_WORD.sub(lambda found: _without_middle(found[0], _LONGEST_WORD), text)
    return _without_middle(text, _LONGEST_TEXT)


def _without_middle(text: str, most: int) -> str:
    """The beginning and the end, with … between them, if it is longer than `most`."""
    if len(text) <= most:
        return text
    begin = (2 * most) // 3
    return f"{text[:begin]}…{text[begin + 1 - most :]}"
