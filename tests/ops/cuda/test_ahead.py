"""The kernels as machine code: what they need of a GPU, and which instructions they became."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
import triton.language as tl

from ops.cuda import ahead
from steppe.ops.cuda import decode, decode_kernels, decode_tokens, decode_tokens_kernels, pack
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
# One dtype on each, and each on an H100.
DECODING = [(one, torch.bfloat16) for one in ahead.ARCHITECTURES] + [
    (90, dtype) for dtype in (torch.float32, torch.float16)
]
# Of the first product, each with 8 KB in flight or more; an L4 needs one, for a tenth of the speed.
PROGRAMS = 3
# On tokens: the wide launch of each, and on an H100 the narrow one.
OF_TOKENS = [(*one, 4096) for one in DECODING] + [
    (90, dtype, 768) for dtype in (torch.bfloat16, torch.float32)
]
WAITS = r"BAR\.|ACQBULK"
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


@pytest.mark.parametrize("dtype", pack.DTYPES)
@pytest.mark.parametrize(
    ("architecture", "is_linear"), [*((one, True) for one in ahead.ARCHITECTURES), (90, False)]
)
def test_what_recomputing_rows_needs(
    architecture: int, is_linear: bool, dtype: torch.dtype, tmp_path: Path
) -> None:
    """Two programs or more of 128 threads on a processor; tensor cores for 16-bit entries."""
    x, p = torch.empty(64, 1024, dtype=dtype), torch.empty(64, 4096, dtype=dtype)
    starts, words = torch.empty(65, dtype=torch.int64), torch.empty(64, 128, dtype=torch.int32)
    strides = 1024, 1, *((1024, 1) if is_linear else (1, 4096))
    sizes = 64, 4096, 1024, 999
    arguments = x, x, p, p, words, starts, torch.empty(2), p, p, *sizes, *strides
    constants = {"HAS_BIAS": True, **pack.TILE, **pack.OPTIONS}
    code = ahead.compile_ahead(pack.recompute_rows, arguments, architecture, tmp_path, **constants)
    assert 16 <= code.registers <= 248
    assert (code.stack, code.count(SPILLS)) == (0, 0)
    assert (code.shared + 1024) * 2 <= 1024 * ahead.SHARED_LIMIT[architecture]
    assert code.count(r"(ATOM|ATOMG|RED)(\..*)?") == 0  # sm_100's tensor memory has its own
    assert code.count(FLUSHED) == 0
    on_tensor_cores = code.count(r"(HMMA|HGMMA|UTCHMMA)(\..*)?")
    assert (on_tensor_cores > 0) == (dtype.itemsize == 2)
    assert code.count(r"LDGSTS\.E.*128.*") > 0
    a_tile = pack.TILE["ROWS"] * pack.TILE["COLUMNS"] * dtype.itemsize // (128 * 16)
    assert code.count(r"STG\.E\.128.*") >= 2 * a_tile


@pytest.mark.parametrize(("architecture", "dtype"), DECODING)
@pytest.mark.parametrize("width", [768, 2048, 4096])
@pytest.mark.parametrize("screens", [False, True])
def test_what_finding_active_units_needs(
    screens: bool, width: int, dtype: torch.dtype, architecture: int, tmp_path: Path
) -> None:
    config = decode.config_of(width, screens)
    x, floats = torch.empty(16, dtype=dtype), torch.empty(16)
    words = torch.empty(16, dtype=torch.int32)
    arguments = (x, words, floats, x, x, words, words, floats, 4 * width, 1.0, 0.0)
    constants = decode.constants_of(width, screens, config, pdl=architecture >= 90)
    code = ahead.compile_ahead(
        decode_kernels.find_active, arguments, architecture, tmp_path, **constants
    )
    threads = 32 * config.warps
    assert 16 <= code.registers <= 65536 // threads // PROGRAMS // 8 * 8
    assert (code.stack, code.count(SPILLS)) == (0, 0)
    assert (code.shared + 1024) * PROGRAMS <= 1024 * ahead.SHARED_LIMIT[architecture]
    assert code.count(ATOMICS) == 0
    # Rounding to an integer may flush: what is below ½ becomes 0 in any case.
    assert code.count(FLUSHED) == code.count(r"(FRND|F2I)\.FTZ\.FLOOR.*")
    rows = config.batch * width * dtype.itemsize // 16 // threads  # of K, 16 bytes a thread
    words_a_thread = config.group * decode.words_of(width) // threads
    assert code.count(r"LDG\.E\.128.*") >= rows + (words_a_thread // 4 if screens else 0)
    assert (code.count(r"IDP\.4A\.S8\.S8.*") > 0) == screens
    if screens:
        assert code.count(r"IDP\.4A\.S8\.S8.*") >= 2 * words_a_thread  # two bytes of x
        # The first rows of the copy are asked for before anything waits.
        wait = next(i for i, opcode in enumerate(code.opcodes) if re.match(WAITS, opcode))
        ahead_of_it = [opcode for opcode in code.opcodes[:wait] if opcode.startswith("LDG.E.128")]
        assert len(ahead_of_it) >= words_a_thread // 4


@pytest.mark.parametrize(("architecture", "dtype"), DECODING)
@pytest.mark.parametrize("width", [768, 2048, 4096])
@pytest.mark.parametrize("screens", [False, True])
def test_what_adding_rows_needs(
    screens: bool, width: int, dtype: torch.dtype, architecture: int, tmp_path: Path
) -> None:
    config = decode.config_of(width, screens)
    lists = ceil_div(4 * width, config.rows)
    x, floats = torch.empty(16, dtype=dtype), torch.empty(16)
    words = torch.empty(16, dtype=torch.int32)
    arguments = (words, words, floats, x, x, x, width, lists)
    constants = decode.down_constants_of(lists, config, pdl=architecture >= 90)
    code = ahead.compile_ahead(
        decode_kernels.add_rows, arguments, architecture, tmp_path, **constants
    )
    threads = 32 * config.down_warps
    assert 16 <= code.registers <= 65536 // threads // 8 * 8  # a program on each processor
    assert (code.stack, code.count(SPILLS)) == (0, 0)
    assert code.shared <= 48 * 1024
    assert code.count(r"(ATOM|ATOMG|RED)(\..*)?") == 0  # the histogram's are in shared memory
    assert code.count(FLUSHED) == 0
    rows = config.down_batch * config.down_columns * dtype.itemsize // 16 // threads
    assert code.count(r"LDG\.E\.128.*") >= rows


def loads_before_the_wait(code: ahead.Compiled, architecture: int) -> int:
    """Those that a kernel makes while the one before it has not ended."""
    waits = [number for number, opcode in enumerate(code.opcodes) if opcode.startswith("ACQBULK")]
    assert bool(waits) == (architecture >= 90)
    return sum(opcode.startswith("LDG") for opcode in code.opcodes[: waits[0]]) if waits else 0


@pytest.mark.parametrize(("architecture", "dtype", "width"), OF_TOKENS)
@pytest.mark.parametrize(("screens", "gated"), [(False, False), (True, False), (True, True)])
def test_what_finding_the_active_units_of_tokens_needs(
    screens: bool,
    gated: bool,
    architecture: int,
    dtype: torch.dtype,
    width: int,
    tmp_path: Path,
) -> None:
    config = decode_tokens.config_of(width, dtype)
    x, floats = torch.empty(16, dtype=dtype), torch.empty(16)
    integers, words = torch.empty(16, dtype=torch.int8), torch.empty(16, dtype=torch.int32)
    up = (x, x) if gated else (None, None)
    inputs = (x, integers, floats, integers, floats, x, x, *up)
    arguments = (*inputs, words, words, floats, 4, 4 * width, 1.0, 0.0)
    constants = decode_tokens.constants_of(width, screens, config, pdl=architecture >= 90)
    code = ahead.compile_ahead(
        decode_tokens_kernels.find_active_of_tokens, arguments, architecture, tmp_path, **constants
    )
    threads, programs = 32 * config.warps, 1 if architecture == 89 else PROGRAMS
    assert 16 <= code.registers <= 65536 // threads // programs // 8 * 8
    assert (code.stack, code.count(SPILLS)) == (0, 0)
    assert (code.shared + 1024) * programs <= 1024 * ahead.SHARED_LIMIT[architecture]
    assert code.count(ATOMICS) == 0
    assert code.count(FLUSHED) == 0
    assert loads_before_the_wait(code, architecture) == 0
    # Rows are copied to shared memory 16 bytes at a time, before the loop and in it.
    a_step = config.rows * config.step * dtype.itemsize // 16 // threads
    of_copy = config.rows * config.bytes // 16 // threads if screens else 0
    assert code.count(r"LDGSTS\.E.*128.*") >= 2 * (a_step * (1 + gated) + of_copy)
    assert code.count(r"LDG\.E\.U8.*") == 0
    # The bytes of x are multiplied by tensor cores, and 16-bit entries; float32 is not, as TF32.
    assert (code.count(r"IMMA\.16832\.S8\.S8.*") > 0) == screens
    assert (code.count(r"HMMA\..*") > 0) == (dtype.itemsize == 2)
    assert code.count(r"HMMA\..*TF32.*") == 0


@pytest.mark.parametrize(("architecture", "dtype", "width"), OF_TOKENS)
def test_what_adding_the_rows_of_tokens_needs(
    architecture: int, dtype: torch.dtype, width: int, tmp_path: Path
) -> None:
    config = decode_tokens.config_of(width, dtype)
    lists = ceil_div(4 * width, config.rows)
    x, floats = torch.empty(16, dtype=dtype), torch.empty(16)
    words = torch.empty(16, dtype=torch.int32)
    arguments = (words, words, floats, x, x, x, 4, width, lists)
    constants = decode_tokens.down_constants_of(lists, config, dtype, pdl=architecture >= 90)
    code = ahead.compile_ahead(
        decode_tokens_kernels.add_rows_of_tokens, arguments, architecture, tmp_path, **constants
    )
    threads = 32 * config.down_warps
    assert 16 <= code.registers <= 65536 // threads // 2 // 8 * 8  # two programs on a processor
    assert (code.stack, code.count(SPILLS)) == (0, 0)
    assert code.shared <= 48 * 1024
    assert code.count(r"(ATOM|ATOMG|RED)(\..*)?") == 0  # the histogram's are in shared memory
    assert code.count(FLUSHED) == 0
    rows = config.down_batch * config.down_columns * dtype.itemsize // 16 // threads
    values = config.down_batch * decode_tokens.MOST_TOKENS * 4 // 16 // threads
    assert code.count(r"LDG\.E\.128.*") >= rows + values
    assert loads_before_the_wait(code, architecture) <= 2  # of the bias
    assert (code.count(r"HMMA\..*TF32.*") > 0) == (dtype.itemsize == 2)


@pytest.mark.parametrize(("architecture", "dtype", "width"), OF_TOKENS)
def test_what_the_grids_of_tokens_need(
    architecture: int, dtype: torch.dtype, width: int, tmp_path: Path
) -> None:
    x, words, floats = (
        torch.empty(16, dtype=dtype),
        torch.empty(16, dtype=torch.int32),
        torch.ones(16),
    )
    constants = decode_tokens.grids_constants_of(width, pdl=architecture >= 90)
    code = ahead.compile_ahead(
        decode_tokens_kernels.grids_of, (x, words, floats, 4), architecture, tmp_path, **constants
    )
    assert 16 <= code.registers <= 128
    assert (code.stack, code.count(SPILLS)) == (0, 0)
    assert code.count(ATOMICS) == 0
    assert code.count(FLUSHED) == code.count(r"(FRND|F2I)\.FTZ\.FLOOR.*")
    assert loads_before_the_wait(code, architecture) == 0


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
