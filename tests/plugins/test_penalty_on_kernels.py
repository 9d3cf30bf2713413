"""ActivationPenalty on the kernels: Σ|a| and its gradient on the support equal the dense ones."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import models
import steppe
from steppe import ActivationPenalty, JumpingSquaredReLU, RisingThreshold
from steppe.ops import mlp as mlp_op
from steppe.ops import reference
from steppe.ops.cpu import native_ops as native_ops  # registers the kernels
from steppe.ops.cpu.library import kernels
from steppe.ops.cpu.saved import Saved
from steppe.ops.reference import Rule, Weights

pytestmark = pytest.mark.skipif(kernels().name != "native", reason=kernels().reason)
STRENGTH = 2.0**-4
COUNTED = torch.tensor([[True] * 7, [True] * 4 + [False] * 3])
MODELS: dict[str, Callable[[], nn.Module]] = {
    "opt": models.opt,
    "gpt2": functools.partial(models.gpt2, "relu"),
    "t5 gated": functools.partial(models.t5, "relu", gated=True),
    "torch encoder": functools.partial(models.torch_encoder, batch_first=False),
}
LIMITS = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 2e-2}


def block_of(
    gated: bool, dtype: torch.dtype, rows: int = 50, width: int = 33, hidden: int = 700
) -> tuple[Tensor, Weights]:
    def random(*shape: int) -> Tensor:
        return torch.randn(shape).to(dtype)

    weights = Weights(
        activated=random(hidden, width) / 8,
        activated_bias=random(hidden) - 1.0,
        up=random(hidden, width) / 8 if gated else None,
        up_bias=random(hidden) if gated else None,
        down=random(hidden, width),
        down_bias=random(width),
    )
    return random(rows, width), weights


@pytest.mark.parametrize("dtype", list(LIMITS))
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("rule", [(1.0, 0.0), (0.75, 0.5)])
@pytest.mark.parametrize("max_density", [0.0, 1.0])
def test_value_and_gradients_are_those_of_float64(
    dtype: torch.dtype,
    dropout: float,
    gated: bool,
    rule: tuple[float, float],
    max_density: float,
) -> None:
    x, weights = block_of(gated, dtype)
    leaves = [t.requires_grad_() for t in (x, *weights) if t is not None]
    arguments = (*rule, None, dropout, True, max_density, 0.0, True)
    z, l1, *saved = mlp_op.mlp(x, *weights, *arguments)
    assert l1.dtype == torch.promote_types(dtype, torch.float32)
    form = Saved(*(part.detach() for part in saved))
    assert form.is_sparse == (max_density > 0.0 and dtype != torch.float64)
    rows, hidden = len(x), len(weights.down)
    r, up, kept = (
        form.dense(part, rows, hidden) if part.numel() else part
        for part in (form.r, form.up, form.kept)
    )
    exact = [None if t is None else t.detach().double() for t in (x, *weights)]
    if gated:
        assert exact[3] is not None
        up = (exact[0] @ exact[3].T + exact[4]).flatten()
    exact_rule = Rule(*rule, dropout)
    expected = reference.l1(r.double(), up.double(), exact_rule, rows)
    torch.testing.assert_close(l1.double(), expected, rtol=LIMITS[dtype], atol=0)
    assert expected.min() > 0
    grad_z, grad_l1 = torch.randn_like(z), torch.randn_like(l1)
    got = torch.autograd.grad((z, l1), leaves, (grad_z, grad_l1), retain_graph=True)
    found = reference.mlp_backward(
        grad_z.double(),
        grad_l1.double(),
        exact[0],
        Weights(*exact[1:]),
        exact_rule,
        r.double(),
        up.double(),
        kept,
    )
    wanted = [grad for grad in (found[0], *found[1]) if grad is not None]
    without = torch.autograd.grad(z, leaves, grad_z, retain_graph=True)
    alone = torch.autograd.grad(l1, leaves, grad_l1, allow_unused=True)
    for grad, want, of_z, of_l1 in zip(got, wanted, without, alone, strict=True):
        scale = want.norm()
        assert (grad.double() - want).norm() <= 4 * LIMITS[dtype] * scale
        if of_l1 is not None:
            total = of_z.double() + of_l1.double()
            assert (total - want).norm() <= 8 * LIMITS[dtype] * scale
    assert (got[0] - without[0]).norm() > 0.1 * got[0].norm()  # the comparison can fail


@pytest.mark.parametrize("gated", [False, True])
def test_it_can_be_differentiated_twice(gated: bool) -> None:
    x, weights = block_of(gated, torch.float64, 4, 3, 9)
    leaves = [t.requires_grad_() for t in (x, *weights) if t is not None]

    def block(*given: Tensor) -> tuple[Tensor, Tensor]:
        rest = iter(given)
        parts = [None if t is None else next(rest) for t in (x, *weights)]
        z, l1, *_ = mlp_op.mlp(*parts, 1.0, 0.5, None, 0.0, True, 1.0, 0.0, True)
        return z, l1

    assert torch.autograd.gradcheck(block, leaves)
    assert torch.autograd.gradgradcheck(block, leaves)


def loss_of(model: nn.Module, seed: int = 0) -> Tensor:
    """A loss on a batch with padding."""
    if isinstance(model, nn.TransformerEncoder):
        x = torch.randn(7, 2, models.D_MODEL, generator=torch.Generator().manual_seed(seed))
        return model(x, src_key_padding_mask=~COUNTED).square().mean()
    ids = models.token_ids(seed=seed)
    arguments = {"input_ids": ids, "attention_mask": COUNTED.long(), "labels": ids}
    return model(**arguments).logits.square().mean()


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def penalized(model: nn.Module, seed: int = 0) -> Tensor:
    loss = steppe.penalize(loss_of(model, seed), model)
    loss.backward()
    return loss.detach()


@pytest.mark.parametrize("name", MODELS)
def test_a_routed_model_has_the_penalty_of_its_own_modules(name: str) -> None:
    own = steppe.sparsify_(MODELS[name]().train(), [ActivationPenalty(STRENGTH)])
    routed = steppe.accelerate_(copy.deepcopy(own), max_density=1.0)
    for seed in range(2):  # the first call of each mode looks at the wiring
        losses = [penalized(model, seed) for model in (own, routed)]
        torch.testing.assert_close(losses[1], losses[0], rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(gradients(routed), gradients(own), rtol=1e-4, atol=1e-6)
    explained = steppe.explain(routed).blocks
    assert all(block.how == "sparse" for block in explained), explained


def test_it_composes_with_the_other_plug_ins() -> None:
    plugins = [ActivationPenalty(STRENGTH), RisingThreshold(1.0), JumpingSquaredReLU(ramp=1.0)]
    own = steppe.sparsify_(models.gpt2("relu").train(), plugins)
    routed = steppe.accelerate_(copy.deepcopy(own), max_density=1.0)
    for seed in range(3):
        losses = []
        for model in (own, routed):
            losses.append(penalized(model, seed))
            steppe.project_(steppe.advance_(model, 0.2 * (seed + 1)))
        torch.testing.assert_close(losses[1], losses[0], rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(gradients(routed), gradients(own), rtol=1e-4, atol=1e-6)


def test_in_evaluation_there_is_none() -> None:
    model = steppe.sparsify_(models.gpt2("relu"), [ActivationPenalty(1.0)]).eval()
    steppe.accelerate_(model, max_density=1.0)
    for _ in range(2):
        loss = loss_of(model)
        assert steppe.penalize(loss, model) is loss


def test_a_decoding_step_in_training_mode_is_seen() -> None:
    """A step that repeats the last one must not hide a penalty that begins with the mode."""
    model = steppe.sparsify_(models.torch_encoder(batch_first=True), [ActivationPenalty(1.0)])
    steppe.accelerate_(model, max_density=1.0, weights_are_final=True)
    x = torch.randn(1, 1, models.D_MODEL)
    with torch.no_grad():
        for _ in range(6):
            model.eval()(x)
        loss = torch.zeros(())
        for _ in range(4):
            model.train()(x)
        assert steppe.penalize(loss, model) > 0


def make_stack(reentrant: bool | None = None, routed: bool = True) -> nn.Module:
    torch.manual_seed(0)
    stack = steppe.sparsify_(models.CheckpointedStack(reentrant), [ActivationPenalty(STRENGTH)])
    return steppe.accelerate_(stack, max_density=1.0) if routed else stack


def stack_gradients(stack: nn.Module, forward: Any = None) -> tuple[Tensor, dict[str, Tensor]]:
    """Three passes, as in a loop."""
    for seed in range(3):
        x = torch.randn(2, 5, models.D_MODEL, generator=torch.Generator().manual_seed(seed))
        out = (stack if forward is None else forward)(x.requires_grad_())
        loss = steppe.penalize(out.square().mean(), stack)
        loss.backward()
    return loss.detach(), gradients(stack)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_adds_it_once(reentrant: bool) -> None:
    want, got = stack_gradients(make_stack(routed=False)), stack_gradients(make_stack(reentrant))
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-7)


def test_compiled_it_is_the_same_in_one_graph() -> None:
    want = stack_gradients(make_stack(routed=False))
    stack = make_stack()
    stack(torch.randn(2, 5, models.D_MODEL))  # its wiring is looked at
    torch.compiler.reset()
    compiled = torch.compile(stack, fullgraph=True, backend="aot_eager")
    got = stack_gradients(stack, compiled)
    torch.compiler.reset()
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-7)


def test_no_dense_hidden_tensor_is_saved() -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(64, 2, 2048, dropout=0.0, batch_first=True)
    with torch.no_grad():
        layer.linear1.bias.fill_(-1.5)
    stack = nn.Sequential(layer)
    steppe.sparsify_(stack, [ActivationPenalty(STRENGTH)])
    steppe.accelerate_(stack, max_density=1.0)
    x = torch.randn(4, 64, 64)
    stack(x)
    sizes: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: sizes.append(t.numel()) or t, lambda t: t
    ):
        loss = steppe.penalize(stack(x).square().mean(), stack)
    loss.backward()
    assert max(sizes) < 256 * 2048 / 2
