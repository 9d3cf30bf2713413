"""The kernels as machine code: what they need of a GPU, and which instructions they became."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import triton

from ops.cuda import ahead
from steppe.ops.cuda import pack

pytestmark = pytest.mark.skipif(
    triton.knobs.runtime.interpret, reason="TRITON_INTERPRET is set: nothing is compiled"
)
TYPES = {
    "words": "*i32",
    "starts": "*i64",
    "coefficients": "*fp32",
    "F": "i32",
    "capacity": "i32",
}
DTYPES = {"*bf16": 2, "*fp16": 2, "*fp32": 4}  # bytes
KERNELS = {"count": pack.count_rows, "pack": pack.pack_rows, "unpack": pack.unpack_rows}
# Loads and stores of [T, F] matrices, which take nearly all of the time.
WIDE = {"count": (1, 0), "pack": (1, 1), "unpack": (1, 2)}
# An H100 keeps its memory busy with 3.0 TB/s · 0.78 µs / 132 SMs = 17.8 KB in flight on each SM.
# A program asks for a step at a time: 2 KB of 16-bit entries, so 9 programs of 128 threads have to
# fit into 65536 registers; 4 KB of float32, so 5.
REGISTERS = {2: 65536 // (9 * 128) // 8 * 8, 4: 65536 // (5 * 128) // 8 * 8}
SPILLS = r"(LDL|STL)(\..*)?"
ATOMICS = r"(ATOM|ATOMG|ATOMS|RED)(\..*)?"


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))


def compiled(
    name: str, dtype: str, architecture: int, folder: Path, divisible: bool = True, **options: Any
) -> ahead.Compiled:
    """A kernel as it is launched on a block of F columns, a multiple of 16 or not."""
    kernel = KERNELS[name]
    types = {key: TYPES.get(key, dtype) for key in kernel.arg_names if key != "BLOCK"}
    aligned = tuple(key for key, kind in types.items() if kind.startswith("*"))
    return ahead.compile_ahead(
        kernel,
        types,
        {"BLOCK": pack.BLOCK},
        (*aligned, "F") if divisible else aligned,
        architecture,
        folder,
        **{**pack.OPTIONS, **options},
    )


@pytest.mark.parametrize("architecture", ahead.ARCHITECTURES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", KERNELS)
def test_what_the_kernels_need(name: str, dtype: str, architecture: int, tmp_path: Path) -> None:
    code = compiled(name, dtype, architecture, tmp_path)
    size = DTYPES[dtype]
    assert 16 <= code.registers <= REGISTERS[size]
    assert (code.stack, code.count(SPILLS)) == (0, 0)
    # 9 programs of 16-bit entries, and 1 KB of each that CUDA takes for itself.
    assert (code.shared + 1024) * 9 <= 1024 * ahead.SHARED_LIMIT[architecture]
    assert code.count(ATOMICS) == 0
    assert code.count("FFMA.*") == 0
    loads, stores = WIDE[name]
    a_step = pack.BLOCK * size // (pack.OPTIONS["num_warps"] * 32 * 16)  # of 16 bytes a thread
    assert code.count(r"LDG\.E\.128.*") >= loads * a_step
    assert code.count(r"STG\.E\.128.*") >= stores * a_step


@pytest.mark.parametrize("name", KERNELS)
def test_a_width_that_is_no_multiple_of_16_is_read_entry_by_entry(
    name: str, tmp_path: Path
) -> None:
    code = compiled(name, "*bf16", 90, tmp_path, divisible=False)
    assert (code.stack, code.count(SPILLS)) == (0, 0)
    assert code.count(r"LDG\.E\.128.*") == 0
    assert code.count(r"LDG\.E\.U16.*") >= 8


def test_the_count_of_spills_can_fail(tmp_path: Path) -> None:
    code = compiled("pack", "*fp32", 90, tmp_path, maxnreg=24)
    assert code.registers <= 24
    assert code.stack > 0
    assert code.count(SPILLS) > 0


def test_the_count_of_fused_products_can_fail(tmp_path: Path) -> None:
    code = compiled("pack", "*fp32", 90, tmp_path, enable_fp_fusion=True)
    assert code.count("FFMA.*") > 0


def test_the_count_of_atomics_can_fail(tmp_path: Path) -> None:
    code = ahead.compile_ahead(add_up, {"total": "*i32"}, {}, (), 90, tmp_path)
    assert code.count(ATOMICS) == 1


@triton.jit
def add_up(total):
    triton.language.atomic_add(total, 1)
