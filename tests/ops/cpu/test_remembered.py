"""What a calibration keeps is read again, and a file that is damaged in any way is none."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from steppe.errors import OutputError
from steppe.ops.cpu import remembered
from steppe.ops.cpu.thresholds import Tables

DENSITIES: dict[int, Tables] = {
    256: {False: {32: 0.25}, True: {}},
    512: {False: {1: 1.0, 128: 0.0}, True: {512: 0.375}},
}
CANDIDATES: Tables = {False: {1: 0.5}, True: {}}
NESTED = "[" * 20_000 + "]" * 20_000  # within the size of a file


def is_sane(known: Any) -> bool:
    """Whether shares are finite numbers in [0, 1] at few positive steps."""
    densities, candidates = known
    return all(
        isinstance(rows, int)
        and 0 < rows < 10**9
        and isinstance(share, float)
        and 0.0 <= share <= 1.0
        and isinstance(width, int)
        and 0 < width < 10**9
        for width, tables in [*densities.items(), (1, candidates)]
        for trains in (False, True)
        for rows, share in tables[trains].items()
    )


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "steppe" / "thresholds.json"
    remembered.write(path, DENSITIES, CANDIDATES)
    return path


def test_what_is_written_is_read_again(path: Path) -> None:
    assert remembered.read(path) == (DENSITIES, CANDIDATES)
    assert json.loads(path.read_text()) == {
        "density": {
            "256": {"inference": {"32": 0.25}, "training": {}},
            "512": {"inference": {"1": 1.0, "128": 0.0}, "training": {"512": 0.375}},
        },
        "candidates": {"inference": {"1": 0.5}, "training": {}},
    }


def test_no_file_and_no_file_of_ours_are_no_calibration(tmp_path: Path) -> None:
    assert remembered.read(tmp_path / "none.json") is None
    assert remembered.read(tmp_path) is None
    (tmp_path / "binary.json").write_bytes(bytes(range(256)))
    assert remembered.read(tmp_path / "binary.json") is None


WRONG_SHARES = [
    *("NaN", "Infinity", "-Infinity", "-0.001", "1.001", "true", "false", "null", '"0.5"'),
    *("[]", "{}", "1e999", "-1e999", "1" + "0" * 400, "1" + "0" * 5000, NESTED),
]
WRONG_STEPS = ["", "0", "-1", "1.5", "a", "٣", "²", "1e3", " 1", "1_0", "9" * 10, "9" * 5000, "NaN"]


@pytest.mark.parametrize("share", WRONG_SHARES, ids=lambda share: share[:12])
@pytest.mark.parametrize("place", ["0.375", "0.25", "0.5"])
def test_a_share_that_is_none_makes_it_no_calibration(path: Path, share: str, place: str) -> None:
    path.write_text(path.read_text().replace(place, share))
    assert remembered.read(path) is None


@pytest.mark.parametrize("step", WRONG_STEPS, ids=lambda step: step[:12])
@pytest.mark.parametrize("place", ["512", "32", "1"])
def test_a_step_that_is_none_makes_it_no_calibration(path: Path, step: str, place: str) -> None:
    path.write_text(path.read_text().replace(f'"{place}"', f'"{step}"'))
    assert remembered.read(path) is None


@pytest.mark.parametrize(
    "content",
    [
        *("", "{}", "[]", "null", "3", '"density"', NESTED, '{"density": ' + NESTED + "}"),
        '{"density": {}}',
        '{"candidates": {"inference": {}, "training": {}}}',
        '{"density": [], "candidates": 3}',
        '{"density": {"64": {"inference": {}}}, "candidates": {"inference": {}, "training": {}}}',
        '{"density": {"64": []}, "candidates": {"inference": {}, "training": {}}}',
    ],
    ids=lambda content: content[:20],
)
def test_another_shape_is_no_calibration(path: Path, content: str) -> None:
    path.write_text(content)
    assert remembered.read(path) is None


def test_more_steps_than_a_calibration_has_are_none(path: Path) -> None:
    many = {str(rows): 0.5 for rows in range(1, 66)}
    named = {"inference": many, "training": {}}
    path.write_text(json.dumps({"density": {}, "candidates": named}))
    assert remembered.read(path) is None
    path.write_text(path.read_text() + " " * 2**16)
    assert remembered.read(path) is None
    many.pop("65")
    path.write_text(json.dumps({"density": {}, "candidates": named}))
    assert remembered.read(path) is not None


def test_a_file_changed_at_random_is_sane_or_none(path: Path) -> None:
    whole = path.read_bytes()
    rng = random.Random(0)
    pieces = [piece.encode() for piece in (*WRONG_SHARES[:15], *WRONG_STEPS, '"', "{", "}", ",")]
    outcomes = set()
    for _ in range(2000):
        data = bytearray(whole)
        for _ in range(rng.randint(1, 3)):
            start = rng.randrange(len(data) + 1)
            end = min(len(data), start + rng.choice([0, 1, 1, 4, 40]))
            data[start:end] = rng.choice([b"", rng.randbytes(1), rng.choice(pieces)])
        path.write_bytes(bytes(data))
        known = remembered.read(path)
        outcomes.add(known is None)
        assert known is None or is_sane(known)
    assert outcomes == {False, True}


def test_a_machine_without_a_home_is_one_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", homeless)
    with pytest.raises(OutputError, match="XDG_CACHE_HOME"):
        remembered.path_of(torch.float32, 1)


def test_each_dtype_and_number_of_threads_has_a_file_of_its_own() -> None:
    paths = {
        remembered.path_of(dtype, threads)
        for dtype in (torch.float32, torch.bfloat16)
        for threads in (1, 2, 64)
    }
    assert len(paths) == 6
    assert len({path.parent for path in paths}) == 1
