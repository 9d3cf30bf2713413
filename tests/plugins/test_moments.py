"""The sample of tokens that the deviations of `RisingThreshold` are taken from."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import steppe
from steppe import RisingThreshold
from steppe.data.embedded import load_pydoc_split
from steppe.ops.cpu.library import kernels
from steppe.plugins import moments
from steppe.plugins.moments import LEAST, add_moments_, rows_of_sample, start_of
from steppe.training.demo import language_model

SHARE = 1 / 16
needs_kernels = pytest.mark.skipif(kernels().name != "native", reason=kernels().reason)


def sample_of(rows: int, start: int, share: float = SHARE, processes: int = 1) -> list[int]:
    rows_sampled = rows_of_sample(rows, torch.tensor(start), share, processes)
    return list(range(rows)) if rows_sampled is None else rows_sampled.tolist()


@pytest.mark.parametrize("share", [1.0, 0.5, 1 / 3, SHARE, 1e-4])
@pytest.mark.parametrize("rows", [0, 1, 63, 64, 127, 128, 197, 1000, 1024, 1025, 8 * 197, 16384])
def test_a_sample_is_the_share_or_the_least_number_of_tokens(rows: int, share: float) -> None:
    for start in (0, 1, 15, rows, 2**31 - 1):
        found = sample_of(rows, start, share)
        assert len(set(found)) == len(found)
        assert all(0 <= row < rows for row in found)
        assert len(found) >= min(rows, LEAST)
        assert len(found) <= max(2 * LEAST, int(rows * share) + 1)
        if rows * share >= 2 * LEAST:
            assert abs(len(found) - rows * share) <= 1


def test_every_token_has_its_turn() -> None:
    rows = 1000  # no multiple of 15
    seen = set(itertools.chain(*(sample_of(rows, start_of(0, k / 999)) for k in range(200))))
    assert seen == set(range(rows))


def test_the_start_is_a_function_of_seed_and_step() -> None:
    starts = [start_of(0, step / 300) for step in range(300)]
    assert starts == [start_of(0, step / 300) for step in range(300)]
    assert starts != [start_of(1, step / 300) for step in range(300)]
    by_offset = torch.bincount(torch.tensor(starts) % 16, minlength=16)
    assert by_offset.min() > 0  # each of the 16 offsets, about 19 times
    assert by_offset.max() < 40


@pytest.mark.parametrize("processes", [2, 4, 8])
def test_processes_together_have_the_sample_of_the_whole_batch(processes: int) -> None:
    rows, start = 4096, 1_234_567
    own = rows // processes
    parts = [
        part * own + row
        for part in range(processes)
        for row in sample_of(own, start, SHARE, processes)
    ]
    assert sorted(parts) == sorted(sample_of(rows, start))


@pytest.mark.parametrize("masked", [False, True])
def test_the_moments_are_those_of_the_sampled_tokens(masked: bool) -> None:
    p = torch.randn(2, 1024, 5, dtype=torch.float64)
    counted = torch.rand(2048) < 0.7 if masked else None
    start = torch.tensor(77)
    sums = torch.zeros(3, 5, dtype=torch.float64)
    add_moments_(sums, p, counted, start, SHARE)
    rows = rows_of_sample(2048, start, SHARE)
    assert rows is not None
    kept = p.flatten(0, 1)[rows]
    if counted is not None:
        kept = kept[counted[rows]]
        assert 0 < len(kept) < len(rows)
    wanted = torch.stack([torch.full((5,), float(len(kept))), kept.sum(0), kept.square().sum(0)])
    torch.testing.assert_close(sums, wanted.double(), rtol=1e-10, atol=1e-12)


class Stack(nn.Module):
    """Two blocks wide enough for the kernels."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        layers = [
            nn.TransformerEncoderLayer(width, 2, 4 * width, dropout=0.0, batch_first=True)
            for _ in range(2)
        ]
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def trained(plugin: RisingThreshold, accelerated: bool = False, steps: int = 12) -> nn.Module:
    """A stack after some steps on 2,048 tokens each."""
    torch.manual_seed(0)
    stack = steppe.sparsify_(Stack(), [plugin])
    if accelerated:
        steppe.accelerate_(stack, max_density=1.0)
    optimizer = torch.optim.SGD(stack.parameters(), lr=0.05)
    steppe.constrain_(stack, optimizer, total_steps=steps)
    for _ in range(steps):
        stack(torch.randn(8, 256, 64)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return stack


def deviations_of(stack: Any) -> Tensor:
    return torch.stack([layer.linear1.threshold.deviation for layer in stack.layers])


def test_sampled_deviations_are_near_the_full_ones() -> None:
    full, sampled = (deviations_of(trained(RisingThreshold(sample=s))) for s in (1.0, SHARE))
    errors = sampled / full - 1.0
    # From 128 tokens 1/√256 = 6 % a step, and less by the running mean of 12.
    assert 0.001 < errors.std().item() < 0.06
    assert abs(errors.mean().item()) < 0.02


@needs_kernels
def test_on_the_kernels_the_same_tokens_are_sampled() -> None:
    plugin = RisingThreshold()
    own, routed = (deviations_of(trained(plugin, accelerated)) for accelerated in (False, True))
    torch.testing.assert_close(routed, own, rtol=1e-3, atol=0)
    other = deviations_of(trained(RisingThreshold(seed=1)))
    assert (other / own - 1.0).abs().max() > 1e-2  # the comparison can fail


def test_a_sample_of_more_processes_is_taken_from_each(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(moments.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(moments.dist, "get_world_size", lambda: 4)
    sums, whole = (torch.zeros(3, 6, dtype=torch.float64) for _ in range(2))
    p, start = torch.randn(4096, 6), torch.tensor(9)
    for shard in p.chunk(4):
        add_moments_(sums, shard, None, start, SHARE)
    monkeypatch.undo()
    add_moments_(whole, p, None, start, SHARE)
    torch.testing.assert_close(sums, whole, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("sample", [0.0, -0.5, 1.5, float("nan")])
def test_a_sample_that_is_no_share_is_refused(sample: float) -> None:
    with pytest.raises(ValueError, match=r"RisingThreshold\.sample is a share of the tokens"):
        RisingThreshold(sample=sample)


def trained_on_text(sample: float, seed: int) -> tuple[float, float]:
    """Held-out loss and density of a small GPT of bytes after 200 steps."""
    torch.manual_seed(seed)
    split = load_pydoc_split()
    model = language_model(48).train()
    steppe.sparsify_(model, [RisingThreshold(sample=sample)])
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    steppe.constrain_(model, optimizer, total_steps=200)
    for _ in range(200):
        ids = windows(split.train, torch.randint(len(split.train), (32,)).tolist())
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    ids = windows(split.held_out, range(200))
    with torch.no_grad(), steppe.watch(model.eval()) as monitor:
        loss = model(input_ids=ids, labels=ids).loss.item()
    return loss, monitor.report().density


def windows(data: Any, indices: Iterable[int]) -> Tensor:
    return torch.stack([torch.as_tensor(data[index]["input_ids"]) for index in indices])


@pytest.mark.slow
def test_a_run_ends_as_with_all_tokens_within_the_noise_of_seeds() -> None:
    found = {
        share: torch.tensor([trained_on_text(share, seed) for seed in range(4)])
        for share in (1.0, SHARE)
    }
    apart = (found[SHARE] - found[1.0]).mean(0)  # pairs of one seed
    noise = found[1.0].std(0)
    print("loss, density", found[1.0].mean(0), "apart", apart, "noise of seeds", noise)
    assert found[1.0][:, 1].max() < 0.2  # it is the threshold that makes it sparse
    assert (apart.abs() <= noise).all()
