"""Which rectifier an activation is: closed forms, true reasons, and nothing left behind."""

from __future__ import annotations

import itertools
import math
import random
import re
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.activations import ACT2FN

import oracles
from steppe.activations import Activation, Rectifier, SShapedSquaredReLU, evaluate
from steppe.blocks.block import Slot
from steppe.blocks.recognition import Recognised, recognise
from steppe.plugins.jumping_relu import MixedActivation
from steppe.surgery.journal import Journal

RELU, SQUARED, JUMPING = (1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (1.0, 0.5, 0.0)
PARAMETER = nn.Parameter(torch.ones(()))
MIX = float(torch.tensor(0.3))  # float32, as the buffer has it


def mixed(original: Activation, mix: float) -> MixedActivation:
    activation = MixedActivation(original)
    activation.mix.fill_(mix)
    return activation


def shifted(p: Tensor, shift: float, alpha: float, beta: float) -> Tensor:
    r = torch.relu(p - shift)
    return alpha * r + beta * r * r


class WithBuffer(nn.Module):
    """ReLU whose slope is a buffer of more than one dimension, of any dtype."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.register_buffer("slope", torch.full((1,), 0.25, dtype=dtype))

    def forward(self, p: Tensor) -> Tensor:
        return torch.relu(p) * self.slope.to(p.dtype)


class StraightThrough(torch.autograd.Function):
    """ReLU with the gradient of the identity."""

    @staticmethod
    def forward(ctx: Any, p: Tensor) -> Tensor:
        return torch.relu(p)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


class SlopeOne(torch.autograd.Function):
    """Squared ReLU with the gradient of ReLU."""

    @staticmethod
    def forward(ctx: Any, p: Tensor) -> Tensor:
        ctx.save_for_backward(p)
        return torch.relu(p).square()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * (ctx.saved_tensors[0] > 0)


class OnlyInTraining(nn.Module):
    """ReLU in evaluation, GELU in training."""

    def forward(self, p: Tensor) -> Tensor:
        return F.gelu(p) if self.training else F.relu(p)


class TopHalf(nn.Module):
    """Only what is above its row's mean passes, as with Gemma 3n's top-k."""

    def forward(self, p: Tensor) -> Tensor:
        return torch.relu(p - p.mean(-1, keepdim=True))


RECOGNISED: dict[str, tuple[Activation, tuple[float, float, float]]] = {
    "nn.ReLU": (nn.ReLU(), RELU),
    "in place": (nn.ReLU(inplace=True), RELU),
    "F.relu": (F.relu, RELU),
    "torch.relu": (torch.relu, RELU),
    "torch.relu_": (torch.relu_, RELU),
    "ACT2FN relu": (ACT2FN["relu"], RELU),
    "ACT2FN relu2": (ACT2FN["relu2"], SQUARED),
    "Threshold": (nn.Threshold(0.0, 0.0), RELU),
    "LeakyReLU without a slope": (nn.LeakyReLU(0.0), RELU),
    "p where positive": (lambda p: p * (p > 0), RELU),
    "squared": (lambda p: F.relu(p) ** 2, SQUARED),
    "Rectifier": (Rectifier(1.0, 0.5), JUMPING),
    "Rectifier, any": (Rectifier(0.3, 1.7), (0.3, 1.7, 0.0)),
    "half": (lambda p: 0.5 * F.relu(p), (0.5, 0.0, 0.0)),
    "buffer": (WithBuffer(), (0.25, 0.0, 0.0)),
    "wide buffer": (WithBuffer(torch.float64), (0.25, 0.0, 0.0)),
    "ReLU, not yet mixed": (mixed(F.relu, 0.0), RELU),
    "ReLU, mixed": (mixed(nn.ReLU(), MIX), (1.0, 0.5 * MIX, 0.0)),
    "ReLU, all mixed": (mixed(F.relu, 1.0), JUMPING),
    "SiLU, all mixed": (mixed(nn.SiLU(), 1.0), JUMPING),
    "GELU, all mixed": (mixed(F.gelu, 1.0), JUMPING),
    "ACT2FN gelu, all mixed": (mixed(ACT2FN["gelu_new"], 1.0), JUMPING),
    "shifted": (partial(shifted, shift=0.1, alpha=1.0, beta=0.0), (1.0, 0.0, 0.1)),
    "shifted to the left": (lambda p: F.relu(p + 2.0), (1.0, 0.0, -2.0)),
    "shifted by a little": (partial(shifted, shift=1e-5, alpha=1.0, beta=0.0), (1.0, 0.0, 1e-5)),
    "shifted and squared": (partial(shifted, shift=1.0, alpha=0.0, beta=2.0), (0.0, 2.0, 1.0)),
    "shifted, any": (partial(shifted, shift=1 / 3, alpha=1.0, beta=0.5), (1.0, 0.5, 1 / 3)),
    "in a container": (nn.Sequential(nn.ReLU(), nn.Dropout(0.0)), RELU),
}
NEGATIVE = "is not zero for negative inputs"
GRADIENT = "has a gradient that is not that of its values"
REFUSED: dict[str, tuple[Activation, str]] = {
    "SiLU": (nn.SiLU(), rf"^{NEGATIVE}: σ\(-1.0\) = -0.2689$"),
    "GELU": (F.gelu, rf"^{NEGATIVE}: σ\(-1.0\) = -0.1587$"),
    "softplus": (nn.Softplus(), rf"^{NEGATIVE}: σ\(-1.0\) = 0.3133$"),
    "LeakyReLU": (nn.LeakyReLU(), rf"^{NEGATIVE}: σ\(-1.0\) = -0.01$"),
    "ELU": (nn.ELU(), rf"^{NEGATIVE}: σ\(-1.0\) = -0.6321$"),
    "S-shaped": (SShapedSquaredReLU(), rf"^{NEGATIVE}: σ\(-3.0\) = -2.25$"),
    "absolute value": (torch.abs, NEGATIVE),
    "SiLU, half mixed": (mixed(nn.SiLU(), 0.5), NEGATIVE),
    "SiLU, almost all mixed": (mixed(nn.SiLU(), 1.0 - 2.0**-24), NEGATIVE),
    "a threshold below zero": (nn.Threshold(-0.5, 0.0), NEGATIVE),
    "PReLU": (nn.PReLU(), "^has parameters$"),
    "a function with parameters": (lambda p: F.relu(p) * PARAMETER, "^has parameters$"),
    "RReLU": (nn.RReLU(), "^is random in training$"),
    "dropout": (nn.Sequential(nn.ReLU(), nn.Dropout(0.5)), "^is random in training$"),
    "another in training": (OnlyInTraining(), "^is another function in training than in eval"),
    "ReLU6": (nn.ReLU6(), r"^is 6\.0 at 7\.0, where 7\.0 would be expected: capped$"),
    "hardtanh": (nn.Hardtanh(0.0, 1.0), r"^is 1\.0 at 2\.0, where 2\.0 would be expected: capped$"),
    "capped at float16": (lambda p: F.relu(p).clamp(max=65504.0), r"^is 65504\.0 at .*: capped$"),
    "cube": (lambda p: F.relu(p) ** 3, r"^is 8\.0 at 2\.0, where 4\.0 would be expected$"),
    "power 1.5": (lambda p: F.relu(p) ** 1.5, "would be expected$"),
    "a dent": (lambda p: torch.where((p > 3) & (p < 4), 3.0, F.relu(p)), "^is 3.0 at 3.1, where"),
    "FATReLU": (nn.Threshold(0.5, 0.0), r"^jumps from 0 to 0\.5 at 0\.5$"),
    "J-SquaredReLU that rounds": (lambda p: ((F.relu(p) + 1) ** 2 - 1) / 2, "at 1e-15, where"),
    "negative": (lambda p: -F.relu(p), r"^is negative: σ\(1\.0\) = -1\.0$"),
    "saturating": (lambda p: torch.tanh(F.relu(p)), "^bends down: "),
    "nothing": (torch.zeros_like, "^is zero everywhere$"),
    "clamp": (lambda p: p.clamp(min=0), rf"^{GRADIENT}: 1\.0 at 0\.0, where 0\.0 would be exp"),
    "clamp, shifted": (lambda p: (p - 1).clamp(min=0), rf"^{GRADIENT}: 1\.0 at 1\.0, where 0\.0"),
    "straight through": (StraightThrough.apply, rf"^{GRADIENT}: 1\.0 at -1\.0, where 0\.0 would"),
    "another slope": (SlopeOne.apply, rf"^{GRADIENT}: 1\.0 at 1\.0, where 2\.0 would be expected"),
    "detached": (lambda p: F.relu(p.detach()), "^has no gradient$"),
    "NaN": (lambda p: torch.where(p > 0, p, 0.0), r"^is 0\.0 for NaN, which has to stay NaN$"),
    "exp": (torch.exp, r"^is not finite: σ\(1000\.0\) = inf$"),
    "log": (torch.log, r"^is not finite: σ\(-1\.0\) = nan$"),
    "softmax": (nn.Softmax(-1), "^is not elementwise$"),
    "GLU": (nn.GLU(), "^is not elementwise$"),
    "top half of a row": (TopHalf(), "^is not elementwise$"),
    "above the mean of all": (lambda p: F.relu(p - p.mean()), "^is not elementwise$"),
    "float32 only": (lambda p: F.relu(p.float()), r"^gives torch\.float32 for torch\.float64$"),
    "no tensor": (lambda p: None, "^is not elementwise$"),
    "raising": (nn.BatchNorm1d(4, affine=False), r"^cannot be evaluated \(ValueError: expected 2D"),
    "without values": (WithBuffer().to("meta"), r"^cannot be evaluated \(NotImplementedError"),
}


def assert_is(found: Recognised | str, want: tuple[float, float, float]) -> None:
    assert isinstance(found, Recognised), found
    got = found.alpha, found.beta, found.shift
    assert got == pytest.approx(want, rel=1e-14, abs=0.0)


@pytest.mark.parametrize(("act", "want"), RECOGNISED.values(), ids=RECOGNISED.keys())
def test_a_rectifier_is_recognised_by_what_it_computes(
    act: Activation, want: tuple[float, float, float]
) -> None:
    found = recognise(act)
    assert_is(found, want)
    p = torch.tensor([-3.0, -1.0, -0.0, 0.0, 0.2, 1.0, 2.5, 70.0], dtype=torch.float64)
    alpha, beta, shift = want
    by_hand = [oracles.rectifier(entry - shift, alpha, beta) for entry in p.tolist()]
    assert evaluate(act, p).tolist() == pytest.approx(by_hand, rel=1e-14, abs=0.0)
    assert found.value(p).tolist() == pytest.approx(by_hand, rel=1e-14, abs=0.0)


@pytest.mark.parametrize(("act", "reason"), REFUSED.values(), ids=REFUSED.keys())
def test_anything_else_is_refused_with_the_true_reason(act: Activation, reason: str) -> None:
    found = recognise(act)
    assert isinstance(found, str), found
    assert re.search(reason, found), found


@pytest.mark.parametrize("original", [nn.SiLU(), F.gelu])
def test_what_the_ramp_ends_in_is_bit_equal_to_the_rectifier_that_is_recognised(
    original: Activation,
) -> None:
    act = mixed(original, 1.0)
    found = recognise(act)
    assert found == Recognised(*JUMPING)
    p = torch.randn(1000)
    assert torch.equal(act(p), Rectifier(found.alpha, found.beta)(p))


@pytest.mark.parametrize("name", sorted(ACT2FN))
def test_of_hugging_faces_activations_two_are_rectifiers(name: str) -> None:
    found, act = recognise(ACT2FN[name]), ACT2FN[name]
    want = {"relu": RELU, "relu2": SQUARED}.get(name)
    if want is not None:
        assert_is(found, want)
    elif name in ("prelu", "xielu"):
        assert found == "has parameters"
    elif name == "relu6":
        assert found == "is 6.0 at 7.0, where 7.0 would be expected: capped"
    else:
        match = re.fullmatch(rf"{NEGATIVE}: σ\((.*)\) = (.*)", str(found))
        assert match, found
        point, value = map(float, match.groups())
        assert point < 0
        assert float(act(torch.tensor(point, dtype=torch.float64))) == pytest.approx(
            value, rel=1e-3
        )


@pytest.mark.parametrize(
    ("alpha", "beta"),
    [(a, b) for a, b in itertools.product((0.0, 1e-3, 1.0, 700.0), repeat=2) if a + b > 0],
)
@pytest.mark.parametrize("shift", [0.0, 0.7, -13.0, 1e-12])
def test_any_coefficients_are_found(alpha: float, beta: float, shift: float) -> None:
    found = recognise(partial(shifted, shift=shift, alpha=alpha, beta=beta))
    assert isinstance(found, Recognised), found
    assert found.shift == shift
    assert found.alpha == pytest.approx(alpha, rel=1e-9, abs=0.0)
    assert found.beta == pytest.approx(beta, rel=1e-14, abs=0.0)


@pytest.mark.parametrize("relative", [1e-13, -1e-13])
@pytest.mark.parametrize("where", [-2.0, 1e-6, 0.5, 3.0, 100.0])
def test_a_difference_of_some_ulps_anywhere_above_a_point_is_seen(
    relative: float, where: float
) -> None:
    def slightly_off(p: Tensor) -> Tensor:
        return torch.where(p >= where, F.relu(p) * (1.0 + relative), F.relu(p))

    found = recognise(slightly_off)
    if where < 0:
        assert_is(found, (1.0 + relative, 0.0, 0.0))
    else:
        assert isinstance(found, str)


# ---- nothing is left behind


class Recording(nn.Module):
    """ReLU with a child, which counts its calls and could be told by them."""

    def __init__(self) -> None:
        super().__init__()
        self.child = nn.Sequential(nn.ReLU(inplace=True))
        self.itself = [self]
        self.calls = 0
        self.register_buffer("one", torch.ones(()))

    def forward(self, p: Tensor) -> Tensor:
        self.calls += 1
        self.one.mul_(1.0)
        return self.child(p) * self.one


@pytest.mark.parametrize("training", [False, True])
def test_an_activation_is_left_as_it_was(training: bool) -> None:
    act = Recording().train(training)
    act.child.train(not training)
    seen: list[nn.Module] = []
    for module in (act, act.child, act.child[0]):
        module.register_forward_hook(lambda module, args, output: seen.append(module))
        module.register_forward_pre_hook(lambda module, args: (seen.append(module), args)[1])
    before = {name: dict(module.__dict__) for name, module in act.named_modules()}
    version = act.one._version
    assert_is(recognise(act), RELU)
    assert seen == []
    assert {name: dict(module.__dict__) for name, module in act.named_modules()} == before
    assert act.calls == 0
    assert act.one._version == version
    act(torch.ones(2))
    assert len(seen) == 6, "the hooks are still there"


def test_random_numbers_are_as_if_nothing_had_happened() -> None:
    torch.manual_seed(1)
    random.seed(1)
    want = torch.rand(3), random.random()
    torch.manual_seed(1)
    random.seed(1)
    assert recognise(nn.RReLU()) == recognise(nn.Dropout(0.5)) == "is random in training"
    recognise(nn.ReLU())
    assert torch.equal(torch.rand(3), want[0])
    assert random.random() == want[1]


@pytest.mark.parametrize(
    "context",
    [
        torch.no_grad,
        torch.inference_mode,
        torch.enable_grad,
        partial(torch.autocast, "cpu", torch.bfloat16),
        partial(torch.device, "meta"),
    ],
    ids=str,
)
def test_the_answer_is_the_same_in_every_context(context: Callable[[], Any]) -> None:
    activations = nn.ReLU(), WithBuffer(), nn.SiLU()
    want = [recognise(act) for act in activations]
    with context():
        assert [recognise(act) for act in activations] == want


def test_a_default_dtype_changes_nothing() -> None:
    torch.set_default_dtype(torch.float64)
    try:
        assert_is(recognise(lambda p: F.relu(p) * torch.ones(()).to(p.dtype)), RELU)
    finally:
        torch.set_default_dtype(torch.float32)


def test_a_module_made_in_inference_mode_is_recognised() -> None:
    with torch.inference_mode():
        act = mixed(nn.ReLU(), MIX)
    assert_is(recognise(act), (1.0, 0.5 * MIX, 0.0))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_buffers_of_any_dtype_are_taken_as_they_are(dtype: torch.dtype) -> None:
    act = mixed(nn.ReLU(), MIX).to(dtype)
    assert_is(recognise(act), (1.0, 0.5 * float(act.mix), 0.0))
    assert act.mix.dtype == dtype


class Passing(nn.Module):
    """A behaviour of a swapped class, that of an accelerated block's activation."""

    def forward(self, p: Tensor) -> Tensor:
        return p if "passes" in self.__dict__ else super().forward(p)


def test_below_a_swapped_class_the_own_one_is_recognised() -> None:
    act, journal = nn.ReLU(), Journal(transient=True)
    journal.swap_class(act, Passing)
    journal.add_attribute(Slot(act, "passes"), True)
    assert act(torch.tensor(-1.0)) == -1.0
    assert_is(recognise(act), RELU)
    assert_is(recognise(nn.Sequential(act)), RELU)
    journal.undo()


@pytest.mark.parametrize("act", [nn.ReLU(), F.relu], ids=["module", "function"])
def test_a_compiled_activation_is_not_compiled_again(act: Activation) -> None:
    compiled: list[Any] = []

    def backend(graph: Any, inputs: Any) -> Any:
        compiled.append(graph)
        return graph

    assert_is(recognise(torch.compile(act, backend=backend)), RELU)
    assert compiled == []


@pytest.mark.filterwarnings("ignore:.*is deprecated:DeprecationWarning")
def test_a_scripted_activation_is_recognised() -> None:
    assert_is(recognise(torch.jit.script(nn.ReLU())), RELU)


def test_an_error_of_the_activation_is_told_in_one_line() -> None:
    def broken(p: Tensor) -> Tensor:
        raise LookupError("first line\nsecond line")

    assert recognise(broken) == "cannot be evaluated (LookupError: first line)"


def test_only_what_is_a_rectifier_has_its_values() -> None:
    found = Recognised(0.5, 2.0, 1.0)
    p = torch.tensor([0.0, 1.0, 2.0, 3.0])
    assert found.value(p).tolist() == [0.0, 0.0, 2.5, 9.0]
    assert found.slope(p).tolist() == [0.0, 0.0, 4.5, 8.5]
    assert math.isnan(found.value(torch.tensor(math.nan)))
