"""Checkpoints measured on held-out data, and every way in which one cannot be."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F
from transformers import PreTrainedModel, Trainer, TrainingArguments

import models
import steppe
from data.data_makers import TEXT, words_tokenizer, write_images, write_jsonl
from steppe.checkpoints.held_out import measure_checkpoints
from steppe.data.batches import load_batches
from steppe.data.sources import Source
from steppe.errors import CheckpointError, DataError
from steppe.runs import read_run, write_run

PLUGINS = [steppe.ZerothBias(), steppe.RestrictedNorm(), steppe.JumpingSquaredReLU()]


def saved(model: PreTrainedModel, folder: Path, step: int | None = None) -> Path:
    """A checkpoint, with the Trainer's state if a step is given."""
    model.save_pretrained(folder)
    if step is not None:
        (folder / "trainer_state.json").write_text(json.dumps({"global_step": step}))
    return folder


@pytest.fixture
def text(tmp_path: Path) -> Source:
    """A file of text, and a tokenizer of its words to be used with any model."""
    (tmp_path / "text.txt").write_text(TEXT * 12)
    tokenizer = words_tokenizer(tmp_path / "tokenizer")
    return Source(str(tmp_path / "text.txt"), max_length=16, batch_size=2, processor=str(tokenizer))


def test_one_checkpoint_is_measured_as_its_model_is(tmp_path: Path, text: Source) -> None:
    model = steppe.sparsify_(models.gpt2(), PLUGINS)
    folder = saved(model, tmp_path / "checkpoint-30")
    batches = list(load_batches(text, model, ""))
    expected = steppe.measure(model, batches)
    seen: list[tuple[str, int, int | None, float]] = []
    loaded: list[str] = []
    run = measure_checkpoints(
        [folder], text, on_batch=lambda *told: seen.append(told), on_load=loaded.append
    )
    assert loaded == [str(folder)]
    assert run.held_out_steps == [30]
    assert str(run.held_out) == str([expected])  # NaN is not equal to itself
    assert math.isfinite(run.held_out[0].blocks[0].AF_up)
    assert run.model == "GPT2LMHeadModel"
    assert run.name == "checkpoint-30"
    assert run.activations == ["Rectifier(alpha=1.0, beta=0.5)"] * 2
    assert [p["plugin"] for p in run.plugins] == [plugin.key for plugin in PLUGINS]
    assert run.block_names == tuple(block.name for block in steppe.find_blocks(model))
    assert run.settings["data"] == text.data
    assert run.settings["split"] == "full"
    assert run.settings["checkpoints"] == [str(folder)]
    assert {"steppe", "torch", "transformers", "datasets"} <= set(run.versions)
    assert [one[:3] for one in seen] == [(str(folder), n, None) for n in range(len(batches) + 1)]
    assert math.isnan(seen[0][3])
    for done in range(1, len(batches) + 1):
        so_far = steppe.measure(model, batches[:done], labels=None).density
        assert seen[done][3] == so_far
    assert len({told[3] for told in seen}) > 2, "the density changes from batch to batch"
    # 168 words in windows of 16: ten whole ones and one of 8.
    assert run.tokens_per_sample == 168 / 11
    write_run(run, tmp_path / "run.json")
    assert read_run(tmp_path / "run.json").held_out_steps == [30]


def test_the_held_out_loss_is_the_mean_over_all_that_is_predicted(
    tmp_path: Path, text: Source
) -> None:
    model = models.gpt2().eval()
    total, number = 0.0, 0
    for batch in load_batches(text, model, ""):
        logits = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        labels = batch["labels"][:, 1:].flatten()
        total += F.cross_entropy(logits[:, :-1].flatten(0, 1), labels, reduction="sum").item()
        number += int((labels != -100).sum())
    run = measure_checkpoints([saved(model, tmp_path / "m")], text)
    assert run.quality == {"loss": pytest.approx(total / number, rel=1e-5)}
    assert run.logs == [{"step": 0, "eval_loss": run.quality["loss"]}]


def test_the_accuracy_of_a_classifier(tmp_path: Path) -> None:
    data = write_images(tmp_path / "data", ("0", "1"), each=4)
    model = models.vit().eval()
    correct = [
        (model(batch["pixel_values"]).logits.argmax(-1) == batch["labels"]).float()
        for batch in load_batches(Source(str(data), batch_size=3), model, str(tmp_path))
    ]
    folder = saved(model, tmp_path / "m")
    run = measure_checkpoints([folder], Source(str(data), batch_size=3))
    assert run.quality["accuracy"] == torch.cat(correct).mean().item()
    assert any("no preprocessor_config.json" in note for note in run.settings["notes"])
    without = measure_checkpoints([folder], Source(str(data)), labels="model")
    assert without.quality == {}
    assert math.isfinite(without.held_out[0].blocks[0].AF_up)


@pytest.mark.parametrize("labels", ["data", "model", None])
@pytest.mark.parametrize("name", [*models.LANGUAGE_MODELS, *models.VISION_MODELS])
def test_every_architecture_can_be_measured(tmp_path: Path, name: str, labels: str | None) -> None:
    model = {**models.LANGUAGE_MODELS, **models.VISION_MODELS}[name]()
    folder = saved(model, tmp_path / "m")
    if name in models.VISION_MODELS:
        data = write_images(tmp_path / "data", [str(i) for i in range(10)], each=1)
    else:
        kind = {"t5": "pairs", "bert": "masked"}.get(name, "causal")
        words_tokenizer(folder, kind)
        rows = [{"text": TEXT, "summary": "a lazy dog"}, {"text": "the fox", "summary": "it"}] * 4
        data = write_jsonl(tmp_path / "a.jsonl", rows)
    options = {} if name in (*models.VISION_MODELS, "t5") else {"text_column": "text"}
    run = measure_checkpoints([folder], Source(str(data), **options), labels=labels)
    (report,) = run.held_out
    assert 0.0 < report.density < 1.0
    for block in report.blocks:
        assert math.isnan(block.AF_up) == (labels is None)
        if labels is not None:
            deviation = block.derivative_density_by_identity / block.derivative_density - 1.0
            assert abs(deviation) < 1e-4
    if labels is None and name not in models.VISION_MODELS:
        assert run.quality["loss"] > 0


def test_no_more_batches_are_made_than_are_measured(tmp_path: Path, text: Source) -> None:
    folder = saved(models.gpt2(), tmp_path / "m")
    seen: list[tuple[int, int | None]] = []
    run = measure_checkpoints(
        [folder], text, labels=None, max_batches=2, on_batch=lambda _, *told: seen.append(told[:2])
    )
    assert seen == [(0, 2), (1, 2), (2, 2)]
    assert run.held_out[0].blocks[0].samples == 4
    digits = saved(models.vit(), tmp_path / "v")
    seen.clear()
    measure_checkpoints(
        [digits],
        Source("digits", batch_size=100),
        labels=None,
        max_batches=50,
        on_batch=lambda _, *told: seen.append(told[:2]),
    )
    assert seen == [(done, 4) for done in range(5)]


def test_checkpoints_are_put_in_the_order_of_their_steps(tmp_path: Path, text: Source) -> None:
    late = saved(models.gpt2(), tmp_path / "run" / "last", step=200)
    early = saved(models.gpt2(), tmp_path / "run" / "checkpoint-90")
    run = measure_checkpoints([late, early], text)
    assert run.held_out_steps == [90, 200]
    assert run.settings["checkpoints"] == [str(early), str(late)]
    alone = measure_checkpoints([late], text)
    assert str(run.held_out[1]) == str(alone.held_out[0]) != str(run.held_out[0])
    assert run.quality == alone.quality
    assert [log["step"] for log in run.logs] == [90, 200]
    assert run.name == "run"


def test_without_steps_the_order_given_counts(tmp_path: Path, text: Source) -> None:
    folders = [saved(models.gpt2(), tmp_path / name) for name in ("z", "checkpoint-5")]
    run = measure_checkpoints(folders, text, labels=None)
    assert run.held_out_steps == [0, 1]
    assert run.settings["checkpoints"] == [str(folder) for folder in folders]


def test_the_steps_are_those_the_trainer_wrote(tmp_path: Path) -> None:
    data = list(load_batches(Source("digits", batch_size=1), models.vit(), ""))[:8]
    rows = [{key: tensor[0] for key, tensor in batch.items()} for batch in data]
    arguments = TrainingArguments(
        str(tmp_path), max_steps=4, save_steps=2, report_to=[], disable_tqdm=True, use_cpu=True
    )
    Trainer(models.vit(), arguments, train_dataset=rows).train()
    for folder in tmp_path.glob("checkpoint-*"):
        folder.rename(folder.with_name(f"renamed{folder.name[-1]}"))
    run = measure_checkpoints(sorted(tmp_path.glob("renamed*"))[::-1], Source("digits"), None, 1)
    assert run.held_out_steps == [2, 4]


def test_model_labels_are_the_same_each_time_and_the_callers_random_numbers_go_on(
    tmp_path: Path, text: Source
) -> None:
    folder = saved(models.gpt2(), tmp_path / "m")
    one = measure_checkpoints([folder], text, labels="model")
    torch.manual_seed(123)
    state = torch.random.get_rng_state()
    two = measure_checkpoints([folder], text, labels="model")
    assert str(one.held_out) == str(two.held_out)
    assert str(one.held_out) != str(measure_checkpoints([folder], text).held_out)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_checkpoints_that_do_not_go_together_are_refused(tmp_path: Path, text: Source) -> None:
    one, other = (saved(models.gpt2(), tmp_path / name, step=7) for name in ("a", "b"))
    with pytest.raises(CheckpointError, match=r"two of the same step.*steppe report"):
        measure_checkpoints([one, other], text)
    with pytest.raises(CheckpointError, match="named twice"):
        measure_checkpoints([one, one], text)
    model = models.opt()
    with pytest.raises(CheckpointError, match=r"c: has 2 blocks from model\.decoder.*a has 2 blo"):
        measure_checkpoints([one, saved(model, tmp_path / "c", step=8)], text, labels=None)
    with pytest.raises(CheckpointError, match="no such folder"):
        measure_checkpoints([one, tmp_path / "nowhere-9"], text)
    (one / "trainer_state.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"trainer_state.json: damaged \(KeyError"):
        measure_checkpoints([one], text)


def test_wrong_numbers_and_data_are_refused(tmp_path: Path, text: Source) -> None:
    folder = saved(models.gpt2(), tmp_path / "m")
    with pytest.raises(ValueError, match="at least one checkpoint"):
        measure_checkpoints([], text)
    with pytest.raises(ValueError, match="max_batches=0"):
        measure_checkpoints([folder], text, max_batches=0)
    with pytest.raises(DataError, match="its tokens are bytes"):
        measure_checkpoints([folder], Source("pydoc"))
