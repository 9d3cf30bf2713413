"""save_pretrained and load_pretrained: the same model again, or one clear error."""

from __future__ import annotations

import json
import logging
import pickle
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForSeq2SeqLM,
)

import models
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
from steppe.errors import CheckpointError, SteppeError
from steppe.plugins.applied import require_sparsification
from steppe.plugins.jumping_relu import MixedActivation
from steppe.record import METHOD_MARK, RECORD_KEY, RECORD_VERSION, WEIGHTS_MARK

PROGRESS = 0.2
MIX = 0.4  # of a ramp over half the run
LAST_SHARD = "model-*.safetensors"
LOADERS: dict[str, Callable[..., nn.Module]] = {
    "t5": AutoModelForSeq2SeqLM.from_pretrained,
    "opt": AutoModelForCausalLM.from_pretrained,
    "gpt2": AutoModelForCausalLM.from_pretrained,
    "llama": AutoModelForCausalLM.from_pretrained,
    "vit": AutoModelForImageClassification.from_pretrained,
    "ijepa": AutoModelForImageClassification.from_pretrained,
}
load_causal = LOADERS["gpt2"]
Edit = Callable[[dict[str, Any]], Any]


def sparsified(name: str = "gpt2", seed: int = 0) -> nn.Module:
    """A model in the middle of a finetuning run, with biases that are not zero."""
    torch.manual_seed(seed)
    model = {**models.LANGUAGE_MODELS, **models.VISION_MODELS}[name]().eval()
    sparsify_(
        model, [ZerothBias(max_tokens=8), RestrictedNorm(ramp=0.3), JumpingSquaredReLU(ramp=0.5)]
    )
    for parameter in added_parameters(model).values():
        nn.init.uniform_(parameter.detach(), -0.05, 0.05)
    return project_(advance_(model, PROGRESS))


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return model(**models.inputs_for(model)).logits


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A good checkpoint of GPT-2."""
    sparsified().save_pretrained(tmp_path)
    return tmp_path


def edit_config(folder: Path, edit: Edit) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    edit(config)
    path.write_text(json.dumps(config))


def edit_weights(folder: Path, edit: Callable[[dict[str, Tensor]], None]) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    edit(tensors)
    path.unlink()  # the tensors may be mapped from it
    save_file(tensors, path, metadata={"format": "pt"})


def never(folder: str) -> nn.Module:
    raise AssertionError("a bad record must be refused before the weights are read")


# ---- the same model again


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


# ---- damage


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


# ---- what Transformers says of the keys


class _Kept(logging.Handler):
    """Keeps messages."""

    def __init__(self) -> None:
        super().__init__()
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())


@pytest.fixture
def reports() -> Iterator[list[str]]:
    """What Transformers logs of a checkpoint, warnings and worse."""
    logger = logging.getLogger("transformers.modeling_utils")
    kept = _Kept()
    logger.addHandler(kept)
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_warning()
    yield kept.messages
    transformers.logging.set_verbosity(verbosity)
    logger.removeHandler(kept)
    assert not logger.filters, "the filter must go after loading"


def take_marks_off(folder: Path) -> None:
    """Make a folder what steppe wrote before there were marks."""
    edit_config(folder, lambda config: [config.pop(key) for key in (WEIGHTS_MARK, METHOD_MARK)])


@pytest.mark.parametrize("shard_size", ["1GB", "10KB"])
@pytest.mark.parametrize("has_marks", [True, False])
def test_our_tensors_are_not_reported_as_unexpected(
    tmp_path: Path, reports: list[str], shard_size: str, has_marks: bool
) -> None:
    sparsified().save_pretrained(tmp_path, max_shard_size=shard_size)
    if not has_marks:
        take_marks_off(tmp_path)
        load_causal(tmp_path)
        assert ["LOAD REPORT" in message for message in reports] == [True], "nothing to hold back"
        reports.clear()
    load_pretrained(load_causal, tmp_path)
    assert reports == []


@pytest.mark.parametrize("has_marks", [True, False])
def test_other_unexpected_tensors_are_still_reported(
    folder: Path, reports: list[str], has_marks: bool
) -> None:
    if not has_marks:
        take_marks_off(folder)
    edit_weights(folder, lambda tensors: tensors.update({"junk.weight": torch.zeros(2)}))
    load_pretrained(load_causal, folder)
    assert len(reports) == 1
    assert "junk.weight" in reports[0]


def test_missing_tensors_are_still_reported(folder: Path, reports: list[str]) -> None:
    edit_weights(folder, lambda tensors: tensors.pop("transformer.ln_f.bias"))
    load_pretrained(load_causal, folder)
    assert len(reports) == 1
    assert "transformer.ln_f.bias" in reports[0]
    assert "MISSING" in reports[0]


def test_other_messages_of_transformers_are_not_held_back(folder: Path, reports: list[str]) -> None:
    def load(name: str) -> nn.Module:
        logging.getLogger("transformers.modeling_utils").warning("something else")
        return load_causal(name)

    load_pretrained(load, folder)
    assert reports == ["something else"]


def test_a_report_before_an_error_of_the_stock_loader_is_shown(
    folder: Path, reports: list[str]
) -> None:
    def shrink(tensors: dict[str, Tensor]) -> None:
        tensors["transformer.ln_f.bias"] = torch.zeros(3)

    edit_weights(folder, shrink)
    with pytest.raises(Exception, match="mismatch"):
        load_pretrained(load_causal, folder)
    assert len(reports) == 1
    assert "transformer.ln_f.bias" in reports[0]


def test_the_filter_is_gone_after_an_error(folder: Path, reports: list[str]) -> None:
    def fail(name: str) -> nn.Module:
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        load_pretrained(fail, folder)
    assert not logging.getLogger("transformers.modeling_utils").filters
    assert reports == []
