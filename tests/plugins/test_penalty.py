"""ActivationPenalty: its value and gradient against the definition, in every kind of step."""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD
from torch.utils.checkpoint import checkpoint

import models
import oracles
import steppe
from steppe import ActivationPenalty, JumpingSquaredReLU, RisingThreshold
from steppe.errors import LossError, ScheduleError, SparsificationError

pytestmark = [
    pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable. is deprecated"),
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),
]
STRENGTH = 2.0**-6
COUNTED = torch.tensor([[True] * 7, [True] * 4 + [False] * 3])
DECODED = torch.tensor([[True] * 5, [True] * 2 + [False] * 3])
MODELS: dict[str, Callable[[], nn.Module]] = {
    "opt": models.opt,
    "gpt2": models.gpt2,
    "gpt2 gelu": functools.partial(models.gpt2, "gelu"),
    "llama": models.llama,
    "t5": functools.partial(models.t5, dropout=0.3),
    "t5 gated": functools.partial(models.t5, "gelu_new", gated=True),
    "torch encoder": functools.partial(models.torch_encoder, batch_first=False),
}


def loss_of(model: nn.Module, seed: int = 0) -> Tensor:
    """A loss on a batch with padding."""
    if isinstance(model, nn.TransformerEncoder):
        x = torch.randn(7, 2, models.D_MODEL, generator=torch.Generator().manual_seed(seed))
        x = x.to(model.layers[0].linear1.weight.dtype)
        return model(x, src_key_padding_mask=~COUNTED).square().mean()
    ids = models.token_ids(seed=seed)
    arguments = {"input_ids": ids, "attention_mask": COUNTED.long()}
    if model.config.is_encoder_decoder:
        arguments["labels"] = models.token_ids(2, 5, seed).masked_fill(~DECODED, -100)
    else:
        arguments["labels"] = ids.masked_fill(~COUNTED, -100)
    # The stock losses are float32.
    return model(**arguments).logits.square().mean()


def counted_of(model: nn.Module) -> list[Tensor]:
    if isinstance(model, nn.TransformerEncoder):
        return [COUNTED.T.reshape(-1)]
    if model.config.is_encoder_decoder:
        return [COUNTED.reshape(-1)] * 2 + [DECODED.reshape(-1)] * 2
    return [COUNTED.reshape(-1)]


class Activations:
    """What each block's activations were, with their graphs; before dropout."""

    def __init__(self, model: nn.Module) -> None:
        self.a: list[Tensor] = []
        for block in steppe.find_blocks(model):
            receiver = block.down if block.dropout is None else block.dropout
            receiver.register_forward_pre_hook(self.see)

    def see(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        self.a.append(args[0].reshape(-1, args[0].shape[-1]))


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", MODELS)
def test_value_and_gradient_are_those_of_the_definition(name: str) -> None:
    torch.manual_seed(0)
    model = MODELS[name]().double().train()
    plain = copy.deepcopy(model)
    steppe.sparsify_(model, [ActivationPenalty(STRENGTH)])
    torch.manual_seed(1)
    loss = loss_of(model)
    got = steppe.penalize(loss, model)
    got.backward()
    recorder = Activations(plain)
    torch.manual_seed(1)
    task = loss_of(plain)
    masks = counted_of(plain)
    penalty = [oracles.mean_l1(a, masks[i % len(masks)]) for i, a in enumerate(recorder.a)]
    assert loss.item() == task.item()
    assert got.item() == pytest.approx(task.item() + STRENGTH * sum(penalty), rel=1e-12)
    terms = [a[masks[i % len(masks)]].abs().sum(-1).mean() for i, a in enumerate(recorder.a)]
    (task + STRENGTH * torch.stack(terms).sum()).backward()
    want = gradients(plain)
    torch.testing.assert_close(gradients(model), want, rtol=1e-10, atol=1e-13)
    plain.zero_grad()  # the comparison can fail
    torch.manual_seed(1)
    loss_of(plain).backward()
    assert any(not torch.allclose(g, want[n], rtol=1e-3) for n, g in gradients(plain).items())


def test_it_composes_with_a_threshold_and_the_papers_activation() -> None:
    torch.manual_seed(0)
    model = models.gpt2().double()
    steppe.sparsify_(
        model, [ActivationPenalty(STRENGTH), RisingThreshold(1.0), JumpingSquaredReLU(ramp=1.0)]
    )
    steppe.penalize(loss_of(model), model)
    steppe.project_(steppe.advance_(model, 0.5))
    recorder = Activations(model)
    loss = loss_of(model, seed=1)
    want = sum(oracles.mean_l1(a, COUNTED.reshape(-1)) for a in recorder.a)
    assert steppe.penalize(loss, model).item() == pytest.approx(
        loss.item() + STRENGTH * want, rel=1e-12
    )


@pytest.mark.parametrize("name", ["gpt2", "t5"])
def test_a_strength_of_zero_changes_no_bit(name: str) -> None:
    torch.manual_seed(0)
    model = MODELS[name]().train()
    plain = copy.deepcopy(model)
    steppe.sparsify_(model, [ActivationPenalty(0.0)])
    for each in (model, plain):
        torch.manual_seed(1)
        loss = loss_of(each)
        (steppe.penalize(loss, each) if each is model else loss).backward()
    assert gradients(model).keys() == gradients(plain).keys()
    assert all(torch.equal(g, gradients(plain)[n]) for n, g in gradients(model).items())


def test_in_evaluation_there_is_none() -> None:
    model = steppe.sparsify_(models.gpt2(), [ActivationPenalty(1.0)]).eval()
    loss = loss_of(model)
    assert steppe.penalize(loss, model) is loss
    model.train()
    loss_of(model)
    model.eval()
    loss = loss_of(model)  # the state of an earlier pass is forgotten
    assert steppe.penalize(loss, model) is loss


def test_accumulated_batches_are_one_large_batch() -> None:
    torch.manual_seed(0)
    model = steppe.sparsify_(models.gpt2().double(), [ActivationPenalty(STRENGTH)])
    ids = models.token_ids(6)
    steppe.penalize(model(input_ids=ids).logits.square().mean(), model).backward()
    want = gradients(model)
    model.zero_grad()
    for part in ids.split(2):
        loss = model(input_ids=part).logits.square().mean()
        (steppe.penalize(loss, model) / 3).backward()
    torch.testing.assert_close(gradients(model), want, rtol=1e-10, atol=1e-14)


def penalized_gradients(
    stack: nn.Module, forward: Callable[[Tensor], Tensor]
) -> tuple[Tensor, dict[str, Tensor]]:
    """Two passes, as in a loop."""
    for seed in range(2):
        x = torch.randn(2, 5, models.D_MODEL, generator=torch.Generator().manual_seed(seed))
        loss = steppe.penalize(forward(x.requires_grad_()).square().mean(), stack)
        loss.backward()
    return loss.detach(), gradients(stack)


def make_stack(reentrant: bool | None = None) -> nn.Module:
    torch.manual_seed(0)
    return steppe.sparsify_(models.CheckpointedStack(reentrant), [ActivationPenalty(STRENGTH)])


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_adds_it_once(reentrant: bool) -> None:
    plain, checked = make_stack(), make_stack(reentrant)
    want, got = penalized_gradients(plain, plain), penalized_gradients(checked, checked)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-7)


def test_reentrant_checkpointing_of_one_layer_knows_the_scaled_loss() -> None:
    found = []
    for reentrant in (None, True):
        stack = make_stack()
        if reentrant:
            first, second = stack.layers
            stack.forward = lambda x, one=first, two=second: two(
                checkpoint(one, x, use_reentrant=True)
            )
        optimizer = SGD(stack.parameters(), lr=0.1)
        steppe.constrain_(stack, optimizer)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**6)
        x = torch.randn(2, 5, models.D_MODEL, generator=torch.Generator().manual_seed(0))
        for _ in range(2):
            loss = steppe.penalize(stack(x.requires_grad_()).square().mean(), stack) / 3
            scaler.scale(loss).backward()
            found.append(gradients(stack))
        scaler.step(optimizer)  # every block has had its gradient
    torch.testing.assert_close(found[2], found[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found[3], found[1], rtol=1e-5, atol=1e-5)


def test_a_penalty_of_a_pass_without_a_graph_is_one_clear_error() -> None:
    stack = make_stack()
    optimizer = SGD(stack.parameters(), lr=0.1)
    steppe.constrain_(stack, optimizer)
    x = torch.randn(2, 5, models.D_MODEL)
    with torch.no_grad():
        loss = stack(x).square().mean()
        assert steppe.penalize(loss, stack) > loss
    own = sum(parameter.square().sum() for parameter in stack.parameters())
    with torch.no_grad():
        stack(x)
    steppe.penalize(own, stack).backward()
    with pytest.raises(LossError, match=r"under torch\.no_grad\(\), from which no gradient comes"):
        optimizer.step()


@pytest.mark.parametrize("reentrant", [None, False])
def test_compiled_it_is_the_same(reentrant: bool | None) -> None:
    torch.compiler.reset()
    plain, stack = make_stack(), make_stack(reentrant)
    want = penalized_gradients(plain, plain)
    # Checkpointing breaks the graph, where the means leave it.
    compiled = torch.compile(stack, backend="aot_eager", fullgraph=reentrant is None)
    got = penalized_gradients(stack, compiled)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-7)


def test_in_half_precision_the_sums_are_float32() -> None:
    torch.manual_seed(0)
    model = models.gpt2()
    with torch.no_grad():
        for block in steppe.find_blocks(model):
            block.up.bias += 300.0  # 32 units of it are more than float16 tells apart
    steppe.sparsify_(model, [ActivationPenalty(STRENGTH)])
    recorder = Activations(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
    with torch.autocast("cpu", torch.float16):
        loss = loss_of(model)
        got = steppe.penalize(loss, model)
    want = sum(oracles.mean_l1(a.detach(), COUNTED.reshape(-1)) for a in recorder.a)
    assert recorder.a[0].dtype == torch.float16
    assert got.dtype == loss.dtype
    assert (got - loss).item() == pytest.approx(STRENGTH * want, rel=1e-5)
    scaler.scale(got).backward()
    with_penalty = gradients(model)
    model.zero_grad()
    recorder.a.clear()
    with torch.autocast("cpu", torch.float16):
        loss = loss_of(model)
    scaler.scale(loss).backward()
    difference = (
        with_penalty["transformer.h.1.mlp.c_fc.bias"]
        - gradients(model)["transformer.h.1.mlp.c_fc.bias"]
    ) / 2.0**8
    # Every unit is active on every token, so each has λ for its gradient.
    torch.testing.assert_close(
        difference, torch.full_like(difference, STRENGTH), rtol=2e-2, atol=2e-3
    )


@pytest.mark.parametrize(("progress", "share"), [(0.0, 0.0), (0.1, 0.25), (0.4, 1.0), (1.0, 1.0)])
def test_the_strength_rises_linearly(progress: float, share: float) -> None:
    model = steppe.sparsify_(models.gpt2(), [ActivationPenalty(STRENGTH, ramp=0.4)])
    whole = steppe.sparsify_(
        copy.deepcopy(steppe.restore_(copy.deepcopy(model))), [ActivationPenalty(STRENGTH)]
    )
    steppe.advance_(model, progress)
    losses = [loss_of(each) for each in (model, whole)]
    added = [
        (steppe.penalize(loss, each) - loss).item()
        for loss, each in zip(losses, (model, whole), strict=True)
    ]
    assert added[1] > 0.01
    assert added[0] == pytest.approx(share * added[1], rel=1e-5, abs=1e-7)


def test_a_ramp_without_the_length_of_the_run_is_refused() -> None:
    model = steppe.sparsify_(models.gpt2(), [ActivationPenalty(STRENGTH, ramp=0.4)])
    with pytest.raises(ScheduleError, match=r"ActivationPenalty.*total_steps=10_000"):
        steppe.constrain_(model, SGD(model.parameters(), lr=0.1))


def test_a_loop_that_forgets_it_is_arguments() -> None:
    model = steppe.sparsify_(models.gpt2(), [ActivationPenalty(STRENGTH)])
    optimizer = SGD(model.parameters(), lr=0.1)
    steppe.constrain_(model, optimizer)
    steppe.penalize(loss_of(model), model).backward()
    optimizer.step()
    loss_of(model).backward()
    with pytest.raises(ScheduleError, match=r"loss = steppe\.penalize\(loss, model\)"):
        optimizer.step()


def test_a_model_without_a_penalty_is_arguments() -> None:
    with pytest.raises(SparsificationError, match="GPT2LMHeadModel carries no penalty"):
        steppe.penalize(torch.ones(()), models.gpt2())


@pytest.mark.parametrize("strength", [-1e-4, math.nan, math.inf])
def test_a_strength_that_means_nothing_is_refused(strength: float) -> None:
    with pytest.raises(ValueError, match=f"expected strength ≥ 0, got {strength}"):
        ActivationPenalty(strength)


def test_accelerated_blocks_get_their_penalty_from_their_own_modules() -> None:
    torch.manual_seed(0)
    model = steppe.sparsify_(models.gpt2(), [ActivationPenalty(STRENGTH)])
    steppe.penalize(loss_of(model), model).backward()
    want = gradients(model)
    model.zero_grad()
    steppe.accelerate_(model, max_density=1.0)
    steppe.penalize(loss_of(model), model).backward()
    torch.testing.assert_close(gradients(model), want, rtol=1e-5, atol=1e-7)


def test_it_is_no_part_of_the_state_dict_and_a_copy_is_independent() -> None:
    model = models.gpt2()
    keys = list(model.state_dict())
    steppe.sparsify_(model, [ActivationPenalty(STRENGTH)])
    loss = loss_of(model)
    clone = copy.deepcopy(model)  # also with a graph that waits
    assert list(clone.state_dict()) == keys
    steppe.penalize(loss, model).backward()
    assert steppe.penalize(loss_of(clone), clone) > loss
