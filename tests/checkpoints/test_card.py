"""The section of the model card: true, in place, and nobody else's text is touched."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from huggingface_hub import HfApi, ModelCard, RepoUrl, repocard
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import GPT2LMHeadModel, PreTrainedModel, Trainer, TrainingArguments

import models
import steppe
from checkpoints.saved_models import sparsified
from steppe.errors import OutputError
from steppe.plugins.applied import sparsification_of
from steppe.runs import RUN_FILE, Run, write_run
from steppe.training import SteppeCallback

BEGIN, END = "<!-- steppe:begin", "<!-- steppe:end -->"
PLUGINS = (steppe.ZerothBias, steppe.RestrictedNorm, steppe.JumpingSquaredReLU)  # of `sparsified`


def card_of(folder: Path) -> str:
    return (folder / "README.md").read_bytes().decode("utf-8")


def section_of(card: str) -> str:
    """The one section of a card."""
    assert card.count(BEGIN) == card.count(END) == 1
    return card[card.index(BEGIN) : card.index(END)]


def code_of(card: str) -> str:
    (code,) = re.findall(r"```python\n(.*?)```", section_of(card), re.DOTALL)
    return code


def ran_in(folder: Path, card: str, monkeypatch: pytest.MonkeyPatch, **given: Any) -> Any:
    """The `model` that a card's code makes."""
    monkeypatch.chdir(folder)
    exec(code_of(card), given)
    return given["model"].eval()


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return model.eval()(**models.inputs_for(model)).logits


def run_of(model: nn.Module, plugins: list[dict[str, Any]] | None = None) -> Run:
    """The record of a run with densities, of a model with the plug-ins of another or of none."""
    sparsification = sparsification_of(model)
    own = [] if sparsification is None else sparsification.record()["plugins"]
    batches = [models.inputs_for(model)]
    report = steppe.measure(model, batches, labels=None)
    return Run(
        "a", "GPT2LMHeadModel", 5.0, plugins=own if plugins is None else plugins,
        steps=[7, 9], training=[replace(report, density=0.25), replace(report, density=0.5)],
        held_out_steps=[8, 9], held_out=[report, replace(report, density=0.123456)],
    )  # fmt: skip


# ---- what it says


@pytest.mark.parametrize("name", ["gpt2", "t5", "vit", "llama"])
def test_the_code_of_the_section_loads_the_model(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = sparsified(name)
    model.save_pretrained(tmp_path)
    loaded = ran_in(tmp_path, card_of(tmp_path), monkeypatch)
    assert type(loaded) is type(model)
    assert torch.equal(logits(loaded), logits(model))
    assert not torch.equal(logits(steppe.restore_(loaded)), logits(model)), "can it fail?"


def test_a_tower_saved_alone_has_a_section_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = steppe.sparsify_(models.t5(), [steppe.JumpingSquaredReLU()])
    numbers = {}
    for folder, saved in (("whole", model), ("tower", model.decoder)):
        saved.save_pretrained(tmp_path / folder)
        card = card_of(tmp_path / folder)
        numbers[folder] = len(steppe.find_blocks(saved))
        assert f"in {numbers[folder]} block" in card
        assert type(ran_in(tmp_path / folder, card, monkeypatch)) is type(saved)
    assert numbers["whole"] > numbers["tower"]


def test_the_section_says_which_plug_ins_with_which_settings(tmp_path: Path) -> None:
    sparsified().save_pretrained(tmp_path)
    section = section_of(card_of(tmp_path))
    record = json.loads((tmp_path / "config.json").read_text())["steppe"]
    for entry in record["plugins"]:
        (kind,) = (kind for kind in PLUGINS if kind.key == entry["plugin"])
        (line,) = (line for line in section.splitlines() if line.startswith(f"- `{kind.__name__}("))
        again = eval(line[len("- `") : line.index("`", 3)], {kind.__name__: kind})
        assert {"blocks": entry["blocks"], **again.settings()} == entry
        assert line.endswith("in 2 blocks")
    assert "Density" not in section
    data = ModelCard(card_of(tmp_path)).data
    assert data.tags == ["steppe"]
    assert data.library_name == "transformers"


def test_a_plug_in_and_a_class_of_the_users_own_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = steppe.sparsify_(Mine(models.gpt2().config).eval(), [steppe.ZerothBias(), Twice(3.0)])
    model.save_pretrained(tmp_path)
    card = card_of(tmp_path)
    assert "plugins=[Twice]" in code_of(card)
    assert f"from {__name__} import Mine" in code_of(card)
    assert "- `Twice(factor=3.0)` in 2 blocks" in card
    with monkeypatch.context() as patch:
        loaded = ran_in(tmp_path, card, patch)
    assert isinstance(loaded, Mine)
    assert torch.equal(logits(loaded), logits(model))


def test_a_class_that_cannot_be_imported_is_told_as_ones_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Local(GPT2LMHeadModel):
        pass

    model = steppe.sparsify_(Local(models.gpt2().config), [steppe.ZerothBias()])
    model.save_pretrained(tmp_path)
    card = card_of(tmp_path)
    assert "# Local is a class of your own" in code_of(card)
    assert isinstance(ran_in(tmp_path, card, monkeypatch, Local=Local), Local)


class Mine(GPT2LMHeadModel):
    """A class of the user's."""


@dataclass(frozen=True)
class Twice(steppe.Plugin):
    """Scales what a block's second layer gives; not registered."""

    key: ClassVar[str] = "twice"
    factor: float = 2.0

    def check(self, block: steppe.MLPBlock) -> None:
        pass

    def apply(self, model: nn.Module, blocks: Any, journal: Any) -> list[Any]:
        for block in blocks:
            journal.set_attribute(block.act_slot, Scaled(block.act, self.factor))
        return []


class Scaled(nn.Module):
    """An activation times a factor."""

    def __init__(self, act: Any, factor: float) -> None:
        super().__init__()
        self.act, self.factor = act, factor

    def forward(self, p: Tensor) -> Tensor:
        return self.factor * self.act(p)


def test_a_density_is_that_of_the_record_beside_the_model(tmp_path: Path) -> None:
    model = sparsified()
    write_run(run_of(model), tmp_path / RUN_FILE)
    model.save_pretrained(tmp_path)
    section = section_of(card_of(tmp_path))
    assert "12.35 % on held-out data after step 9" in section
    assert "37.50 % over the measured training steps" in section
    write_run(run_of(model, plugins=[]), tmp_path / RUN_FILE)
    model.save_pretrained(tmp_path)
    assert "Density" not in section_of(card_of(tmp_path)), "of another model"
    (tmp_path / RUN_FILE).unlink()
    write_run(replace(run_of(model), held_out=[], held_out_steps=[]), tmp_path / RUN_FILE)
    model.save_pretrained(tmp_path)
    assert "run: 37.50 % over" in card_of(tmp_path)


def test_a_damaged_record_of_a_run_is_told_and_gives_no_density(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / RUN_FILE).write_text("{")
    sparsified().save_pretrained(tmp_path)
    assert "states no density" in caplog.text
    assert "Density" not in section_of(card_of(tmp_path))


# ---- the rest of the card


METADATA = """\
---
license: mit  # ours
tags: [a, b]
model-index:
- name: x
  results:
  - task: {type: text-generation}
    dataset: {type: t, name: T}
    metrics:
    - {type: loss, value: 1.5, odd: kept}
---
"""
AS_MODEL_CARD = "---\nlicense: mit\ntags:\n- a\n---\n"
BODY = "# Mine\n\ntext – with `code`  \n\n---\n\nend\n"
CARDS = {
    "text": BODY,
    "metadata as written by hand": METADATA + BODY,
    "metadata that are no table": "---\n- a\n---\n" + BODY,
    "metadata that are no YAML": "---\na: [\n---\n" + BODY,
    "windows": (METADATA + BODY).replace("\n", "\r\n"),
    "no end of line": "# Mine",
}


@pytest.mark.parametrize("card", CARDS.values(), ids=CARDS)
def test_the_text_and_metadata_of_a_card_stay_byte_by_byte(card: str, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_bytes(card.encode())
    model = sparsified()
    model.save_pretrained(tmp_path)
    first = card_of(tmp_path)
    assert first.startswith(card)
    assert "ZerothBias(" in section_of(first)
    if "\r\n" in card:
        assert first.count("\r\n") == first.count("\n")
    # An author writes below the section, and the model changes.
    (tmp_path / "README.md").write_bytes(first.encode() + b"## After\n")
    steppe.sparsify_(steppe.restore_(model), [steppe.RisingThreshold()])
    model.save_pretrained(tmp_path)
    second = card_of(tmp_path)
    assert second.startswith(card)
    assert second.endswith("## After\n")
    assert "RisingThreshold(" in section_of(second)
    assert "ZerothBias(" not in second
    model.save_pretrained(tmp_path)
    assert card_of(tmp_path) == second
    steppe.restore_(model).save_pretrained(tmp_path)
    plain = card_of(tmp_path)
    assert plain.startswith(card)
    assert plain.endswith("## After\n")
    assert "steppe" not in plain


def test_metadata_get_the_tag_where_nothing_else_changes(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text(AS_MODEL_CARD + BODY)
    for _ in range(2):
        sparsified().save_pretrained(tmp_path)
        card = card_of(tmp_path)
        assert card.startswith(AS_MODEL_CARD.replace("- a\n", "- a\n- steppe\n") + BODY)


def test_text_after_a_lost_end_mark_stays(tmp_path: Path) -> None:
    model = sparsified()
    model.save_pretrained(tmp_path)
    broken = card_of(tmp_path).replace(END, "mine")
    (tmp_path / "README.md").write_text(broken)
    for _ in range(2):
        model.save_pretrained(tmp_path)
        card = card_of(tmp_path)
        assert card.startswith(broken)
        assert card.count(BEGIN) == 2
        assert card.count(END) == 1


def test_a_card_that_is_no_text_stays_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "README.md").write_bytes(b"\xff\xfe\x00")
    with caplog.at_level(logging.WARNING):
        sparsified().save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_bytes() == b"\xff\xfe\x00"
    assert "stays as it is" in caplog.text


def test_a_model_without_plug_ins_gets_nothing(tmp_path: Path) -> None:
    models.gpt2().save_pretrained(tmp_path)
    steppe.restore_(sparsified()).save_pretrained(tmp_path)
    assert not (tmp_path / "README.md").exists()
    (tmp_path / "README.md").write_text(METADATA + BODY)
    models.gpt2().save_pretrained(tmp_path)
    assert card_of(tmp_path) == METADATA + BODY


def test_another_process_than_the_one_that_saves_writes_no_card(tmp_path: Path) -> None:
    sparsified().save_pretrained(tmp_path)
    (tmp_path / "README.md").unlink()
    sparsified().save_pretrained(tmp_path, is_main_process=False)
    assert not (tmp_path / "README.md").exists()


def test_a_card_is_never_half_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "README.md").write_text(BODY)

    def half(path: Path, content: bytes) -> int:
        with path.open("wb") as file:
            file.write(content[: len(content) // 2])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", half)
    with pytest.raises(OutputError, match="No space left"):
        sparsified().save_pretrained(tmp_path)
    assert card_of(tmp_path) == BODY
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


# ---- on its way to the hub


@dataclass
class Hub:
    """A hub that keeps what would be sent.

    Attributes:
        files: the content of each file that was sent last, by path.
        card: the ``README.md`` that the repository has before, if any.
    """

    files: dict[str, bytes]
    card: Path | None = None

    @property
    def sent(self) -> str:
        """The card that was sent."""
        return self.files["README.md"].decode()

    def saved_as(self, folder: Path) -> Path:
        """What was sent, under the repository's name in a folder."""
        for name, content in self.files.items():
            path = folder / "me" / "sparse" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        return folder


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Hub:
    """In place of the network, at the boundary of huggingface_hub."""
    fake = Hub({})

    def create_commit(self: HfApi, repo_id: str, operations: Any, **kwargs: Any) -> None:
        fake.files = {
            one.path_in_repo: Path(one.path_or_fileobj).read_bytes() for one in operations
        }

    def upload_folder(self: HfApi, *, folder_path: str, **kwargs: Any) -> None:
        found = [path for path in Path(folder_path).iterdir() if path.is_file()]
        fake.files = {path.name: path.read_bytes() for path in found}

    def download(repo_id: str, filename: str, **kwargs: Any) -> str:
        if fake.card is None:
            raise LocalEntryNotFoundError("there is no card")
        return str(fake.card)

    def create_repo(self: HfApi, repo_id: str, **kwargs: Any) -> RepoUrl:
        return RepoUrl(f"https://huggingface.co/{repo_id}")

    assert issubclass(LocalEntryNotFoundError, EntryNotFoundError)
    for method in (create_commit, upload_folder, create_repo):
        monkeypatch.setattr(HfApi, method.__name__, method)
    monkeypatch.setattr(repocard, "hf_hub_download", download)
    return fake


def push(model: PreTrainedModel, folder: Path) -> None:
    model.push_to_hub("me/sparse")


def save_and_push(model: PreTrainedModel, folder: Path) -> None:
    model.save_pretrained(folder, push_to_hub=True, repo_id="me/sparse")
    assert "me/sparse" in card_of(folder)


@pytest.mark.parametrize("send", [push, save_and_push])
def test_what_is_pushed_has_the_record_and_the_section(
    send: Callable[[PreTrainedModel, Path], None],
    hub: Hub,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = sparsified()
    send(model, tmp_path / "out")
    assert {"README.md", "config.json", "model.safetensors"} <= set(hub.files)
    assert json.loads(hub.files["config.json"])["steppe"]["plugins"]
    assert "steppe" in ModelCard(hub.sent).data.tags
    assert "transformers" in hub.sent.partition(BEGIN)[0], "the text of Transformers' card stays"
    loaded = ran_in(hub.saved_as(tmp_path / "there"), hub.sent, monkeypatch)
    assert torch.equal(logits(loaded), logits(model))
    # The repository has that card now, and its author has written into it.
    hub.card = tmp_path / "README.md"
    hub.card.write_text(hub.sent + "## After\n")
    send(steppe.sparsify_(steppe.restore_(model), [steppe.RisingThreshold()]), tmp_path / "out")
    assert hub.sent.endswith("## After\n")
    assert "RisingThreshold(" in section_of(hub.sent)
    assert "ZerothBias(" not in hub.sent


def test_a_plain_model_is_pushed_as_ever(hub: Hub) -> None:
    models.gpt2().push_to_hub("me/plain")
    assert "steppe" not in hub.sent


def adapted() -> nn.Module:
    """A model with an adapter and plug-ins."""
    config = LoraConfig(
        r=2, target_modules=["c_attn"], fan_in_fan_out=True, init_lora_weights=False
    )
    return get_peft_model(sparsified(), config).eval()


def test_an_adapter_has_a_section_that_loads_it(
    tmp_path: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = adapted()
    for _ in range(2):
        model.save_pretrained(tmp_path / "one")
    card = card_of(tmp_path / "one")
    assert "PEFT" in card.partition(BEGIN)[0], "the text of PEFT's card stays"
    assert {"peft", "steppe"} & {*ModelCard(card).data.tags, ModelCard(card).data.library_name}
    base = {"base": steppe.restore_(sparsified())}
    want = model(**models.inputs_for(model.get_base_model())).logits
    loaded = ran_in(tmp_path / "one", card, monkeypatch, **base)
    assert torch.equal(loaded(**models.inputs_for(loaded.get_base_model())).logits, want)
    model.push_to_hub("me/sparse")
    assert {"adapter_config.json", "steppe_config.json"} <= set(hub.files)
    base = {"base": steppe.restore_(sparsified())}
    loaded = ran_in(hub.saved_as(tmp_path / "there"), hub.sent, monkeypatch, **base)
    assert torch.equal(loaded(**models.inputs_for(loaded.get_base_model())).logits, want)


def test_an_adapter_with_a_plug_in_of_the_users_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True)
    model = get_peft_model(steppe.sparsify_(models.gpt2(), [Twice(3.0)]), config)
    model.save_pretrained(tmp_path)
    loaded = ran_in(tmp_path, card_of(tmp_path), monkeypatch, base=models.gpt2())
    assert sparsification_of(loaded).record() == sparsification_of(model).record()


@pytest.mark.parametrize("adapter", [False, True])
def test_the_trainer_pushes_a_card_with_the_section(
    adapter: bool, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = adapted() if adapter else sparsified()
    options = {"logging_steps": 1, "save_steps": 1, "eval_strategy": "steps", "eval_steps": 1}
    args = TrainingArguments(
        str(tmp_path / "out"),
        max_steps=2,
        per_device_train_batch_size=2,
        report_to="none",
        use_cpu=True,
        hub_model_id="me/sparse",
        **options,
    )
    rows = [{"input_ids": ids, "labels": ids} for ids in models.token_ids(4)]
    trainer = Trainer(
        model=model, args=args, train_dataset=rows, eval_dataset=rows,
        callbacks=[SteppeCallback(every=1)],
    )  # fmt: skip
    trainer.train()
    assert "Density" not in card_of(tmp_path / "out" / "checkpoint-1")
    trainer.push_to_hub()
    assert "Training hyperparameters" in hub.sent, "the Trainer's card stays"
    section = section_of(hub.sent)
    assert "on held-out data after step 2" in section
    given = {"base": steppe.restore_(sparsified())} if adapter else {}
    assert "steppe_config.json" in hub.files if adapter else "config.json" in hub.files
    loaded = ran_in(hub.saved_as(tmp_path / "there"), hub.sent, monkeypatch, **given)
    assert sparsification_of(loaded).record() == sparsification_of(model).record()
