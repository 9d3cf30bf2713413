"""Patterns of a user's own: told once, known to every verb, in a copy and in a saved folder."""

from __future__ import annotations

import copy
import io
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import AutoModel, AutoModelForCausalLM, Trainer, TrainingArguments
from typer.testing import CliRunner

import models
import odd
import steppe
from data.data_makers import TEXT, words_tokenizer
from steppe import BlockPattern, find_blocks, load_pretrained, sparsify_
from steppe.bench import time_model
from steppe.blocks.pattern_values import NOTE, pattern_from_text
from steppe.checkpoints.held_out import measure_checkpoints
from steppe.commands.app import app
from steppe.data.sources import Source
from steppe.errors import (
    BlocksNotFoundError,
    CheckpointError,
    PatternError,
    RecipeError,
    ScheduleError,
    UnfitBlockError,
)
from steppe.plugins.applied import require_sparsification
from steppe.record import RECORD_KEY
from steppe.training import SteppeCallback
from steppe.training.lightning import LightningCallback
from steppe.training.recipe import read_recipe, settings_of
from steppe.training.recipe_arguments import ModelArguments, patterns_of
from steppe.training.run_recipe import run_recipe
from training.recipe_worker import tiny_text_recipe, write_text

pytestmark = pytest.mark.filterwarnings(
    "ignore::pytorch_lightning.utilities.warnings.PossibleUserWarning",
    "ignore:.isinstance.treespec, LeafSpec.. is deprecated:FutureWarning",
)
BOTH = ["body.stack.0", "body.stack.1"]


def names(model: nn.Module, **options: Any) -> list[str]:
    return [block.name for block in find_blocks(model, **options)]


def told(*plugins: steppe.Plugin, **options: Any) -> odd.OddForCausalLM:
    """A model that `sparsify_` was told the pattern of."""
    chosen = plugins or (steppe.RestrictedNorm(), steppe.JumpingSquaredReLU())
    model = odd.odd(**options)
    sparsify_(model, chosen, patterns=[odd.PATTERN])
    return model


def data(number: int = 8) -> list[dict[str, Tensor]]:
    return [{"input_ids": one, "labels": one} for one in odd.ids(number)]


def batches() -> list[dict[str, Tensor]]:
    return [{"input_ids": odd.ids(), "labels": odd.ids()}]


def trainer(model: nn.Module, folder: Path, *callbacks: Any, **options: Any) -> Trainer:
    arguments = TrainingArguments(
        **{
            "output_dir": str(folder),
            "max_steps": 2,
            "report_to": "none",
            "use_cpu": True,
            "save_strategy": "no",
            "disable_tqdm": True,
            "dataloader_pin_memory": False,
            "logging_steps": 1,
            **options,
        }
    )
    return Trainer(
        model=model,
        args=arguments,
        train_dataset=data(),
        eval_dataset=data(2),
        callbacks=list(callbacks),
    )


def step_(model: nn.Module) -> None:
    """One training step with all constraints."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with steppe.constrain_(model, optimizer, total_steps=2):
        for _ in range(2):
            model(odd.ids(), labels=odd.ids()).loss.backward()
            optimizer.step()


def test_no_built_in_pattern_knows_the_model() -> None:
    with pytest.raises(BlocksNotFoundError, match="widen"):
        find_blocks(odd.odd())


# ---- in the process


def _watch(model: nn.Module, own: Sequence[BlockPattern] = ()) -> object:
    with steppe.watch(model, patterns=own) as monitor:
        model(odd.ids())
    return [block.name for block in monitor.report().blocks]


def _accelerate(model: nn.Module) -> object:
    steppe.accelerate_(model)
    return [block.name for block in steppe.explain(model).blocks]


def _measure(model: nn.Module) -> object:
    return [block.name for block in steppe.measure(model, batches(), labels="data").blocks]


def _time(model: nn.Module) -> object:
    row = time_model(model, {"input_ids": odd.ids()}, seconds=0.0, least_rounds=2)
    assert row["d"] == odd.D_MODEL
    return BOTH


def _coverage(model: nn.Module) -> object:
    return names(model, strict=True)


VERBS: dict[str, Callable[[nn.Module], object]] = {
    "find_blocks": _coverage,
    "watch": _watch,
    "measure": _measure,
    "accelerate_": _accelerate,
    "time_model": _time,
}
GIVERS: dict[str, Callable[[nn.Module, Sequence[BlockPattern]], object]] = {
    "sparsify_": lambda model, own: sparsify_(model, [steppe.RestrictedNorm()], patterns=own),
    "accelerate_": lambda model, own: steppe.accelerate_(model, patterns=own),
    "measure": lambda model, own: steppe.measure(model, batches(), labels=None, patterns=own),
    "watch": lambda model, own: _watch(model, own),
}


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("giver", GIVERS)
def test_a_verb_knows_what_another_was_told(giver: str, verb: str) -> None:
    model = odd.odd()
    GIVERS[giver](model, [odd.PATTERN])
    assert VERBS[verb](model) == BOTH


def test_a_question_is_not_taken_for_an_order() -> None:
    model = odd.odd()
    assert names(model, patterns=[odd.PATTERN]) == BOTH
    with pytest.raises(BlocksNotFoundError):
        find_blocks(model)


@pytest.mark.parametrize("giver", ["sparsify_", "accelerate_"])
def test_restore_forgets_them(giver: str) -> None:
    model = odd.odd()
    before = [dict(vars(module)) for module in model.modules()]
    config = model.config.to_dict()
    GIVERS[giver](model, [odd.PATTERN])
    steppe.restore_(model)
    assert model.config.to_dict() == config
    assert [vars(m).keys() for m in model.modules()] == [one.keys() for one in before]


class Refuses(steppe.Plugin):
    """A plug-in that fails when half of it is done."""

    key = "refuses"

    def check(self, block: steppe.MLPBlock) -> None:
        """Says nothing."""

    def apply(self, model: Any, blocks: Any, journal: Any) -> Any:
        """Fails."""
        raise RuntimeError("half done")


@pytest.mark.parametrize("plugin", [Refuses(), steppe.RestrictedNorm()])
def test_a_verb_that_fails_leaves_none(plugin: steppe.Plugin) -> None:
    model, kind = odd.odd(), RuntimeError if isinstance(plugin, Refuses) else UnfitBlockError
    own = [replace(odd.PATTERN, norm_is_shared=True)]  # RestrictedNorm refuses that
    with pytest.raises(kind):
        sparsify_(model, [plugin], patterns=own)
    assert not any(NOTE in vars(module) for module in model.modules())
    with pytest.raises(BlocksNotFoundError):
        find_blocks(model)


def test_own_ones_go_before_noted_ones_and_those_before_built_in_ones() -> None:
    model = models.gpt2()
    parts = {"up": "mlp.c_fc", "act": "mlp.act", "down": "mlp.c_proj"}
    assert find_blocks(model)[0].family == "GPT-2"
    steppe.accelerate_(model, patterns=[BlockPattern(family="noted", **parts)])
    assert find_blocks(model)[0].family == "noted"
    own = BlockPattern(family="own", norm="ln_2", **parts)
    assert find_blocks(model, patterns=[own])[0].family == "own"
    steppe.accelerate_(model, patterns=[own])
    assert find_blocks(model)[0].family == "own"
    assert find_blocks(steppe.restore_(model))[0].family == "GPT-2"


@pytest.mark.filterwarnings("ignore::steppe.IncompleteCoverageWarning")
def test_functions_are_asked_once_also_where_a_plug_in_changes_what_they_see() -> None:
    model = odd.odd(layers=4)
    own = replace(odd.PATTERN, when=lambda layer: layer.is_even and type(layer.bend) is nn.ReLU)
    sparsify_(model, [steppe.JumpingSquaredReLU()], patterns=[own])
    assert names(model) == ["body.stack.0", "body.stack.2"]
    assert names(model.body) == ["stack.0", "stack.2"]


def test_the_tokens_dimension_travels() -> None:
    layer = nn.ModuleDict({"a": nn.Linear(4, 8), "b": nn.ReLU(), "c": nn.Linear(8, 4)})
    model = nn.Sequential(layer)
    own = BlockPattern("odd", up="a", act="b", down="c", sequence_first=lambda one: len(one) == 3)
    steppe.accelerate_(model, patterns=[own])
    assert [(block.name, block.token_dim) for block in find_blocks(model)] == [("0", 0)]


def test_copies_know_them() -> None:
    model = steppe.accelerate_(told())
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for one in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        assert names(one) == BOTH
        assert [block.name for block in steppe.explain(one).blocks] == BOTH
        with pytest.raises(BlocksNotFoundError):
            find_blocks(steppe.restore_(one))
    averaged = torch.optim.swa_utils.AveragedModel(model)
    assert names(averaged) == [f"module.{name}" for name in BOTH]


def test_a_pattern_of_a_lambda_does_not_keep_a_model_from_being_pickled() -> None:
    own = replace(odd.PATTERN, when=lambda layer: True)
    model = steppe.accelerate_(odd.odd(), patterns=[own])
    assert names(copy.deepcopy(model)) == BOTH
    torch.save(model, io.BytesIO())


def test_a_value_that_no_file_takes_is_refused_before_anything_is_done() -> None:
    model = odd.odd()
    own = replace(odd.PATTERN, act_flags=(("is_even", torch.float32),))
    with pytest.raises(PatternError, match=r"'odd', act_flags: torch.float32 cannot be written"):
        sparsify_(model, [steppe.JumpingSquaredReLU()], patterns=[own])
    assert isinstance(model.body.stack[0].bend, nn.ReLU)
    assert not any(NOTE in vars(module) for module in model.modules())


# ---- training


def test_the_callback_knows_them_and_its_run(tmp_path: Path) -> None:
    model, callback = told(), SteppeCallback(every=1)
    one = trainer(model, tmp_path, callback)
    one.train()
    assert "eval_density" in one.evaluate()
    run = callback.run(one.args, one.state, model)
    assert list(run.block_names) == BOTH
    assert len(callback.history) == 2


def test_the_callback_takes_patterns_and_where_itself(tmp_path: Path) -> None:
    callback = SteppeCallback(1, where=lambda b: b.name == BOTH[1], patterns=[odd.PATTERN])
    one = trainer(odd.odd(), tmp_path, callback)
    one.train()
    assert "eval_density" in one.evaluate()
    assert list(callback.run(one.args, one.state, one.model).block_names) == BOTH[1:]
    assert callback.training_density_per_block == [callback.training_density]
    assert names(one.model) == BOTH


@pytest.mark.parametrize("restored", [False, True])
def test_a_resumed_run_measures_the_same_blocks(tmp_path: Path, restored: bool) -> None:
    options: dict[str, Any] = {"save_strategy": "steps", "save_steps": 1}
    first = SteppeCallback(1, where=lambda block: block.name == BOTH[1])
    trainer(told(), tmp_path, first, **options).train()
    options["restore_callback_states_from_checkpoint"] = restored
    one = trainer(told(), tmp_path, SteppeCallback(1), **options, num_train_epochs=9)
    one.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    (last,) = [c for c in one.callback_handler.callbacks if isinstance(c, SteppeCallback)]
    assert [entry["step"] for entry in last.history] == [1, 2]
    assert last.history == first.history
    other = SteppeCallback(1, where=lambda block: True)
    wrong = trainer(told(), tmp_path, other, **{**options, "max_steps": 3})
    if not restored:
        with pytest.raises(ScheduleError, match="has measured 1 blocks, and 2 are to be"):
            wrong.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))


class Module(pl.LightningModule):
    """A model in Lightning."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def training_step(self, batch: dict[str, Tensor], index: int) -> Tensor:
        """The loss."""
        return self.model(**batch).loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Plain SGD."""
        return torch.optim.SGD(self.parameters(), 0.1)


@pytest.mark.parametrize("was_told", [True, False])
def test_lightnings_callback_knows_them_or_takes_them(tmp_path: Path, was_told: bool) -> None:
    module = Module(told() if was_told else odd.odd())
    callback = LightningCallback(
        1,
        where=None if was_told else lambda block: block.name.endswith("1"),
        patterns=() if was_told else [odd.PATTERN],
    )
    loader: Any = DataLoader(
        batches() * 2,  # type: ignore[arg-type]
        batch_size=None,
    )
    one = pl.Trainer(
        max_steps=2,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        accelerator="cpu",
        default_root_dir=tmp_path,
        callbacks=[callback],
    )
    one.fit(module, loader)
    assert list(callback.run(one, module).block_names) == (BOTH if was_told else BOTH[1:])


def test_fold_and_advance_know_them(tmp_path: Path) -> None:
    model = told(steppe.RisingThreshold(multiple=1.0))
    step_(model)
    steppe.advance_(model, 1.0)
    expected = model.eval()(odd.ids()).logits
    steppe.fold_(model)
    torch.testing.assert_close(model(odd.ids()).logits, expected)
    assert names(model) == BOTH  # folding is not restoring
    assert model.config.mlp_bias is True
    assert all(block.down.bias is not None for block in find_blocks(model))
    model.save_pretrained(tmp_path)
    stock = AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(stock(odd.ids()).logits, expected)


# ---- saved


def read(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "config.json").read_text())[RECORD_KEY])


def rewrite(folder: Path, patterns: object) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    if patterns is None:
        del config[RECORD_KEY]["patterns"]
    else:
        config[RECORD_KEY]["patterns"] = patterns
    path.write_text(json.dumps(config))


LOADERS: dict[str, Callable[[Path], nn.Module]] = {
    "load_pretrained": lambda folder: load_pretrained(AutoModelForCausalLM.from_pretrained, folder),
    "from_pretrained": AutoModelForCausalLM.from_pretrained,
}


@pytest.mark.parametrize("loader", LOADERS)
def test_a_saved_folder_knows_them(tmp_path: Path, loader: str) -> None:
    model = step_trained()
    model.save_pretrained(tmp_path)
    assert read(tmp_path)["patterns"] == [
        {
            "family": "odd",
            "norm": "before",
            "up": "widen",
            "act": "bend",
            "down": "narrow",
            "blocks": BOTH,
        }
    ]
    loaded = LOADERS[loader](tmp_path)
    assert names(loaded) == BOTH
    assert torch.equal(loaded.eval()(odd.ids()).logits, model.eval()(odd.ids()).logits)
    assert require_sparsification(loaded).record() == require_sparsification(model).record()
    steppe.accelerate_(loaded)


def step_trained() -> odd.OddForCausalLM:
    model = told(steppe.ZerothBias(max_tokens=16), steppe.JumpingSquaredReLU())
    step_(model)
    return model


def test_a_folder_of_the_base_model_knows_them_and_one_with_a_head_too(tmp_path: Path) -> None:
    told().save_pretrained(tmp_path / "head")
    assert names(AutoModel.from_pretrained(tmp_path / "head")) == ["stack.0", "stack.1"]
    body = odd.OddModel(odd.OddConfig())
    sparsify_(body, [steppe.RestrictedNorm()], patterns=[odd.PATTERN]).save_pretrained(
        tmp_path / "body"
    )
    assert names(AutoModelForCausalLM.from_pretrained(tmp_path / "body")) == BOTH


def test_a_model_within_a_model_is_saved_with_its_own(tmp_path: Path) -> None:
    both = nn.ModuleDict({"one": odd.odd(), "two": odd.odd(layers=1)})
    sparsify_(both, [steppe.RestrictedNorm()], patterns=[odd.PATTERN])
    for name, expected in (("one", BOTH), ("two", BOTH[:1])):
        both[name].save_pretrained(tmp_path / name)
        (entry,) = read(tmp_path / name)["patterns"]
        assert entry["blocks"] == expected
        assert names(AutoModelForCausalLM.from_pretrained(tmp_path / name)) == expected


@pytest.mark.filterwarnings("ignore::steppe.IncompleteCoverageWarning")
def test_a_condition_is_saved_as_the_blocks_that_it_chose(tmp_path: Path) -> None:
    model = odd.odd(layers=3)
    own = replace(odd.PATTERN, when=lambda layer: not layer.is_even)
    sparsify_(model, [steppe.RestrictedNorm()], patterns=[own]).save_pretrained(tmp_path)
    (entry,) = read(tmp_path)["patterns"]
    assert "when" not in entry
    assert entry["blocks"] == ["body.stack.1"]
    assert names(AutoModelForCausalLM.from_pretrained(tmp_path)) == ["body.stack.1"]


def test_the_tokens_dimension_and_flags_are_saved(tmp_path: Path) -> None:
    own = replace(
        odd.PATTERN, sequence_first=lambda layer: layer.is_even, act_flags=(("is_even", True),)
    )
    model = odd.odd()
    sparsify_(model, [steppe.JumpingSquaredReLU()], patterns=[own]).save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert [block.token_dim for block in find_blocks(loaded)] == [0, 1]
    assert loaded.body.stack[1].is_even  # set by the flag
    assert not odd.odd().body.stack[1].is_even


def test_later_patterns_are_saved_too_but_for_blocks_that_have_plug_ins(tmp_path: Path) -> None:
    first = replace(odd.PATTERN, when=lambda layer: layer.is_even)
    model = odd.odd()
    with pytest.warns(steppe.IncompleteCoverageWarning):
        sparsify_(model, [steppe.RestrictedNorm()], patterns=[first])
    # RestrictedNorm could not be put back into a block without a norm.
    steppe.accelerate_(model, patterns=[replace(odd.PATTERN, family="later", norm=None)])
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert [block.family for block in find_blocks(loaded)] == ["odd", "later"]


def test_a_later_pattern_of_a_block_with_plug_ins_is_not_saved(tmp_path: Path) -> None:
    model = sparsify_(models.gpt2(), [steppe.RestrictedNorm()])
    later = BlockPattern(family="later", up="mlp.c_fc", act="mlp.act", down="mlp.c_proj")
    steppe.accelerate_(model, patterns=[later])
    steppe.advance_(model, 0.5)
    model.save_pretrained(tmp_path)
    assert "patterns" not in read(tmp_path)
    assert find_blocks(AutoModelForCausalLM.from_pretrained(tmp_path))[0].family == "GPT-2"


def test_a_folder_from_before_wants_the_pattern_or_says_so(tmp_path: Path) -> None:
    model = step_trained()
    model.save_pretrained(tmp_path)
    rewrite(tmp_path, None)
    load = AutoModelForCausalLM.from_pretrained
    with pytest.raises(CheckpointError, match=r"names blocks that .* it has none"):
        load_pretrained(load, tmp_path)
    loaded = load_pretrained(load, tmp_path, patterns=[odd.PATTERN])
    assert torch.equal(loaded(odd.ids()).logits, model.eval()(odd.ids()).logits)
    assert names(loaded) == BOTH


def test_patterns_that_load_pretrained_is_told_go_before_the_records(tmp_path: Path) -> None:
    told().save_pretrained(tmp_path)
    own = replace(odd.PATTERN, family="own")
    loaded = load_pretrained(AutoModelForCausalLM.from_pretrained, tmp_path, patterns=[own])
    assert [block.family for block in find_blocks(loaded)] == ["own", "own"]


def test_an_adapters_folder_knows_them(tmp_path: Path) -> None:
    def lora() -> LoraConfig:
        return LoraConfig(r=2, target_modules=["head"], init_lora_weights=False)

    model = get_peft_model(odd.odd(), lora())
    sparsify_(model, [steppe.ZerothBias(max_tokens=16)], patterns=[odd.PATTERN])
    step_(model)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(odd.odd(), tmp_path)
    assert names(loaded) == BOTH
    assert torch.equal(loaded.eval()(odd.ids()).logits, model.eval()(odd.ids()).logits)


ENTRY = {"family": "odd", "norm": "before", "up": "widen", "act": "bend", "down": "narrow"}
DAMAGED: dict[str, tuple[Any, str]] = {
    "no list": ({"up": "widen"}, "patterns: Input should be a valid list"),
    "no mapping": ([3], "patterns.0: Input should be a valid dictionary"),
    "no blocks": ([ENTRY], "blocks: expected a list of names"),
    "blocks of numbers": ([{**ENTRY, "blocks": [0]}], "blocks: expected a list of names"),
    "no up": (
        [{"family": "odd", "act": "bend", "down": "narrow", "blocks": BOTH}],
        "two linear layers",
    ),
    "a number": ([{**ENTRY, "blocks": BOTH, "norm": 3}], "norm: Input should be a valid string"),
    "code": ([{**ENTRY, "blocks": BOTH, "when": "os.system"}], "when: Input should be callable"),
    "dimension": ([{**ENTRY, "blocks": BOTH, "sequence_first": "a.b"}], "expected true or false"),
    "unknown": ([{**ENTRY, "blocks": BOTH, "more": "x"}], "more: Extra inputs"),
    "other model": ([{**ENTRY, "blocks": ["body.stack.9"]}], "does not have: body.stack.9"),
    "other parts": ([{**ENTRY, "blocks": BOTH, "up": "fc1"}], "'odd', does not match body.stack.0"),
    "twice": ([{**ENTRY, "blocks": BOTH}] * 2, "two patterns for one block"),
    "no path": ([{**ENTRY, "blocks": BOTH, "up": "a b"}], "up: expected a dotted path"),
    "a method": ([{**ENTRY, "blocks": BOTH, "act": "bend.forward"}], "act: expected a dotted path"),
    "dunder": ([{**ENTRY, "blocks": BOTH, "norm": "__class__"}], "norm: expected a dotted path"),
    "a flag of all": (
        [{**ENTRY, "blocks": BOTH, "act_flags": [["training", False]]}],
        "act_flags: 'training' is not for a pattern to set",
    ),
    "a flag's value": (
        [{**ENTRY, "blocks": BOTH, "act_flags": [["is_even", {"a": 1}]]}],
        "act_flags: 'is_even' is not for a pattern to set",
    ),
    "a part": (
        [{**ENTRY, "blocks": BOTH, "act_flags": [["narrow", 0]]}],
        "sets 'narrow', and body.stack.0 has no such flag",
    ),
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("odd")
    told().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_record_is_one_clear_error(saved: Path, name: str) -> None:
    patterns, message = DAMAGED[name]
    rewrite(saved, patterns)
    with pytest.raises(CheckpointError) as raised:
        AutoModelForCausalLM.from_pretrained(saved)
    assert message in str(raised.value)
    assert str(saved) in str(raised.value)
    assert "\n" not in str(raised.value)


# ---- the command line and recipes


@pytest.fixture
def source(tmp_path: Path) -> Source:
    (tmp_path / "text.txt").write_text(TEXT * 4)
    processor = words_tokenizer(tmp_path / "tokenizer")
    return Source(str(tmp_path / "text.txt"), max_length=8, batch_size=2, processor=str(processor))


def test_a_folder_is_measured_by_its_record_and_a_plain_one_by_what_is_told(
    tmp_path: Path, source: Source
) -> None:
    told().save_pretrained(tmp_path / "told")
    odd.odd().save_pretrained(tmp_path / "plain")
    assert list(measure_checkpoints([tmp_path / "told"], source, None).block_names) == BOTH
    with pytest.raises(BlocksNotFoundError):
        measure_checkpoints([tmp_path / "plain"], source, None)
    run = measure_checkpoints([tmp_path / "plain"], source, None, patterns=[odd.PATTERN])
    assert list(run.block_names) == BOTH
    words = ["measure", str(tmp_path / "plain"), "--data", source.data, "--labels", "none"]
    words += ["--processor", str(source.processor), "--pattern", odd.TEXT]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0
    assert "of 32" in done.output  # units


def test_steppe_blocks_shows_what_a_pattern_finds(tmp_path: Path) -> None:
    odd.OddConfig(architectures=["OddForCausalLM"]).save_pretrained(tmp_path)
    without = CliRunner().invoke(app, ["blocks", str(tmp_path)])
    assert "BlockPattern(family='mine', up='widen', act='bend', down='narrow')" in without.output
    done = CliRunner().invoke(app, ["blocks", str(tmp_path), "--pattern", odd.TEXT])
    assert "100% of the MLP parameters are in 2 blocks" in done.output
    wrong = CliRunner().invoke(app, ["blocks", str(tmp_path), "--pattern", "print(1)"])
    assert wrong.exit_code == 2


def test_a_pattern_is_read_as_it_is_printed() -> None:
    assert pattern_from_text(odd.TEXT) == odd.PATTERN
    assert pattern_from_text(repr(odd.PATTERN)) == odd.PATTERN
    assert pattern_from_text(json.dumps(ENTRY)) == odd.PATTERN


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("", "invalid syntax"),
        ("print('x')", "it is no BlockPattern"),
        ("BlockPattern('mine', up='a')", "every part must be named"),
        ("BlockPattern(**{'up': 'a'})", "every part must be named"),
        ("BlockPattern(family='mine', up=open('x'), act='b', down='c')", "malformed"),
        ("BlockPattern(family='mine', up='a', act='b')", "expected the paths of two linear layers"),
        ("BlockPattern(family='mine', up='a', act='b', down='c', colour=1)", "colour: Extra"),
        ("BlockPattern(family='mine', up='a', act='b', down='c', when='x')", "when: "),
        ('{"family": "mine"', "Expecting"),
        ("(" * 9000, ""),
    ],
)
def test_what_is_no_pattern_is_refused_and_not_run(text: str, fault: str) -> None:
    with pytest.raises(PatternError, match="expected a pattern as `steppe blocks` prints") as error:
        pattern_from_text(text)
    assert fault in str(error.value)


def test_a_recipe_has_patterns(tmp_path: Path) -> None:
    path = tmp_path / "odd.yaml"
    lines = "task: causal-lm\nmodel_type: odd-of-steppe\nmodel_config: {}\n"
    lines += f"data_dir: {tmp_path}\nmax_steps: 2\noutput_dir: {tmp_path}/out\n"
    path.write_text(f"{lines}patterns:\n- {json.dumps(ENTRY)}\n- {odd.TEXT}\n")
    recipe = read_recipe(path)
    assert patterns_of(recipe.model) == [odd.PATTERN, odd.PATTERN]
    assert len(settings_of(recipe)["patterns"]) == 2
    assert patterns_of(read_recipe(path, ["--patterns", odd.TEXT]).model) == [odd.PATTERN]
    path.write_text(lines)
    assert "patterns" not in settings_of(read_recipe(path))  # as runs of before have it
    path.write_text(f"{lines}patterns: [{{up: 3}}]\n")
    with pytest.raises(RecipeError, match="patterns: expected a pattern"):
        read_recipe(path)
    assert patterns_of(ModelArguments(task="causal-lm")) == []


def test_a_recipe_trains_a_model_that_steppe_does_not_know(tmp_path: Path) -> None:
    data_folder = write_text(tmp_path / "data", topics=4)
    words = ["--model_type", "odd-of-steppe", "--model_config", "{}", "--max_steps", "2"]
    words += ["--patterns", odd.TEXT, "--save_steps", "1", "--logging_steps", "1", "--ramp", "0.5"]
    words += ["--gradient_accumulation_steps", "1", "--vocab_size", "280"]
    recipe = tiny_text_recipe(data_folder, tmp_path / "cache", tmp_path / "out", *words)
    summary = run_recipe(recipe)
    assert len(summary["density_per_block"]) == len(BOTH)
    assert names(AutoModelForCausalLM.from_pretrained(summary["model"])) == BOTH
    again = tiny_text_recipe(
        data_folder, tmp_path / "cache", tmp_path / "out", *words, "--resume", "true"
    )
    assert run_recipe(again)["resumed_from"] == "checkpoint-2"
