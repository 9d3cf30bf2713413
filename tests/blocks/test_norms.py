"""What a norm multiplies by, and the bounds of the plug-ins that follow from it."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import GemmaConfig, GemmaForCausalLM

import steppe
from steppe import BlockPattern
from steppe.blocks.norms import scale_of

D, HIDDEN = 8, 24


class RMS(nn.Module):
    """x / rms(x), in float32 as most models have it, times a function of the weight."""

    def __init__(self, of_weight: Callable[[Tensor], Tensor] | None) -> None:
        super().__init__()
        self.of_weight = of_weight
        if of_weight is not None:
            self.weight = nn.Parameter(torch.rand(D))

    def forward(self, x: Tensor) -> Tensor:
        z = F.rms_norm(x.float(), (D,)).to(x.dtype)
        return z if self.of_weight is None else z * self.of_weight(self.weight)


NORMS: list[tuple[nn.Module, float | None]] = [
    (nn.LayerNorm(D), 0.0),
    (nn.RMSNorm(D), 0.0),
    (nn.LayerNorm(D, elementwise_affine=False), 1.0),
    (nn.RMSNorm(D, elementwise_affine=False), 1.0),
    (RMS(None), 1.0),
    (RMS(lambda weight: weight), 0.0),
    (RMS(lambda weight: 1.0 + weight), 1.0),
    (RMS(lambda weight: weight.exp()), None),
    (RMS(lambda weight: 2.0 + weight), None),
    (RMS(lambda weight: weight.square()), None),
    (RMS(lambda weight: weight.detach() * 0 + 1.0), None),
    (nn.Identity(), None),
]


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize(("norm", "offset"), NORMS)
def test_the_scale_is_told_by_evaluating(
    norm: nn.Module, offset: float | None, device: str
) -> None:
    norm = copy.deepcopy(norm).to(device)
    found = scale_of(norm, D)
    assert (None if found is None else found.offset) == offset
    if found is None or device == "meta":
        return
    x = torch.randn(5, D)
    with torch.no_grad():
        plain = RMS(None)(x) if not isinstance(norm, nn.LayerNorm) else F.layer_norm(x, (D,))
        torch.testing.assert_close(norm(x), plain * found.value(x))


def test_hooks_of_a_norm_are_neither_run_nor_copied() -> None:
    norm = RMS(lambda weight: 1.0 + weight)

    class Uncopied:
        def __call__(self, *args: object) -> None:
            raise AssertionError

        def __deepcopy__(self, memo: object) -> None:
            raise AssertionError

    norm.register_forward_hook(Uncopied())
    found = scale_of(norm, D)
    assert found is not None
    assert found.offset == 1.0
    assert len(norm._forward_hooks) == 1


class Block(nn.Module):
    """A pre-norm block."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm, self.act = norm, nn.ReLU()
        self.up, self.down = nn.Linear(D, HIDDEN), nn.Linear(HIDDEN, D)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.act(self.up(self.norm(x))))  # type: ignore[no-any-return]


PATTERN = BlockPattern(family="mine", norm="norm", up="up", act="act", down="down")


def trained(model: Block, plugin: steppe.Plugin) -> Block:
    """A block with a plug-in after a large step."""
    steppe.sparsify_(model, [plugin], patterns=[PATTERN])
    optimizer = torch.optim.SGD(model.parameters(), lr=50.0)
    steppe.constrain_(model, optimizer, total_steps=1)
    model(torch.randn(4, 6, D)).square().mean().backward()
    optimizer.step()
    return model


def test_the_zeroth_bias_is_bounded_by_the_scale() -> None:
    for norm in (RMS(lambda weight: 1.0 + weight), nn.RMSNorm(D, elementwise_affine=False)):
        model = Block(norm)
        for parameter in norm.parameters():
            parameter.requires_grad_(False)
        trained(model, steppe.ZerothBias(max_tokens=6))
        (bias,) = steppe.added_parameters(model).values()
        scale = scale_of(norm, D)
        assert scale is not None
        torch.testing.assert_close(bias.abs().amax(0), 0.1 * scale.value(bias).expand(D))


def test_the_floor_is_under_one_plus_the_weight() -> None:
    norm = RMS(lambda weight: 1.0 + weight)
    with torch.no_grad():
        norm.weight.zero_()
    model = trained(Block(norm), steppe.RestrictedNorm())
    assert float(norm.weight.detach().min()) == 0.0  # scale 1
    for ramp, weights in ((0.0, [-0.5]), (0.5, [-3.0, -0.25, 0.5, -1.25])):
        norm = RMS(lambda weight: 1.0 + weight)
        with torch.no_grad():
            norm.weight.copy_(torch.tensor(weights * (D // len(weights))))
            before = norm.weight.clone()
        model = Block(norm)
        if ramp == 0.0:
            with pytest.raises(steppe.SteppeError, match="below the floor"):
                steppe.sparsify_(model, [steppe.RestrictedNorm()], patterns=[PATTERN])
            continue
        steppe.sparsify_(model, [steppe.RestrictedNorm(ramp=ramp)], patterns=[PATTERN])
        steppe.advance_(model, 1.0)
        steppe.project_(model)
        # Scales −2, ¾, 1½, −¼: raised to 1 in size, signs kept.
        want = torch.tensor([-3.0, 0.0, 0.5, -2.0]).repeat(D // 4)
        torch.testing.assert_close(norm.weight.detach(), want, rtol=0, atol=0)
        assert not torch.equal(before, want)


def test_gemma_takes_both() -> None:
    config = GemmaConfig(
        vocab_size=50,
        hidden_size=16,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=8,
        hidden_act="relu",
        max_position_embeddings=32,
    )
    model = GemmaForCausalLM(config)
    steppe.sparsify_(model, [steppe.ZerothBias(), steppe.RestrictedNorm()])
    optimizer = torch.optim.SGD(model.parameters(), lr=10.0)
    steppe.constrain_(model, optimizer)
    ids = torch.randint(50, (2, 9))
    norm = model.model.layers[0].post_attention_layernorm
    for _ in range(3):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        (bias,) = steppe.added_parameters(model).values()
        bound = 0.1 * (1.0 + norm.weight)
        assert float(norm.weight.detach().min()) >= 0.0
        assert bool((bias.abs() <= bound + 1e-7).all())
    assert float(bias.detach().abs().max()) > 0.01  # with |weight| for the scale it stays at 0
