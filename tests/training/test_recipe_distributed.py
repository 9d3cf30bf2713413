"""A recipe on two processes is the same recipe on one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from training import recipe_worker
from training.processes import run_together

FSDP2 = (
    '{"fsdp_version": 2, "transformer_layer_cls_to_wrap": ["GPT2Block"],'
    ' "state_dict_type": "FULL_STATE_DICT"}'
)
WAYS = {
    "ddp": ("--per_device_train_batch_size", "4"),
    "fsdp2": (
        *("--per_device_train_batch_size", "4"),
        *("--fsdp", "full_shard", "--fsdp_config", FSDP2),
    ),
}
# Without dropout, whose masks differ, and with an ε that keeps Adam from making differences of
# rounding as large as a step.
SAME = (
    *("--model_config", recipe_worker.TINY_GPT.replace("0.1", "0.0")),
    *("--gradient_accumulation_steps", "1", "--max_steps", "8", "--save_steps", "4"),
    *("--eval_steps", "8", "--adam_epsilon", "1e-3"),
    *("--rising_threshold", "true", "--activation_penalty", "1e-3", "--penalty_ramp", "0.5"),
)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("distributed")
    data = recipe_worker.write_text(place / "data")
    flags = (*SAME, "--per_device_train_batch_size", "8")
    recipe_worker.run_tiny_text(data, place / "cache", place / "alone", *flags)
    return place / "alone"


def counts_of(out: Path) -> list[dict]:
    state = json.loads((out / "checkpoint-8" / "trainer_state.json").read_text())
    return state["stateful_callbacks"]["SteppeCallback"]["attributes"]["history"]


@pytest.mark.distributed
@pytest.mark.parametrize("way", WAYS)
def test_two_processes_are_as_one(alone: Path, way: str) -> None:
    place, together = alone.parent, alone.parent / way
    run_together(
        recipe_worker.work, 2, place / "data", place / "cache", together, *SAME, *WAYS[way]
    )
    expected = load_file(alone / "model" / "model.safetensors")
    got = load_file(together / "model" / "model.safetensors")
    assert expected.keys() <= got.keys()  # FSDP keeps a tied weight twice
    for name, tensor in expected.items():
        assert (tensor - got[name]).abs().max() < 1e-6, name
    for index in (0, 1):
        threshold = f"transformer.h.{index}.mlp.c_fc.threshold"
        assert expected[f"{threshold}.multiple"] == 2.0
        # The two differ by the rounding of the weights.
        own, other = (tensors[f"{threshold}.deviation"] for tensors in (expected, got))
        torch.testing.assert_close(other, own, rtol=1e-5, atol=0)
        assert own.min() > 0
    moved = "transformer.h.0.mlp.c_fc.zeroth_bias"
    assert expected[moved].abs().max() > 1e-4  # a hundred times what the two may differ
    for mine, other in zip(counts_of(alone), counts_of(together), strict=True):
        assert mine["samples_per_block"] == other["samples_per_block"]
        assert mine["tokens_per_block"] == other["tokens_per_block"]
        assert mine["density_per_block"] == pytest.approx(other["density_per_block"], abs=1e-5)
        assert mine["AF_up_per_block"] == pytest.approx(other["AF_up_per_block"], rel=1e-4)
    one, two = (json.loads((out / "summary.json").read_text()) for out in (alone, together))
    assert two["world_size"] == 2
    assert one["quality"] == pytest.approx(two["quality"], rel=1e-5)
    assert one["density"] == pytest.approx(two["density"], abs=1e-5)


@pytest.mark.distributed
def test_two_sharded_processes_on_the_kernels_are_as_one_dense(alone: Path) -> None:
    place = alone.parent
    flags = (*SAME, "--rising_threshold", "false")
    batch = ("--per_device_train_batch_size", "8")
    dense, ours = place / "dense", place / "on the kernels"
    recipe_worker.run_tiny_text(place / "data", place / "cache", dense, *flags, *batch)
    run_together(
        *(recipe_worker.work, 2, place / "data", place / "cache", ours),
        *(*flags, *WAYS["fsdp2"], "--accelerate"),
    )
    expected, got = (load_file(out / "model" / "model.safetensors") for out in (dense, ours))
    for name, tensor in expected.items():
        assert (tensor - got[name]).abs().max() < 1e-5, name
    summary = json.loads((ours / "summary.json").read_text())
    blocks = summary["acceleration"]["blocks"]
    assert [block["calls"]["sparse"] > 0 for block in blocks] == [True, True]
