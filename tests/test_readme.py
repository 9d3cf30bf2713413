"""The README's code runs as it stands, and its table is the committed result."""

from __future__ import annotations

import logging
import re
import runpy
import shlex
import sys
from pathlib import Path

import pytest

import steppe
from data.data_makers import words_tokenizer
from steppe.commands.app import run
from training.recipe_worker import write_text

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


# Minutes of training, made short; `bench` and `calibrate` are run by test_cli.py.
SHORTENED = {
    "steppe train text-gpt --data_dir ./texts --output_dir out --accelerate": "--max_steps 2"
    " --vocab_size 300 --length 32 --eval_steps 2 --held_out_samples 8 --use_cpu true"
    " --cache_dir cache",
}
NOT_HERE = ("steppe bench", "steppe calibrate")


def place_to_run(folder: Path, patch: pytest.MonkeyPatch) -> None:
    """A folder with texts, where the id of GPT-2's tokenizer is that of one beside them."""
    patch.chdir(folder)
    patch.setenv("HF_HUB_OFFLINE", "1")
    write_text(folder / "texts", topics=4)
    words_tokenizer(folder / "openai-community" / "gpt2")


def run_blocks() -> None:
    """The blocks of Python, one after another, as one program."""
    names: dict[str, object] = {}
    for code in re.findall(r"```python\n(.*?)```", README, re.DOTALL):
        exec(compile(code, "README.md", "exec"), names)


def commands_of(readme: str) -> list[list[str]]:
    """The command lines of steppe, without their comments, as a shell would expand them."""
    lines = [
        line.partition(" #")[0].strip()
        for block in re.findall(r"```sh\n(.*?)```", readme, re.DOTALL)
        for line in block.splitlines()
    ]
    return [
        [
            found
            for word in shlex.split(f"{line} {SHORTENED.get(line, '')}")[1:]
            for found in sorted(map(str, Path().glob(word))) or [word]
        ]
        for line in lines
        if line.startswith("steppe ") and not line.startswith(NOT_HERE)
    ]


@pytest.mark.filterwarnings("ignore:'pin_memory' argument:UserWarning")  # the Trainer's default
def test_all_blocks_run_in_order_and_the_commands_on_what_they_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    place_to_run(tmp_path, monkeypatch)
    for name in ("transformers", "datasets"):  # the commands quieten them
        monkeypatch.setattr(logging.getLogger(name), "level", logging.WARNING)
    run_blocks()
    assert (tmp_path / "sparse" / "config.json").is_file()
    assert set(SHORTENED) <= set(README.replace("  ", "\n").splitlines())
    given = commands_of(README)
    names = ["train", "train", "measure", "report", "study", "blocks"]
    assert [words[0] for words in given] == names
    for words in given:
        monkeypatch.setattr(sys, "argv", ["steppe", *words])
        assert run() == 0, capsys.readouterr().err
        assert capsys.readouterr().out, words
    assert (tmp_path / "held-out.json").is_file()
    assert "<h1" in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_what_the_code_names_is_there() -> None:
    for code in re.findall(r"```python\n(.*?)```", README, re.DOTALL):
        for name in re.findall(r"steppe\.(\w+)\(", code):
            assert hasattr(steppe, name), name


def test_figures_are_the_committed_results() -> None:
    rendering = runpy.run_path(str(ROOT / "docs" / "render.py"))
    for name in rendering["PAGES"]:
        page = (ROOT / name).read_text(encoding="utf-8")
        blank = re.sub(r"(jsonl? -->).*?(<!-- end -->)", r"\1\2", page, flags=re.DOTALL)
        assert blank != page
        assert rendering["render"](blank) == page


def test_the_page_of_the_studies_is_rendered_from_their_rows() -> None:
    rendering = runpy.run_path(str(ROOT / "docs" / "render.py"))
    assert rendering["RESULTS"].read_text(encoding="utf-8") == rendering["results"]()


def test_make_demo_and_make_test_are_the_first_lines() -> None:
    code = README.split("```sh\n")[1].splitlines()
    assert code[0].startswith("make demo")
    assert code[1].startswith("make test")
