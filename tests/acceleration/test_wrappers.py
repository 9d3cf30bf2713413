"""Models within models: the numbers, and the verbs, are those of the model inside."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from transformers import (
    BartConfig,
    BartForSequenceClassification,
    CLIPVisionConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LongformerConfig,
    LongformerForMaskedLM,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    SpeechEncoderDecoderConfig,
    SpeechEncoderDecoderModel,
    StoppingCriteria,
    T5ForTokenClassification,
    VisionEncoderDecoderConfig,
    VisionEncoderDecoderModel,
    ViTConfig,
    Wav2Vec2Config,
)

import models
import steppe
from steppe.blocks.find import decoders, shifts_labels
from steppe.errors import AccelerationError, SparsificationError
from steppe.measures.watch import Monitor
from steppe.plugins.applied import sparsification_of
from steppe.training import SteppeCallback


class Task(nn.Module):
    """What a training framework makes of a model, with a head of its own."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.head = nn.Linear(3, 3)

    def forward(self, **batch: Any) -> Any:
        return self.model(**batch)


class HalfLoss(Task):
    """One that changes the loss."""

    def forward(self, **batch: Any) -> Any:
        output = self.model(**batch)
        output.loss = output.loss * 0.5
        return output


WRAPPERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "task": Task,
    "twice": lambda model: Task(Task(model)),
    "averaged": AveragedModel,
    "half the loss": HalfLoss,
}


def uneven_batch() -> dict[str, Tensor]:
    """Two samples with 2 and 9 labels."""
    ids = models.token_ids(2, 9)
    labels = ids.clone()
    labels[0, 2:] = -100
    return {"input_ids": ids, "labels": labels}


# ---- measured


@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("name", ["gpt2", "t5", "llama", "opt"])
def test_a_wrapper_changes_no_number(name: str, wrapper: str) -> None:
    model, batch = models.LANGUAGE_MODELS[name]().eval(), uneven_batch()
    want = steppe.measure(model, [batch]).to_dict()
    wrapped = WRAPPERS[wrapper](model)
    if wrapper != "half the loss":
        have = steppe.measure(wrapped, [batch]).to_dict()
        for key in ("AF_up_per_block", "tokens_per_block", "density_per_block"):
            assert have[key] == pytest.approx(want[key], rel=1e-6), key
    with steppe.watch(wrapped, gradients=True) as monitor:
        (wrapped(**batch).loss * 3.0).backward()
    have = monitor.report().to_dict()
    for key in ("AF_up_per_block", "AF_down_per_block", "tokens_per_block"):
        assert have[key] == pytest.approx(want[key], rel=1e-5), key


def test_the_numbers_are_those_of_the_samples_one_by_one() -> None:
    model, batch = models.gpt2().eval(), uneven_batch()
    alone = [
        steppe.measure(model, [{key: value[s : s + 1] for key, value in batch.items()}])
        for s in (0, 1)
    ]
    want = sum(report.blocks[0].AF_up for report in alone) / 2
    have = steppe.measure(Task(model), [batch]).blocks[0].AF_up
    assert have == pytest.approx(want, rel=1e-5)


def test_the_longest_sequence_is_that_of_the_model_inside() -> None:
    task = steppe.sparsify_(Task(models.gpt2()), [steppe.ZerothBias()])
    assert task.model.transformer.h[0].mlp.c_fc.zeroth_bias.shape[0] == models.MAX_TOKENS


# ---- changed


@pytest.mark.parametrize("wrapper", ["task", "twice", "averaged"])
def test_plug_ins_of_the_model_inside_are_found(wrapper: str) -> None:
    model = steppe.sparsify_(models.gpt2(), [steppe.ZerothBias(), steppe.JumpingSquaredReLU(0.5)])
    wrapped = WRAPPERS[wrapper](model)
    names = [name for name, _ in wrapped.named_parameters() if "zeroth_bias" in name]
    assert sorted(steppe.added_parameters(wrapped)) == sorted(names)
    steppe.advance_(wrapped, 0.5)
    for parameter in steppe.added_parameters(wrapped).values():
        nn.init.constant_(parameter.detach(), 7.0)
    steppe.project_(wrapped)
    assert all(p.max() <= 0.1 for p in steppe.added_parameters(wrapped).values())
    steppe.restore_(wrapped)
    assert sparsification_of(wrapped) is None
    if wrapper == "averaged":
        assert sparsification_of(model) is not None, "the copy alone is restored"
        steppe.restore_(model)


@pytest.mark.parametrize("wrapper", ["task", "averaged"])
def test_thresholds_of_the_model_inside_are_folded(wrapper: str) -> None:
    model = steppe.sparsify_(models.gpt2().eval(), [steppe.RisingThreshold()])
    for block in steppe.find_blocks(model):
        block.up.threshold.multiple.fill_(1.0)
        block.up.threshold.deviation.fill_(0.5)
    wrapped = WRAPPERS[wrapper](model).eval()
    batch = {"input_ids": models.token_ids()}
    want = wrapped(**batch).logits
    steppe.fold_(wrapped)
    torch.testing.assert_close(wrapped(**batch).logits, want, rtol=1e-5, atol=1e-5)
    assert sparsification_of(wrapped) is None


def test_an_accelerated_model_inside_is_restored() -> None:
    averaged = AveragedModel(steppe.accelerate_(models.gpt2().eval()))
    steppe.restore_(averaged)
    assert {type(module) for module in averaged.module.modules()} == {
        type(module) for module in models.gpt2().modules()
    }


def test_two_models_with_plug_ins_are_told_apart() -> None:
    model = steppe.sparsify_(models.gpt2(), [steppe.ZerothBias()])
    both = nn.ModuleDict({"model": model, "ema": AveragedModel(model)})
    for verb in (steppe.restore_, steppe.project_, steppe.added_parameters):
        with pytest.raises(SparsificationError, match=r"2 models.*ema\.module, model"):
            verb(both)


@pytest.mark.parametrize("place", ["model", "model.decoder", "model.decoder.layers"])
def test_a_part_of_a_model_with_plug_ins_gets_no_more(place: str) -> None:
    model = models.opt()
    attributes = [set(vars(module)) for module in model.modules()]
    steppe.sparsify_(model, [steppe.ZerothBias()])
    with pytest.raises(SparsificationError, match=r"OPTForCausalLM"):
        steppe.sparsify_(model.get_submodule(place), [steppe.JumpingSquaredReLU()])
    steppe.sparsify_(model, [steppe.JumpingSquaredReLU()])
    steppe.restore_(model)
    assert [set(vars(module)) for module in model.modules()] == attributes
    steppe.sparsify_(model.get_submodule(place), [steppe.JumpingSquaredReLU()])


def test_two_accelerated_models_are_told_apart() -> None:
    both = nn.ModuleList([steppe.accelerate_(models.opt()), steppe.accelerate_(models.opt())])
    with pytest.raises(AccelerationError, match=r"2 accelerated models: 0, 1\. Name one"):
        steppe.restore_(both)


def test_added_parameters_of_a_part_are_those_within_it() -> None:
    both = nn.ModuleDict({"one": models.opt(), "other": models.opt()})
    steppe.sparsify_(both, [steppe.ZerothBias(max_tokens=8)])
    own = dict(both["one"].named_parameters())
    found = steppe.added_parameters(both["one"])
    assert len(found) == 2
    assert all(own[name] is parameter for name, parameter in found.items())


@pytest.mark.parametrize("wrapper", ["bare", "averaged", "plain"])
def test_what_a_wrapper_folds_is_saved_whole(wrapper: str, tmp_path: Any) -> None:
    model = models.llama()
    steppe.sparsify_(model, [steppe.RisingThreshold(multiple=0.5)])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    batch = {"input_ids": models.token_ids(), "labels": models.token_ids()}
    with steppe.constrain_(model, optimizer, total_steps=2):
        for _ in range(2):
            model.train()(**batch).loss.backward()
            optimizer.step()
    wrapped = {"bare": lambda one: one, "averaged": AveragedModel, "plain": nn.ModuleList}[wrapper](
        [model] if wrapper == "plain" else model
    )
    steppe.fold_(wrapped)
    (inner,) = [one for one in wrapped.modules() if isinstance(one, LlamaForCausalLM)]
    inner.eval().save_pretrained(tmp_path)
    loaded = LlamaForCausalLM.from_pretrained(tmp_path).eval()
    assert any(name.endswith("gate_proj.bias") for name in loaded.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(loaded(**batch).logits, inner(**batch).logits)


def test_more_plug_ins_go_into_the_same_model() -> None:
    model = steppe.sparsify_(models.gpt2(), [steppe.ZerothBias()])
    for other in (Task(model), model.transformer):
        with pytest.raises(SparsificationError, match="were put into GPT2LMHeadModel"):
            steppe.sparsify_(other, [steppe.RestrictedNorm()])
    steppe.sparsify_(model, [steppe.RestrictedNorm()])


# ---- padding


def speech() -> nn.Module:
    encoder = Wav2Vec2Config(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=48,
        conv_dim=(8,), conv_stride=(4,), conv_kernel=(4,), num_feat_extract_layers=1,
        num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2, hidden_act="relu",
        mask_time_prob=0.0,
    )  # fmt: skip
    config = SpeechEncoderDecoderConfig.from_encoder_decoder_configs(encoder, decoder())
    return SpeechEncoderDecoderModel(config=config).eval()


def vision() -> nn.Module:
    encoder = ViTConfig(**models.IMAGES, hidden_act="relu")
    config = VisionEncoderDecoderConfig.from_encoder_decoder_configs(encoder, decoder())
    return VisionEncoderDecoderModel(config=config).eval()


def decoder() -> GPT2Config:
    return GPT2Config(
        vocab_size=50, n_embd=16, n_layer=1, n_head=2, n_positions=32,
        activation_function="relu", add_cross_attention=True, is_decoder=True,
    )  # fmt: skip


@pytest.mark.parametrize("wrapper", [lambda model: model, Task])
@pytest.mark.parametrize("kind", [vision, speech])
def test_labels_tell_the_padding_of_every_decoder(
    kind: Callable[[], nn.Module], wrapper: Callable[[nn.Module], nn.Module]
) -> None:
    model = kind()
    model.config.decoder_start_token_id, model.config.pad_token_id = 0, 2
    labels = torch.randint(3, 50, (3, 8))
    labels[0, 3:] = labels[1, 5:] = -100
    signal = (
        {"pixel_values": models.images(3)}
        if kind is vision
        else {"input_values": torch.randn(3, 64)}
    )
    block = steppe.measure(wrapper(model), [{**signal, "labels": labels}]).blocks[-1]
    assert "decoder" in block.name
    assert block.tokens == int((labels != -100).sum()) == 16


@pytest.mark.parametrize("plugins", [[], [steppe.ZerothBias(max_tokens=16)]])
@pytest.mark.parametrize("with_mask", [False, True])
def test_what_a_stack_pads_itself_counts_nowhere(
    with_mask: bool, plugins: list[steppe.Plugin]
) -> None:
    config = LongformerConfig(
        **models.TEXT,
        attention_window=[8, 8],
        hidden_act="relu",
        pad_token_id=1,
    )
    model = LongformerForMaskedLM(config).eval()
    if plugins:
        steppe.sparsify_(model, plugins)
    batch = {"input_ids": torch.randint(3, 60, (1, 14))}
    if with_mask:
        batch["attention_mask"] = torch.ones(1, 14, dtype=torch.long)
        batch["attention_mask"][0, -2:] = 0
    with steppe.watch(model) as monitor, torch.no_grad():
        model(**batch)
    assert monitor.report().blocks[0].tokens == (12 if with_mask else 14)


class Pair(NamedTuple):
    pixels: Tensor
    labels: Tensor


def test_a_named_tuple_is_a_batch() -> None:
    model = models.vit().eval()
    loss = lambda output, batch: nn.functional.cross_entropy(output.logits, batch.labels)  # noqa: E731
    pair = Pair(models.images(), torch.tensor([1, 2]))
    have = steppe.measure(model, [pair], loss=loss)
    want = steppe.measure(model, [{"pixel_values": pair.pixels, "labels": pair.labels}])
    assert have.blocks[0].AF_up == pytest.approx(want.blocks[0].AF_up, rel=1e-6)


# ---- generation


def generator() -> tuple[GPT2LMHeadModel, Tensor, int]:
    """A model and two prompts: it ends the first at once, and the second never."""
    torch.manual_seed(0)
    model = models.gpt2().eval()
    nn.init.normal_(model.transformer.wte.weight, std=0.5)
    for seed in range(200):
        prompts = models.token_ids(2, 3, seed)
        new = model.generate(
            prompts, max_new_tokens=20, do_sample=False, eos_token_id=None, pad_token_id=2
        )[:, 3:]
        end = int(new[0, 0])
        if end not in new[1]:
            return model, prompts, end
    raise AssertionError("no such prompts")


@pytest.mark.parametrize("how", ["argument", "config", "list", "positional"])
def test_rows_that_have_ended_count_no_more(how: str) -> None:
    model, prompts, end = generator()
    options: dict[str, Any] = {"max_new_tokens": 20, "do_sample": False, "pad_token_id": 2}
    if how == "argument":
        options["eos_token_id"] = end
    elif how == "list":
        options["eos_token_id"] = [end, 63]
    else:
        model.generation_config.eos_token_id = end
    plain = model.generate(prompts, **options)
    reports = []
    for batches in ([prompts], [prompts[:1], prompts[1:]]):
        with steppe.watch(model) as monitor:
            got = [model.generate(batch, **options) for batch in batches]
        reports.append(monitor.report().blocks[0])
    assert torch.equal(got[1][0], plain[1]), "generation itself is as it was"
    assert "generate" not in vars(model)
    together, alone = reports
    assert together.tokens == alone.tokens == 3 + 3 + 19
    assert together.density == alone.density


class Ends(StoppingCriteria):
    """A row ends with a token."""

    def __init__(self, end: int) -> None:
        self._end = end

    def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
        return input_ids[:, -1] == self._end


@pytest.mark.parametrize(
    "how", ["own criterion", "config replaced", "padding is the end", "uncached"]
)
def test_a_row_ends_however_it_is_told_to(how: str) -> None:
    model, prompts, end = generator()
    options: dict[str, Any] = {"max_new_tokens": 20, "do_sample": False, "pad_token_id": 2}
    options["eos_token_id"] = None if how == "own criterion" else end
    if how == "own criterion":
        options["stopping_criteria"] = [Ends(end)]
    elif how == "padding is the end":
        options["pad_token_id"] = end
    elif how == "uncached":
        options["use_cache"] = False
    counted = []
    for batches in ([prompts], [prompts[:1], prompts[1:]]):
        with steppe.watch(model) as monitor:
            if how == "config replaced":
                model.generation_config = copy.deepcopy(model.generation_config)
                model.generation_config.eos_token_id = options.pop("eos_token_id", end)
            for batch in batches:
                model.generate(batch, **options)
        counted.append(monitor.counts().tolist())
    # Tokens and entries; a sample is counted once a pass.
    assert counted[0] == counted[1]
    if how != "uncached":
        assert counted[0][0][3] == 3 + 3 + 19


def test_whoever_watches_at_the_same_time_counts_the_same() -> None:
    model, prompts, end = generator()
    options: dict[str, Any] = {"max_new_tokens": 20, "do_sample": False, "pad_token_id": 2}
    with steppe.watch(model) as outer, steppe.watch(model) as inner:
        model.generate(prompts, eos_token_id=end, **options)
    assert outer.report().blocks[0].tokens == inner.report().blocks[0].tokens == 3 + 3 + 19
    without = Monitor(model, steppe.find_blocks(model), counts_generation=False)
    with steppe.watch(model) as outer, without.attached():
        model.generate(prompts, eos_token_id=end, **options)
        model(prompts)
    assert without.report().blocks[0].tokens == 6
    assert outer.report().blocks[0].tokens == 3 + 3 + 19 + 6


def test_what_has_ended_is_forgotten_with_the_call_that_raises() -> None:
    model, prompts, end = generator()

    class Broken(StoppingCriteria):
        def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
            if input_ids.shape[1] > 8:
                raise RuntimeError("broken")
            return torch.zeros(len(input_ids), dtype=torch.bool)

    with steppe.watch(model) as monitor:
        with pytest.raises(RuntimeError, match="broken"):
            model.generate(
                prompts, max_new_tokens=20, do_sample=False, eos_token_id=end, pad_token_id=2,
                stopping_criteria=[Broken()],
            )  # fmt: skip
        monitor.reset()
        model(prompts)
    assert monitor.report().blocks[0].tokens == 6


def test_with_beams_all_rows_count() -> None:
    model, prompts, end = generator()
    passes: list[int] = []
    model.register_forward_pre_hook(
        lambda module, args, kwargs: passes.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    with steppe.watch(model) as monitor:
        model.generate(
            prompts, max_new_tokens=8, num_beams=2, do_sample=False, eos_token_id=end,
            pad_token_id=2,
        )  # fmt: skip
    assert monitor.report().blocks[0].tokens == sum(passes)


def test_an_evaluation_that_generates_counts_its_losses_alone(tmp_path: Any) -> None:
    ids = models.token_ids(8, 6)
    labels = models.token_ids(8, 5, seed=1)
    labels[:4, 3:] = -100
    data = [{"input_ids": i, "labels": y} for i, y in zip(ids, labels, strict=True)]
    callback = SteppeCallback(every=1)
    args = Seq2SeqTrainingArguments(
        str(tmp_path), max_steps=1, use_cpu=True, report_to=[], predict_with_generate=True,
        generation_max_length=12, save_strategy="no", eval_strategy="steps", eval_steps=1,
    )  # fmt: skip
    trainer = Seq2SeqTrainer(
        model=models.t5(), args=args, train_dataset=data, eval_dataset=data, callbacks=[callback]
    )
    trainer.train()
    (entry,) = callback.held_out_history
    assert entry["samples_per_block"] == [8, 8, 8, 8]
    assert entry["tokens_per_block"] == [48, 48, 32, 32]


def test_lightning_trains_the_model_beside_its_average() -> None:
    lightning = pytest.importorskip("steppe.training.lightning")
    model = steppe.sparsify_(models.gpt2(), [steppe.ZerothBias()])
    assert lightning._model_of(Task(model), ()) is model
    both = nn.ModuleDict({"model": model, "ema": AveragedModel(model)})
    assert lightning._model_of(both, ()) is model


# ---- the meaning of labels


def llava() -> nn.Module:
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**models.IMAGES),
        text_config=LlamaConfig(**models.TEXT, hidden_act="relu"),
        image_token_index=5,
    )
    return LlavaForConditionalGeneration(config).eval()


def test_the_text_of_a_vision_language_model_is_predicted_from_before() -> None:
    model = llava()
    assert shifts_labels(model)
    assert not shifts_labels(models.t5())
    ids = models.token_ids(2, 9).clamp(min=6)
    labels = ids.clone()
    labels[0, 3:] = -100
    batch = {"input_ids": ids, "labels": labels}
    alone = [
        steppe.measure(model, [{key: value[s : s + 1] for key, value in batch.items()}])
        for s in (0, 1)
    ]
    have = steppe.measure(model, [batch]).blocks[-1].AF_up
    want = sum(report.blocks[-1].AF_up for report in alone) / 2
    assert have == pytest.approx(want, rel=1e-5)


def test_one_label_a_sample_tells_no_padding() -> None:
    config = BartConfig(
        vocab_size=64, d_model=16, encoder_layers=1, decoder_layers=1, encoder_ffn_dim=32,
        decoder_ffn_dim=32, encoder_attention_heads=2, decoder_attention_heads=2,
        max_position_embeddings=32, pad_token_id=1, eos_token_id=2, num_labels=3,
    )  # fmt: skip
    model = BartForSequenceClassification(config).eval()
    ids = models.token_ids(2, 7).clamp(min=3)
    ids[:, -1] = 2
    with steppe.watch(model) as monitor, torch.no_grad():
        model(input_ids=ids, labels=torch.tensor([0, 2]))
    assert [block.tokens for block in monitor.report().blocks] == [14, 14]


def test_an_encoder_that_is_called_a_decoder_has_no_labels() -> None:
    model = T5ForTokenClassification(models.t5().config)
    stacks = {id(block.stack) for block in steppe.find_blocks(model)}
    parts = {id(part) for _, decoder in decoders(model) for part in decoder}
    assert not stacks & parts
