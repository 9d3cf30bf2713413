"""Step: build the CPU kernels and their tests, with CMake or as CMakeLists.txt would; run these.

It goes on beside the steps that use the GPU, behind them in the queue for the processors.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import steppe
from gpu_steps.step import Context

ROOT = Path(__file__).resolve().parents[2]
SOURCES, TESTS = ROOT / "src/steppe/native", ROOT / "tests/native"
LIBRARY = "libsteppe_native.so"
PROGRAMS = {
    "kernels_test": ("kernels_test.cpp", "screen_test.cpp", "decode_mlp_test.cpp"),
    "threads_test": ("threads_test.cpp",),
}
_AVX512 = "-mavx512f -mavx512bw -mavx512vl -mavx512dq -mfma -mprefer-vector-width=512"
ISAS = {
    "portable": ("portable", ""),
    "avx2": ("avx2", "-mavx2 -mfma"),
    "avx512": ("avx512", _AVX512),
    "avx512_vnni": ("avx512+vnni", f"{_AVX512} -mavx512vnni"),
    "avx512_bf16": ("avx512+bf16", f"{_AVX512} -mavx512vnni -mavx512bf16 -mavx512vbmi2"),
}
_FLAGS = (
    "-std=c++17 -fPIC -fopenmp -fvisibility=hidden -O3 -fno-math-errno -ffp-contract=fast"
    " -Wno-psabi -fno-loop-unroll-and-jam -fno-loop-interchange -DSTEPPE_X86"
)


def run(context: Context) -> None:
    """Build, unless nothing can, and test."""
    os.nice(10)
    folder = folder_of(context)
    folder.mkdir(parents=True, exist_ok=True)
    compiler = shutil.which(os.environ.get("CXX", "c++")) or shutil.which("g++")
    context.keep(compiler=compiler or "none", cmake=shutil.which("cmake") or "none")
    if context.is_dry:
        found = steppe.kernels()
        context.keep(built=f"not in a dry run; there is {found.name} {found.isa}".rstrip())
        return
    if compiler is None:
        context.keep(built="left out: no C++ compiler; the CPU kernels do not run here")
        return
    if shutil.which("cmake") is not None:
        with_cmake(context, folder)
    else:
        with_compiler(context, folder, compiler)
    for name in PROGRAMS:
        context.attempt(name, lambda name=name: last_line(_call(folder / name)))


def folder_of(context: Context) -> Path:
    """Where the library is built, as ``steppe.__path__`` would have it."""
    return context.folder / "built/native"


def with_cmake(context: Context, folder: Path) -> None:
    """As ``make test-native`` does."""
    _call("cmake", "-S", SOURCES, "-B", folder, "-DSTEPPE_TESTS=ON")
    _call("cmake", "--build", folder, "--parallel", os.cpu_count())
    context.keep(built="with cmake")


def with_compiler(context: Context, folder: Path, compiler: str) -> None:
    """Each instruction set, all at once, and then the programs."""
    flags = shlex.split(_FLAGS)

    def compile_one(name: str) -> None:
        isa, options = ISAS[name]
        defines = [f"-DSTEPPE_TARGET={name}", f'-DSTEPPE_ISA="{isa}"']
        source, target = SOURCES / "target.cpp", folder / f"{name}.o"
        _call(compiler, *flags, *shlex.split(options), *defines, "-c", source, "-o", target)

    with ThreadPoolExecutor(len(ISAS)) as pool:
        list(pool.map(compile_one, ISAS))
    objects = [folder / f"{name}.o" for name in ISAS]
    library = folder / LIBRARY
    _call(compiler, *flags, "-shared", SOURCES / "abi.cpp", *objects, "-o", library)
    context.keep(built=f"with {compiler}")
    for name, sources in PROGRAMS.items():
        files = [TESTS / source for source in sources]
        link = [f"-I{SOURCES}", *files, library, f"-Wl,-rpath,{folder}"]
        _call(compiler, *flags, *link, "-o", folder / name)


def last_line(text: str) -> str:
    """Of a text, without what is around it."""
    return (text.strip().splitlines() or [""])[-1]


def _call(*command: Any) -> str:
    """Call a program; what it has printed.

    Raises:
        RuntimeError: it failed; the first line that says why.
    """
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    output = done.stdout + done.stderr
    print(output)
    if done.returncode:
        errors = [line for line in output.splitlines() if "error" in line.lower()]
        text = errors[0] if errors else last_line(output)
        raise RuntimeError(f"{command[0]}: exit status {done.returncode}: {text[:300]}")
    return output
