"""The kernels as machine code: what they need of a GPU, and which instructions they became."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import triton
import triton.language as tl

from ops.cuda import ahead
from steppe.ops.cuda import pack
from steppe.ops.reference import ceil_div

pytestmark = pytest.mark.skipif(
    triton.knobs.runtime.interpret, reason="TRITON_INTERPRET is set: nothing is compiled"
)
KERNELS = {"count": pack.count_rows, "pack": pack.pack_rows, "unpack": pack.unpack_rows}
# Loads and stores of [T, F] matrices, which take nearly all of the time.
WIDE = {"count": (1, 0), "pack": (1, 1), "unpack": (1, 2)}
# An H100 keeps its memory busy with 3.0 TB/s · 0.78 µs / 132 SMs = 17.8 KB in flight on each SM.
# A program asks for a step at a time: 2 KB of 16-bit entries, so 9 programs of 128 threads have to
# fit into 65536 registers; 4 KB of float32, so 5.
REGISTERS = {2: 65536 // (9 * 128) // 8 * 8, 4: 65536 // (5 * 128) // 8 * 8}
SPILLS = r"(LDL|STL)(\..*)?"
FLUSHED = r".*\.FTZ.*"  # subnormal numbers become 0
ATOMICS = r"(ATOM|ATOMG|ATOMS|RED)(\..*)?"


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))


def compiled(
    name: str, dtype: torch.dtype, architecture: int, folder: Path, F: int = 4096, **options: Any
) -> ahead.Compiled:
    """A kernel as it is launched on two rows of F columns."""
    p = torch.empty(2, F, dtype=dtype)
    starts = torch.empty(3, dtype=torch.int64)
    words = torch.empty(2, ceil_div(F, 32), dtype=torch.int32)
    coefficients = torch.empty(2)
    arguments = {
        "count": (p, starts, F),
        "pack": (p, p, words, p.flatten(), starts, coefficients, F, 2 * F),
        "unpack": (p, words, p.flatten(), starts, coefficients, p, p, F, 2 * F),
    }[name]
    options = {"BLOCK": pack.BLOCK, **pack.OPTIONS, **options}
    return ahead.compile_ahead(KERNELS[name], arguments, architecture, folder, **options)


@pytest.mark.parametrize("architecture", ahead.ARCHITECTURES)
@pytest.mark.parametrize("dtype", pack.DTYPES)
@pytest.mark.parametrize("name", KERNELS)
def test_what_the_kernels_need(
    name: str, dtype: torch.dtype, architecture: int, tmp_path: Path
) -> None:
    code = compiled(name, dtype, architecture, tmp_path)
    size = dtype.itemsize
    assert 16 <= code.registers <= REGISTERS[size]
    assert (code.stack, code.count(SPILLS)) == (0, 0)
    # 9 programs of 16-bit entries, and 1 KB of each that CUDA takes for itself.
    assert (code.shared + 1024) * 9 <= 1024 * ahead.SHARED_LIMIT[architecture]
    assert code.count(ATOMICS) == 0
    assert code.count("FFMA.*") == 0
    assert code.count(FLUSHED) == 0
    loads, stores = WIDE[name]
    a_step = pack.BLOCK * size // (pack.OPTIONS["num_warps"] * 32 * 16)  # of 16 bytes a thread
    assert code.count(r"LDG\.E\.128.*") >= loads * a_step
    assert code.count(r"STG\.E\.128.*") >= stores * a_step


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize(("F", "loads"), [(1, 1), (4095, 8)])
def test_a_width_that_is_no_multiple_of_16_is_read_entry_by_entry(
    F: int, loads: int, name: str, tmp_path: Path
) -> None:
    code = compiled(name, torch.bfloat16, 90, tmp_path, F)
    assert (code.stack, code.count(SPILLS)) == (0, 0)
    assert code.count(r"LDG\.E\.128.*") == 0
    assert code.count(r"LDG\.E\.U16.*") >= loads


def test_the_count_of_spills_can_fail(tmp_path: Path) -> None:
    code = compiled("pack", torch.float32, 90, tmp_path, maxnreg=24)
    assert code.registers <= 24
    assert code.stack > 0
    assert code.count(SPILLS) > 0


def test_the_count_of_fused_products_can_fail(tmp_path: Path) -> None:
    code = compiled("pack", torch.float32, 90, tmp_path, enable_fp_fusion=True)
    assert code.count("FFMA.*") > 0


@triton.jit
def add_up(total):
    tl.atomic_add(total, 1)


@triton.jit
def flush(x):
    square = tl.inline_asm_elementwise(
        "mul.ftz.f32 $0, $1, $1;", "=r,r", [tl.load(x)], dtype=tl.float32, is_pure=True, pack=1
    )
    tl.store(x, square)


def test_the_counts_of_atomics_and_of_what_flushes_can_fail(tmp_path: Path) -> None:
    total = torch.empty(1, dtype=torch.int32)
    assert ahead.compile_ahead(add_up, (total,), 90, tmp_path).count(ATOMICS) == 1
    assert ahead.compile_ahead(flush, (total.float(),), 90, tmp_path).count(FLUSHED) > 0
