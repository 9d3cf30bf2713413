"""Errors: how they name settings, that they pickle, and that the command line's flags are real."""

from __future__ import annotations

import ast
import inspect
import pickle
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from transformers import TrainingArguments
from typer.main import get_command

import steppe
from steppe import errors
from steppe.commands.app import app
from steppe.commands.flags import FLAGS, in_flags
from steppe.errors import DataError, OutputError, SteppeError
from steppe.training import recipe_arguments as recipe

SOURCE = Path(steppe.__file__).parent
FLAG = re.compile(r"(?<![\w-])--[a-z][\w-]*")
# Programs whose flags a message may tell to type: a whole command.
PROGRAMS = re.compile(r"\b(?:pip install|torchrun|apt install) [^,;]*")
CLASSES = [
    kind
    for kind in vars(errors).values()
    if inspect.isclass(kind) and issubclass(kind, SteppeError)
]


def below_the_command_line() -> list[Path]:
    return [path for path in SOURCE.rglob("*.py") if path.parent.name != "commands"]


def docstrings_of(tree: ast.AST) -> set[ast.AST]:
    """Every string that stands by itself: docstrings, also those below attributes."""
    return {node.value for node in ast.walk(tree) if isinstance(node, ast.Expr)}


def texts_of(path: Path) -> Iterator[tuple[int, str]]:
    """The strings of a file that it may show to somebody, f-strings with … for their values."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    left_out = docstrings_of(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            left_out |= set(node.values)
            parts = [p.value if isinstance(p, ast.Constant) else "…" for p in node.values]
            yield node.lineno, "".join(map(str, parts))
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node not in left_out:
            yield node.lineno, node.value


def settings_named() -> dict[str, str]:
    """The settings that errors below the command line name, each with a place."""
    found = {}
    for path in below_the_command_line():
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") in vars(errors):
                for argument in node.args[1:]:
                    if isinstance(argument, ast.Dict):
                        for key in argument.keys:
                            if isinstance(key, ast.Constant):
                                found[str(key.value)] = f"{path.name}:{node.lineno}"
    return found


def flags_of(text: str) -> list[str]:
    return FLAG.findall(PROGRAMS.sub("", text))


def test_no_message_below_the_command_line_names_a_flag() -> None:
    found = [
        f"{path.relative_to(SOURCE)}:{line}: {flags}"
        for path in below_the_command_line()
        for line, text in texts_of(path)
        if (flags := flags_of(text))
    ]
    assert not found


def test_the_search_for_flags_finds_them() -> None:
    assert flags_of("Name another: --processor FOLDER") == ["--processor"]
    assert flags_of("lower it (--lr)") == ["--lr"]
    assert flags_of("Start with: torchrun --nproc_per_node 2 ...") == []
    assert flags_of("a -- b, x--y, ---") == []
    texts = [text for _, text in texts_of(SOURCE / "checkpoints" / "steps.py")]
    assert any("Measure each run" in text for text in texts)
    assert not any("Returns:" in text for text in texts)


@pytest.mark.parametrize("command", list(FLAGS))
def test_every_flag_of_the_table_is_one_that_the_command_takes(command: str) -> None:
    known = {
        option
        for parameter in get_command(app).commands[command].params
        for option in parameter.opts
    }
    if command == "train":  # whose flags are the keys of a recipe
        kinds = (
            recipe.ModelArguments,
            recipe.DataArguments,
            recipe.ArmArguments,
            TrainingArguments,
        )
        known |= {f"--{name}" for kind in kinds for name in kind.__dataclass_fields__}
    assert set(FLAGS[command].values()) <= known


def test_the_table_has_all_commands_and_every_setting_that_an_error_names() -> None:
    assert set(FLAGS) == set(get_command(app).commands)
    named = settings_named()
    assert {"processor", "learning_rate", "text_column"} <= set(named)
    mapped = {setting for flags in FLAGS.values() for setting in flags}
    assert not {name: place for name, place in named.items() if name not in mapped}


def test_settings_stand_at_the_end_as_python_or_as_flags_of_the_command() -> None:
    error = DataError("no tokenizer. Name one", {"processor": "FOLDER"}, {"max_length": 8})
    assert str(error) == "no tokenizer. Name one: processor=FOLDER; or max_length=8"
    assert in_flags(error, "measure").endswith(": --processor FOLDER; or --max-length 8")
    assert in_flags(error, "train").endswith(": --tokenizer FOLDER; or --length 8")
    assert in_flags(error, "demo") == "no tokenizer. Name one"


def test_of_a_way_that_cannot_be_gone_nothing_is_told() -> None:
    error = DataError("wrong", {"text_column": "A", "target_column": "B"}, {"streaming": False})
    assert str(error) == "wrong: text_column=A, target_column=B; or streaming=False"
    assert in_flags(error, "measure") == "wrong: --text-column A --target-column B"
    assert in_flags(error, "train") == "wrong: --streaming false"


@pytest.mark.parametrize("kind", CLASSES, ids=lambda kind: kind.__name__)
def test_errors_come_out_of_other_processes_whole(kind: type[SteppeError]) -> None:
    error = pickle.loads(pickle.dumps(kind("wrong", {"out": "PATH"})))
    assert type(error) is kind
    assert str(error) == "wrong: out=PATH"
    assert error.instead == ({"out": "PATH"},)
    assert str(kind("wrong")) == "wrong"


def test_an_output_error_has_no_number_of_the_operating_system() -> None:
    assert OutputError("wrong", {"out": "PATH"}).errno is None
