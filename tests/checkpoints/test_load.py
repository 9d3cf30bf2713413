"""save_pretrained and load_pretrained: the same model again, and nothing is unpickled."""

from __future__ import annotations

import json
import pickle
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModel

import models
from checkpoints.saved_models import (
    LOADERS,
    MIX,
    PROGRESS,
    load_causal,
    logits,
    never,
    sparsified,
    take_marks_off,
)
from steppe import (
    BlockPattern,
    JumpingSquaredReLU,
    RestrictedNorm,
    ZerothBias,
    added_parameters,
    advance_,
    load_pretrained,
    project_,
    restore_,
    sparsify_,
)
from steppe.errors import CheckpointError
from steppe.plugins.applied import require_sparsification
from steppe.plugins.jumping_relu import MixedActivation
from steppe.record import RECORD_KEY, RECORD_VERSION


@pytest.mark.parametrize("name", LOADERS)
def test_a_saved_model_comes_back_bit_for_bit(name: str, tmp_path: Path) -> None:
    model = sparsified(name)
    model.save_pretrained(tmp_path)
    loaded = load_pretrained(LOADERS[name], tmp_path)
    assert type(loaded) is type(model)
    assert torch.equal(logits(loaded), logits(model))
    state, want = loaded.state_dict(), model.state_dict()
    assert list(state) == list(want)
    assert all(torch.equal(state[key], want[key]) for key in want)
    # The comparison can fail: without what steppe did, these are other logits.
    assert not torch.equal(logits(restore_(loaded)), logits(model))


@pytest.mark.parametrize("name", LOADERS)
def test_progress_mix_and_record_come_back(name: str, tmp_path: Path) -> None:
    model = sparsified(name)
    model.save_pretrained(tmp_path)
    loaded = load_pretrained(LOADERS[name], str(tmp_path))
    assert require_sparsification(loaded).progress == PROGRESS
    mixes = [float(m.mix) for m in loaded.modules() if isinstance(m, MixedActivation)]
    assert mixes == pytest.approx([MIX] * len(mixes))
    assert mixes
    record = json.loads((tmp_path / "config.json").read_text())[RECORD_KEY]
    assert getattr(loaded.config, RECORD_KEY) == getattr(model.config, RECORD_KEY) == record
    assert record["version"] == RECORD_VERSION


@pytest.mark.parametrize("name", LOADERS)
def test_a_folder_without_marks_goes_on_loading(name: str, tmp_path: Path) -> None:
    model = sparsified(name)
    model.save_pretrained(tmp_path)
    take_marks_off(tmp_path)
    assert torch.equal(logits(load_pretrained(LOADERS[name], tmp_path)), logits(model))


def test_a_loaded_model_saves_the_same_files(folder: Path, tmp_path: Path) -> None:
    again = tmp_path / "again"
    load_pretrained(load_causal, folder).save_pretrained(again)
    assert (again / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()
    assert (again / "config.json").read_text() == (folder / "config.json").read_text()


def test_a_loaded_model_goes_on_where_it_was(folder: Path) -> None:
    loaded = load_pretrained(load_causal, folder)
    assert not any(module.training for module in loaded.modules())
    assert list(added_parameters(loaded)) == list(added_parameters(sparsified()))
    assert all(parameter.requires_grad for parameter in added_parameters(loaded).values())
    norm = loaded.transformer.h[0].ln_2
    assert not norm.bias.requires_grad
    with torch.no_grad():
        norm.weight.fill_(0.01)
        loaded.transformer.h[0].mlp.c_fc.zeroth_bias.fill_(7.0)
    project_(advance_(loaded, 1.0))
    assert torch.equal(norm.weight, torch.ones_like(norm.weight))
    assert loaded.transformer.h[0].mlp.c_fc.zeroth_bias.abs().max() <= 0.1


def test_plug_ins_on_some_blocks_come_back_on_those_blocks(tmp_path: Path) -> None:
    model = models.opt().eval()
    sparsify_(model, [JumpingSquaredReLU()], where=lambda b: b.name.endswith(".0"))
    sparsify_(model, [JumpingSquaredReLU(ramp=0.5)], where=lambda b: b.name.endswith(".1"))
    sparsify_(model, [RestrictedNorm(floor=0.5)])
    advance_(model, PROGRESS)
    model.save_pretrained(tmp_path)
    loaded = load_pretrained(load_causal, tmp_path)
    assert require_sparsification(loaded).record() == require_sparsification(model).record()
    assert torch.equal(logits(loaded), logits(model))


@pytest.mark.parametrize("name", ["gpt2", "t5", "llama"])
def test_sharded_weights_come_back(name: str, tmp_path: Path) -> None:
    model = sparsified(name)
    model.save_pretrained(tmp_path, max_shard_size="10KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    assert torch.equal(logits(load_pretrained(LOADERS[name], tmp_path)), logits(model))


@pytest.mark.parametrize("name", ["gpt2", "opt", "llama", "vit"])
def test_a_base_model_loads_from_the_checkpoint_of_a_head(name: str, tmp_path: Path) -> None:
    model = sparsified(name)
    model.save_pretrained(tmp_path)
    base = load_pretrained(AutoModel.from_pretrained, tmp_path)
    batch = models.inputs_for(model)
    with torch.no_grad():
        want = model.base_model(**batch).last_hidden_state
        assert torch.equal(base(**batch).last_hidden_state, want)
    assert set(added_parameters(base)) < {key for key, _ in base.named_parameters()}
    assert len(added_parameters(base)) == len(added_parameters(model))


@pytest.mark.parametrize("name", ["gpt2", "opt", "llama"])
def test_a_head_loads_from_the_checkpoint_of_a_base_model(name: str, tmp_path: Path) -> None:
    model = sparsified(name)
    base = AutoModel.from_config(models.LANGUAGE_MODELS[name]().config).eval()
    sparsify_(base, [JumpingSquaredReLU(), ZerothBias(max_tokens=8)])
    base.save_pretrained(tmp_path)
    head = load_pretrained(load_causal, tmp_path)
    batch = models.inputs_for(model)
    with torch.no_grad():
        want = base(**batch).last_hidden_state
        assert torch.equal(head.base_model(**batch).last_hidden_state, want)


def test_options_of_the_stock_loader_go_in_with_partial(folder: Path) -> None:
    loaded = load_pretrained(partial(load_causal, dtype=torch.bfloat16), folder)
    want = sparsified().state_dict()
    for name, parameter in loaded.named_parameters():
        assert parameter.dtype == torch.bfloat16
        assert torch.equal(parameter, want[name].to(torch.bfloat16)), name
    mixes = [float(m.mix) for m in loaded.modules() if isinstance(m, MixedActivation)]
    assert mixes == pytest.approx([MIX, MIX], rel=1e-6)


def test_a_model_saved_in_half_precision_comes_back(tmp_path: Path) -> None:
    model = sparsified().to(torch.bfloat16)
    model.save_pretrained(tmp_path)
    loaded = load_pretrained(load_causal, tmp_path)
    assert loaded.dtype == torch.bfloat16
    assert torch.equal(logits(loaded), logits(model))


def test_no_value_is_left_uninitialised(folder: Path) -> None:
    """With deterministic algorithms torch fills fresh memory with NaN."""
    torch.use_deterministic_algorithms(True)
    try:
        first, second = (load_pretrained(load_causal, folder) for _ in range(2))
        assert torch.equal(logits(first), logits(second))
        assert torch.equal(logits(first), logits(sparsified()))
    finally:
        torch.use_deterministic_algorithms(False)


class Own(nn.Module):
    """A model of the user's own, with parts under other names."""

    PATTERN = BlockPattern(family="own", norm="before", up="wide", act="bend", down="narrow")

    def __init__(self) -> None:
        super().__init__()
        self.before = nn.LayerNorm(4)
        self.wide, self.bend, self.narrow = nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.narrow(self.bend(self.wide(self.before(x))))


def test_a_model_of_your_own_loads_with_its_pattern(tmp_path: Path) -> None:
    model = sparsify_(Own(), [ZerothBias(max_tokens=3)], patterns=[Own.PATTERN])
    nn.init.normal_(model.wide.zeroth_bias.detach())
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    config = {RECORD_KEY: require_sparsification(model).record()}
    (tmp_path / "config.json").write_text(json.dumps(config))

    def load(folder: str) -> nn.Module:
        own = Own()
        own.load_state_dict(load_file(Path(folder) / "model.safetensors"), strict=False)
        return own

    loaded = load_pretrained(load, tmp_path, patterns=[Own.PATTERN])
    x = torch.randn(2, 3, 4)
    assert torch.equal(loaded(x), model(x))


# ---- hub ids


def test_a_hub_id_is_read_through_the_hub(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    asked = []

    def download(repository: str, file: str) -> str:
        asked.append((repository, file))
        if not (folder / file).is_file():
            raise huggingface_hub.errors.EntryNotFoundError(file)
        return str(folder / file)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    loaded = load_pretrained(lambda name: load_causal(folder), "someone/model")
    assert torch.equal(logits(loaded), logits(sparsified()))
    assert {repository for repository, _ in asked} == {"someone/model"}


def test_a_hub_id_that_is_not_in_the_cache_is_an_error_offline() -> None:
    with pytest.raises(CheckpointError, match=r"someone/model.*config\.json"):
        load_pretrained(never, "someone/model")


# ---- nothing is unpickled


@pytest.fixture
def no_unpickling(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("something was unpickled")

    for module in (pickle, torch):
        monkeypatch.setattr(module, "load", refuse)
    monkeypatch.setattr(pickle, "loads", refuse)


@pytest.mark.usefixtures("no_unpickling")
@pytest.mark.parametrize("shard_size", ["1GB", "10KB"])
def test_loading_unpickles_nothing(tmp_path: Path, shard_size: str) -> None:
    model = sparsified()
    model.save_pretrained(tmp_path, max_shard_size=shard_size)
    # Bait: the stock loader must not prefer it.
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    assert torch.equal(logits(load_pretrained(load_causal, tmp_path)), logits(model))


@pytest.mark.usefixtures("no_unpickling")
def test_a_checkpoint_with_a_pickle_only_is_refused_unread(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=rf"{folder}.*safetensors only"):
        load_pretrained(load_causal, folder)
