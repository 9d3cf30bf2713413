"""A damaged checkpoint, or one of another model, is one clear error."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

import models
from checkpoints.saved_models import (
    LAST_SHARD,
    Edit,
    edit_config,
    edit_weights,
    load_causal,
    never,
    sparsified,
)
from steppe import load_pretrained, restore_
from steppe.errors import CheckpointError, SteppeError
from steppe.record import RECORD_KEY, RECORD_VERSION


def test_a_folder_without_config_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=rf"{tmp_path}.*config\.json"):
        load_pretrained(never, tmp_path)
    with pytest.raises(CheckpointError, match=r"config\.json"):
        load_pretrained(never, tmp_path / "nothing here")


CORRUPT = ["", "{", '{"steppe": ', "[1, 2]", '"text"', "null", "{}", '{"steppe": null}']


@pytest.mark.parametrize("content", [*map(str.encode, CORRUPT), b"\xff\xfe{}"])
def test_a_corrupt_config_is_an_error_that_names_the_file(folder: Path, content: bytes) -> None:
    (folder / "config.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"{folder}/config\.json"):
        load_pretrained(never, folder)


def test_a_plain_model_is_an_error_that_says_what_to_do(tmp_path: Path) -> None:
    restore_(sparsified()).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"config\.json: no record.*sparsify_"):
        load_pretrained(never, tmp_path)


def _record(**changes: Any) -> Edit:
    return lambda config: config[RECORD_KEY].update(changes)


def _without(key: str) -> Edit:
    return lambda config: config[RECORD_KEY].pop(key)


def _plug_in(index: int, **changes: Any) -> Edit:
    return lambda config: config[RECORD_KEY]["plugins"][index].update(changes)


@pytest.mark.parametrize(
    ("edit", "says"),
    [
        pytest.param(lambda c: c.update({RECORD_KEY: [1]}), "damaged", id="record is a list"),
        pytest.param(lambda c: c.update({RECORD_KEY: "yes"}), "damaged", id="record is text"),
        pytest.param(_without("version"), "damaged.*version", id="no version"),
        pytest.param(_without("progress"), "damaged.*progress", id="no progress"),
        pytest.param(_without("plugins"), "damaged.*plugins", id="no plug-ins"),
        pytest.param(_record(plugins={"a": 1}), "damaged", id="plug-ins are no list"),
        pytest.param(_record(plugins=[1]), "damaged", id="a plug-in is a number"),
        pytest.param(
            _record(plugins=[{"plugin": "zeroth_bias"}]), "damaged.*blocks", id="no blocks"
        ),
        pytest.param(_record(progress="half"), "damaged", id="progress is text"),
        pytest.param(_record(progress=None), "damaged", id="progress is null"),
        pytest.param(_record(progress=1.5), "0 … 1.*1.5", id="progress above 1"),
        pytest.param(
            _record(progress=float("nan")), "damaged.*progress.*nan", id="progress is NaN"
        ),
        pytest.param(_record(progress=True), "damaged.*progress", id="progress is true"),
        pytest.param(_record(version=True), "damaged.*version", id="version is true"),
        pytest.param(_plug_in(0, blocks="all"), "damaged.*blocks", id="blocks are text"),
        pytest.param(_plug_in(0, blocks=[1]), "damaged.*blocks", id="a block is a number"),
        pytest.param(_plug_in(0, max_tokens=True), "max_tokens", id="a number is true"),
        pytest.param(_plug_in(1, allow_shared="no"), "allow_shared.*'no'", id="a flag is text"),
        pytest.param(_plug_in(1, floor=float("nan")), "floor", id="a floor is NaN"),
        pytest.param(_plug_in(1, floor=float("inf")), "floor", id="a floor is infinite"),
        pytest.param(
            _record(version=RECORD_VERSION + 1),
            rf"version {RECORD_VERSION + 1}.*newer steppe",
            id="a later version",
        ),
        pytest.param(_plug_in(0, plugin="magic"), "'magic'.*zeroth_bias", id="unknown plug-in"),
        pytest.param(_plug_in(0, plugin=None), "None", id="nameless plug-in"),
        pytest.param(_plug_in(0, strength=3), "'zeroth_bias'.*strength", id="unknown setting"),
        pytest.param(_plug_in(0, limit=-1.0), "limit > 0", id="a setting out of range"),
        pytest.param(_plug_in(0, limit="much"), "'zeroth_bias'", id="a setting of another kind"),
        pytest.param(_plug_in(2, ramp=None), "'jumping_squared_relu'", id="a setting is null"),
        pytest.param(_plug_in(0, plugin=["x"]), "plug-in", id="the name is a list"),
        pytest.param(_plug_in(0, max_tokens=7.5), "max_tokens.*7.5", id="half a token"),
    ],
)
def test_a_damaged_record_is_refused_before_the_weights_are_read(
    folder: Path, edit: Edit, says: str
) -> None:
    edit_config(folder, edit)
    with pytest.raises(CheckpointError, match=rf"config\.json.*{says}"):
        load_pretrained(never, folder)


@pytest.mark.parametrize(
    "edit",
    [
        pytest.param(_record(plugins=[]), id="no plug-in at all"),
        pytest.param(_plug_in(0, blocks=[]), id="no block at all"),
        pytest.param(
            lambda c: c[RECORD_KEY]["plugins"].append(c[RECORD_KEY]["plugins"][0]), id="twice"
        ),
        pytest.param(_plug_in(1, floor=5.0, ramp=0.0), id="a floor above the saved scale"),
    ],
)
def test_a_record_that_cannot_be_applied_is_a_checkpoint_error(folder: Path, edit: Edit) -> None:
    edit_config(folder, edit)
    with pytest.raises(CheckpointError, match=str(folder)):
        load_pretrained(load_causal, folder)


def test_blocks_of_another_model_are_an_error_that_names_both(folder: Path) -> None:
    edit_config(folder, _plug_in(0, blocks=["encoder.layers.0", "transformer.h.0"]))
    with pytest.raises(
        CheckpointError, match=r"GPT2LMHeadModel.*encoder\.layers\.0.*transformer\.h"
    ):
        load_pretrained(load_causal, folder)


def test_the_record_of_another_architecture_is_an_error(folder: Path, tmp_path: Path) -> None:
    other = tmp_path / "opt"
    sparsified("opt").save_pretrained(other)
    record = json.loads((other / "config.json").read_text())[RECORD_KEY]
    edit_config(folder, lambda config: config.update({RECORD_KEY: record}))
    with pytest.raises(CheckpointError, match="another model"):
        load_pretrained(load_causal, folder)


def test_weights_of_the_plain_model_are_an_error_that_names_a_missing_tensor(
    folder: Path, tmp_path: Path
) -> None:
    plain = tmp_path / "plain"
    models.gpt2().save_pretrained(plain)
    shutil.copy(plain / "model.safetensors", folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=rf"{folder}.*zeroth_bias.*weights none"):
        load_pretrained(load_causal, folder)


def test_one_missing_tensor_is_an_error(folder: Path) -> None:
    gone = "transformer.h.1.mlp.c_fc.zeroth_bias"
    edit_weights(folder, lambda tensors: tensors.pop(gone))
    with pytest.raises(CheckpointError, match=f"{gone}.*1 missing"):
        load_pretrained(load_causal, folder)


@pytest.mark.parametrize("max_tokens", [4, 9, 10**12, None])  # 10**12 would be terabytes
def test_another_number_of_positions_is_an_error_with_both_numbers(
    folder: Path, max_tokens: int | None
) -> None:
    edit_config(folder, _plug_in(0, max_tokens=max_tokens))
    by_record = max_tokens or models.MAX_TOKENS
    with pytest.raises(CheckpointError, match=rf"zeroth_bias has {by_record} .*weights 8\."):
        load_pretrained(load_causal, folder)


@pytest.mark.parametrize("kept", [0, 4, 100, -8])
def test_truncated_tensors_of_ours_are_an_error_that_names_the_file(
    folder: Path, kept: int
) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:kept])
    with pytest.raises(CheckpointError, match=rf"{weights}.*truncated"):
        load_pretrained(lambda name: models.gpt2(), folder)


@pytest.mark.parametrize(
    ("file", "content", "says"),
    [
        ("model.safetensors.index.json", b"{", "not valid JSON"),
        ("model.safetensors.index.json", b"[]", "damaged"),
        ("model.safetensors.index.json", b"{}", "damaged"),
        (LAST_SHARD, b"\x10", "truncated"),
        (LAST_SHARD, None, "index names"),
    ],
)
def test_damaged_shards_of_ours_are_an_error_that_names_the_file(
    tmp_path: Path, file: str, content: bytes | None, says: str
) -> None:
    sparsified().save_pretrained(tmp_path, max_shard_size="10KB")
    damaged = _find(tmp_path, file)
    _put(damaged, content)
    with pytest.raises(CheckpointError, match=rf"{damaged.name}.*{says}"):
        load_pretrained(lambda name: models.gpt2(), tmp_path)


def _find(folder: Path, pattern: str) -> Path:
    """The last file by name."""
    return sorted(folder.glob(pattern))[-1]


def _put(file: Path, content: bytes | None) -> None:
    if content is None:
        file.unlink()
    else:
        file.write_bytes(content)


@pytest.mark.parametrize(
    ("shard_size", "file", "content"),
    [
        pytest.param("1GB", "model.safetensors", b"", id="empty"),
        pytest.param("1GB", "model.safetensors", b"\x10" * 100, id="truncated"),
        pytest.param("1GB", "model.safetensors", None, id="no weights"),
        pytest.param("10KB", LAST_SHARD, None, id="a shard is missing"),
        pytest.param("10KB", LAST_SHARD, b"\x10", id="a shard is cut"),
        pytest.param("10KB", "model.safetensors.index.json", b"{", id="the index is corrupt"),
    ],
)
def test_damaged_weights_are_an_error_that_names_the_file_with_the_stock_loader_too(
    tmp_path: Path, shard_size: str, file: str, content: bytes | None
) -> None:
    sparsified().save_pretrained(tmp_path, max_shard_size=shard_size)
    damaged = _find(tmp_path, file)
    _put(damaged, content)
    with pytest.raises(CheckpointError, match=damaged.name):
        load_pretrained(load_causal, tmp_path)


def test_every_checkpoint_error_can_be_caught_as_value_error() -> None:
    assert issubclass(CheckpointError, SteppeError)
    assert issubclass(CheckpointError, ValueError)
