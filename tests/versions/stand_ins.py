"""Stand-ins for the CUDA libraries, so that a CUDA build of torch runs on the CPU without them.

The package index has only CUDA builds of torch for Linux. They cannot be imported without the CUDA
libraries, 3 GB for every version, and on the CPU call nothing in them. So an empty library is put
in the place of each, with what torch's libraries look up in it: functions that say that there is
no device. A CPU build of torch misses nothing, and none is made.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
from pathlib import Path

_NO_DEVICE = 100  # cudaErrorNoDevice, CUDA_ERROR_NO_DEVICE
_TEXTS = re.compile(r"(String|Name)$")  # functions that return text, not a status
_CUDA = re.compile(r"(lib|_*)(cu|nccl|nv)")  # how libraries and functions of CUDA begin


def make_stand_ins(libraries: Path) -> list[str]:
    """Put a stand-in beside torch's libraries for each CUDA library that they miss.

    Args:
        libraries: the folder ``torch/lib`` of an environment.

    Returns:
        The names of the stand-ins, sorted.

    Raises:
        SystemExit: there is no C compiler or no binutils.
    """
    for tool in ("cc", "nm", "readelf"):
        if shutil.which(tool) is None:
            raise SystemExit(f"the stand-ins need {tool}: install gcc and binutils")
    missing = sorted(name for name in _needed(libraries) if not (libraries / name).exists())
    versioned, unversioned = _looked_up(libraries)
    for name in missing:
        # A function without a version may be in any library that has none.
        _build(libraries / name, versioned.get(name) or {"": unversioned})
    return missing


def _needed(libraries: Path) -> set[str]:
    """The CUDA libraries that torch's are linked to."""
    listed = _run("readelf", "--dynamic", "--wide", *_own(libraries))
    names = set(re.findall(r"\(NEEDED\).*\[(.+)\]", listed))
    return {name for name in names if _CUDA.match(name)}


def _looked_up(libraries: Path) -> tuple[dict[str, dict[str, set[str]]], set[str]]:
    """The functions that torch's libraries look up: by library and version, and without one."""
    file_of = {}
    file = ""
    for line in _run("readelf", "--version-info", "--wide", *_own(libraries)).splitlines():
        if found := re.search(r"Version: \d+ +File: (\S+)", line):
            file = found[1]
        elif found := re.search(r"Name: (\S+) +Flags: \S+ +Version: \d+", line):
            file_of[found[1]] = file
    versioned: dict[str, dict[str, set[str]]] = {}
    unversioned = set()
    for line in _run("nm", "--dynamic", "--undefined-only", *_own(libraries)).splitlines():
        function, _, version = line.split(" ")[-1].replace("@@", "@").partition("@")
        if version in file_of:
            by_version = versioned.setdefault(file_of[version], {})
            by_version.setdefault(version, set()).add(function)
        elif not version and _CUDA.match(function):
            unversioned.add(function)
    return versioned, unversioned


def _own(libraries: Path) -> list[str]:
    return [str(path) for path in sorted(libraries.glob("*.so"))]


def _build(path: Path, functions: dict[str, set[str]]) -> None:
    """Compile a library of functions that fail, by version; the version "" is none."""
    with tempfile.TemporaryDirectory() as folder:
        source, script = Path(folder, "stand_in.c"), Path(folder, "versions")
        names = sorted(set().union(*functions.values()))
        source.write_text("".join(f"{_define(name)}\n" for name in names))
        nodes = (
            f"{version} {{ global: {' '.join(f'{name};' for name in sorted(its))} }};\n"
            for version, its in functions.items()
            if version
        )
        script.write_text("".join(nodes))
        options = [] if "" in functions else [f"-Wl,--version-script={script}"]
        options += ["-shared", "-fPIC", "-fno-builtin", "-w", f"-Wl,-soname,{path.name}"]
        _run("cc", str(source), *options, "-o", str(path))


def _define(function: str) -> str:
    if _TEXTS.search(function):
        return f'const char *{function}(void) {{ return "there is no CUDA device"; }}'
    return f"int {function}(void) {{ return {_NO_DEVICE}; }}"


def _run(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout
