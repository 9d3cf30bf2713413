"""Whole models whose first products are screened: trained, decoding, changed under way."""

from __future__ import annotations

import copy
import gc
import math
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import GenerationConfig, GPT2Config, GPT2LMHeadModel

import models
import steppe
from steppe.ops.cpu import copies, native_ops, screen
from steppe.ops.cpu.block import CpuBlock
from steppe.ops.cpu.decode import FewCall
from steppe.ops.cpu.library import kernels

native = pytest.mark.skipif(kernels().name != "native", reason=kernels().reason)
pytestmark = [
    pytest.mark.filterwarnings(
        "ignore:.gradient_checkpointing_enable. is deprecated:FutureWarning"
    ),
    pytest.mark.filterwarnings("ignore:<class 'torch.autograd.function.Function'> should not be"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning"),
    pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning"),
]
PLUGINS = [
    steppe.ZerothBias(max_tokens=16),
    steppe.RestrictedNorm(),
    steppe.JumpingSquaredReLU(),
]
MODELS = {**models.LANGUAGE_MODELS, "t5 gated": lambda: models.t5(gated=True)}
Change = Callable[[nn.Module], object]


def gpt2(width: int = 64, hidden: int = 256) -> nn.Module:
    """A GPT-2 with more units than the smallest, few of them active."""
    config = GPT2Config(
        vocab_size=models.VOCABULARY,
        n_embd=width,
        n_inner=hidden,
        n_layer=2,
        n_head=4,
        n_positions=models.MAX_TOKENS,
        activation_function="relu",
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        pad_token_id=0,
        **models.SPECIAL_TOKENS,
    )
    model = GPT2LMHeadModel(config)
    for block in steppe.find_blocks(model):
        nn.init.normal_(block.up.weight, std=width**-0.5 / 2)
        nn.init.constant_(block.up.bias, -0.5)
    return model


SEEN: list[float] = []  # the share of candidates of each screened call


def screen_(model: nn.Module) -> nn.Module:
    steppe.accelerate_(model, max_density=1.0, max_candidates=1.0)
    SEEN.clear()  # the calls of the dry run
    return model


@pytest.fixture
def shares(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The share of candidates of each screened call, of many rows and of few."""
    SEEN.clear()
    run, run_again = FewCall.run, CpuBlock.run_again

    def see(call: FewCall | None) -> None:
        share = math.nan if call is None else call.outcome().candidates
        if not math.isnan(share):
            SEEN.append(share)

    def finding(*arguments: Any) -> Any:
        found = screen.find_candidates(*arguments)
        if found is not None:
            SEEN.append(found.share)
        return found

    def running(call: FewCall, *arguments: Any) -> Any:
        done = run(call, *arguments)
        see(None if done is None else call)
        return done

    def running_again(block: CpuBlock, x: Tensor) -> Tensor | None:
        z = run_again(block, x)
        see(None if z is None else block._repeated)
        return z

    monkeypatch.setattr(native_ops, "find_candidates", finding)
    monkeypatch.setattr(FewCall, "run", running)
    monkeypatch.setattr(CpuBlock, "run_again", running_again)
    return SEEN


def train(model: nn.Module, steps: int) -> list[float]:
    """The losses."""
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, eps=1e-4)
    if steppe.added_parameters(model):
        steppe.constrain_(model, optimizer)
    losses = []
    for step in range(steps):
        ids = models.token_ids(4, 16, seed=step % 5)
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@native
@pytest.mark.parametrize("plugins", [[], PLUGINS], ids=["plain", "sparsified"])
def test_two_hundred_steps_have_the_same_losses(plugins: list, shares: list[float]) -> None:
    """Of a model so small that it is unlikely for any p to come as near to zero as rounding goes.

    There the gradient jumps, and two runs part even if their sums differ only in their order.
    """
    model = models.gpt2()
    if plugins:
        steppe.sparsify_(model, plugins)
    other = screen_(copy.deepcopy(model))
    losses = train(model, 200)
    assert shares == []
    assert train(other, 200) == pytest.approx(losses, rel=1e-5)
    assert losses[-1] < losses[0] - 1.0
    assert len(shares) == 2 * 2 * 200  # of some tokens, then of all, in each block
    assert 0.0 < sum(shares) / len(shares) < 0.8


def loss_and_gradients(model: nn.Module, inputs: dict[str, Tensor]) -> tuple[float, list[Tensor]]:
    model.zero_grad()
    loss = model(**inputs).logits.square().mean()
    loss.backward()
    return loss.item(), [p.grad.clone() for p in model.parameters() if p.grad is not None]


def assert_same(got: tuple[float, list[Tensor]], expected: tuple[float, list[Tensor]]) -> None:
    assert got[0] == pytest.approx(expected[0], rel=1e-5)
    assert len(got[1]) == len(expected[1]) > 0
    largest = max(float(gradient.abs().max()) for gradient in expected[1])
    for one, other in zip(got[1], expected[1], strict=True):
        assert torch.allclose(one, other, rtol=1e-4, atol=1e-6 * largest)


@native
@pytest.mark.parametrize("name", MODELS)
def test_every_architecture_computes_and_learns_the_same(name: str, shares: list[float]) -> None:
    model = MODELS[name]().eval()
    inputs = models.inputs_for(model, batch=4)
    expected = loss_and_gradients(model, inputs)
    blocks = len(steppe.find_blocks(model))
    screen_(model)
    assert_same(loss_and_gradients(model, inputs), expected)
    assert len(shares) == 2 * blocks


@native
def test_a_forward_pass_that_checkpointing_repeats_comes_to_the_same_list(
    shares: list[float],
) -> None:
    """Also where a few tokens less or more candidates would have decided otherwise."""
    model = gpt2().train()
    inputs = {"input_ids": models.token_ids(4, 16), "use_cache": False}
    expected = loss_and_gradients(model, inputs)
    screen_(model)
    loss_and_gradients(model, inputs)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    middle = sum(shares) / len(shares)
    for most in (0.0, middle - 0.1, middle - 0.05, middle, middle + 0.05, 1.0):
        steppe.accelerate_(model, max_density=1.0, max_candidates=most)
        assert_same(loss_and_gradients(model, inputs), expected)


@native
def test_accumulated_gradients_are_those_of_the_whole_batch(shares: list[float]) -> None:
    model = gpt2()
    other = screen_(copy.deepcopy(model))
    ids = models.token_ids(8, 16)
    model(input_ids=ids, labels=ids).loss.backward()
    for part in ids.split(2):
        (other(input_ids=part, labels=part).loss / 4).backward()
    assert len(shares) == 4 * 2 * 2
    for one, two in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.allclose(two.grad, one.grad, rtol=1e-4, atol=1e-6)
        assert one.grad.abs().max() > 1e-4


@native
@pytest.mark.parametrize("training", [True, False])
def test_autocast_screens_in_the_lower_precision(training: bool, shares: list[float]) -> None:
    model = gpt2()
    inputs = {"input_ids": models.token_ids(4, 16)}
    with torch.autocast("cpu", torch.bfloat16), torch.set_grad_enabled(training):
        expected = model(**inputs).logits
        screen_(model)
        got = [model(**inputs).logits for _ in range(2)]
    assert len(shares) == 2 * 2 * 2  # a cast weight is met once, so a sample is screened first
    assert got[0].dtype == expected.dtype
    assert torch.equal(got[0], got[1])
    assert (got[0] - expected).norm() < 1e-2 * expected.norm()


@native
def test_a_model_of_bfloat16_is_screened(shares: list[float]) -> None:
    model = gpt2().to(torch.bfloat16)
    other = screen_(copy.deepcopy(model))
    with torch.no_grad():
        for tokens in (16, 4):
            ids = models.token_ids(1, tokens)
            for _ in range(3):
                expected, got = model(input_ids=ids).logits, other(input_ids=ids).logits
                assert (got - expected).norm() < 3e-2 * expected.norm()
    assert len(shares) > 8


@native
def test_compiled_into_one_graph() -> None:
    layer = nn.TransformerEncoderLayer(64, 4, 256, dropout=0.0, batch_first=True)
    x = torch.randn(1, 40, 64)
    expected = layer(x)
    screen_(layer)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert torch.allclose(compiled(x), expected, atol=1e-5)
    (gradient,) = torch.autograd.grad(compiled(x).square().sum(), layer.linear1.weight)
    (wanted,) = torch.autograd.grad(expected.square().sum(), layer.linear1.weight)
    assert torch.allclose(gradient, wanted, rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        assert torch.allclose(compiled(x[:, :4]), layer(x[:, :4]), atol=1e-5)


@native
@pytest.mark.parametrize("name", ["gpt2", "opt", "t5", "llama", "wide"])
def test_generation_is_the_same_token_by_token(name: str, shares: list[float]) -> None:
    model = (gpt2() if name == "wide" else MODELS[name]()).eval()
    settings = GenerationConfig(
        max_new_tokens=12, do_sample=False, pad_token_id=0, eos_token_id=None
    )
    ids = models.token_ids(2, 7)
    expected = model.generate(ids, generation_config=settings)
    screen_(model)
    for _ in range(2):
        assert torch.equal(model.generate(ids, generation_config=settings), expected)
    assert len(shares) >= 20


def step_of_an_optimizer(block: Any) -> None:
    with torch.inference_mode(False), torch.enable_grad():
        optimizer = torch.optim.SGD([block.up.weight, block.down.weight], lr=1.0)
        (block.up.weight.square().sum() + block.down.weight.square().sum()).backward()
        optimizer.step()
        optimizer.zero_grad()


def replace_parameters(block: Any) -> None:
    for layer in (block.up, block.down):
        layer.weight = nn.Parameter(layer.weight.detach() * -2.0)


def move_data(block: Any, name: str) -> None:
    layer = getattr(block, name)
    layer.weight.data = layer.weight.data * -3.0


CHANGES: dict[str, Change] = {
    "in place": lambda block: block.up.weight.detach().mul_(-2.0),
    "one value": lambda block: block.up.weight.detach()[0, 0].fill_(9.0),
    "bias": lambda block: block.up.bias.detach().add_(1.0),
    "through data": lambda block: block.up.weight.data.mul_(-2.0),
    "other data of up": lambda block: move_data(block, "up"),
    "other data of down": lambda block: move_data(block, "down"),
    "other data of a bias": lambda block: setattr(block.up.bias, "data", block.up.bias + 1.0),
    "no bias data": lambda block: setattr(block.up.bias, "data", block.up.bias * 0.0),
    "parameter": replace_parameters,
    "optimizer": step_of_an_optimizer,
    "load": lambda block: block.up.load_state_dict(
        {name: value * -2.0 for name, value in block.up.state_dict().items()}
    ),
    "assign": lambda block: block.up.load_state_dict(
        {name: value * -2.0 for name, value in block.up.state_dict().items()}, assign=True
    ),
    "dtype and back": lambda block: block.up.to(torch.bfloat16) and block.up.to(torch.float32),
}


@native
@pytest.mark.parametrize("without", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("tokens", [1, 7, 24])
@pytest.mark.parametrize("name", ["wide", "opt", "llama"])
def test_weights_that_change_between_calls(
    name: str, tokens: int, without: Callable[[], Any], shares: list[float]
) -> None:
    """Through every change that is made to a model; dense is right."""
    model = (gpt2() if name == "wide" else MODELS[name]()).eval()
    plain = copy.deepcopy(model)
    screen_(model)
    ids = models.token_ids(1, tokens)
    for what, change in CHANGES.items():
        blocks = [steppe.find_blocks(each)[0] for each in (model, plain)]
        if "bias" in what and blocks[0].up.bias is None:
            continue
        with without():
            for _ in range(3):
                before = model(input_ids=ids).logits
        del shares[:]
        with torch.no_grad():
            for block in blocks:
                change(block)
        with without():
            for call in range(4):
                expected = plain(input_ids=ids).logits
                got = model(input_ids=ids).logits
                limit = 1e-5 * float(expected.abs().max())
                assert torch.allclose(got, expected, rtol=1e-4, atol=limit), (what, call)
        assert not torch.equal(before, expected), what
        assert shares, what


@native
@pytest.mark.parametrize("tokens", [4, 24])
def test_the_whole_model_in_another_dtype_and_back(tokens: int) -> None:
    model = gpt2().eval()
    plain = copy.deepcopy(model)
    screen_(model)
    ids = models.token_ids(1, tokens)
    with torch.no_grad():
        for dtype in (torch.float32, torch.bfloat16, torch.float64, torch.float32, torch.bfloat16):
            model.to(dtype), plain.to(dtype)
            limit = {torch.bfloat16: 3e-2}.get(dtype, 1e-5)
            for _ in range(3):
                expected, got = plain(input_ids=ids).logits, model(input_ids=ids).logits
                assert got.dtype == dtype
                assert (got - expected).norm() < limit * expected.norm()


@native
def test_a_copy_has_screens_of_its_own_weights(shares: list[float]) -> None:
    model = screen_(gpt2().eval())
    ids = models.token_ids(1, 4)
    with torch.no_grad():
        for _ in range(3):
            expected = model(input_ids=ids).logits
        other = copy.deepcopy(model)
        for _ in range(3):
            assert torch.allclose(other(input_ids=ids).logits, expected, atol=1e-6)
        for block in steppe.find_blocks(other):
            block.up.weight.mul_(-2.0)
        plain = copy.deepcopy(other)
        steppe.restore_(plain)
        wanted = plain(input_ids=ids).logits
        del shares[:]
        for _ in range(3):
            assert torch.allclose(other(input_ids=ids).logits, wanted, rtol=1e-4, atol=1e-5)
            assert torch.equal(model(input_ids=ids).logits, expected)
        assert not torch.allclose(wanted, expected, atol=1e-3)
        assert len(shares) >= 8


@native
@pytest.mark.parametrize("tokens", [4, 24])
def test_restore_frees_the_screens(tokens: int) -> None:
    copies._entries.clear()
    model = screen_(gpt2().eval())
    weights = [weakref.ref(block.up.weight) for block in steppe.find_blocks(model)]
    with torch.no_grad():
        for _ in range(3):
            model(input_ids=models.token_ids(1, tokens))
    kept = [
        weakref.ref(entry.copy.screen.integers)
        for entry in copies._entries.values()
        if isinstance(entry.copy, copies.KeptScreen)
    ]
    assert len(kept) == 2
    gc.collect()
    assert all(screen() is not None for screen in kept)
    steppe.restore_(model)
    gc.collect()
    assert copies._entries == {}
    assert all(screen() is None for screen in kept)
    assert all(weight() is not None for weight in weights)


@native
def test_training_keeps_no_screen() -> None:
    copies._entries.clear()
    train(screen_(gpt2()), 2)
    assert copies._entries == {}


@native
def test_an_inference_call_before_a_training_step() -> None:
    model = gpt2()
    other = screen_(copy.deepcopy(model))
    losses: list[list[float]] = []
    for each in (model, other):
        losses.append([])
        optimizer = torch.optim.SGD(each.parameters(), lr=0.1)
        for step in range(4):
            ids = models.token_ids(2, 16, seed=step)
            with torch.inference_mode():
                for tokens in (4, 16):
                    losses[-1].append(float(each(input_ids=ids[:1, :tokens]).logits.norm()))
            loss = each(input_ids=ids, labels=ids).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses[-1].append(loss.item())
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    assert len(set(losses[0])) == 12


@native
@pytest.mark.parametrize("tokens", [1, 4, 24])
def test_threads_of_python_call_one_model_at_once(tokens: int) -> None:
    model = screen_(gpt2().eval())
    plain = copy.deepcopy(model)
    steppe.restore_(plain)
    inputs = [models.token_ids(1, tokens, seed=seed) for seed in range(8)]
    with torch.no_grad():
        expected = [plain(input_ids=ids).logits for ids in inputs]

    def call(place: int) -> Tensor:
        torch.set_num_threads(1)
        with torch.no_grad():
            for _ in range(10):
                got = model(input_ids=inputs[place]).logits
        return got

    with ThreadPoolExecutor(4) as pool:
        for got, wanted in zip(pool.map(call, range(8)), expected, strict=True):
            assert torch.allclose(got, wanted, rtol=1e-4, atol=1e-5)


@native
def test_a_model_that_is_watched_counts_the_same(shares: list[float]) -> None:
    model = gpt2().eval()
    inputs = {"input_ids": models.token_ids(2, 16)}

    def counts() -> str:
        with torch.no_grad(), steppe.watch(model) as monitor:
            model(**inputs)
        return str(monitor.report())

    expected = counts()
    screen_(model)
    for _ in range(2):
        del shares[:]
        assert counts() == expected
    assert len(shares) == 2


def test_what_is_no_share_is_refused() -> None:
    model = models.gpt2()
    for share in (1.5, -0.1, float("nan")):
        with pytest.raises(ValueError, match=r"accelerate_: expected max_candidates in 0 … 1, got"):
            steppe.accelerate_(model, max_candidates=share)
    assert steppe.acceleration.accelerate.acceleration_of(model) is None


@native
def test_zero_is_never_screened_and_nothing_is_kept_for_it(shares: list[float]) -> None:
    copies._entries.clear()
    model = steppe.accelerate_(gpt2().eval(), max_density=1.0, max_candidates=0.0)
    with torch.no_grad():
        for tokens in (4, 4, 4, 24):
            model(input_ids=models.token_ids(1, tokens))
    train(model, 2)
    assert shares == []
    assert not any(isinstance(e.copy, copies.KeptScreen) for e in copies._entries.values())
