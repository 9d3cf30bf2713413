"""watch: its counts against the loops of oracles.py, and that nothing of it stays behind."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from functools import partial
from operator import attrgetter
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint
from transformers import BloomConfig, BloomForCausalLM

import models
import oracles
from steppe import (
    BlockPattern,
    JumpingSquaredReLU,
    MLPBlock,
    SShapedSquaredReLU,
    ZerothBias,
    advance_,
    find_blocks,
    restore_,
    sparsify_,
    watch,
)
from steppe.errors import BlocksNotFoundError
from steppe.measures.density import count_
from steppe.surgery.journal import Journal

pytestmark = [
    # Deprecated in Transformers 5, but the only name that the oldest supported version has.
    pytest.mark.filterwarnings(
        "ignore:.gradient_checkpointing_enable. is deprecated:FutureWarning"
    ),
    # What nn.TransformerEncoder says of itself.
    pytest.mark.filterwarnings("ignore:enable_nested_tensor is True:UserWarning"),
    pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning"),
    # What torch.compile does inside.
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning"),
    pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),
]

Slope = Callable[[Tensor], Tensor]
Counts = list[tuple[int, ...]]

ARCHITECTURES: dict[str, Callable[..., nn.Module]] = {
    **models.LANGUAGE_MODELS,
    **models.VISION_MODELS,
    "t5_gated": partial(models.t5, gated=True),
    "opt_post_norm": partial(models.opt, norm_first=False),
    "gpt_neox_sequential": partial(models.gpt_neox, parallel=False),
}
GATED = ("t5_gated", "llama", "qwen2")


class Recorder:
    """p and a of every block, one tensor ``[N, F]`` a call, as plain hooks see them.

    a is what the block's `down` receives, or another module that `receiver` names.
    """

    def __init__(
        self, model: nn.Module, receiver: Callable[[MLPBlock], nn.Module] = attrgetter("down")
    ) -> None:
        blocks = find_blocks(model)
        self.p: list[list[Tensor]] = [[] for _ in blocks]
        self.a: list[list[Tensor]] = [[] for _ in blocks]
        self._handles = []
        for block, p, a in zip(blocks, self.p, self.a, strict=True):
            see_a = receiver(block).register_forward_pre_hook(partial(_keep_input, a))
            see_p = block.activated.register_forward_hook(partial(_keep_output, p))
            self._handles += [see_p, see_a]

    def remove(self) -> None:
        """Take the hooks out."""
        for handle in self._handles:
            handle.remove()


def _keep_output(kept: list[Tensor], module: nn.Module, args: tuple[Any, ...], out: Tensor) -> None:
    kept.append(out.detach().clone().reshape(-1, out.shape[-1]))


def _keep_input(kept: list[Tensor], module: nn.Module, args: tuple[Any, ...]) -> None:
    _keep_output(kept, module, (), args[0])


def rectifier_slope(alpha: float, beta: float, p: Tensor) -> Tensor:
    return p.double().apply_(partial(oracles.rectifier_derivative, alpha=alpha, beta=beta))


relu_slope = partial(rectifier_slope, 1.0, 0.0)
jumping_slope = partial(rectifier_slope, 1.0, 0.5)


def slope_by_autograd(act: Callable[[Tensor], Tensor], p: Tensor) -> Tensor:
    p = p.clone().requires_grad_()
    return torch.autograd.grad(act(p).sum(), p)[0]


def expected(recorder: Recorder, slope: Slope, *counted: Tensor | None) -> Counts:
    """The oracle's counts per block; counted is bool in the order of the block's tokens."""
    rows = []
    for index, (p, a) in enumerate(zip(recorder.p, recorder.a, strict=True)):
        mask = counted[index % len(counted)] if counted else None
        if mask is None:
            mask = torch.ones(sum(map(len, p)), dtype=torch.bool)
        rows.append(oracles.counts(torch.cat(a), slope(torch.cat(p)), mask.reshape(-1)))
    return rows


def as_rows(counts: Tensor) -> Counts:
    """All but the number of samples, which the oracle does not know."""
    return [tuple(row[:4]) for row in counts.tolist()]


def drop_some_hidden_units_of_up(model: nn.Module) -> None:
    """Zeros in `up` of gated blocks, so that the product is sparser than the activated gate."""
    for block in find_blocks(model):
        with torch.no_grad():
            block.up.weight[::4] = 0.0


def enlarge_pre_activations(model: nn.Module, factor: float) -> None:
    for block in find_blocks(model):
        with torch.no_grad():
            block.activated.weight.mul_(factor)


def padding(side: str) -> Tensor:
    """An attention mask int64 [2, 7] with 3 tokens of padding in the second row."""
    mask = torch.ones(2, 7, dtype=torch.int64)
    mask[1, slice(4, None) if side == "right" else slice(0, 3)] = 0
    return mask


def hanging_on(model: nn.Module) -> list[tuple[Any, ...]]:
    """Everything a hook or a class could hide in, module by module."""
    return [
        (
            type(module),
            set(module.__dict__),
            *(
                len(v)
                for key, v in sorted(module.__dict__.items())
                if "hooks" in key and v is not None
            ),
        )
        for module in model.modules()
    ]


class Bare(nn.Module):
    """One MLP block and nothing else, which compiles quickly."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(models.D_MODEL)
        self.up = nn.Linear(models.D_MODEL, models.D_HIDDEN)
        self.act = nn.ReLU()
        self.down = nn.Linear(models.D_HIDDEN, models.D_MODEL)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.act(self.up(self.norm(x))))


BARE = BlockPattern(family="bare", norm="norm", up="up", act="act", down="down")


class Stack(nn.Module):
    """Two bare blocks, with or without gradient checkpointing."""

    def __init__(self, reentrant: bool | None = None) -> None:
        super().__init__()
        self.reentrant = reentrant
        self.layers = nn.ModuleList(Bare() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            if self.reentrant is None:
                x = layer(x)
            else:
                x = checkpoint(layer, x, use_reentrant=self.reentrant)
        return x


# ---- the counts


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_counts_equal_the_oracle_for_every_architecture(name: str) -> None:
    model = ARCHITECTURES[name]().eval()
    if name in GATED:
        drop_some_hidden_units_of_up(model)
    recorder = Recorder(model)
    with watch(model) as monitor:
        model(**models.inputs_for(model))
        model(**models.inputs_for(model, batch=1))
    want = expected(recorder, relu_slope)
    assert as_rows(monitor.counts()) == want
    assert all(0 < active < entries for active, _, entries, _ in want)


@pytest.mark.parametrize("name", GATED)
def test_in_gated_blocks_the_product_is_counted_not_the_gate(name: str) -> None:
    model = ARCHITECTURES[name]().eval()
    drop_some_hidden_units_of_up(model)
    with watch(model) as monitor:
        model(**models.inputs_for(model))
    for active, slopes, entries, _ in as_rows(monitor.counts()):
        assert 0 < active < slopes < entries


@pytest.mark.parametrize("act", ["gelu", "gelu_new", "silu"])
@pytest.mark.parametrize("name", ["gpt2", "vit", "t5", "llama"])
def test_smooth_activations_have_a_derivative_by_autograd(name: str, act: str) -> None:
    model = ARCHITECTURES[name](act).eval()
    # Zeros of a smooth activation are underflow, far on the negative side.
    enlarge_pre_activations(model, 5000.0 if act == "silu" else 1000.0)
    recorder = Recorder(model)
    with watch(model) as monitor:
        model(**models.inputs_for(model))
    want = expected(recorder, partial(slope_by_autograd, find_blocks(model)[0].act))
    assert as_rows(monitor.counts()) == want
    assert all(0 < slopes < entries for _, slopes, entries, _ in want)


@pytest.mark.parametrize("name", ["opt", "llama", "vit"])
def test_jumping_squared_relu_counts_as_the_oracle(name: str) -> None:
    model = sparsify_(ARCHITECTURES[name]().eval(), [JumpingSquaredReLU()])
    recorder = Recorder(model)
    with watch(model) as monitor:
        model(**models.inputs_for(model))
    assert as_rows(monitor.counts()) == expected(recorder, jumping_slope)


@pytest.mark.parametrize("act", ["relu", "gelu"])
def test_a_half_mixed_activation_counts_as_the_oracle(act: str) -> None:
    model = sparsify_(models.gpt2(act).eval(), [JumpingSquaredReLU(ramp=0.4)])
    advance_(model, 0.2)
    enlarge_pre_activations(model, 1000.0)
    recorder = Recorder(model)
    with watch(model) as monitor:
        model(**models.inputs_for(model))
    want = expected(recorder, partial(slope_by_autograd, find_blocks(model)[0].act))
    assert as_rows(monitor.counts()) == want
    assert all(0 < slopes < entries for _, slopes, entries, _ in want)


@pytest.mark.parametrize("shift_x", [-1.6, 0.0, 1.6])
def test_a_shifted_s_shape_is_dense_where_its_derivative_is_sparse(shift_x: float) -> None:
    model = models.gpt2().eval()
    for layer in model.transformer.h:
        layer.mlp.act = SShapedSquaredReLU(shift_x=shift_x, shift_y=1.6)
    enlarge_pre_activations(model, 20.0)
    recorder = Recorder(model)
    with watch(model) as monitor:
        model(**models.inputs_for(model))
    want = expected(recorder, lambda p: (p - shift_x).abs() > 1.5)
    assert as_rows(monitor.counts()) == want
    report = monitor.report()
    assert report.density == 1.0
    assert 0.0 < report.derivative_density < 1.0


def test_the_report_is_counts_over_entries_pooled_and_per_block() -> None:
    model = models.opt().eval()
    with watch(model) as monitor:
        model(input_ids=models.token_ids())
    rows = as_rows(monitor.counts())
    report = monitor.report()
    entries = sum(row[2] for row in rows)
    assert report.density == sum(row[0] for row in rows) / entries
    assert report.derivative_density == sum(row[1] for row in rows) / entries
    assert [block.name for block in report.blocks] == [b.name for b in find_blocks(model)]
    assert [block.density for block in report.blocks] == [row[0] / row[2] for row in rows]
    assert [block.tokens for block in report.blocks] == [14, 14]


# ---- nn.TransformerEncoder


@pytest.mark.parametrize("grad", [False, True], ids=["no_grad", "grad"])
@pytest.mark.parametrize("batch_first", [True, False], ids=["batch_first", "tokens_first"])
@pytest.mark.parametrize("norm_first", [True, False], ids=["pre_norm", "post_norm"])
def test_a_torch_encoder_with_padding_counts_as_the_oracle(
    norm_first: bool, batch_first: bool, grad: bool
) -> None:
    model = models.torch_encoder(norm_first, batch_first).eval()
    x = torch.randn(2, 7, models.D_MODEL)
    counted = padding("right").bool()
    recorder = Recorder(model)
    with torch.set_grad_enabled(grad), watch(model) as monitor:
        model(x if batch_first else x.transpose(0, 1), src_key_padding_mask=~counted)
    want = expected(recorder, relu_slope, counted if batch_first else counted.T)
    assert as_rows(monitor.counts()) == want
    assert [row[3] for row in want] == [11, 11]


def test_nested_tensors_are_set_aside_while_watching_and_come_back() -> None:
    model = models.torch_encoder(norm_first=False).eval()
    x = torch.randn(2, 7, models.D_MODEL)
    counted = padding("right").bool()
    with torch.no_grad():
        before = model(x, src_key_padding_mask=~counted)
        assert not before[~counted].any(), "the nested path was not taken: this test shows nothing"
        with watch(model) as monitor:
            during = model(x, src_key_padding_mask=~counted)
        after = model(x, src_key_padding_mask=~counted)
    torch.testing.assert_close(during[counted], before[counted], rtol=1e-5, atol=1e-5)
    assert torch.equal(before, after)
    assert [block.tokens for block in monitor.report().blocks] == [11, 11]


@pytest.mark.parametrize("kind", [torch.bool, torch.float32])
def test_a_torch_layer_by_itself_reads_either_kind_of_mask(kind: torch.dtype) -> None:
    layer = nn.TransformerEncoderLayer(models.D_MODEL, 2, models.D_HIDDEN, batch_first=True).eval()
    counted = padding("left").bool()
    mask = ~counted if kind == torch.bool else torch.zeros(2, 7).masked_fill(~counted, -torch.inf)
    recorder = Recorder(layer)
    with watch(layer) as monitor:
        layer(torch.randn(2, 7, models.D_MODEL), src_key_padding_mask=mask)
    assert as_rows(monitor.counts()) == expected(recorder, relu_slope, counted)


def test_a_single_sequence_without_a_batch_dimension_counts_too() -> None:
    model = models.torch_encoder()
    counted = torch.tensor([True, True, False, True, False])
    recorder = Recorder(model)
    with watch(model) as monitor:
        model(torch.randn(5, models.D_MODEL), src_key_padding_mask=~counted)
    assert as_rows(monitor.counts()) == expected(recorder, relu_slope, counted)


# ---- padding


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", [name for name in models.LANGUAGE_MODELS if name != "t5"])
def test_padding_by_the_attention_mask_counts_nowhere(name: str, side: str) -> None:
    model = ARCHITECTURES[name]().eval()
    mask = padding(side)
    recorder = Recorder(model)
    with watch(model) as monitor:
        model(input_ids=models.token_ids(), attention_mask=mask)
        model(input_ids=models.token_ids(seed=1))
    counted = torch.cat([mask.bool(), torch.ones(2, 7, dtype=torch.bool)])
    want = expected(recorder, relu_slope, counted)
    assert as_rows(monitor.counts()) == want
    assert want != expected(recorder, relu_slope)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("by", ["labels", "decoder_attention_mask", "both"])
def test_t5_counts_no_padding_in_encoder_and_decoder(by: str, gated: bool) -> None:
    model = models.t5(gated=gated).eval()
    encoder_mask = padding("right")
    counted = torch.tensor([[True] * 5, [True] * 2 + [False] * 3])
    told: dict[str, Tensor] = {"labels": models.token_ids(2, 5, seed=1)}
    if by != "decoder_attention_mask":
        told["labels"] = told["labels"].masked_fill(~counted, -100)
    if by != "labels":
        told["decoder_attention_mask"] = counted.long()
    recorder = Recorder(model)
    with watch(model) as monitor:
        model(input_ids=models.token_ids(), attention_mask=encoder_mask, **told)
    encoder, decoder = encoder_mask.bool(), counted
    want = expected(recorder, relu_slope, encoder, encoder, decoder, decoder)
    assert as_rows(monitor.counts()) == want
    assert [row[3] for row in want] == [11, 11, 7, 7]


def test_labels_of_one_call_do_not_mask_the_next() -> None:
    model = models.t5().eval()
    labels = models.token_ids(2, 5, seed=1)
    labels[1, 2:] = -100
    with watch(model) as monitor:
        model(input_ids=models.token_ids(), labels=labels)
        monitor.reset()
        model(input_ids=models.token_ids(), decoder_input_ids=models.token_ids(2, 5))
        assert [row[3] for row in as_rows(monitor.counts())] == [14, 14, 10, 10]
        model(input_ids=models.token_ids(), labels=labels)
        monitor.reset()
        model.get_decoder()(input_ids=models.token_ids(2, 5))
    assert [row[3] for row in as_rows(monitor.counts())] == [0, 0, 10, 10]


@pytest.mark.parametrize("use_cache", [True, False], ids=["cache", "no_cache"])
@pytest.mark.parametrize("name", ["opt", "gpt2", "llama"])
def test_generation_from_left_padded_prompts_counts_no_padding(name: str, use_cache: bool) -> None:
    model = ARCHITECTURES[name]().eval()
    mask = padding("left")
    recorder = Recorder(model)
    with watch(model) as monitor:
        model.generate(
            models.token_ids(),
            attention_mask=mask,
            use_cache=use_cache,
            do_sample=False,
            min_new_tokens=4,
            max_new_tokens=4,
            pad_token_id=0,
        )
    calls = [mask.bool()]
    for step in (1, 2, 3):
        new = torch.ones(2, step, dtype=torch.bool)
        calls.append(new[:, :1] if use_cache else torch.cat([mask.bool(), new], dim=1))
    assert [len(p) for p in recorder.p[0]] == [call.numel() for call in calls]
    counted = torch.cat([call.reshape(-1) for call in calls])
    assert as_rows(monitor.counts()) == expected(recorder, relu_slope, counted)


def test_t5_generation_counts_the_encoder_once_without_padding() -> None:
    model = models.t5().eval()
    mask = padding("right")
    recorder = Recorder(model)
    with watch(model) as monitor:
        model.generate(
            models.token_ids(),
            attention_mask=mask,
            do_sample=False,
            min_new_tokens=4,
            max_new_tokens=4,
        )
    want = expected(recorder, relu_slope, mask.bool(), mask.bool(), None, None)
    assert as_rows(monitor.counts()) == want
    assert [row[3] for row in want] == [11, 11, 2 * 4, 2 * 4]


# ---- dropout, autocast, checkpointing


@pytest.mark.parametrize("gated", [False, True])
def test_dropout_is_not_seen(gated: bool) -> None:
    model = models.t5(gated=gated, dropout=0.5).train()
    before = Recorder(model, lambda b: model.get_submodule(b.name).DenseReluDense.dropout)
    after = Recorder(model)
    with watch(model) as monitor:
        model(**models.inputs_for(model))
    want = expected(before, relu_slope)
    assert as_rows(monitor.counts()) == want
    dropped = expected(after, relu_slope)
    assert all(a[0] < 0.75 * b[0] for a, b in zip(dropped, want, strict=True))


@pytest.mark.parametrize("name", ["gpt2", "llama", "t5"])
def test_under_autocast_the_half_precision_activations_are_counted(name: str) -> None:
    model = sparsify_(ARCHITECTURES[name]().train(), [JumpingSquaredReLU()])
    recorder = Recorder(model)
    with watch(model) as monitor, torch.autocast("cpu", dtype=torch.bfloat16):
        model(**models.inputs_for(model))
    assert all(p.dtype == torch.bfloat16 for calls in recorder.p for p in calls)
    assert as_rows(monitor.counts()) == expected(recorder, jumping_slope)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", ["gpt2", "llama", "t5"])
def test_a_forward_repeated_by_gradient_checkpointing_counts_once(
    name: str, reentrant: bool
) -> None:
    model = ARCHITECTURES[name]().train()
    labels = models.token_ids(seed=1)
    labels[1, 3:] = -100
    batch = {"input_ids": models.token_ids(), "attention_mask": padding("right"), "labels": labels}
    with watch(model) as monitor:
        model(**batch).loss.backward()
    want = monitor.counts()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    recorder = Recorder(model)
    with watch(model) as monitor:
        for _ in range(2):
            model(**batch, use_cache=False).loss.backward()
    assert torch.equal(monitor.counts(), 2 * want)
    assert len(recorder.p[0]) == 4, "nothing was repeated: this test shows nothing"


class OldSwish(torch.autograd.Function):
    """The form in which Bloom, timm and apex write their activations; torch.func refuses it."""

    @staticmethod
    def forward(ctx: Any, p: Tensor) -> Tensor:
        ctx.save_for_backward(p)
        return p * p.sigmoid()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (p,) = ctx.saved_tensors
        s = p.sigmoid()
        return grad * s * (1 + p * (1 - s))


class Swish(nn.Module):
    def forward(self, p: Tensor) -> Tensor:
        return OldSwish.apply(p)


@pytest.mark.parametrize("how", ["plain", "reentrant", "checkpointed", "compiled"])
@pytest.mark.parametrize("old", [False, True], ids=["silu", "old autograd.Function"])
@pytest.mark.usefixtures("fresh_compiler")
def test_smooth_activations_are_measured_in_training(how: str, old: bool) -> None:
    model = models.one_layer_(models.gpt2("silu")).train()
    enlarge_pre_activations(model, 3000.0)
    batch = {"input_ids": models.token_ids(), "labels": models.token_ids(seed=1)}
    with watch(model, gradients=True) as monitor:
        model(**batch).loss.backward()
    want = monitor.report()
    assert 0 < want.derivative_density < 1
    if old:
        for block in model.transformer.h:
            block.mlp.act = Swish()
    if how in ("reentrant", "checkpointed"):
        model.gradient_checkpointing_enable({"use_reentrant": how == "reentrant"})
    with watch(model, gradients=True) as monitor:
        run = torch.compile(model, backend="aot_eager") if how == "compiled" else model
        run(**batch, use_cache=False).loss.backward()
    got = monitor.report()
    for ours, theirs in zip(got.blocks, want.blocks, strict=True):
        # Zeros of SiLU are underflow, which differs between the two ways to write it.
        assert ours.density == pytest.approx(theirs.density, abs=0.02)
        assert ours.derivative_density == pytest.approx(theirs.derivative_density, abs=0.02)
        assert pytest.approx(theirs.AF_up, rel=1e-3) == ours.AF_up
        assert ours.derivative_density_by_identity == pytest.approx(
            ours.derivative_density, rel=1e-5
        )


def test_bloom_is_measured_in_training_and_in_evaluation() -> None:
    pattern = BlockPattern(
        family="Bloom",
        norm="post_attention_layernorm",
        up="mlp.dense_h_to_4h",
        act="mlp.gelu_impl",
        down="mlp.dense_4h_to_h",
    )
    config = BloomConfig(vocab_size=64, hidden_size=16, n_layer=2, n_head=2)
    model = BloomForCausalLM(config).train()
    ids = models.token_ids()
    with watch(model, patterns=[pattern], gradients=True) as monitor:
        model(input_ids=ids, labels=ids).loss.backward()
    (first, _) = monitor.report().blocks
    assert first.AF_up > 0
    assert first.derivative_density_by_identity == pytest.approx(first.derivative_density, rel=1e-5)
    with watch(model.eval(), patterns=[pattern]) as monitor, torch.inference_mode():
        model(input_ids=ids)
    assert monitor.report().derivative_density == 1.0


# ---- torch.compile


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def count_steps(model: nn.Module, batch: Tensor, steps: int = 1) -> Tensor:
    with watch(model, patterns=[BARE]) as monitor:
        for _ in range(steps):
            model(batch).sum().backward()
    return monitor.counts()


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("reentrant", [None, False, True], ids=["plain", "checkpoint", "reentrant"])
def test_a_compiled_model_counts_as_eager_and_forgets_the_counters(reentrant: bool | None) -> None:
    model = Stack(reentrant)
    x = torch.randn(2, 5, models.D_MODEL, requires_grad=True)
    want = count_steps(model, x)
    backend = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    compiled(x).sum().backward()
    assert backend.frame_count == 1

    with watch(compiled, patterns=[BARE]) as monitor:
        compiled(x).sum().backward()
        compiled(x).sum().backward()
    assert torch.equal(monitor.counts(), 2 * want)
    assert backend.frame_count == 2

    compiled(x).sum().backward()
    assert torch.equal(monitor.counts(), 2 * want), "counted after the end"
    # More often than torch.compile would recompile before it gives up.
    for _ in range(torch._dynamo.config.recompile_limit + 2):
        assert torch.equal(count_steps(compiled, x), want)
        compiled(x).sum().backward()
    assert backend.frame_count == 2


@pytest.mark.usefixtures("fresh_compiler")
def test_a_model_compiled_inside_watch_counts_and_then_runs_bare() -> None:
    model = Stack()
    x = torch.randn(2, 5, models.D_MODEL)
    want = count_steps(model, x)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    assert torch.equal(count_steps(compiled, x, steps=2), 2 * want)
    outputs = compiled(x)
    torch.testing.assert_close(outputs, model(x))


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("reentrant", [False, True])
def test_blocks_compiled_one_by_one_below_an_eager_checkpoint_count_once(reentrant: bool) -> None:
    model = Stack(reentrant)
    x = torch.randn(2, 5, models.D_MODEL, requires_grad=True)
    want = count_steps(model, x)
    for layer in model.layers:
        layer.compile(backend="aot_eager")
    model(x).sum().backward()
    assert torch.equal(count_steps(model, x), want)


@pytest.mark.usefixtures("fresh_compiler")
def test_wrapped_compiled_blocks_are_watched_under_their_plain_names() -> None:
    model = Stack()
    x = torch.randn(2, 5, models.D_MODEL)
    want = count_steps(model, x)
    for index in range(2):
        model.layers[index] = torch.compile(model.layers[index], backend="aot_eager")
    model(x)
    with watch(model, patterns=[BARE]) as monitor:
        model(x)
    assert monitor.names == ("layers.0", "layers.1")
    assert torch.equal(monitor.counts(), want)


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("name", ["gpt2", "t5"])
def test_padding_counts_nowhere_in_a_compiled_model(name: str) -> None:
    model = models.one_layer_(ARCHITECTURES[name]()).eval()
    batch = {"input_ids": models.token_ids(), "attention_mask": padding("right")}
    if name == "t5":
        batch["labels"] = models.token_ids(2, 5, seed=1)
        batch["labels"][1, 2:] = -100
    with torch.no_grad():
        with watch(model) as monitor:
            model(**batch)
        want = monitor.counts()
        compiled = torch.compile(model, backend="aot_eager")
        compiled(**batch)
        with watch(compiled) as monitor:
            compiled(**batch)
    assert torch.equal(monitor.counts(), want)
    assert int(want[-1, 3]) == (7 if name == "t5" else 11)


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
def test_inductor_counts_as_eager() -> None:
    model = Bare()
    x = torch.randn(2, 5, models.D_MODEL)
    with torch.no_grad():
        with watch(model, patterns=[BARE]) as monitor:
            model(x)
        want = monitor.counts()
        compiled = torch.compile(model, fullgraph=True)
        with watch(compiled, patterns=[BARE]) as monitor:
            compiled(x)
            compiled(x)
    assert torch.equal(monitor.counts(), 2 * want)


@pytest.mark.parametrize("masked", [False, True], ids=["all", "some"])
@pytest.mark.parametrize("shape", [(3, 1, 5), (1, 3, 5), (0, 3, 5)])
def test_the_counting_op_is_a_proper_custom_op(shape: tuple[int, ...], masked: bool) -> None:
    counts, units = torch.zeros(5, dtype=torch.int64), torch.zeros(5, dtype=torch.int64)
    moments = torch.zeros(4, 4, dtype=torch.float64)
    mask = torch.rand(shape[:2]) > 0.5 if masked else None
    arguments = (counts, units, moments, torch.rand(shape) > 0.5, torch.rand(shape) > 0.5, mask)
    checks = torch.library.opcheck(count_, arguments)
    assert set(checks.values()) == {"SUCCESS"}


# ---- nothing stays behind


@pytest.mark.parametrize("error", [None, RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("name", ["t5_gated", "gpt2", "torch"])
def test_hooks_and_classes_are_gone_afterwards(
    name: str, error: type[BaseException] | None
) -> None:
    model = models.torch_encoder(norm_first=False) if name == "torch" else ARCHITECTURES[name]()
    before = hanging_on(model)
    monitors = []
    try:
        with watch(model) as monitor, watch(model):
            monitors.append(monitor)
            assert hanging_on(model) != before
            if error is not None:
                raise error
    except (RuntimeError, KeyboardInterrupt) as raised:
        assert type(raised) is error  # noqa: PT017  (KeyboardInterrupt, too, must come through)
    assert hanging_on(model) == before
    if name == "torch":
        assert model.use_nested_tensor
    assert monitors[0].counts().shape[1] == 5, "the monitor can be read afterwards"


def test_hooks_are_gone_when_watching_fails_half_way(monkeypatch: pytest.MonkeyPatch) -> None:
    model = models.gpt2()
    before = hanging_on(model)
    register = Journal.add_forward_hook
    calls: list[nn.Module] = []

    def fail_at_the_second(
        self: Journal, module: nn.Module, hook: Callable[..., Any], **settings: bool
    ) -> None:
        calls.append(module)
        if len(calls) == 2:
            raise MemoryError
        register(self, module, hook, **settings)

    monkeypatch.setattr(Journal, "add_forward_hook", fail_at_the_second)
    with pytest.raises(MemoryError), watch(model):
        pass
    assert hanging_on(model) == before


def test_hooks_of_the_user_stay_where_they_were() -> None:
    model = models.gpt2()
    recorder = Recorder(model)
    with watch(model):
        pass
    model(**models.inputs_for(model))
    assert len(recorder.p[0]) == 1
    recorder.remove()


@pytest.mark.parametrize("act", ["relu", "gelu"])
def test_hooks_of_the_user_on_the_activation_run_as_often_as_without(act: str) -> None:
    model = models.gpt2(act).eval()
    seen: list[Tensor] = []
    handle = find_blocks(model)[0].act.register_forward_hook(partial(_keep_output, seen))
    with watch(model):
        model(**models.inputs_for(model))
    handle.remove()
    assert len(seen) == 1


def test_nested_watches_count_each_for_itself() -> None:
    model = models.llama().eval()
    batch = models.inputs_for(model)
    with watch(model) as outer:
        model(**batch)
        once = outer.counts()
        with watch(model, where=lambda block: block.name.endswith("1")) as inner:
            model(**batch)
        model(**batch)
    assert torch.equal(inner.counts(), once[1:])
    assert torch.equal(outer.counts(), 3 * once)


@pytest.mark.parametrize("name", ["t5", "t5_gated", "gpt2", "vit", "bert"])
@pytest.mark.parametrize("act", ["relu", "gelu"])
def test_outputs_and_gradients_stay_bit_identical(name: str, act: str) -> None:
    model = ARCHITECTURES[name](act).train()
    batch = models.inputs_for(model)
    runs = []
    for watched in (False, True):
        model.zero_grad()
        torch.manual_seed(1)
        if watched:
            with watch(model):
                logits = model(**batch).logits
                logits.square().sum().backward()
        else:
            logits = model(**batch).logits
            logits.square().sum().backward()
        grads = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        runs.append([logits.detach(), *grads])
    assert len(runs[0]) == len(runs[1])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_random_numbers_are_left_alone() -> None:
    model = models.t5(dropout=0.5).train()
    batch = models.inputs_for(model)
    torch.manual_seed(1)
    plain = model(**batch).logits
    torch.manual_seed(1)
    with watch(model):
        watched = model(**batch).logits
    assert torch.equal(plain, watched)


# ---- plug-ins that come and go while watching


def test_an_activation_replaced_while_watching_is_seen() -> None:
    model = models.gpt2().eval()
    batch = models.inputs_for(model)
    with watch(model) as monitor:
        for layer in model.transformer.h:
            layer.mlp.act = SShapedSquaredReLU(shift_y=1.6)
        model(**batch)
    assert monitor.report().density == 1.0


@pytest.mark.parametrize("name", ["gpt2", "llama", "t5"])
def test_plug_ins_put_in_while_watching_are_seen_and_change_nothing_else(name: str) -> None:
    plain, model = (ARCHITECTURES[name]().eval() for _ in range(2))
    plain.load_state_dict(model.state_dict())
    batch = models.inputs_for(model)
    plug_ins = [ZerothBias(max_tokens=8), JumpingSquaredReLU()]
    with torch.no_grad():
        want = sparsify_(plain, plug_ins)(**batch).logits
        before = hanging_on(model)
        with watch(model) as monitor:
            sparsify_(model, plug_ins)
            recorder = Recorder(model)
            got = model(**batch).logits
            assert as_rows(monitor.counts()) == expected(recorder, jumping_slope)
            recorder.remove()
            restore_(model)
            monitor.reset()
            recorder = Recorder(model)
            model(**batch)
            assert as_rows(monitor.counts()) == expected(recorder, relu_slope)
            recorder.remove()
    assert torch.equal(got, want)
    assert hanging_on(model) == before


def test_a_torch_encoder_sparsified_while_watching_still_runs_afterwards() -> None:
    model = models.torch_encoder(norm_first=False).eval()
    with watch(model):
        sparsify_(model, [ZerothBias(max_tokens=8), JumpingSquaredReLU()])
    with torch.no_grad():
        model(torch.randn(2, 7, models.D_MODEL), src_key_padding_mask=~padding("right").bool())
    restore_(model)
    assert model.use_nested_tensor


# ---- where, reset, enabled, take


def test_where_keeps_some_blocks() -> None:
    model = models.opt().eval()
    with watch(model) as everything, watch(model, lambda b: b.name.endswith(".1")) as some:
        model(input_ids=models.token_ids())
    assert some.names == everything.names[1:]
    assert torch.equal(some.counts(), everything.counts()[1:])


def test_where_that_refuses_all_blocks_is_an_error_that_names_them() -> None:
    model = models.opt()
    before = hanging_on(model)
    with pytest.raises(BlocksNotFoundError, match=r"layers\.1"), watch(model, lambda block: False):
        pass
    assert hanging_on(model) == before


def test_a_report_before_any_forward_pass_is_nan() -> None:
    with watch(models.opt()) as monitor:
        report = monitor.report()
    assert report.density != report.density
    assert report.derivative_density != report.derivative_density
    assert all(block.density != block.density and block.tokens == 0 for block in report.blocks)


def test_reset_starts_again_and_take_hands_out_and_resets() -> None:
    model = models.opt().eval()
    with watch(model) as monitor:
        model(input_ids=models.token_ids(seed=1))
        monitor.reset()
        assert not monitor.counts().any()
        model(input_ids=models.token_ids(seed=2))
        want = monitor.counts()
        taken = monitor.take()
        assert torch.equal(torch.stack([tally.counts for tally in taken]), want)
        assert not monitor.counts().any()
        model(input_ids=models.token_ids(seed=2))
        assert torch.equal(torch.stack([tally.counts for tally in taken]), want), (
            "taken counts must not go on counting"
        )
        assert torch.equal(monitor.counts(), want)


@pytest.mark.parametrize("name", ["opt", "llama"])
def test_a_monitor_that_is_not_enabled_counts_nothing(name: str) -> None:
    model = ARCHITECTURES[name]().eval()
    with watch(model) as monitor:
        monitor.enabled = False
        model(input_ids=models.token_ids())
        assert not monitor.counts().any()
        monitor.enabled = True
        model(input_ids=models.token_ids())
    assert int(monitor.counts()[0, 3]) == 14


def test_counts_go_with_a_model_that_changes_its_precision() -> None:
    model = models.gpt2().eval()
    recorder = Recorder(model)
    with watch(model) as monitor:
        model(**models.inputs_for(model))
        model.to(torch.bfloat16)
        model(**models.inputs_for(model))
        model.to(torch.float64)
        model(**models.inputs_for(model))
    # Concatenated, the three precisions become float64, which keeps every zero.
    assert as_rows(monitor.counts()) == expected(recorder, relu_slope)
