"""Run every verb of steppe with each supported version of torch: ``make test-versions``.

For each pair of Python and torch: a new virtual environment with torch and steppe's one wheel, and
`smoke.py` in it. One environment is there at a time, 2 GB, and it is deleted before the next is
made; the other packages are installed once for each Python, beside it. The outcomes go to a JSON
file, pair by pair; a run of some pairs leaves the others as they were.

Pairs whose interpreter ``pythonX.Y`` is not installed are passed over, with a line that says so.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from stand_ins import make_stand_ins

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
RECORD = HERE / "floor.json"
FLOOR = "2.8.0"
# Every minor version of torch once; the oldest and the newest Python with the floor and with the
# newest torch that is made for them.
PAIRS = (
    *(
        ("3.12", version)
        for version in (FLOOR, "2.9.1", "2.10.0", "2.11.0", "2.12.1", "2.13.0", "2.14.1", "2.15.0")
    ),
    *(("3.10", version) for version in (FLOOR, "2.14.1")),
    *(("3.13", version) for version in (FLOOR, "2.15.0")),
)
# What torch imports, what steppe and its extra `train` need; torch's other requirements are CUDA's.
PACKAGES = (
    *("filelock", "fsspec", "jinja2", "networkx", "setuptools<82", "sympy", "typing-extensions"),
    *("huggingface-hub", "numpy", "pydantic", "rich", "safetensors", "typer", "wrapt"),
    *("packaging", "psutil", "pyyaml", "scipy", "tqdm", "transformers>=5.0,<6"),
)
# These require torch, so pip would look for all that torch requires.
PACKAGES_WITHOUT_THEIRS = ("accelerate", "hessian-eigenthings>=1.0.0a5")


class InstallError(Exception):
    """An environment could not be made; pip's last words."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the pairs.

    Returns:
        0 if every verb of every pair that ran is in order.
    """
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("pairs", nargs="*", help="such as 3.12:2.8.0; all by default")
    parser.add_argument("--json", type=Path, default=ROOT / "docs/results/versions.json")
    parser.add_argument("--folder", type=Path, default=ROOT / "build/versions")
    parser.add_argument("--wheel", type=Path, help="of `make wheels`; by default one is built")
    parser.add_argument("--find-links", default="", help="a folder of wheels to look in first")
    options = parser.parse_args(arguments)
    pairs = [tuple(pair.split(":")) for pair in options.pairs] or PAIRS
    options.folder = options.folder.absolute()
    options.folder.mkdir(parents=True, exist_ok=True)
    environment = options.folder / "environment"
    wheel = options.wheel or _wheel(options.folder)
    all_good = True
    for python, torch in pairs:
        interpreter = _interpreter(python)
        if interpreter is None:
            print(f"Python {python}, torch {torch}: passed over, there is no python{python}")
            continue
        started = time.monotonic()
        try:
            row = _run_pair(environment, interpreter, torch, wheel, options)
        finally:
            shutil.rmtree(environment, ignore_errors=True)
        _write(options.json, {"python": python, "torch": torch, **row})
        bad = {
            verb: outcome for verb, outcome in row["verbs"].items() if not outcome.startswith("ok")
        }
        all_good &= not bad
        print(
            f"Python {python}, torch {torch}: {len(row['verbs'])} verbs, {len(bad)} not ok,"
            f" {time.monotonic() - started:.0f} s",
            flush=True,
        )
        for verb, outcome in bad.items():
            print(f"  {verb}: {outcome}", flush=True)
    return 0 if all_good else 1


def _run_pair(
    environment: Path, interpreter: str, torch: str, wheel: Path, options: argparse.Namespace
) -> dict[str, Any]:
    """The exact Python, and the outcome of each verb."""
    try:
        _make(environment, interpreter, torch, wheel, options)
    except InstallError as error:
        return {"verbs": {"install": str(error)}}
    python = environment / "bin/python"
    if torch == FLOOR:
        _write_json(RECORD, json.loads(_output(python, HERE / "record_floor.py")))
    exact = _output(python, "-c", "import platform; print(platform.python_version())").strip()
    done = subprocess.run([python, HERE / "smoke.py"], capture_output=True, text=True)
    lines = done.stdout.strip().splitlines()
    if done.returncode:  # before or between the checks: a failed import, or a crash
        last = (done.stderr.strip().splitlines() or [""])[-1]
        verbs = {"import": f"exit status {done.returncode}: {last[:300]}"}
    else:
        verbs = {"import": "ok", **json.loads(lines[-1])}
    (options.folder / f"smoke-{exact}-{torch}.log").write_text(done.stdout + done.stderr)
    return {"exact_python": exact, "verbs": verbs}


def _make(
    environment: Path, interpreter: str, torch: str, wheel: Path, options: argparse.Namespace
) -> None:
    """A virtual environment with torch and steppe, and a path to the other packages."""
    shutil.rmtree(environment, ignore_errors=True)
    subprocess.run([interpreter, "-m", "venv", environment], check=True)
    (site,) = environment.glob("lib/python*/site-packages")
    packages = options.folder / f"packages-{Path(interpreter).name}"
    pip = [environment / "bin/python", "-m", "pip", "install", "-q", "--no-cache-dir"]
    pip += ["--no-compile", *(["--find-links", options.find_links] if options.find_links else [])]
    if not packages.exists():
        partial = packages.with_name(f"{packages.name}-partial")
        shutil.rmtree(partial, ignore_errors=True)
        constraints = environment / "constraints.txt"  # the tested versions of all but torch
        lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
        constraints.write_text("\n".join(line for line in lines if not line.startswith("torch==")))
        into = ["--target", partial, "-c", constraints]
        _install([*pip, *into, *PACKAGES])
        _install([*pip, *into, "--no-deps", *PACKAGES_WITHOUT_THEIRS])
        partial.rename(packages)
    _install([*pip, "--no-deps", f"torch=={torch}", wheel])
    (site / "packages.pth").write_text(f"{packages}\n")
    if sys.platform == "linux":
        make_stand_ins(site / "torch/lib")


def _install(command: Sequence[str | os.PathLike[str]]) -> None:
    """Call pip.

    Raises:
        InstallError: it failed.
    """
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
        raise InstallError((errors or ["pip failed"])[-1][:300])


def _wheel(folder: Path) -> Path:
    """Steppe's wheel: one for every Python and torch, since its kernels know neither."""
    target = folder / "wheel"
    shutil.rmtree(target, ignore_errors=True)
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", target, ROOT]
    subprocess.run(command, check=True)
    (wheel,) = target.glob("steppe-*-py3-none-*.whl")
    return wheel


def _interpreter(python: str) -> str | None:
    """The path of ``pythonX.Y``, if it runs: a version manager's may be there and not run."""
    path = shutil.which(f"python{python}")
    if path is None:
        return None
    done = subprocess.run([path, "-c", "import venv, ensurepip"], capture_output=True)
    return None if done.returncode else path


def _output(*command: str | os.PathLike[str]) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _write(path: Path, row: dict[str, Any]) -> None:
    """Put a row in the place of the same pair's."""
    rows = json.loads(path.read_text(encoding="utf-8"))["rows"] if path.exists() else []
    rows = [old for old in rows if (old["python"], old["torch"]) != (row["python"], row["torch"])]
    _write_json(path, {"rows": sorted([*rows, row], key=_order)})


def _order(row: dict[str, Any]) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", f"{row['torch']} {row['python']}")]


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
