"""Two processes with DDP or FSDP2 train what one process trains on the whole batch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import multiprocessing

from plugins import distributed_workers
from plugins.distributed_workers import PADDING, STEPS, TOKENS, WORLD

pytestmark = pytest.mark.distributed
each_kind = pytest.mark.parametrize("kind", ["ddp", "fsdp2"])


@pytest.fixture(scope="module")
def by_rank(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """The results of each process."""
    folder = tmp_path_factory.mktemp("distributed")
    multiprocessing.spawn(distributed_workers.work, (folder,), nprocs=WORLD)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(WORLD)]


@pytest.fixture(scope="module")
def expected() -> dict[str, Any]:
    """The results of one process."""
    return distributed_workers.train(distributed_workers.alone, rank=0, world=1)


@each_kind
def test_the_parameters_are_those_of_one_process(
    kind: str, by_rank: list[dict[str, Any]], expected: dict[str, Any]
) -> None:
    for results in by_rank:
        torch.testing.assert_close(
            results[kind]["parameters"], expected["parameters"], rtol=1e-8, atol=1e-10
        )
        assert results[kind]["added"] == expected["added"]
        assert results[kind]["link"] == {"step": STEPS}
        assert results[kind]["mix"] == 1.0


@each_kind
def test_accelerated_blocks_learn_what_one_process_learns(
    kind: str, by_rank: list[dict[str, Any]]
) -> None:
    expected = distributed_workers.accelerated(distributed_workers.alone, rank=0, world=1)
    for results in by_rank:
        for how in ("accelerated", "screened"):
            torch.testing.assert_close(results[f"{kind} {how}"], expected, rtol=1e-4, atol=1e-5)


@each_kind
def test_packed_blocks_learn_what_one_process_learns(
    kind: str, by_rank: list[dict[str, Any]]
) -> None:
    expected = distributed_workers.packed(distributed_workers.alone, rank=0, world=1)
    for results in by_rank:
        torch.testing.assert_close(results[f"{kind} packed"], expected, rtol=1e-8, atol=1e-10)


@each_kind
def test_thresholds_and_penalty_are_those_of_one_process(
    kind: str, by_rank: list[dict[str, Any]]
) -> None:
    expected = distributed_workers.thresholded(distributed_workers.alone, rank=0, world=1)
    for results in by_rank:
        got = results[f"{kind} thresholded"]
        torch.testing.assert_close(got["state"], expected["state"], rtol=1e-9, atol=1e-12)
    for block in ("transformer.h.0", "transformer.h.1"):
        assert expected["state"][f"{block}.mlp.c_fc.threshold.multiple"] == 2.0
        assert expected["state"][f"{block}.mlp.c_fc.threshold.deviation"].all()
    # Each process had statistics of its own rows, also while DDP gave out its buffers.
    own = [results[f"{kind} thresholded"]["own tokens"] for results in by_rank]
    tokens = [int((TOKENS - part).sum()) for part in PADDING.chunk(WORLD)]
    assert own == [[count] * STEPS for count in tokens]
    assert tokens[0] != tokens[1]
    assert expected["own tokens"] == [sum(tokens)] * STEPS


@each_kind
def test_the_projections_were_active_in_every_process(
    kind: str, by_rank: list[dict[str, Any]]
) -> None:
    for results in by_rank:
        parameters = results[kind]["parameters"]
        for block in ("transformer.h.0", "transformer.h.1"):
            scale = parameters[f"{block}.ln_2.weight"]
            bias = parameters[f"{block}.mlp.c_fc.zeroth_bias"]
            assert bias.shape[0] == TOKENS
            bound = (0.1 * scale).expand_as(bias)
            assert scale.min() == 1.0
            assert (scale > 1.0).any()
            assert (bias.abs() <= bound).all()
            clipped = (bias.abs() == bound).any(dim=1)
            half = (TOKENS + 1) // 2
            assert clipped[:half].any()  # the rows of process 0 under FSDP2
            assert clipped[half:].any()  # and those of process 1


@each_kind
def test_the_densities_summed_over_processes_are_exactly_those_of_one(
    kind: str, by_rank: list[dict[str, Any]], expected: dict[str, Any]
) -> None:
    for results in by_rank:
        assert results[kind]["densities"] == expected["densities"]
        assert torch.equal(results[kind]["counts"], expected["counts"])
    own = [results[kind]["own tokens"] for results in by_rank]
    assert own == [STEPS * (2 * TOKENS - 2), STEPS * (2 * TOKENS - 5)]  # without the padding
    assert sum(own) == expected["own tokens"] == STEPS * int((TOKENS - PADDING).sum())


@each_kind
def test_measure_over_processes_is_measure_of_all_samples(
    kind: str, by_rank: list[dict[str, Any]]
) -> None:
    want = distributed_workers.measured(distributed_workers.alone, rank=0, world=1)
    assert want["AF_up_per_block"][0] > 0
    for results in by_rank:
        got = results[f"{kind} measured"]
        assert got.keys() == want.keys()
        for key, value in want.items():
            if key == "standard_errors_per_block":
                for one, two in zip(got[key], value, strict=True):
                    assert one["AF_up"] == pytest.approx(two["AF_up"], rel=1e-6)
            elif key.startswith(("AF", "active", "squared")):
                for one, two in zip(got[key], value, strict=True):
                    assert one is two is None or one == pytest.approx(two, rel=1e-6), key
            else:
                assert got[key] == value, key


def test_a_model_that_is_sharded_already_is_refused_by_name(by_rank: list[dict[str, Any]]) -> None:
    for results in by_rank:
        assert results["too late"].startswith("transformer.h.0: the model is sharded already")
