"""What is timed is what was asked for; how fast it is, is no matter of a test."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import nn

import models
import steppe
from steppe import bench, find_blocks, kernels
from steppe.bench import DECODE, PREFILL, TRAINING, Setting, block, times
from steppe.bench import model as model_times
from steppe.errors import AccelerationError, OutputError
from steppe.ops.cpu import dispatch
from steppe.report import bench_table, plot_bench
from steppe.routing.route import routes_of

D, F, T = 48, 96, 32
KEYS = [
    *("case", "d", "f", "tokens", "density", "candidates", "dtype", "threads"),
    *("ratio", "quartiles", "unscreened_ratio", "gain", "gain_quartiles"),
    *("bound", "dense_ms", "sparse_ms", "rounds"),
]


@pytest.fixture(autouse=True)
def _uncalibrated(monkeypatch: pytest.MonkeyPatch) -> None:
    """Dispatch as on a machine on which everything was measured, which takes seconds."""
    monkeypatch.setattr(dispatch, "_measured", {})
    monkeypatch.setattr(dispatch, "_screened", {})
    always = {False: {1: 1.0}, True: {1: 1.0}}
    for dtype in (torch.float32, torch.bfloat16):
        for threads in (1, 2):
            dispatch.use(dtype, threads, {0: always}, always)
    monkeypatch.setattr(dispatch, "_LEAST_WORK", 0)


def row_of(setting: Setting, **options: Any) -> dict[str, Any]:
    return bench.time_block(setting, seconds=0.0, least_rounds=2, **options)


@pytest.mark.parametrize("density", [0.0, 0.03, 0.5, 1.0])
@pytest.mark.parametrize(
    ("case", "tokens", "dtype"),
    [
        (TRAINING, T, torch.float32),
        (PREFILL, T, torch.float32),
        (PREFILL, T, torch.bfloat16),
        (DECODE, 1, torch.float32),
    ],
)
def test_a_row_says_what_was_timed(
    case: bench.Case, tokens: int, dtype: torch.dtype, density: float
) -> None:
    setting = Setting(case, density, D, F, tokens, dtype, threads=2)
    row = row_of(setting, cold_bytes=2**18)
    assert list(row) == KEYS
    named = {key: row[key] for key in ("case", "d", "f", "tokens", "threads")}
    assert named == {"case": case.name, "d": D, "f": F, "tokens": tokens, "threads": 2}
    assert row["dtype"] == str(dtype).split(".")[1]
    # Of few entries one is much, and bfloat16 rounds them onto the threshold.
    assert row["density"] == pytest.approx(density, abs=1e-3 if dtype.itemsize == 4 else 2e-2)
    assert row["bound"] == case.bound(row["density"])
    low, high = row["quartiles"]
    assert 0 < low <= row["ratio"] <= high < math.inf
    low, high = row["gain_quartiles"]
    assert 0 < low <= row["gain"] <= high < math.inf
    assert row["unscreened_ratio"] > 0
    assert row["density"] <= row["candidates"] <= 1
    assert row["candidates"] < row["density"] + 0.2
    assert row["dense_ms"] > 0
    assert row["sparse_ms"] > 0
    assert row["rounds"] == 2
    assert torch.get_num_threads() == 1  # as before


@pytest.mark.parametrize(
    ("case", "density", "bound"),
    [
        (TRAINING, 0.0, 6.0),
        (TRAINING, 0.05, 4.8),
        (TRAINING, 1.0, 1.0),
        (PREFILL, 0.0, 2.0),
        (PREFILL, 0.25, 1.6),
        (DECODE, 0.25, 1.6),
        (DECODE, 1.0, 1.0),
    ],
)
def test_the_bound_is_that_of_the_arithmetic(
    case: bench.Case, density: float, bound: float
) -> None:
    assert case.bound(density) == pytest.approx(bound, rel=1e-12)


def test_a_cold_case_has_as_many_weights_as_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    infer = times._infer

    def note(blocks: torch.nn.ModuleList, inputs: list[torch.Tensor]) -> float:
        seen.append(len(blocks))
        return infer(blocks, inputs)

    monkeypatch.setattr(times, "_infer", note)
    row_of(Setting(DECODE, 0.1, D, F, 1), cold_bytes=10 * 2 * D * F * 4 - 1)
    assert set(seen) == {10}
    seen.clear()
    row_of(Setting(PREFILL, 0.1, D, F, 1), cold_bytes=2**20)
    assert set(seen) == {1}


def test_the_two_take_turns_in_changing_order_and_the_ratio_is_that_of_a_round() -> None:
    order: list[str] = []
    dense_times, sparse_times = iter([9.0, 2.0, 8.0, 3.0]), iter([9.0, 1.0, 2.0, 1.0])

    def dense() -> float:
        order.append("dense")
        return next(dense_times)

    def sparse() -> float:
        order.append("sparse")
        return next(sparse_times)

    summary = bench.time_pair(dense, sparse, seconds=0.0, least_rounds=3).summary()
    assert order[2:] == ["dense", "sparse", "sparse", "dense", "dense", "sparse"]
    # Ratios 2, 4, 3; the calls before them do not count.
    assert summary == {
        "ratio": 3.0,
        "quartiles": [2.5, 3.5],
        "dense_ms": 3000.0,
        "sparse_ms": 1000.0,
        "rounds": 3,
    }


def test_both_blocks_compute_the_same_and_one_is_routed(monkeypatch: pytest.MonkeyPatch) -> None:
    outputs = []
    train = times._train

    def note(blocks: torch.nn.ModuleList, inputs: list[torch.Tensor]) -> float:
        routed = bool(routes_of(blocks[0].down))
        outputs.append((routed, blocks[0](inputs[0]).detach()))
        return train(blocks, inputs)

    monkeypatch.setattr(times, "_train", note)
    row_of(Setting(TRAINING, 0.1, D, F, T))
    assert [routed for routed, _ in outputs[:3]] == [False, True, True]
    torch.testing.assert_close(outputs[0][1], outputs[1][1])
    torch.testing.assert_close(outputs[0][1], outputs[2][1])


def test_one_of_the_routed_blocks_is_never_screened(monkeypatch: pytest.MonkeyPatch) -> None:
    limits = []
    accelerate_ = times.accelerate_

    def note(model: nn.Module, **options: Any) -> nn.Module:
        limits.append(options.get("max_candidates"))
        return accelerate_(model, **options)

    monkeypatch.setattr(times, "accelerate_", note)
    row_of(Setting(PREFILL, 0.1, D, F, T))
    assert limits == [None, 0.0]


def test_outlier_features_are_in_the_input() -> None:
    (_, (x,)) = block._random_blocks(Setting(PREFILL, 0.1, D, F, T, outliers=3), 1)
    (_, (plain,)) = block._random_blocks(Setting(PREFILL, 0.1, D, F, T), 1)
    assert torch.equal(x[:, 3:], plain[:, 3:])
    assert torch.equal(x[:, :3], 15 * plain[:, :3])


def test_the_block_is_found_by_its_own_pattern_alone() -> None:
    (found,) = find_blocks(bench.Block(D, F), patterns=bench.PATTERNS)
    assert found.family == "steppe.bench"
    assert (found.d_model, found.d_hidden) == (D, F)


@pytest.mark.parametrize("gated", [False, True])
def test_a_gated_block_is_found_as_one(gated: bool) -> None:
    (found,) = find_blocks(bench.Block(D, F, gated=gated), patterns=bench.PATTERNS)
    assert (found.gate is not None) is gated


@pytest.mark.parametrize("case", [TRAINING, PREFILL])
@pytest.mark.parametrize(
    "build", [models.gpt2, models.opt, models.t5, partial(models.t5, gated=True)]
)
@pytest.mark.parametrize("sparsified", [False, True])
def test_a_trained_models_blocks_are_timed_as_they_are_in_it(
    case: bench.Case,
    build: Callable[[], nn.Module],
    sparsified: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, timed = build(), []
    if sparsified:
        steppe.sparsify_(model, [steppe.ZerothBias(max_tokens=16), steppe.JumpingSquaredReLU()])
        for parameter in steppe.added_parameters(model).values():
            parameter.data.normal_()
    batch = models.inputs_for(model, batch=2, tokens=6)
    blocks = find_blocks(model)
    outputs: list[torch.Tensor] = []
    hooks = [
        block.down.register_forward_hook(lambda _, __, z: outputs.append(z.detach().flatten(0, -2)))
        for block in blocks
    ]
    model.train()
    time_against_dense = model_times.time_against_dense

    def note(dense: nn.ModuleList, inputs: list[torch.Tensor], *rest: Any) -> dict[str, Any]:
        timed.extend(one(x) for one, x in zip(dense, inputs, strict=True))
        return time_against_dense(dense, inputs, *rest)

    monkeypatch.setattr(model_times, "time_against_dense", note)
    keys = list(model.state_dict())
    row = bench.time_model(model, batch, case, seconds=0.0, least_rounds=2)
    for hook in hooks:
        hook.remove()
    assert len(timed) == len(blocks)
    for alone, inside in zip(timed, outputs, strict=True):
        torch.testing.assert_close(alone, inside)
    assert list(row) == KEYS
    assert (row["case"], row["tokens"]) == (case.name, 12)
    with steppe.watch(model.eval()) as monitor, torch.no_grad():
        model(**batch)
    assert row["density"] == pytest.approx(monitor.report().density, abs=1e-9)
    assert model.train().training
    assert list(model.state_dict()) == keys


def test_rows_are_handed_over_as_they_come() -> None:
    seen: list[dict[str, Any]] = []
    settings = [Setting(PREFILL, density, D, F, T) for density in (0.5, 0.1)]
    rows = bench.time_blocks(settings, seconds=0.0, least_rounds=2, on_row=seen.append)
    assert rows == seen
    assert [round(row["density"], 2) for row in rows] == [0.5, 0.1]


def test_saved_for_backward_is_what_the_definition_says() -> None:
    row = bench.saved_bytes(Setting(TRAINING, 0.05, D, F, T))
    input_bytes = T * D * 4
    assert row["dense_bytes"] == T * F * 4  # a, from which ReLU's and `down`'s gradients come
    assert row["dense_bytes_with_input"] == row["dense_bytes"] + input_bytes
    assert row["sparse_bytes_with_input"] == row["sparse_bytes"] + input_bytes
    assert row["share"] == row["sparse_bytes"] / row["dense_bytes"]
    if kernels().name == "native":
        entries = round(row["density"] * T * F)
        # Values of 4 bytes, columns of 2, and an offset of 8 for each row of each tile and the end.
        assert (row["sparse_bytes"] - 6 * entries - 8) % (8 * T) == 0
        assert row["share"] < 0.25


@pytest.mark.parametrize(
    ("ratios", "density"),
    [((2.0, 1.5, 0.5), 0.3), ((2.0, 1.0, 0.9), 0.2), ((2.0, 1.5, 1.2), None), ((0.9,) * 3, None)],
)
def test_break_even_is_where_the_ratio_falls_to_one(
    ratios: tuple[float, ...], density: float | None
) -> None:
    rows = [
        {"density": rho, "ratio": ratio} for rho, ratio in zip((0.1, 0.2, 0.4), ratios, strict=True)
    ]
    found = bench.break_even(rows[::-1])
    assert found is None if density is None else found == pytest.approx(density)


def test_bad_settings_are_refused() -> None:
    with pytest.raises(ValueError, match=r"density in 0 … 1, got 1\.5"):
        Setting(PREFILL, 1.5)
    with pytest.raises(ValueError, match="tokens ≥ 1, got 0"):
        Setting(PREFILL, 0.5, tokens=0)
    with pytest.raises(AccelerationError, match="hidden width other than"):
        row_of(Setting(PREFILL, 0.5, 32, 32, T))


ROW = {"case": "training", "d": 8, "f": 32, "tokens": 4, "dtype": "float32", "threads": 1} | {
    "bound": 1.714,
    "dense_ms": 12.345,
    "sparse_ms": 8.2,
    "rounds": 5,
}
ROW |= {"candidates": 0.613, "unscreened_ratio": 1.42}
ROWS = [
    {**ROW, "density": 0.5, "ratio": 1.5, "quartiles": [1.25, 1.75]},
    {**ROW, "density": 0.9, "ratio": 0.9, "quartiles": [0.9, 0.9]},
    {**ROW, "density": 0.1, "ratio": 1.6, "quartiles": [1.5, 1.7]}
    | {"case": "prefill", "dtype": "bfloat16"},
]


def test_the_table_prints_every_row_in_80_columns() -> None:
    console = Console(width=80)
    with console.capture() as capture:
        console.print(bench_table(ROWS))
    text = capture.get()
    assert "d_model 8, d_hidden 32; threads: 1" in text
    for name in ("training", "prefill", "bfloat16"):
        assert text.count(name) == 1  # once for all densities
    assert "training 50.0 61.3 12.3 8.2 1.50 1.25–1.75 1.42 1.71" in " ".join(text.split())
    assert "…" not in text


def test_the_plot_is_a_png_with_the_crossover(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    path = plot_bench(ROWS, tmp_path / "bench.png")
    assert path.read_bytes().startswith(b"\x89PNG")
    with pytest.raises(OutputError, match="cannot write"):
        plot_bench(ROWS, tmp_path / "none" / "bench.png")
