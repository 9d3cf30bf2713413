"""JumpingSquaredReLU: its definition, and the way to it from ReLU, GELU and SiLU."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import models
import oracles
import steppe
from steppe import JumpingSquaredReLU
from steppe.plugins.jumping_relu import MixedActivation

POINTS = [-4.0, -1.0, -0.3, -1e-9, 0.0, 1e-9, 0.2, 0.5, 1.0, 2.5, 6.0]
P = torch.tensor(POINTS, dtype=torch.float64)
# progress with a ramp of 0.3, and the mix it means
RAMP = [(0.0, 0.0), (0.075, 0.25), (0.15, 0.5), (0.3, 1.0), (0.8, 1.0), (1.0, 1.0)]
each_progress = pytest.mark.parametrize(("progress", "mix"), RAMP)


def silu(p: float) -> float:
    """p times the logistic function of p."""
    return p / (1.0 + math.exp(-p))


def relu(p: float) -> float:
    """max(p, 0)."""
    return max(p, 0.0)


def full(p: float) -> float:
    """((p+1)² − 1)/2 for p > 0."""
    return ((p + 1.0) ** 2 - 1.0) / 2.0 if p > 0.0 else 0.0


# Models with this activation, and its definition.
ORIGINALS: dict[str, tuple[Callable[[], nn.Module], Callable[[float], float]]] = {
    "relu": (models.gpt2, relu),
    "gelu": (lambda: models.gpt2("gelu"), oracles.gelu),
    "silu": (lambda: models.llama("silu"), silu),
    "relu as a function": (models.torch_encoder, relu),
}
each_original = pytest.mark.parametrize(("make", "original"), ORIGINALS.values(), ids=ORIGINALS)


def activations(model: nn.Module) -> list[nn.Module]:
    """What stands at each block's activation."""
    slots = [block.act_slot for block in steppe.find_blocks(model)]
    return [getattr(slot.module, slot.name) for slot in slots]


def slope(function: Callable[[float], float], p: float) -> float:
    """Central difference, of fourth order."""
    h = 1e-3
    outer, inner = function(p + 2 * h) - function(p - 2 * h), function(p + h) - function(p - h)
    return (8 * inner - outer) / (12 * h)


def test_from_scratch_it_is_j_squared_relu_at_once() -> None:
    model = steppe.sparsify_(models.gpt2(), [JumpingSquaredReLU()])
    for act in activations(model):
        assert isinstance(act, steppe.Rectifier)
        assert (act.alpha, act.beta) == (1.0, 0.5)
        assert act(P).tolist() == pytest.approx([full(p) for p in POINTS], rel=1e-7, abs=0)
        exact = [oracles.rectifier(p, 1.0, 0.5) for p in POINTS]
        assert act(P).tolist() == pytest.approx(exact, rel=1e-15, abs=0)
        slopes = [oracles.rectifier_derivative(p, 1.0, 0.5) for p in POINTS]
        assert act.derivative(P).tolist() == pytest.approx(slopes, rel=1e-15, abs=0)
    assert not [name for name in model.state_dict() if "act" in name]


@each_original
@each_progress
def test_the_two_activations_are_mixed_linearly(
    make: Callable[[], nn.Module],
    original: Callable[[float], float],
    progress: float,
    mix: float,
) -> None:
    model = steppe.sparsify_(make().double(), [JumpingSquaredReLU(ramp=0.3)])
    steppe.advance_(model, progress)
    for act in activations(model):
        assert act.mix.item() == mix
        expected = [
            (1.0 - mix) * original(p) + mix * oracles.rectifier(p, 1.0, 0.5) for p in POINTS
        ]
        assert act(P).tolist() == pytest.approx(expected, rel=1e-13, abs=1e-15)


@each_progress
def test_from_relu_the_mix_is_one_coefficient(progress: float, mix: float) -> None:
    model = steppe.sparsify_(models.gpt2().double(), [JumpingSquaredReLU(ramp=0.3)])
    steppe.advance_(model, progress)
    for act in activations(model):
        out = [oracles.rectifier(p, 1.0, mix / 2.0) for p in POINTS]
        assert act(P).tolist() == pytest.approx(out, rel=1e-15, abs=0)
        slopes = [oracles.rectifier_derivative(p, 1.0, mix / 2.0) for p in POINTS]
        assert act.derivative(P).tolist() == pytest.approx(slopes, rel=1e-15, abs=0)


@each_original
def test_at_the_end_of_the_ramp_it_is_j_squared_relu(
    make: Callable[[], nn.Module], original: Callable[[float], float]
) -> None:
    model = steppe.sparsify_(make().double(), [JumpingSquaredReLU(ramp=0.3)])
    steppe.advance_(model, 1.0)
    for act in activations(model):
        expected = [oracles.rectifier(p, 1.0, 0.5) for p in POINTS]
        assert act(P).tolist() == pytest.approx(expected, rel=1e-15, abs=0)
        assert ((act(P) != 0) == (P > 0)).all()
        assert ((act.derivative(P) != 0) == (P > 0)).all()


@each_original
@pytest.mark.parametrize("mix", [0.0, 0.375, 1.0])
def test_the_gradient_is_the_derivative(
    make: Callable[[], nn.Module], original: Callable[[float], float], mix: float
) -> None:
    model = steppe.sparsify_(make().double(), [JumpingSquaredReLU(ramp=1.0)])
    steppe.advance_(model, mix)
    act = activations(model)[0]
    p = P[P.abs() > 0.1].clone().requires_grad_()  # away from the jump
    (gradient,) = torch.autograd.grad(act(p).sum(), p)
    mixed = [
        slope(lambda q: (1.0 - mix) * original(q) + mix * full(q), value) for value in p.tolist()
    ]
    assert gradient.tolist() == pytest.approx(mixed, rel=1e-9, abs=1e-9)
    torch.testing.assert_close(act.derivative(p), gradient, rtol=1e-13, atol=1e-15)
    assert torch.autograd.gradcheck(act, p)


@pytest.mark.parametrize(
    "act", [nn.ReLU(), nn.ReLU(inplace=True), nn.GELU(), nn.SiLU(inplace=True)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_mixed_activation_keeps_dtype_and_input(act: nn.Module, dtype: torch.dtype) -> None:
    mixed = MixedActivation(act)
    mixed.mix.fill_(0.5)
    p = torch.randn(3, 5).to(dtype)
    old = p.clone()
    out = mixed(p)
    assert out.dtype == dtype
    assert out.shape == p.shape
    assert torch.equal(p, old)
    assert mixed.derivative(p).dtype == dtype


def test_the_mix_is_in_the_state_dict_and_comes_back_from_it() -> None:
    model = steppe.sparsify_(models.t5("gelu"), [JumpingSquaredReLU(ramp=0.3)])
    steppe.advance_(model, 0.15)
    mixes = {name: value for name, value in model.state_dict().items() if name.endswith(".mix")}
    assert list(mixes) == [
        f"{block.name}.DenseReluDense.act.mix" for block in steppe.find_blocks(model)
    ]
    assert [value.item() for value in mixes.values()] == [0.5] * 4
    other = steppe.sparsify_(models.t5("gelu"), [JumpingSquaredReLU(ramp=0.3)])
    other.load_state_dict(model.state_dict())
    inputs = models.inputs_for(model)
    assert torch.equal(other(**inputs).logits, model(**inputs).logits)


def test_the_mix_is_no_parameter_and_gets_no_gradient() -> None:
    model = steppe.sparsify_(models.gpt2(), [JumpingSquaredReLU(ramp=0.3)])
    steppe.advance_(model, 0.1)
    assert steppe.added_parameters(model) == {}
    ids = models.token_ids()
    model(input_ids=ids, labels=ids).loss.backward()
    assert all(act.mix.grad is None for act in activations(model))


@pytest.mark.filterwarnings("ignore:.* should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("act", [nn.ReLU(), nn.GELU()], ids=str)
def test_the_mix_changes_in_a_compiled_activation_without_another_graph(act: nn.Module) -> None:
    torch.compiler.reset()
    mixed = MixedActivation(act)
    graphs = 0

    def count(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., object]:
        nonlocal graphs
        graphs += 1
        return graph.forward

    compiled = torch.compile(mixed, backend=count, fullgraph=True)
    p = torch.randn(4, 4)
    outputs = []
    for mix in (0.0, 0.25, 1.0):
        mixed.mix.fill_(mix)
        outputs.append(compiled(p))
        torch.testing.assert_close(outputs[-1], mixed(p))
    assert graphs == 1
    assert not torch.allclose(outputs[0], outputs[2])


@pytest.mark.parametrize("ramp", [-0.1, 1.5])
def test_a_ramp_outside_the_run_is_refused(ramp: float) -> None:
    with pytest.raises(ValueError, match=r"JumpingSquaredReLU\.ramp is a share of the run"):
        JumpingSquaredReLU(ramp=ramp)
