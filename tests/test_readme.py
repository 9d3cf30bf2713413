"""The README's code runs as it stands, and its table is the committed result."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_code_blocks_run_in_order() -> None:
    blocks = re.findall(r"(<!-- no test:[^\n]*\n)?```python\n(.*?)```", README, re.DOTALL)
    runnable = [code for skipped, code in blocks if not skipped]
    assert len(runnable) >= 2
    names: dict[str, object] = {}
    for code in runnable:
        exec(compile(code, "README.md", "exec"), names)


def test_code_blocks_that_need_more_are_python_and_name_what_exists() -> None:
    import steppe
    import steppe.training

    for code in re.findall(r"```python\n(.*?)```", README, re.DOTALL):
        compile(code, "README.md", "exec")
        for name in re.findall(r"steppe\.(\w+)", code):
            assert hasattr(steppe, name), name


def test_figures_are_the_committed_results() -> None:
    rendering = runpy.run_path(str(ROOT / "docs" / "render.py"))
    for name in rendering["PAGES"]:
        page = (ROOT / name).read_text(encoding="utf-8")
        blank = re.sub(r"(json -->).*?(<!-- end -->)", r"\1\2", page, flags=re.DOTALL)
        assert blank != page
        assert rendering["render"](blank) == page


def test_make_demo_and_make_test_are_the_first_lines() -> None:
    code = README.split("```sh\n")[1].splitlines()
    assert code[0].startswith("make demo")
    assert code[1].startswith("make test")
