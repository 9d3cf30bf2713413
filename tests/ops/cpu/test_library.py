"""The native library: each instruction set, none at all, a broken one, one of another version."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import steppe
from steppe.errors import KernelError
from steppe.ops import products
from steppe.ops.cpu import library
from steppe.ops.cpu.library import kernels
from steppe.ops.cpu.structures import STRUCTURES, MatrixStructure

needs_native = pytest.mark.skipif(kernels().name != "native", reason=kernels().reason)
CHECK = """
import itertools

import torch
from steppe.ops import reference
from steppe.ops.cpu import calls, dispatch
from steppe.ops.cpu.library import kernels

share = dispatch.max_candidates_for(1024, torch.float32, trains=True)
print(kernels().isa, kernels().unscreened, share, sep="|")
torch.manual_seed(0)
dtypes = (torch.float32, 1e-6), (torch.bfloat16, 1e-2)
for (dtype, limit), threads in itertools.product(dtypes, (1, 3, 17)):
    torch.set_num_threads(threads)
    p = torch.randn(50, 777).to(dtype)
    matrix = torch.randn(777, 130).to(dtype)
    values, support = calls.compact(p)
    dense = reference.densify(values, support.index, support.offsets, 50, 777)
    assert torch.equal(dense, torch.relu(p))
    expected = dense.double() @ matrix.double()
    got = calls.spmm(values, support, calls.pack(matrix))
    assert (got.double() - expected).norm() < limit * expected.norm()
    gradient = calls.sampled(support, calls.pack(got), calls.pack(matrix))
    expected = (got.double() @ matrix.double().T)[dense != 0].norm()
    assert abs(gradient.double().norm() - expected) < limit * expected
    # The bits of an entry do not depend on which others are listed.
    whole = reference.densify(gradient, support.index, support.offsets, 50, 777)
    kept = torch.where(torch.rand(50, 777) < 0.7, p, 0.0)
    fewer, part = calls.compact(kept)
    again = calls.sampled(part, calls.pack(got), calls.pack(matrix))
    again = reference.densify(again, part.index, part.offsets, 50, 777)
    assert torch.equal(again, torch.where(kept > 0, whole, 0.0))
"""
# The screens find the candidates of the definition, and the block what is active of them.
SCREEN = """
from steppe.ops import screening
from steppe.ops.cpu import native_ops, screen
from steppe.ops.mlp import mlp

for dtype, limit in ((torch.float32, 1e-5), (torch.bfloat16, 2e-2)):
    for width in (1, 130, 384):
        x = torch.randn(97, width).to(dtype)
        weight = (torch.randn(333, width) * width**-0.5).to(dtype)
        bias = (torch.randn(333) - 1.5).to(dtype)
        found = screen.find_candidates(x, screen.screen_of(weight), bias)
        listed = (found.masks[..., None] >> torch.arange(64) & 1).bool().flatten(1)[:, :333]
        grid = screening.quantise(weight)
        most = screen.token_most(width, 97)
        expected = screening.candidates(screening.quantise(x, most=most), grid, bias)
        # In bfloat16 some numbers are halfway between two integers of the grid.
        assert int((listed != expected).sum()) <= (5 if dtype == torch.bfloat16 else 0)
        assert 0.02 < listed.double().mean() < 0.5
        down = torch.randn(333, width).to(dtype)
        for rows in (97, 7):
            block = (x[:rows], weight, bias, None, None, down, None, 1.0, 0.0, None, 0.0)
            for trains in (False, True):
                screened_z = mlp(*block, trains, 1.0, 1.0)[0].double()
                z = mlp(*block, trains, 1.0, 0.0)[0].double()
                assert (screened_z - z).norm() <= limit * z.norm()
                assert z.norm() > 0
        mlp(*block, False, 1.0, 1.0)  # a weight is screened for few rows when it is met again
        share = native_ops.cached_screen(weight).few.share
        most = screen.token_most(width, 7)
        expected = screening.candidates(screening.quantise(x[:7], most=most), grid, bias)
        assert abs(share - expected.double().mean()) <= (2e-3 if dtype == torch.bfloat16 else 0)
"""
# A library that adds pairs of int8 products in 16 bits saturates at values like these.
CAPPED = """
import torch
torch.manual_seed(0)
from ops.screening_cases import CASES, active_somewhere
from steppe.ops.cpu import native_ops
from steppe.ops.mlp import mlp
from steppe.ops.cpu.screen import find_candidates, screen_of

extreme = torch.full((40, 256), 127.0), torch.full((70, 256), 127.0), torch.full((70,), -4e6)
cases = [make(torch.Generator().manual_seed(0)) for make in CASES] + [extreme]
for x, weight, bias in cases:
    found = find_candidates(x, screen_of(weight), bias)
    hidden = len(weight)
    listed = (found.masks[..., None] >> torch.arange(64) & 1).bool().flatten(1)[:, :hidden]
    assert not (active_somewhere(x, weight, bias) & ~listed).any()
x, weight, bias = cases[0]
down = torch.randn_like(weight)
block = (x, weight, bias, None, None, down, None, 1.0, 0.0, None, 0.0)
for trains in (False, True):
    screened, plain = (mlp(*block, trains, 1.0, most) for most in (1.0, 0.0))
    assert len(screened[2]) == len(plain[2]) > 0  # r
    assert torch.allclose(screened[0], plain[0], atol=1e-5)
x = extreme[0] * torch.where(torch.rand(40, 256) < 0.5, -1, 1)
found = find_candidates(x, screen_of(extreme[1]), torch.full((70,), -1.5e6))
assert found.share == 0.0
"""
ORDER = ["avx512+amx", "avx512+bf16", "avx512+vnni", "avx512", "avx2+vnni", "avx2", "portable"]


@pytest.fixture
def place(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """An empty folder in place of those of the installation."""
    monkeypatch.setattr(library, "_places", lambda: [tmp_path])
    library.load.cache_clear()
    library.kernels.cache_clear()
    yield tmp_path
    library.load.cache_clear()
    library.kernels.cache_clear()


@needs_native
@pytest.mark.parametrize("isa", ORDER)
def test_every_instruction_set_computes_the_same(isa: str) -> None:
    got, unscreened, share = run(CHECK + SCREEN, STEPPE_ISA=isa).strip().split("|")
    # The cap, or what this processor has below it.
    assert ORDER.index(got) >= ORDER.index(isa)
    # Elsewhere a first product is screened only if it is asked for.
    if got not in ("avx512", "portable"):
        assert (unscreened, float(share) > 0) == ("", True)
    else:
        assert got in unscreened
        assert "no faster" in unscreened
        assert float(share) == 0.0


@needs_native
@pytest.mark.parametrize(
    "caps",
    [
        {"ONEDNN_MAX_CPU_ISA": "SSE41"},
        {"ONEDNN_MAX_CPU_ISA": "AVX2"},
        {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE"},
        {"ATEN_CPU_CAPABILITY": "default"},
    ],
    ids=str,
)
def test_caps_of_torchs_own_kernels_are_no_matter_to_the_screen(caps: dict[str, str]) -> None:
    run(CAPPED, **caps)


def run(script: str, **environment: str) -> str:
    """What another process prints."""
    result = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, **environment},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_without_the_library_the_reference_runs_and_says_why(place: Path) -> None:
    found = steppe.kernels()
    assert found.name == "reference"
    assert "no native kernels" in found.unscreened
    assert "C++ compiler" in found.reason
    assert "pip install" in found.reason
    p = torch.randn(5, 70)
    values, index, offsets = products.compact(p)
    assert len(values) == len(index) == int(offsets[-1]) == int((p > 0).sum())
    layer = torch.nn.TransformerEncoderLayer(8, 2, 32, dropout=0.0)
    x = torch.randn(3, 2, 8)
    expected = layer(x)
    accelerated = steppe.accelerate_(layer, max_density=1.0, max_candidates=1.0)
    assert torch.equal(accelerated(x), expected)


def test_other_systems_are_not_told_to_install_a_compiler(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(library.platform, "system", lambda: "Darwin")
    reason = steppe.kernels().reason
    assert "for Linux, and this is Darwin" in reason
    assert "compiler" not in reason


def test_a_library_that_does_not_load_is_an_error(place: Path) -> None:
    (place / "libsteppe_native.so").write_text("no library")
    with pytest.raises(KernelError, match=r"cannot be loaded.*pip install"):
        steppe.kernels()


@needs_native
def test_a_library_of_another_version_is_an_error(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    library.load.cache_clear()
    version = library.ABI_VERSION
    monkeypatch.setattr(library, "ABI_VERSION", 0)
    with pytest.raises(KernelError, match=f"expected version 0, got {version}"):
        library.load()


@needs_native
def test_a_library_with_structs_of_other_sizes_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    class Longer(ctypes.Structure):
        _fields_ = (("watch", MatrixStructure), ("more", ctypes.c_int64))

    library.load.cache_clear()
    size = ctypes.sizeof(MatrixStructure)
    monkeypatch.setitem(STRUCTURES, "matrix", Longer)
    with pytest.raises(KernelError, match=rf"'matrix': {size + 8}.*'matrix': {size}.*pip install"):
        library.load()


@needs_native
def test_functions_have_the_signatures_that_the_library_gives() -> None:
    functions = library.library()
    pointer, size, integer = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
    assert functions.steppe_edges.argtypes == (pointer, size)
    assert functions.steppe_edges.restype is size
    assert functions.steppe_stop_watching.restype is None
    assert functions.steppe_count.argtypes == (pointer, integer, *[size] * 3, pointer, integer)
    with pytest.raises(ctypes.ArgumentError):
        functions.steppe_edges(0, 1.5)
    assert not hasattr(functions, "steppe_matvec")  # a part of decoding, for the C++ tests alone
