"""RisingThreshold: its statistics against the oracle, its schedule, and its independence."""

from __future__ import annotations

import copy
import functools
import itertools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.optim import SGD, AdamW
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM, AutoModelForImageClassification

import models
import oracles
import steppe
from plugins.thresholds import threshold_of
from steppe import (
    BlockPattern,
    JumpingSquaredReLU,
    Plugin,
    RestrictedNorm,
    RisingThreshold,
    ZerothBias,
)
from steppe.errors import ScheduleError, UnfitBlockError
from steppe.plugins.moments import moments_of
from steppe.plugins.rising_threshold import DECAY, Threshold

pytestmark = [
    pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable. is deprecated"),
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),
]
STEPS = 3
COUNTED = torch.tensor([[True] * 7, [True] * 4 + [False] * 3])
DECODED = torch.tensor([[True] * 5, [True] * 2 + [False] * 3])


def thresholds(model: nn.Module) -> list[Threshold]:
    found = [threshold_of(block) for block in steppe.find_blocks(model)]
    assert all(found)
    return found


def deviations(model: nn.Module) -> list[Tensor]:
    return [threshold.deviation.clone() for threshold in thresholds(model)]


class Recorder:
    """The pre-activations of every block, one ``[N, F]`` a call; made before the plug-in."""

    def __init__(self, model: nn.Module) -> None:
        self.p: list[list[Tensor]] = []
        for block in steppe.find_blocks(model):
            self.p.append([])
            block.activated.register_forward_hook(functools.partial(_keep, self.p[-1]))

    def take(self) -> list[Tensor]:
        taken = [torch.cat(p) for p in self.p]
        for p in self.p:
            p.clear()
        return taken


def _keep(kept: list[Tensor], module: nn.Module, args: tuple[Any, ...], out: Tensor) -> None:
    kept.append(out.detach().clone().reshape(-1, out.shape[-1]))


def run_text(model: nn.Module, seed: int) -> list[Tensor]:
    """A forward pass with padding; which tokens count, by block."""
    model(input_ids=models.token_ids(seed=seed), attention_mask=COUNTED.long())
    return [COUNTED.reshape(-1)]


def run_t5(model: nn.Module, seed: int) -> list[Tensor]:
    labels = models.token_ids(2, 5, seed=seed).masked_fill(~DECODED, -100)
    ids = models.token_ids(seed=seed + 50)
    model(input_ids=ids, attention_mask=COUNTED.long(), labels=labels)
    encoder, decoder = COUNTED.reshape(-1), DECODED.reshape(-1)
    return [encoder, encoder, decoder, decoder]


def run_images(model: nn.Module, seed: int) -> list[Tensor]:
    model(pixel_values=models.images(seed=seed))
    tokens = 2 * (5 if model.config.model_type == "vit" else 4)
    return [torch.ones(tokens, dtype=torch.bool)]


def run_encoder(model: nn.Module, seed: int, batch_first: bool) -> list[Tensor]:
    x = torch.randn(2, 7, models.D_MODEL, generator=torch.Generator().manual_seed(seed))
    x = x.to(next(model.parameters()).dtype)
    model(x if batch_first else x.transpose(0, 1), src_key_padding_mask=~COUNTED)
    return [(COUNTED if batch_first else COUNTED.T).reshape(-1)]


Run = Callable[[nn.Module, int], list[Tensor]]
CASES: dict[str, tuple[Callable[[], nn.Module], Run]] = {
    **{name: (models.LANGUAGE_MODELS[name], run_text) for name in ("opt", "gpt2", "llama", "bert")},
    "t5": (models.t5, run_t5),
    "t5 gated": (functools.partial(models.t5, "gelu_new", gated=True), run_t5),
    "vit": (models.vit, run_images),
    "ijepa": (models.ijepa, run_images),
    "torch encoder": (models.torch_encoder, functools.partial(run_encoder, batch_first=True)),
    "torch encoder, sequence first": (
        functools.partial(models.torch_encoder, batch_first=False),
        functools.partial(run_encoder, batch_first=False),
    ),
}
each_case = pytest.mark.parametrize(("make", "run"), CASES.values(), ids=CASES)


# ---- the statistics


@each_case
def test_the_deviations_are_the_oracles(make: Callable[[], nn.Module], run: Run) -> None:
    model = make().double().train()
    recorder = Recorder(model)
    steppe.sparsify_(model, [RisingThreshold()])
    steppe.advance_(model, 0.1)
    history: list[list[list[float]]] = []
    for step in range(STEPS):
        counted = [run(model, 2 * step + micro) for micro in range(2)]
        taken = recorder.take()
        history.append([])
        for index, p in enumerate(taken):
            own = torch.cat([mask[index % len(mask)] for mask in counted])
            history[-1].append(oracles.deviation(p, own))
        steppe.project_(model)
        for index, got in enumerate(deviations(model)):
            want = oracles.running_deviation([past[index] for past in history], DECAY)
            assert got.tolist() == pytest.approx(want, rel=1e-11)
            assert min(want) > 0
    everything = torch.ones_like(own)
    if not own.all():  # the comparison can fail
        assert oracles.deviation(p, everything) != pytest.approx(history[-1][-1], rel=1e-3)


def test_the_activation_sees_the_pre_activation_less_the_threshold() -> None:
    model = models.gpt2().double()
    recorder = Recorder(model)
    steppe.sparsify_(model, [RisingThreshold(multiple=1.5, ramp=0.5)])
    run_text(model, 0)
    steppe.project_(steppe.advance_(model, 0.25))
    recorder.take()
    after = Recorder(model)
    for train in (True, False):
        model.train(train)
        run_text(model, 1)
        for threshold, p, seen in zip(
            thresholds(model), recorder.take(), after.take(), strict=True
        ):
            for unit in range(models.D_HIDDEN):
                want = [v - 0.75 * threshold.deviation[unit].item() for v in p[:, unit].tolist()]
                assert seen[:, unit].tolist() == pytest.approx(want, rel=1e-13, abs=1e-16)


def test_no_gradient_passes_through_the_deviations() -> None:
    model = models.gpt2().double()
    plain = copy.deepcopy(model)
    steppe.sparsify_(model, [RisingThreshold()])
    run_text(model, 0)
    steppe.project_(steppe.advance_(model, 1.0))
    ids = models.token_ids(seed=3)
    model(input_ids=ids, labels=ids).loss.backward()
    # The same thresholds as constants.
    for block, threshold in zip(steppe.find_blocks(plain), thresholds(model), strict=True):
        with torch.no_grad():
            block.up.bias -= 2.0 * threshold.deviation
    plain(input_ids=ids, labels=ids).loss.backward()
    for (name, got), want in zip(model.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(got.grad, want.grad, rtol=1e-10, atol=1e-14, msg=name)
    assert all(t.deviation.grad is None for t in thresholds(model))
    assert steppe.added_parameters(model) == {}


@pytest.mark.parametrize("offset", [0.0, 1e2, 1e4])
def test_a_mean_far_from_zero_does_not_hide_the_deviation(offset: float) -> None:
    p = offset + torch.randn(500, 3)
    sums = moments_of(p, None)
    mean = sums[1] / sums[0]
    got = (sums[2] / sums[0] - mean.square()).sqrt()
    want = oracles.deviation(p, torch.ones(500, dtype=torch.bool))
    assert got.tolist() == pytest.approx(want, rel=1e-5)
    naive = (p.square().mean(0) - p.mean(0).square()).clamp(min=0).sqrt()
    if offset == 1e4:
        assert naive.tolist() != pytest.approx(want, rel=1e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("offset", [0.0, 30.0])
@pytest.mark.parametrize("tokens", ["all", "some", "none", "no rows"])
def test_the_moments_are_those_of_their_slow_twin(
    dtype: torch.dtype, offset: float, tokens: str
) -> None:
    p = (offset + torch.randn(0 if tokens == "no rows" else 700, 5)).to(dtype)
    counted = {"some": torch.rand(len(p)) > 0.3, "none": torch.zeros(len(p), dtype=torch.bool)}
    mask = counted.get(tokens)
    precise = p.double() if mask is None else p[mask].double()
    got = moments_of(p, mask)
    assert got.dtype == torch.float64
    n, total, squares = got
    assert torch.equal(n, torch.full((5,), float(len(precise))).double())
    torch.testing.assert_close(total, precise.sum(0), rtol=1e-6, atol=1e-4)
    if len(precise):
        variance = squares / n - (total / n).square()
        torch.testing.assert_close(variance, precise.var(0, correction=0), rtol=1e-5, atol=0.0)


class Traffic(TorchDispatchMode):
    """Counts the bytes that operations read and write, views left out."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.namespace == "aten" and not func.is_view:
            tensors, _ = tree_flatten((args, kwargs, result))
            self.bytes += sum(t.nbytes for t in tensors if isinstance(t, torch.Tensor))
        return result


def test_off_the_cpu_the_moments_of_half_precision_take_few_passes() -> None:
    """With copies in float32 it was 17 times the pre-activations."""
    with FakeTensorMode():
        p = torch.empty(4096, 256, dtype=torch.bfloat16, device="cuda")
        with Traffic() as traffic:
            moments_of(p, None)
    assert traffic.bytes < 6.1 * 4096 * 256 * 2


def test_what_stands_on_padding_may_be_infinite() -> None:
    p = torch.randn(6, 4)
    counted = torch.tensor([True, True, False, True, False, True])
    want = moments_of(p[counted], None)
    p[~counted] = torch.inf
    torch.testing.assert_close(moments_of(p, counted), want, rtol=1e-6, atol=1e-9)


def test_a_step_whose_pre_activations_overflow_changes_nothing() -> None:
    model = steppe.sparsify_(models.gpt2(), [RisingThreshold()])
    run_text(model, 0)
    steppe.project_(model)
    before = deviations(model)
    bias = model.transformer.h[0].mlp.c_fc.bias
    with torch.no_grad():
        bias[3], old = torch.inf, bias[3].item()
        run_text(model, 1)
        bias[3] = old
    steppe.project_(model)
    after = deviations(model)
    assert after[0][3] == before[0][3]
    assert (after[0] != before[0]).sum() == models.D_HIDDEN - 1
    run_text(model, 1)
    steppe.project_(model)
    assert all(d.isfinite().all() for d in deviations(model))


def test_a_unit_that_does_not_vary_has_no_threshold_until_it_does() -> None:
    model = steppe.sparsify_(models.gpt2(), [RisingThreshold()])
    layer = model.transformer.h[0].mlp.c_fc
    with torch.no_grad():
        column = layer.weight[:, 5].clone()
        layer.weight[:, 5] = 0.0
        layer.bias[5] = 0.75
    steppe.advance_(model, 1.0)
    for seed in range(3):
        run_text(model, seed)
        steppe.project_(model)
    assert layer.threshold.deviation[5] == 0.0
    assert (layer.threshold.deviation == 0.0).sum() == 1
    with torch.no_grad():
        layer.weight[:, 5] = column
    recorder = Recorder(model)
    run_text(model, 4)
    steppe.project_(model)
    own = oracles.deviation(recorder.take()[0], COUNTED.reshape(-1))[5]
    assert layer.threshold.deviation[5].item() == pytest.approx(own, rel=1e-5)


# ---- once a step, whatever happens in it


def test_accumulated_batches_are_one_large_batch() -> None:
    model = steppe.sparsify_(models.gpt2().double(), [RisingThreshold()])
    whole = copy.deepcopy(model)
    for step in range(STEPS):
        ids = models.token_ids(6, seed=step)
        mask = torch.arange(7) < torch.tensor([7, 2, 3, 7, 1, 5]).unsqueeze(1)
        for rows in (slice(0, 1), slice(1, 4), slice(4, 6)):
            model(input_ids=ids[rows], attention_mask=mask[rows].long())
        whole(input_ids=ids, attention_mask=mask.long())
        for each in (model, whole):
            steppe.project_(each)
        for one, two in zip(deviations(model), deviations(whole), strict=True):
            torch.testing.assert_close(one, two, rtol=1e-12, atol=0)


class Bare(nn.Module):
    """One MLP block and nothing else, which compiles quickly."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(models.D_MODEL)
        self.up = nn.Linear(models.D_MODEL, models.D_HIDDEN)
        self.act = nn.ReLU(inplace=True)
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


def train_stack(stack: nn.Module, forward: Callable[[Tensor], Tensor]) -> list[Tensor]:
    """A few steps; the sums of each, deviations, parameters and the last output."""
    sums = []
    optimizer = SGD(stack.parameters(), lr=0.1)
    steppe.constrain_(stack, optimizer, total_steps=4)
    for step in range(4):
        for micro in range(2):
            generator = torch.Generator().manual_seed(10 * step + micro)
            x = torch.randn(3, 5, models.D_MODEL, generator=generator, dtype=torch.float64)
            forward(x.requires_grad_()).square().mean().backward()
        # Of a batch that counts twice the deviation is the same; the sums are not.
        sums += [layer.up.threshold.sums.clone() for layer in stack.layers]
        assert sums[-1][0].tolist() == [2 * 3 * 5] * models.D_HIDDEN
        optimizer.step()
        optimizer.zero_grad()
    found = [layer.up.threshold.deviation for layer in stack.layers]
    assert all(layer.up.threshold.multiple == 2.0 for layer in stack.layers)
    return [*sums, *found, *stack.parameters(), forward(x)]


def make_stack(reentrant: bool | None = None) -> nn.Module:
    torch.manual_seed(0)
    return steppe.sparsify_(Stack(reentrant).double(), [RisingThreshold()], patterns=[BARE])


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_forward_pass_recomputed_by_checkpointing_counts_once(reentrant: bool) -> None:
    plain, checked = make_stack(), make_stack(reentrant)
    want, got = train_stack(plain, plain), train_stack(checked, checked)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("reentrant", [None, False])
def test_compiled_it_gathers_the_same_in_one_graph(reentrant: bool | None) -> None:
    torch.compiler.reset()
    plain, model = make_stack(), make_stack(reentrant)
    want = train_stack(plain, plain)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        got = train_stack(model, compiled)
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", ["gpt2", "t5"])
def test_transformers_own_checkpointing_counts_once(name: str) -> None:
    torch.manual_seed(0)
    model = steppe.sparsify_({**models.LANGUAGE_MODELS}[name]().double(), [RisingThreshold()])
    other = copy.deepcopy(model)
    other.gradient_checkpointing_enable()
    run = run_t5 if name == "t5" else run_text
    for each in (model, other):
        each.train()
        kept: list[Tensor] = []
        each.lm_head.register_forward_hook(functools.partial(_keep_graph, kept))
        run(each, 0)
        kept[0].square().mean().backward()
        counted = [int(threshold.sums[0, 0]) for threshold in thresholds(each)]
        assert counted == ([11, 11, 7, 7] if name == "t5" else [11, 11])
        steppe.project_(each)
    for one, two in zip(deviations(model), deviations(other), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-12, atol=0)
        assert one.any()


def _keep_graph(kept: list[Tensor], module: nn.Module, args: tuple[Any, ...], out: Tensor) -> None:
    kept.append(out)


def test_evaluation_changes_no_statistics() -> None:
    model = steppe.sparsify_(models.gpt2(), [RisingThreshold()])
    run_text(model, 0)
    steppe.project_(steppe.advance_(model, 1.0))
    before = deviations(model)
    ids = models.token_ids(seed=9)
    steppe.measure(model.train(), [{"input_ids": ids, "labels": ids}])
    model.eval()
    run_text(model, 1)
    steppe.project_(model)
    assert all(map(torch.equal, deviations(model), before))


# ---- before there are statistics, and where nothing shall change


def test_without_statistics_nothing_is_subtracted() -> None:
    model = models.gpt2().eval()
    ids = models.token_ids()
    want = model(input_ids=ids).logits
    steppe.advance_(steppe.sparsify_(model, [RisingThreshold()]), 1.0)
    assert thresholds(model)[0].multiple == 2.0
    assert torch.equal(model(input_ids=ids).logits, want)
    steppe.project_(model)  # no batch, so there are still none
    assert torch.equal(model(input_ids=ids).logits, want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_multiple_of_zero_trains_bit_for_bit_as_without(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    plain = models.gpt2().to(dtype)
    model = steppe.sparsify_(copy.deepcopy(plain), [RisingThreshold(multiple=0.0)])
    optimizers = [AdamW(each.parameters(), lr=1e-2) for each in (plain, model)]
    steppe.constrain_(model, optimizers[1])  # there is no ramp that needs the length of the run
    for step in range(3):
        ids = models.token_ids(seed=step)
        for each, optimizer in zip((plain, model), optimizers, strict=True):
            each(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    assert all(map(torch.equal, plain.parameters(), model.parameters()))
    assert all(d.all() for d in deviations(model))  # although the statistics are there


def test_half_precision_keeps_its_statistics_in_float32() -> None:
    model = steppe.sparsify_(models.gpt2(), [RisingThreshold()])
    run_text(model, 0)
    steppe.project_(model)
    before = deviations(model)
    model.to(torch.bfloat16)
    assert all(map(torch.equal, deviations(model), before))
    recorder = Recorder(model)
    steppe.advance_(model, 1.0)
    run_text(model, 1)
    p = recorder.take()  # of the hook after ours
    assert all(q.dtype == torch.bfloat16 for q in p)
    steppe.project_(model)
    for threshold, old in zip(thresholds(model), before, strict=True):
        assert threshold.deviation.dtype == torch.float32
        assert not torch.equal(threshold.deviation, old)
        assert not torch.equal(threshold.deviation.bfloat16().float(), threshold.deviation)
    assert thresholds(model.double())[0].deviation.dtype == torch.float64


def test_autocast_gathers_in_float32() -> None:
    model = models.gpt2()
    recorder = Recorder(model)
    steppe.sparsify_(model, [RisingThreshold()])
    with torch.autocast("cpu", torch.bfloat16):
        run_text(model, 0)
    steppe.project_(model)
    for got, p in zip(deviations(model), recorder.take(), strict=True):
        assert p.dtype == torch.bfloat16
        want = oracles.deviation(p, COUNTED.reshape(-1))
        assert got.tolist() == pytest.approx(want, rel=1e-6)


# ---- the schedule, and a run that goes on


@pytest.mark.parametrize(("progress", "tau"), [(0.0, 0.0), (0.1, 0.5), (0.4, 2.0), (1.0, 2.0)])
def test_the_multiple_rises_linearly(progress: float, tau: float) -> None:
    model = steppe.sparsify_(models.t5(), [RisingThreshold(multiple=2.0, ramp=0.4)])
    assert [t.multiple.item() for t in thresholds(model)] == [0.0] * 4
    steppe.advance_(model, progress)
    assert [t.multiple.item() for t in thresholds(model)] == pytest.approx([tau] * 4)


def test_it_needs_the_length_of_the_run() -> None:
    model = steppe.sparsify_(models.gpt2(), [RisingThreshold()])
    optimizer = SGD(model.parameters(), lr=0.1)
    with pytest.raises(ScheduleError, match=r"RisingThreshold.*total_steps=10_000"):
        steppe.constrain_(model, optimizer)
    steppe.constrain_(model, optimizer, total_steps=3)


class Training:
    """A training run with everything that a new process would make again."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.model = steppe.sparsify_(models.gpt2(), [RisingThreshold(), JumpingSquaredReLU()])
        self.optimizer = AdamW(self.model.parameters(), lr=0.02)
        self.link = steppe.constrain_(self.model, self.optimizer, total_steps=8)

    def train(self, first: int, last: int) -> None:
        """Steps first … last - 1."""
        for step in range(first, last):
            ids = models.token_ids(seed=step)
            self.model(input_ids=ids, labels=ids).loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()


@pytest.mark.parametrize("stop", [1, 3, 6])
def test_a_resumed_run_equals_the_uninterrupted_one(stop: int, tmp_path: Path) -> None:
    whole, first, second = Training(), Training(), Training()
    whole.train(0, 8)
    first.train(0, stop)
    parts = ("model", "optimizer", "link")
    torch.save({name: getattr(first, name).state_dict() for name in parts}, tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    for name in parts:
        getattr(second, name).load_state_dict(state[name])
    second.train(stop, 8)
    for key, want in whole.model.state_dict().items():
        assert torch.equal(second.model.state_dict()[key], want), key
    keys = [key for key in whole.model.state_dict() if ".threshold." in key]
    assert keys == [
        f"transformer.h.{layer}.mlp.c_fc.threshold.{name}"
        for layer in range(2)
        for name in ("multiple", "deviation")
    ]


@pytest.mark.parametrize(
    ("name", "load"),
    [
        ("gpt2", AutoModelForCausalLM.from_pretrained),
        ("llama", AutoModelForCausalLM.from_pretrained),
        ("vit", AutoModelForImageClassification.from_pretrained),
    ],
)
def test_a_saved_model_comes_back_bit_for_bit(
    name: str, load: Callable[..., nn.Module], tmp_path: Path
) -> None:
    make, run = CASES[name]
    model = steppe.sparsify_(make(), [RisingThreshold(multiple=1.5), ZerothBias(max_tokens=8)])
    run(model, 0)
    steppe.project_(steppe.advance_(model, 0.75))
    model.eval().save_pretrained(tmp_path)
    loaded = steppe.load_pretrained(load, tmp_path).eval()
    inputs = models.inputs_for(model)
    with torch.no_grad():
        want = model(**inputs).logits
        assert torch.equal(loaded(**inputs).logits, want)
        assert thresholds(loaded)[0].multiple == 1.5
        # The comparison can fail: without the threshold, these are other logits.
        assert not torch.equal(steppe.restore_(loaded)(**inputs).logits, want)


# ---- with the other plug-ins, and measured


def order_of(plugins: tuple[Plugin, ...]) -> str:
    return " ".join(plugin.key for plugin in plugins)


PAPER = (ZerothBias(), RestrictedNorm(), JumpingSquaredReLU(ramp=0.5))


@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("place", range(4))
def test_it_composes_with_the_papers_plugins_in_any_order(place: int, apart: bool) -> None:
    order = (*PAPER[:place], RisingThreshold(), *PAPER[place:])
    torch.manual_seed(0)
    model, first = models.gpt2().double(), models.gpt2().double()
    first.load_state_dict(model.state_dict())
    steppe.sparsify_(first, [*PAPER, RisingThreshold()])
    for group in [[plugin] for plugin in order] if apart else [order]:
        steppe.sparsify_(model, group)
    for each in (model, first):
        run_text(each, 0)
        steppe.project_(steppe.advance_(each, 0.25))
    recorder = Recorder(model)
    ids = models.token_ids(seed=1)
    assert torch.equal(model(input_ids=ids).logits, first(input_ids=ids).logits)
    for block, p in zip(steppe.find_blocks(model), recorder.take(), strict=True):
        assert block.act.mix == 0.5
        hidden = block.act(p)
        want = [oracles.rectifier(v, 1.0, 0.25) for v in p.flatten().tolist()]
        assert hidden.flatten().tolist() == pytest.approx(want, rel=1e-14, abs=0)
    steppe.restore_(model)
    assert not [key for key in model.state_dict() if "threshold" in key]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(
    "others", [(), (JumpingSquaredReLU(),), (JumpingSquaredReLU(ramp=1.0),)], ids=order_of
)
@pytest.mark.parametrize("name", ["gpt2", "t5 gated", "llama"])
def test_the_identity_holds_with_a_threshold(
    name: str, others: tuple[Plugin, ...], dtype: torch.dtype
) -> None:
    make, run = CASES[name]
    model = (models.t5(gated=True) if name == "t5 gated" else make()).to(dtype)
    steppe.sparsify_(model, [RisingThreshold(multiple=1.0), *others])
    run(model, 0)
    steppe.project_(steppe.advance_(model, 0.5))
    ids = models.token_ids()
    batch = {"input_ids": ids, "attention_mask": COUNTED.long(), "labels": ids}
    report = steppe.measure(model, [batch])
    steppe.restore_(model)
    plain = steppe.measure(model, [batch])
    tolerance = 1e-12 if dtype == torch.float64 else 1e-6
    for block, before in zip(report.blocks, plain.blocks, strict=True):
        assert block.derivative_density_by_identity == pytest.approx(
            block.derivative_density, rel=tolerance
        )
        assert 0.05 < block.derivative_density < 0.6 * before.derivative_density


# ---- refused


@pytest.mark.parametrize("multiple", [-0.1, math.nan, math.inf])
def test_a_multiple_below_zero_is_refused(multiple: float) -> None:
    with pytest.raises(ValueError, match=f"expected multiple ≥ 0, got {multiple}"):
        RisingThreshold(multiple=multiple)


@pytest.mark.parametrize("ramp", [0.0, -0.5, 1.01, math.nan])
def test_a_ramp_outside_the_run_is_refused(ramp: float) -> None:
    with pytest.raises(ValueError, match=rf"RisingThreshold\.ramp is a share .* got {ramp}"):
        RisingThreshold(ramp=ramp)


def test_a_first_layer_that_peft_adapts_is_refused() -> None:
    config = LoraConfig(r=2, target_modules=["c_fc"], fan_in_fan_out=True)
    model = get_peft_model(models.gpt2(), config)
    with pytest.raises(UnfitBlockError, match=r"transformer\.h\.0: PEFT adapts the first layer"):
        steppe.sparsify_(model, [RisingThreshold()])


def test_a_threshold_of_its_own_is_refused() -> None:
    model = models.gpt2()
    model.transformer.h[1].mlp.c_fc.threshold = 3
    with pytest.raises(UnfitBlockError, match=r"transformer\.h\.1: .* 'threshold' of its own"):
        steppe.sparsify_(model, [RisingThreshold()])


def test_blocks_can_be_left_out() -> None:
    model = models.gpt2()
    steppe.sparsify_(model, [RisingThreshold()], where=lambda block: block.name.endswith("1"))
    run_text(model, 0)
    steppe.project_(model)
    found = [threshold_of(block) for block in steppe.find_blocks(model)]
    assert found[0] is None
    assert found[1].deviation.all()


def test_the_orders_above_are_different_ones() -> None:
    orders = [order_of((*PAPER[:i], RisingThreshold(), *PAPER[i:])) for i in range(4)]
    assert all(one != two for one, two in itertools.combinations(orders, 2))
