"""The code in the documents runs as it stands, and prints what they say."""

from __future__ import annotations

import logging
import re
import shlex
import sys
from doctest import ELLIPSIS, NORMALIZE_WHITESPACE, OutputChecker
from pathlib import Path

import pytest

from steppe.commands.app import run
from training.recipe_worker import write_text

DOCS = Path(__file__).parents[1] / "docs"
# A block, and the text behind it that it prints. `...` stands for anything.
BLOCK = re.compile(
    r"(<!-- no test:[^\n]*\n)?```(python|sh|yaml)\n(.*?)```(?:\n\n```output\n(.*?)```)?", re.DOTALL
)
# The pages whose commands run too; those of the others take data, hours or several machines.
WITH_COMMANDS = ("getting_started.md", "troubleshooting.md", "guides")
PAGES = sorted(
    path.relative_to(DOCS).as_posix()
    for path in DOCS.rglob("*.md")
    if BLOCK.search(path.read_text("utf-8"))
)


def run_commands(script: str, patch: pytest.MonkeyPatch) -> None:
    """The command lines of steppe, each in this process."""
    lines = script.replace("\\\n", " ").splitlines()
    for line in (line.partition(" #")[0] for line in lines if line.startswith("steppe ")):
        patch.setattr(sys, "argv", shlex.split(line))
        assert run() == 0, line


def is_like(expected: str, printed: str) -> bool:
    """Whether a text is as expected, but for space and for what `...` stands for."""
    return OutputChecker().check_output(expected, printed, ELLIPSIS | NORMALIZE_WHITESPACE)


@pytest.mark.filterwarnings("ignore:'pin_memory' argument:UserWarning")  # the Trainer's default
@pytest.mark.filterwarnings("ignore::pytorch_lightning.utilities.warnings.PossibleUserWarning")
@pytest.mark.filterwarnings("ignore:.isinstance.treespec, LeafSpec.. is deprecated:FutureWarning")
@pytest.mark.parametrize("page", PAGES)
def test_code_blocks_of_a_page_run_in_order(
    page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("COLUMNS", "100")
    for name in ("transformers", "datasets"):  # the commands quieten them
        monkeypatch.setattr(logging.getLogger(name), "level", logging.WARNING)
    if page.startswith(WITH_COMMANDS):
        write_text(tmp_path / "texts", topics=4)
    names: dict[str, object] = {"__name__": "__main__"}
    for skipped, kind, code, expected in BLOCK.findall((DOCS / page).read_text("utf-8")):
        capsys.readouterr()
        if kind == "python":
            compiled = compile(code, page, "exec", dont_inherit=True)
            if not skipped:
                exec(compiled, names)
        elif kind == "yaml" and (named := re.match(r"# (\S+\.yaml)\n", code)):
            Path(named[1]).write_text(code, encoding="utf-8")
        elif kind == "sh" and page.startswith(WITH_COMMANDS) and not skipped:
            run_commands(code, monkeypatch)
        printed = capsys.readouterr().out
        assert not expected or skipped or is_like(expected, printed), printed


def test_the_comparison_of_outputs_can_fail() -> None:
    assert is_like("block  a\n... ran\n", "block a\nhow it ran\n")
    assert not is_like("block a\n", "block b\n")
    assert not is_like("1 of 2 ... sparse\n", "1 of 3, sparse\n")
