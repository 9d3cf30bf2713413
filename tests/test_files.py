"""Results on disk: all of a file or none of it, and one clear error where there is no room."""

from __future__ import annotations

import errno
import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors import SafetensorError

from steppe import files
from steppe.errors import OutputError, SteppeError
from steppe.files import prepare_folder, write_file, write_folder, write_json, writing_to

OLD = '{"old": true}\n'


def refuse(code: int, *args: Any, **kwargs: Any) -> None:
    raise OSError(code, os.strerror(code))


class FullDisk:
    """A probe file that can be opened but not written to."""

    def __init__(self, **options: Any) -> None:
        pass

    def __enter__(self) -> FullDisk:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def write(self, data: bytes) -> None:
        refuse(errno.ENOSPC)


# ---- prepare_folder


@pytest.mark.parametrize("as_text", [False, True])
def test_a_folder_is_made_with_its_parents_and_left_empty(tmp_path: Path, as_text: bool) -> None:
    folder = tmp_path / "a" / "b"
    assert prepare_folder(str(folder) if as_text else folder) == folder
    assert folder.is_dir()
    assert not list(folder.iterdir())


def test_a_folder_that_is_there_keeps_its_files(tmp_path: Path) -> None:
    (tmp_path / "old.json").write_text(OLD)
    prepare_folder(tmp_path)
    prepare_folder(tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["old.json"]
    assert (tmp_path / "old.json").read_text() == OLD


@pytest.mark.parametrize("below", [".", "sub", "sub/sub"])
def test_a_path_that_is_a_file_is_an_error_that_names_it(tmp_path: Path, below: str) -> None:
    file = tmp_path / "file"
    file.write_text(OLD)
    with pytest.raises(OutputError, match=rf"{file}"):
        prepare_folder(file / below)
    assert file.read_text() == OLD


@pytest.mark.parametrize("code", [errno.EROFS, errno.EACCES, errno.ENOSPC])
def test_a_folder_that_cannot_be_made_is_an_error_with_the_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    monkeypatch.setattr(Path, "mkdir", lambda self, **options: refuse(code))
    with pytest.raises(OutputError, match=os.strerror(code)):
        prepare_folder(tmp_path / "new")


@pytest.mark.parametrize("code", [errno.EROFS, errno.EACCES])
def test_a_folder_that_cannot_be_written_to_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    monkeypatch.setattr(tempfile, "TemporaryFile", lambda **options: refuse(code))
    with pytest.raises(OutputError, match=rf"{tmp_path}: {os.strerror(code)}"):
        prepare_folder(tmp_path)


def test_a_full_disk_is_noticed_before_the_work_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "TemporaryFile", FullDisk)
    with pytest.raises(OutputError, match=os.strerror(errno.ENOSPC)):
        prepare_folder(tmp_path)


@pytest.mark.skipif(os.geteuid() == 0, reason="root can write anywhere")
def test_a_read_only_folder_is_an_error(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(OutputError, match=str(tmp_path)):
        prepare_folder(tmp_path)


# ---- write_json and write_file


@pytest.mark.parametrize("value", [{"a": [1, 2.5, None, "ü"]}, [], "text", 0])
def test_json_is_written_and_nothing_else(tmp_path: Path, value: Any) -> None:
    path = tmp_path / "summary.json"
    write_json(path, value)
    assert json.loads(path.read_text(encoding="utf-8")) == value
    assert path.read_text().endswith("\n")
    assert list(tmp_path.iterdir()) == [path]


def test_an_older_file_is_replaced_whole(tmp_path: Path) -> None:
    path = tmp_path / "summary.json"
    path.write_text(OLD * 1000)
    write_json(path, 1)
    assert path.read_text() == "1\n"


def test_a_file_is_written_under_another_name_with_the_same_ending(tmp_path: Path) -> None:
    path = tmp_path / "plot.png"
    path.write_bytes(b"old")
    seen: list[Path] = []

    def write(temporary: Path) -> None:
        seen.append(temporary)
        temporary.write_bytes(b"new")
        assert path.read_bytes() == b"old"

    write_file(path, write)
    assert path.read_bytes() == b"new"
    assert seen[0] != path
    assert seen[0].suffix == ".png"
    assert seen[0].parent == tmp_path
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("old", [None, OLD])
@pytest.mark.parametrize("method", ["write_text", "replace"])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EROFS])
def test_a_failing_write_leaves_the_old_file_whole_and_no_temporary(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, method: str, old: str | None
) -> None:
    path = tmp_path / "summary.json"
    if old is not None:
        path.write_text(old)
    monkeypatch.setattr(Path, method, lambda self, *args, **options: refuse(code))
    with pytest.raises(OutputError, match=rf"{path}: {os.strerror(code)}"):
        write_json(path, {"new": True})
    monkeypatch.undo()
    assert [file.read_text() for file in tmp_path.iterdir()] == ([] if old is None else [old])


def test_a_disk_that_fills_up_half_way_leaves_no_half_file(tmp_path: Path) -> None:
    path = tmp_path / "plot.png"
    path.write_bytes(b"old")

    def fill(temporary: Path) -> None:
        temporary.write_bytes(b"half")
        refuse(errno.ENOSPC)

    with pytest.raises(OutputError, match=os.strerror(errno.ENOSPC)):
        write_file(path, fill)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_other_errors_come_through_and_leave_no_temporary(
    tmp_path: Path, error: type[BaseException]
) -> None:
    path = tmp_path / "plot.png"
    path.write_bytes(b"old")

    def fail(temporary: Path) -> None:
        temporary.write_bytes(b"half")
        raise error("drawing failed")

    with pytest.raises(error, match="drawing failed"):
        write_file(path, fail)
    assert list(tmp_path.iterdir()) == [path]
    assert path.read_bytes() == b"old"


def test_what_is_no_json_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    path = tmp_path / "summary.json"
    path.write_text(OLD)
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    assert path.read_text() == OLD
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_that_is_gone_is_an_output_error(tmp_path: Path) -> None:
    path = tmp_path / "gone" / "summary.json"
    with pytest.raises(OutputError, match=str(path)):
        write_json(path, 1)


def test_a_path_below_a_file_is_an_output_error(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text(OLD)
    with pytest.raises(OutputError, match=str(file)):
        write_json(file / "summary.json", 1)
    assert file.read_text() == OLD


def test_a_failing_clean_up_does_not_hide_the_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk that has turned read-only refuses both the write and the clean-up."""
    monkeypatch.setattr(Path, "write_text", lambda self, *args, **options: refuse(errno.EROFS))
    monkeypatch.setattr(Path, "unlink", lambda self, **options: refuse(errno.EROFS))
    with pytest.raises(OutputError, match=os.strerror(errno.EROFS)):
        write_json(tmp_path / "summary.json", 1)


# ---- write_folder


def names(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def old_model(folder: Path) -> Path:
    """A folder with results of an earlier run."""
    path = folder / "model"
    path.mkdir()
    (path / "old.json").write_text(OLD)
    return path


def test_a_folder_is_written_whole_with_its_parents(tmp_path: Path) -> None:
    path = tmp_path / "a" / "model"
    write_folder(path, lambda folder: (folder.mkdir(), (folder / "x").write_text("new")))
    assert names(tmp_path) == ["a", "a/model", "a/model/x"]
    assert (path / "x").read_text() == "new"


def test_an_older_folder_is_replaced_with_everything_in_it(tmp_path: Path) -> None:
    path = old_model(tmp_path)

    def write(folder: Path) -> None:
        assert names(path) == ["old.json"]
        folder.mkdir()
        (folder / "new.json").write_text("1")

    write_folder(path, write)
    assert names(tmp_path) == ["model", "model/new.json"]


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "full"), KeyboardInterrupt(), ValueError()]
)
def test_a_folder_that_cannot_be_filled_leaves_the_older_one_whole(
    tmp_path: Path, error: BaseException
) -> None:
    path = old_model(tmp_path)

    def fail(folder: Path) -> None:
        folder.mkdir()
        (folder / "half.json").write_text("{")
        raise error

    expected = OutputError if isinstance(error, OSError) else type(error)
    with pytest.raises(expected):
        write_folder(path, fail)
    assert names(tmp_path) == ["model", "model/old.json"]


def test_a_folder_that_cannot_be_renamed_leaves_the_older_one_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = old_model(tmp_path)
    rename = Path.rename

    def refuse_the_new_one(self: Path, target: Path) -> Path:
        if self.name == "new":
            refuse(errno.EIO)
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", refuse_the_new_one)
    with pytest.raises(OutputError, match=os.strerror(errno.EIO)):
        write_folder(path, Path.mkdir)
    assert names(tmp_path) == ["model", "model/old.json"]


def test_a_folder_below_a_file_is_an_output_error(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text(OLD)
    with pytest.raises(OutputError, match=rf"{file}"):
        write_folder(file / "model", Path.mkdir)
    assert names(tmp_path) == ["file"]


# ---- writing_to


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "No space left on device"),
        (OSError("without a number"), "without a number"),
        (SafetensorError("I/O error: no space left"), "no space left"),
    ],
)
def test_errors_of_the_file_system_get_the_name_and_the_cure(error: Exception, says: str) -> None:
    with (
        pytest.raises(OutputError, match=rf"runs/demo: .*{says}.*: out=PATH"),
        writing_to(Path("runs/demo"), "out"),
    ):
        raise error


def test_the_innermost_name_is_told() -> None:
    outer, inner = writing_to(Path("outer")), writing_to(Path("inner"))
    with pytest.raises(OutputError, match="inner"), outer, inner:
        refuse(errno.ENOSPC)


def test_an_output_error_can_be_caught_as_os_error() -> None:
    assert issubclass(OutputError, OSError)
    assert issubclass(OutputError, SteppeError)


@pytest.mark.parametrize("is_full", [True, False])
@pytest.mark.parametrize("how", [write_file, write_folder])
def test_a_library_that_tells_a_full_disk_in_words_of_its_own(
    how: Callable[..., None], is_full: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(path: Path) -> None:
        raise Exception("No space left on device (os error 28)")  # as tokenizers does

    if is_full:
        monkeypatch.setattr(files, "why_unwritable", lambda folder: "No space left on device")
    with pytest.raises(OutputError if is_full else Exception, match="No space left") as caught:
        how(tmp_path / "out", fail)
    assert isinstance(caught.value, OutputError) == is_full
    assert list(tmp_path.iterdir()) == []
