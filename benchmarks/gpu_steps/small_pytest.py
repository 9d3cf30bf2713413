"""As much of pytest as ``tests/gpu`` needs, for a machine that has none.

Test functions with the fixtures ``device`` and ``tmp_path``, ``parametrize`` with lists of values,
``raises``, ``skip`` and ``importorskip``.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import itertools
import re
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any


class Skipped(BaseException):
    """A test that cannot run here."""


def run_file(file: Path, device: str, only: str, note: Callable[[str, str], None]) -> int:
    """Run the tests of a file.

    Args:
        file: the file.
        device: for the fixture ``device``.
        only: a part of the names of the tests to run; all of them if it is empty.
        note: gets each test's name, and its outcome when it begins and when it ends.

    Returns:
        0 if none failed.
    """
    sys.modules["pytest"] = _module()
    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec is not None
    assert spec.loader is not None
    tests = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(tests)
    except Skipped as reason:
        note(file.stem, f"skipped: {reason}")
        return 0
    failed = 0
    for name, test in vars(tests).items():
        if name.startswith("test_") and callable(test):
            for case, values in _cases(test):
                if only in name + case:
                    failed += not _run(name + case, test, values, device, note)
    return 1 if failed else 0


def _run(
    name: str,
    test: Callable[..., None],
    values: dict[str, Any],
    device: str,
    note: Callable[[str, str], None],
) -> bool:
    """Run one test; whether it did not fail."""
    import torch  # not before the tests have asked for what they need

    note(name, "running")
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        known = {"device": device, "tmp_path": Path(folder)}
        wanted = {key: known[key] for key in inspect.signature(test).parameters if key in known}
        try:
            test(**values, **wanted)
        except Skipped as reason:
            note(name, f"skipped: {reason}")
        except Exception as error:
            traceback.print_exc()
            text = " ".join(str(error).split())[:300]
            note(name, f"failed: {type(error).__name__}: {text}")
            return False
        else:
            note(name, "passed")
    return True


def _cases(test: Callable[..., None]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each combination of a test's parameters, with a name for it."""
    marks = getattr(test, "parametrized", [])
    for combination in itertools.product(*(values for _, values in marks)):
        arguments: dict[str, Any] = {}
        for (names, _), value in zip(marks, combination, strict=True):
            arguments.update(zip(names, value, strict=True))
        label = "-".join(str(value) for value in arguments.values())
        yield (f"[{label}]" if label else ""), arguments


def _parametrize(names: str | Sequence[str], values: Sequence[Any], **_: Any) -> Any:
    listed = [name.strip() for name in names.split(",")] if isinstance(names, str) else list(names)
    rows = [value if len(listed) > 1 else (value,) for value in values]

    def mark(test: Any) -> Any:
        test.parametrized = [*getattr(test, "parametrized", []), (listed, rows)]
        return test

    return mark


def _unchanged(test: Any) -> Any:
    return test


@contextmanager
def _raises(expected: Any, match: str = "") -> Iterator[None]:
    try:
        yield
    except expected as error:
        if not re.search(match, str(error)):
            raise AssertionError(f"expected {match!r} in {error!r}") from error
    else:
        raise AssertionError(f"no {expected.__name__} was raised")


def _skip(reason: str = "") -> None:
    raise Skipped(reason)


def _importorskip(name: str, **_: Any) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError:
        raise Skipped(f"no {name}") from None


def _module() -> ModuleType:
    module: Any = ModuleType("pytest")
    module.mark = SimpleNamespace(parametrize=_parametrize, filterwarnings=lambda _: _unchanged)
    module.raises = _raises
    module.skip = _skip
    module.importorskip = _importorskip
    return module
