"""The native library: each instruction set, none at all, a broken one, one of another version."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import steppe
from steppe.errors import KernelError
from steppe.ops import native, registry
from steppe.ops.native import kernels

needs_native = pytest.mark.skipif(kernels().name != "native", reason=kernels().reason)
CHECK = """
import torch
from steppe.ops import calls, reference
from steppe.ops.native import kernels

print(kernels().isa)
for dtype, limit in ((torch.float32, 1e-6), (torch.bfloat16, 1e-2)):
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


@pytest.fixture
def place(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """An empty folder in place of those of the installation."""
    monkeypatch.setattr(native, "_places", lambda: [tmp_path])
    native.load.cache_clear()
    native.kernels.cache_clear()
    yield tmp_path
    native.load.cache_clear()
    native.kernels.cache_clear()


@needs_native
@pytest.mark.parametrize("isa", ["avx512", "avx2", "portable"])
def test_every_instruction_set_computes_the_same(isa: str) -> None:
    order = ["avx512+bf16", "avx512", "avx2", "portable"]
    result = subprocess.run(
        [sys.executable, "-c", CHECK],
        env={**os.environ, "STEPPE_ISA": isa},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    # The cap, or what this processor has below it.
    assert order.index(result.stdout.strip()) >= order.index(isa)


def test_without_the_library_the_reference_runs_and_says_why(place: Path) -> None:
    found = steppe.kernels()
    assert found.name == "reference"
    assert "C++ compiler" in found.reason
    assert "pip install" in found.reason
    p = torch.randn(5, 70)
    values, index, offsets = registry.compact(p)
    assert len(values) == len(index) == int(offsets[-1]) == int((p > 0).sum())
    layer = torch.nn.TransformerEncoderLayer(8, 2, 32, dropout=0.0)
    x = torch.randn(3, 2, 8)
    expected = layer(x)
    assert torch.equal(steppe.accelerate_(layer, max_density=1.0)(x), expected)


def test_a_library_that_does_not_load_is_an_error(place: Path) -> None:
    (place / "libsteppe_native.so").write_text("no library")
    with pytest.raises(KernelError, match=r"cannot be loaded.*pip install"):
        steppe.kernels()


@needs_native
def test_a_library_of_another_version_is_an_error(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    native.load.cache_clear()
    monkeypatch.setattr(native, "ABI_VERSION", 0)
    with pytest.raises(KernelError, match="expected version 0, got 1"):
        native.load()
