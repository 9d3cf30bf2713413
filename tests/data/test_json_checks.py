"""The depth of JSON is counted right, wherever the text is cut."""

from __future__ import annotations

import json
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from steppe.data.json_checks import Nesting

VALUES = st.recursive(
    st.none() | st.booleans() | st.floats() | st.text('a"\\[]{}:,\n', max_size=9),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text('a"\\[{', max_size=3), inner)
    ),
)


def depth_of(value: Any) -> int:
    """By recursion."""
    if not isinstance(value, list | dict):
        return 0
    inner = value.values() if isinstance(value, dict) else value
    return 1 + max(map(depth_of, inner), default=0)


@given(VALUES, st.integers(1, 7))
def test_the_depth_is_that_of_the_value_however_it_is_cut(value: Any, size: int) -> None:
    text = json.dumps(value).encode()
    deepest, nesting = 0, Nesting("here")
    for at in range(0, len(text), size):
        nesting.add(text[at : at + size])
        assert nesting.depth >= 0
    assert nesting.depth == 0
    for at in range(len(text)):  # byte by byte, so that none is passed over
        nesting.add(text[at : at + 1])
        deepest = max(deepest, nesting.depth)
    assert deepest == depth_of(value)
