"""The code in the documents runs as it stands."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[1] / "docs"
BLOCK = re.compile(r"(<!-- no test:[^\n]*\n)?```python\n(.*?)```", re.DOTALL)
PAGES = sorted(path.name for path in DOCS.glob("*.md") if BLOCK.search(path.read_text("utf-8")))


@pytest.mark.parametrize("page", PAGES)
def test_code_blocks_of_a_page_run_in_order(
    page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {"__name__": "__main__"}
    for skipped, code in BLOCK.findall((DOCS / page).read_text("utf-8")):
        compiled = compile(code, page, "exec", dont_inherit=True)
        if not skipped:
            exec(compiled, names)
