"""Hessian curvature of single weights: against the explicit Hessian, and the model as it was."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.nn import functional as F

import models
from steppe import (
    JumpingSquaredReLU,
    MLPBlock,
    Rectifier,
    accelerate_,
    explain,
    find_blocks,
    sparsify_,
)
from steppe.blocks.linear import linear_weight
from steppe.blocks.patterns import BlockPattern
from steppe.errors import EmptyLoaderError, LossError, MissingExtraError, UnfitBlockError
from steppe.measures.curvature import BlockCurvature, hessian_curvature, samples_of

Loss = Callable[[nn.Module, Any], Tensor]
LAYERS = ("up", "gate", "down")
PATTERN = BlockPattern(family="plain", up="up", act="act", down="down")


class Plain(nn.Module):
    """One block and nothing else, float64."""

    def __init__(self, d_model: int, d_hidden: int, act: nn.Module | None = None) -> None:
        super().__init__()
        self.up = nn.Linear(d_model, d_hidden)
        self.act = act or nn.ReLU()
        self.down = nn.Linear(d_hidden, d_model)
        self.double().eval()

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.act(self.up(x)))


def plain_blocks(model: nn.Module) -> list[MLPBlock]:
    return find_blocks(model, patterns=[PATTERN])


def half_square(model: nn.Module, batch: Tensor) -> Tensor:
    """Mean over samples of ½ Σ_t ‖z_t‖²."""
    return model(batch).square().sum() / (2 * len(batch))


def token_loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return model(**batch, labels=batch["input_ids"]).loss


def image_loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    logits = model(**batch).logits
    return F.cross_entropy(logits, torch.arange(len(logits)))


def explicit_hessian(model: nn.Module, weight: Tensor, loss: Callable[[], Tensor]) -> Tensor:
    """The Hessian, row by row: the derivative of each entry of the gradient."""
    required = weight.requires_grad
    weight.requires_grad_(True)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        (gradient,) = torch.autograd.grad(loss(), weight, create_graph=True)
    rows = [
        torch.autograd.grad(entry, weight, retain_graph=True)[0].flatten()
        for entry in gradient.flatten()
    ]
    weight.requires_grad_(required)
    return torch.stack(rows)


def assert_is_curvature_of(
    found: BlockCurvature, layer: str, hessian: Tensor, num_matvecs: int
) -> None:
    values = asdict(found)
    trace, error = values[f"trace_{layer}"], values[f"trace_{layer}_standard_error"]
    assert 0 < error < math.inf
    assert abs(trace - hessian.trace().item()) < 4 * error
    # The variance of vᵀ H v over random signs is 2 Σ_{i≠j} H_ij².
    off_diagonal = hessian.square().sum() - hessian.diagonal().square().sum()
    assert error == pytest.approx(math.sqrt(2 * off_diagonal / num_matvecs), rel=0.5)
    top = torch.linalg.eigvalsh(hessian)[-1].item()
    assert values[f"top_eigenvalue_{layer}"] == pytest.approx(top, rel=1e-6)
    assert values[f"top_eigenvalue_{layer}_residual"] < 1e-2 * top


def test_a_hessian_known_in_closed_form() -> None:
    # For ½ ‖V a‖² the Hessian in V is the identity ⊗ a aᵀ; one unit is active at a time, so that
    # it is diagonal and every random sign gives the trace itself.
    model = Plain(3, 3)
    with torch.no_grad():
        model.up.weight.copy_(torch.eye(3))
        model.up.bias.zero_()
    x = torch.diag(torch.tensor([1.0, 2.0, -4.0], dtype=torch.float64)).reshape(1, 3, 3)
    (found,) = hessian_curvature(model, [x], half_square, plain_blocks(model), num_matvecs=9)
    assert found.name == "Plain"
    assert found.trace_down == pytest.approx(3 * (1 + 4), rel=1e-12)
    assert found.trace_down_standard_error == pytest.approx(0, abs=1e-12)
    assert found.top_eigenvalue_down == pytest.approx(4, rel=1e-12)
    gate = [value for name, value in asdict(found).items() if "gate" in name]
    assert len(gate) == 4
    assert all(math.isnan(value) for value in gate)


@pytest.mark.parametrize(("beta", "sign"), [(0.0, 1.0), (0.5, 1.0), (0.5, -1.0)])
def test_a_loss_linear_in_the_output_sees_the_activation_alone(beta: float, sign: float) -> None:
    # ∂²/∂W_i² of c·V σ(W x) is 2 β (Vᵀ c)_i Σ_t [p_ti > 0] x_t x_tᵀ: nothing for ReLU.
    torch.manual_seed(1)
    model = Plain(3, 4, Rectifier(1.0, beta))
    with torch.no_grad():
        model.down.weight.abs_().mul_(sign)
    x = torch.randn(2, 5, 3, dtype=torch.float64)
    (found,) = hessian_curvature(
        model, [x], lambda model, batch: model(batch).sum(), plain_blocks(model), num_matvecs=12
    )
    on = (model.up(x) > 0).to(x)
    gain = 2 * beta * model.down.weight.sum(0)
    curvature = torch.einsum("f,btf,btd,bte->fde", gain, on, x, x).detach()
    trace = curvature.diagonal(dim1=1, dim2=2).sum().item()
    assert abs(found.trace_up - trace) <= 4 * found.trace_up_standard_error
    # The largest, also where those that are larger in size are negative.
    largest = torch.linalg.eigvalsh(curvature).max().item()
    assert found.top_eigenvalue_up == pytest.approx(largest, rel=1e-9, abs=1e-12)
    assert (found.trace_up != 0) == (beta != 0)
    assert found.trace_down == found.top_eigenvalue_down == 0  # linear in V


CASES: dict[str, tuple[Callable[[], nn.Module], Loss]] = {
    "gpt2": (partial(models.gpt2, "relu"), token_loss),
    "llama": (partial(models.llama, "relu"), token_loss),
    "llama-silu": (partial(models.llama, "silu"), token_loss),
    "vit": (partial(models.vit, "gelu"), image_loss),
}


@pytest.mark.parametrize(
    ("case", "attention"),
    [
        ("gpt2", "sdpa"),
        ("gpt2", "eager"),
        ("llama", "sdpa"),
        ("llama-silu", "eager"),
        ("vit", "sdpa"),
    ],
)
def test_transformers_against_the_explicit_hessian(case: str, attention: str) -> None:
    build, loss = CASES[case]
    model = build().double().eval()
    model.set_attn_implementation(attention)
    if case in ("gpt2", "vit"):
        sparsify_(model, [JumpingSquaredReLU()] if case == "gpt2" else [JumpingSquaredReLU(0.5)])
    batch = models.inputs_for(model, batch=2, tokens=5)
    if "pixel_values" in batch:
        batch["pixel_values"] = batch["pixel_values"].double()
    blocks = find_blocks(model)[:1]
    (found,) = hessian_curvature(model, [batch], loss, blocks, num_matvecs=50)
    for layer in LAYERS:
        module = getattr(blocks[0], layer)
        if module is None:
            assert math.isnan(asdict(found)[f"trace_{layer}"])
        else:
            hessian = explicit_hessian(model, linear_weight(module), partial(loss, model, batch))
            assert_is_curvature_of(found, layer, hessian, 50)


# ---- accelerated blocks

HessianProduct = Callable[[nn.Module, Tensor, Tensor], Tensor]


def cubes(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).pow(3).sum()


def loss_of_weight(model: nn.Module, x: Tensor) -> Callable[[Tensor], Tensor]:
    """The loss as a function of the weight of `up`."""
    return lambda weight: cubes(_Called(model, weight), x)


class _Called(nn.Module):
    """A model with another weight of `up`."""

    def __init__(self, model: nn.Module, weight: Tensor) -> None:
        super().__init__()
        self.run = partial(torch.func.functional_call, model, {"up.weight": weight})

    def forward(self, x: Tensor) -> Tensor:
        return self.run((x,))


def by_two_backward_passes(model: nn.Module, x: Tensor, v: Tensor) -> Tensor:
    weight = model.up.weight
    (gradient,) = torch.autograd.grad(cubes(model, x), weight, create_graph=True)
    return torch.autograd.grad((gradient * v).sum(), weight)[0]


def by_hvp(model: nn.Module, x: Tensor, v: Tensor) -> Tensor:
    weight = model.up.weight.detach()
    return torch.autograd.functional.hvp(loss_of_weight(model, x), weight, v)[1]


def by_forward_over_reverse(model: nn.Module, x: Tensor, v: Tensor) -> Tensor:
    gradient = torch.func.grad(loss_of_weight(model, x))
    return torch.func.jvp(gradient, (model.up.weight.detach(),), (v,))[1]


def by_batched_gradients(model: nn.Module, x: Tensor, v: Tensor) -> Tensor:
    weight = model.up.weight
    (gradient,) = torch.autograd.grad(cubes(model, x), weight, create_graph=True)
    two = torch.stack([v, -v])
    return torch.autograd.grad(gradient, weight, two, is_grads_batched=True)[0][0]


@pytest.mark.parametrize(
    "product",
    [by_two_backward_passes, by_hvp, by_forward_over_reverse, by_batched_gradients],
    ids=lambda product: product.__name__,
)
@pytest.mark.parametrize("beta", [0.0, 0.5])
# What torch's forward mode does inside.
@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")
def test_products_with_the_hessian_go_through_accelerated_blocks(
    product: HessianProduct, beta: float
) -> None:
    torch.manual_seed(0)
    model = Plain(16, 64, Rectifier(1.0, beta))
    x, v = torch.randn(8, 16).double(), torch.randn(64, 16).double()
    want = by_two_backward_passes(model, x, v)
    assert want.norm() > 1
    accelerate_(model.float(), patterns=[PATTERN], max_density=1.0)
    cubes(model, x.float()).backward()
    assert explain(model).blocks[0].is_sparse
    got = product(model, x.float(), v.float())
    assert (got.double() - want).norm() < 1e-5 * want.norm()


@pytest.mark.parametrize("case", ["gpt2", "llama"])
def test_curvature_through_accelerated_blocks_is_that_of_the_plain_ones(case: str) -> None:
    build, loss = CASES[case]
    model = build().eval()
    batch = models.inputs_for(model, batch=2, tokens=5)
    want = hessian_curvature(model, [batch], loss, find_blocks(model)[:1], num_matvecs=8)
    accelerate_(model, max_density=1.0)
    got = hessian_curvature(model, [batch], loss, find_blocks(model)[:1], num_matvecs=8)
    assert explain(model).blocks[0].is_sparse
    assert values_of(got) == pytest.approx(values_of(want), rel=1e-3)


def test_the_comparison_can_fail() -> None:
    model = Plain(3, 4)
    x = torch.randn(4, 2, 3, dtype=torch.float64)
    (found,) = hessian_curvature(model, [x], half_square, plain_blocks(model), num_matvecs=12)
    hessian = explicit_hessian(model, model.down.weight, partial(half_square, model, x))
    assert_is_curvature_of(found, "down", hessian, 12)
    for wrong in (2 * hessian, hessian + torch.eye(12), hessian - torch.diag(hessian.diag())):
        with pytest.raises(AssertionError):
            assert_is_curvature_of(found, "down", wrong, 12)


def test_blocks_come_back_in_their_order() -> None:
    model = models.gpt2().double().eval()
    blocks = find_blocks(model)
    batch = models.inputs_for(model)
    both = hessian_curvature(model, [batch], token_loss, blocks, num_matvecs=2)
    turned = hessian_curvature(model, [batch], token_loss, blocks[::-1], num_matvecs=2)
    assert [one.name for one in both] == ["transformer.h.0", "transformer.h.1"]
    assert repr(turned) == repr(both[::-1])  # NaN of the gate and all
    assert both[0].trace_up != both[1].trace_up


def values_of(found: tuple[BlockCurvature, ...]) -> list[float]:
    values = [value for one in found for name, value in asdict(one).items() if name != "name"]
    return [value for value in values if not math.isnan(value)]


def test_batches_weigh_as_many_samples_as_they_have() -> None:
    model = Plain(3, 4)
    x = torch.randn(6, 2, 3, dtype=torch.float64)
    blocks = plain_blocks(model)
    whole = values_of(hessian_curvature(model, [x], half_square, blocks, num_matvecs=6))
    for batches in ([x[:1], x[1:]], [x[1:], x[:1]], [x[:3], x[3:]], (x[:2], x[2:3], x[3:])):
        parts = values_of(hessian_curvature(model, batches, half_square, blocks, num_matvecs=6))
        assert parts == pytest.approx(whole, rel=1e-9)
    equally = hessian_curvature(
        model, [x[:1], x[1:]], half_square, blocks, num_matvecs=6, size=lambda batch: 1
    )
    assert values_of(equally) != pytest.approx(whole, rel=1e-2)


def masked_token_loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return model(**batch).loss


def terms_of(batch: dict[str, Tensor]) -> int:
    return int((batch["labels"][:, 1:] != -100).sum())


def test_a_mean_over_tokens_is_weighted_by_its_tokens() -> None:
    model = models.gpt2().double().eval()
    ids = models.token_ids(3, 7)
    labels = ids.clone()
    labels[0, 3:] = -100
    labels[2] = -100  # a batch without a single term
    blocks = find_blocks(model)[:1]
    rows = [{"input_ids": ids[k : k + 1], "labels": labels[k : k + 1]} for k in range(3)]
    assert [terms_of(row) for row in rows] == [2, 6, 0]
    whole = [{"input_ids": ids, "labels": labels}]
    run = partial(
        hessian_curvature, loss=masked_token_loss, blocks=blocks, num_matvecs=3, size=terms_of
    )
    assert values_of(run(model, rows)) == pytest.approx(values_of(run(model, whole)), rel=1e-9)


@pytest.mark.parametrize(
    "batch",
    [torch.zeros(3, 2), (torch.zeros(3, 2), torch.zeros(3)), {"n": 7, "x": torch.zeros(3)}],
)
def test_samples_are_the_first_dimension(batch: object) -> None:
    assert samples_of(batch) == 3


@pytest.mark.parametrize("batch", [{}, torch.tensor(1.0), "text", [3]])
def test_a_batch_without_samples_is_refused(batch: object) -> None:
    with pytest.raises(LossError, match="size=lambda"):
        samples_of(batch)


def test_the_seed_decides_and_the_global_generator_is_left_alone() -> None:
    model = Plain(3, 4)
    x = torch.randn(2, 2, 3, dtype=torch.float64)
    run = partial(hessian_curvature, model, [x], half_square, plain_blocks(model), num_matvecs=3)
    state = torch.get_rng_state()
    first = run()
    assert torch.equal(torch.get_rng_state(), state)
    assert repr(first) == repr(run())
    assert repr(first) != repr(run(seed=1))


def snapshot(model: nn.Module) -> list[tuple[str, bool, Tensor | None, Tensor]]:
    return [
        (name, p.requires_grad, None if p.grad is None else p.grad.clone(), p.detach().clone())
        for name, p in model.named_parameters()
    ]


def assert_same(before: list[Any], after: list[Any]) -> None:
    assert len(before) == len(after)
    for old, new in zip(before, after, strict=True):
        assert old[:2] == new[:2]
        assert (old[2] is None) == (new[2] is None)
        assert old[2] is None or torch.equal(old[2], new[2])
        assert torch.equal(old[3], new[3])


class FailingLate:
    """A loss that fails at its third call."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, model: nn.Module, batch: Any) -> Tensor:
        self.calls += 1
        if self.calls == 3:
            raise KeyError("late")
        return token_loss(model, batch)


@pytest.mark.parametrize("fails", [False, True])
def test_flags_gradients_and_modes_stay(fails: bool) -> None:
    model = models.gpt2().eval()
    batch = models.inputs_for(model)
    token_loss(model, batch).backward()
    blocks = find_blocks(model)
    blocks[0].up.weight.requires_grad_(False)
    blocks[1].up.bias.requires_grad_(False)
    model.transformer.wpe.weight.grad = None
    model.transformer.h[0].train()
    before, modes = snapshot(model), [module.training for module in model.modules()]
    loss = FailingLate() if fails else token_loss
    run = partial(hessian_curvature, model, [batch], loss, blocks, num_matvecs=2)
    if fails:
        with pytest.raises(KeyError, match="late"):
            run()
    else:
        assert run()[0].trace_up_standard_error > 0  # a frozen weight too
    assert_same(before, snapshot(model))
    assert [module.training for module in model.modules()] == modes
    assert torch.is_grad_enabled()
    assert torch.backends.cuda.flash_sdp_enabled()


def test_without_gradients_around_it_is_the_same() -> None:
    model = Plain(3, 4)
    x = torch.randn(2, 2, 3, dtype=torch.float64)
    run = partial(hessian_curvature, model, [x], half_square, plain_blocks(model), num_matvecs=3)
    expected = repr(run())
    with torch.no_grad():
        assert repr(run()) == expected
        assert not torch.is_grad_enabled()
    with torch.inference_mode():
        assert repr(run()) == expected
        assert torch.is_inference_mode_enabled()


def test_lora_and_its_frozen_weights() -> None:
    inner = models.gpt2().double()
    batch = models.inputs_for(inner)
    expected = hessian_curvature(
        inner.eval(), [batch], token_loss, find_blocks(inner), num_matvecs=2
    )
    model = get_peft_model(
        inner,
        LoraConfig(target_modules=["c_fc", "c_proj"], fan_in_fan_out=True, init_lora_weights=True),
    ).eval()
    before = snapshot(model)
    found = hessian_curvature(model, [batch], token_loss, find_blocks(model), num_matvecs=2)
    assert values_of(found) == pytest.approx(values_of(expected), rel=1e-6)
    assert_same(before, snapshot(model))


def test_compiled_models_run_eagerly() -> None:
    model = Plain(3, 4)
    x = torch.randn(2, 2, 3, dtype=torch.float64)
    expected = hessian_curvature(model, [x], half_square, plain_blocks(model), num_matvecs=3)
    compiled = torch.compile(model, backend="aot_eager")
    compiled(x)
    found = hessian_curvature(compiled, [x], half_square, plain_blocks(compiled), num_matvecs=3)
    assert repr(found) == repr(expected)


def padded_loss(model: nn.Module, batch: Tensor) -> Tensor:
    padding = torch.zeros(batch.shape[:2], dtype=torch.bool)
    padding[:, -2:] = True
    return model(batch, src_key_padding_mask=padding)[:, :-2].square().mean()


def test_encoders_keep_to_plain_tensors() -> None:
    # With frozen layers before it, nn.TransformerEncoder would hand a block nested tensors.
    model = models.torch_encoder(norm_first=False).double().eval()
    x = torch.randn(2, 6, models.D_MODEL, dtype=torch.float64)
    blocks = find_blocks(model)[1:]
    (found,) = hessian_curvature(model, [x], padded_loss, blocks, num_matvecs=50)
    assert model.use_nested_tensor
    hessian = explicit_hessian(model, blocks[0].up.weight, partial(padded_loss, model, x))
    assert_is_curvature_of(found, "up", hessian, 50)


def test_few_steps_are_told_by_the_residual() -> None:
    model = Plain(6, 8)
    x = torch.randn(20, 3, 6, dtype=torch.float64)
    blocks = plain_blocks(model)
    tops, residuals = [], []
    for num_matvecs in (2, 4, 8, 16, 48):
        (found,) = hessian_curvature(model, [x], half_square, blocks, num_matvecs)
        tops.append(found.top_eigenvalue_up)
        residuals.append(found.top_eigenvalue_up_residual)
    hessian = explicit_hessian(model, model.up.weight, partial(half_square, model, x))
    eigenvalues = torch.linalg.eigvalsh(hessian)
    assert tops == sorted(tops)  # from below
    assert tops[-1] == pytest.approx(eigenvalues[-1].item(), rel=1e-9)
    for top, residual in zip(tops, residuals, strict=True):
        assert (eigenvalues - top).abs().min() <= residual + 1e-9
    assert residuals[0] > 1e-3 > residuals[-1]


# ------------------------------------------------------------------------------------- errors


def run_plain(model: nn.Module, **changes: Any) -> tuple[BlockCurvature, ...]:
    arguments: dict[str, Any] = {
        "batches": [torch.ones(2, 2, 3, dtype=torch.float64)],
        "loss": half_square,
        "blocks": plain_blocks(model),
        "num_matvecs": 2,
    }
    return hessian_curvature(model, **{**arguments, **changes})


def test_the_library_missing_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Plain(3, 4)
    before = snapshot(model)
    monkeypatch.setitem(sys.modules, "hessian_eigenthings", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'steppe\[curvature\]'"):
        run_plain(model)
    assert_same(before, snapshot(model))


@pytest.mark.parametrize("num_matvecs", [1, 0, -3])
def test_too_few_vectors(num_matvecs: int) -> None:
    with pytest.raises(ValueError, match=f"num_matvecs ≥ 2.*got {num_matvecs}"):
        run_plain(Plain(3, 4), num_matvecs=num_matvecs)


def test_no_batches() -> None:
    with pytest.raises(EmptyLoaderError, match="0 batches"):
        run_plain(Plain(3, 4), batches=[])
    with pytest.raises(EmptyLoaderError, match="1 batches of size 0"):
        run_plain(Plain(3, 4), batches=[torch.zeros(0, 2, 3)])


@pytest.mark.parametrize(
    ("loss", "told"),
    [
        (lambda model, batch: model(batch), r"expected a scalar loss, got \[2, 2, 3\]"),
        (lambda model, batch: {"loss": 1}, "expected a scalar loss, got dict"),
        (lambda model, batch: model(batch).detach().sum(), "does not depend on this weight"),
        (lambda model, batch: model.up(batch).square().sum() / 0, "the loss is inf"),
        (lambda model, batch: model(batch).square().sum() * math.nan, "the loss is nan"),
    ],
)
def test_what_is_no_loss(loss: Loss, told: str) -> None:
    with pytest.raises(LossError, match=told) as caught:
        run_plain(Plain(3, 4), loss=loss)
    assert "Plain.up: batch 0" in str(caught.value)


def test_a_block_that_the_loss_does_not_see_is_named() -> None:
    with pytest.raises(LossError, match=r"Plain\.down: batch 0.*not depend"):
        run_plain(Plain(3, 4), loss=lambda model, batch: model.up(batch).square().sum())


def test_weights_without_a_hessian_are_refused_before_anything_runs() -> None:
    with torch.device("meta"):
        on_meta = Plain(3, 4)
    with torch.inference_mode():
        inferring = Plain(3, 4)
    sharded = Plain(3, 4)
    sharded.down.weight.placements = ()  # what tells a DTensor
    sharded.down.weight.to_local = None
    parametrized = Plain(3, 4)
    nn.utils.parametrizations.weight_norm(parametrized.up)
    for model, told in (
        (on_meta, r"Plain\.up: the weight is on the meta device"),
        (inferring, r"Plain\.up: .*inference_mode"),
        (sharded, r"Plain\.down: the weight is sharded"),
        (Plain(3, 4).bfloat16(), r"Plain\.up: .*bfloat16.*model\.float\(\)"),
        (parametrized, r"Plain\.up: .*no parameter of this Plain.*parametrizations"),
    ):
        with pytest.raises(UnfitBlockError, match=told):
            run_plain(model, loss=None)


def test_blocks_of_another_model_are_refused() -> None:
    with pytest.raises(UnfitBlockError, match="no parameter of this Plain"):
        run_plain(Plain(3, 4), blocks=plain_blocks(Plain(3, 4)))
    model = Plain(3, 4)
    (block,) = plain_blocks(model)
    with pytest.raises(UnfitBlockError, match=r"Plain\.down"):
        run_plain(model, blocks=[replace(block, down=nn.Linear(4, 3))])
