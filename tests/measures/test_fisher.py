"""Labels from the model: their squared gradients are the Fisher matrix's trace on average."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import pytest
import torch
from hessian_eigenthings import EmpiricalFisherOperator, GGNOperator
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import models
from steppe import BlockPattern, find_blocks, measure
from steppe.measures.losses import sample_labels, sum_of_own_losses

CLASSES = 3
BARE = BlockPattern(family="bare", up="up", act="act", down="down")


class Classifier(nn.Module):
    """One block on vectors, each a sample of one token."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.act, self.down = nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 4)
        self.head = nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """Logits."""
        return self.head(self.down(self.act(self.up(x))))


def exact_trace(logits: Tensor, weight: Tensor) -> float:
    """Σ_n Σ_c p_nc ‖∂(−log p_nc)/∂W‖², one label after the other."""
    total = 0.0
    log_probabilities = logits.log_softmax(-1).flatten(0, -2)
    for row in log_probabilities:
        for log_probability in row:
            (grad,) = torch.autograd.grad(-log_probability, weight, retain_graph=True)
            total += (log_probability.exp() * grad.double().square().sum()).item()
    return total


@pytest.mark.parametrize("part", ["up", "down"])
def test_the_mean_over_sampled_labels_is_the_fisher_trace_of_a_classifier(part: str) -> None:
    model = models.vit().double().eval()
    batch = {"pixel_values": models.images(4).double()}
    weight = getattr(find_blocks(model)[0], part).weight
    exact = exact_trace(model(**batch).logits, weight) / 4
    torch.manual_seed(1)
    block = measure(model, [batch] * 150, labels="model").blocks[0]
    mean = getattr(block, f"squared_gradient_norm_{part}")
    # The images come again and again, so the labels' own spread is the smaller part of the error.
    error = block.standard_errors[f"squared_gradient_norm_{part}"]
    assert abs(mean - exact) < 4 * error
    assert error < 0.1 * exact


@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("part", ["up", "down"])
def test_over_a_sequence_the_draws_are_independent(reduction: str, part: str) -> None:
    """The Fisher trace of the sequence's labels, for the sum; over n² for the mean of n terms."""
    model = models.gpt2().double().eval()
    with torch.no_grad():
        model.transformer.wte.weight.mul_(20.0)  # a distribution that is far from uniform
    tokens, samples = 4, 2
    ids = models.token_ids(samples, tokens)
    weight = getattr(find_blocks(model)[0], part).weight
    with torch.enable_grad():
        exact = exact_trace(model(input_ids=ids).logits[:, :-1], weight) / samples
    if reduction == "mean":
        exact /= (tokens - 1) ** 2
    torch.manual_seed(1)
    batches = [{"input_ids": ids, "labels": ids}] * 200
    block = measure(model, batches, labels="model", reduction=reduction).blocks[0]
    mean = getattr(block, f"squared_gradient_norm_{part}")
    error = block.standard_errors[f"squared_gradient_norm_{part}"]
    assert abs(mean - exact) < 4 * error
    assert error < 0.1 * exact


def test_the_flatness_of_sampled_labels_is_the_fisher_trace_of_the_copies() -> None:
    model = models.gpt2().double().eval()
    ids = models.token_ids(1, 3)
    layer = find_blocks(model)[0].up
    kept: list[Tensor] = []
    handle = layer.register_forward_hook(functools.partial(_with_copies, kept))
    logits = model(input_ids=ids).logits[:, :-1]
    handle.remove()
    exact = exact_trace(logits, kept[0])
    torch.manual_seed(1)
    batches = [{"input_ids": ids, "labels": ids}] * 300
    block = measure(model, batches, labels="model", reduction="sum").blocks[0]
    assert abs(block.AF_up - exact) < 4 * block.standard_errors["AF_up"]
    assert block.standard_errors["AF_up"] < 0.1 * exact


def _with_copies(
    kept: list[Tensor], module: nn.Module, args: tuple[Tensor, ...], output: Tensor
) -> Tensor:
    """The layer with a copy of its weight for each token of its one sample."""
    x = args[0][0]
    kept.append(module.weight.detach().expand(len(x), -1, -1).clone().requires_grad_())
    return (torch.einsum("tdf,td->tf", kept[0], x) + module.bias).unsqueeze(0)


# ---- an independent library


def by_unit_vectors(product: Callable[[Tensor], Tensor], size: int) -> float:
    """The trace, exactly."""
    units = torch.eye(size, dtype=torch.float64)
    return math.fsum((unit @ product(unit)).item() for unit in units)


def is_weight(wanted: nn.Parameter, name: str, parameter: nn.Parameter) -> bool:
    return parameter is wanted


def own_loss_of_text(model: nn.Module, sample: dict[str, Tensor]) -> Tensor:
    logits = model(input_ids=sample["input_ids"].unsqueeze(0)).logits[0, :-1]
    return F.cross_entropy(logits, sample["input_ids"][1:])


@pytest.mark.parametrize("part", ["up", "gate", "down"])
def test_the_shared_weights_gradients_are_those_of_hessian_eigenthings(part: str) -> None:
    model = models.llama().double().eval()
    ids = models.token_ids(3, 5)
    weight = getattr(find_blocks(model)[0], part).weight
    report = measure(model, [{"input_ids": ids, "labels": ids}])
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        fisher = EmpiricalFisherOperator(
            model,
            [{"input_ids": ids}],
            own_loss_of_text,
            param_filter=functools.partial(is_weight, weight),
        )
        trace = by_unit_vectors(fisher.matvec, fisher.size)
    got = getattr(report.blocks[0], f"squared_gradient_norm_{part}")
    assert got == pytest.approx(trace, rel=1e-6)  # Transformers' losses are float32
    assert abs(report.blocks[0].AF_up - trace) > 0.01 * trace  # copies are another thing


def own_loss(model: nn.Module, sample: tuple[Tensor, Tensor]) -> Tensor:
    x, y = sample
    return F.cross_entropy(model(x.unsqueeze(0)), y.unsqueeze(0))


@pytest.mark.filterwarnings("ignore:.torch.jit.script.:DeprecationWarning")
@pytest.mark.parametrize("part", ["up", "down"])
def test_sampled_labels_give_the_gauss_newton_trace_of_hessian_eigenthings(part: str) -> None:
    model = Classifier().double().eval()
    x = torch.randn(5, 4, dtype=torch.float64)
    weight = getattr(model, part).weight
    ggn = GGNOperator(
        model,
        [(x, torch.zeros(5, dtype=torch.int64))],
        forward_fn=_forward,
        loss_of_output_fn=_loss_of_output,
        param_filter=functools.partial(is_weight, weight),
    )
    trace = by_unit_vectors(ggn.matvec, ggn.size)
    assert exact_trace(model(x), weight) / 5 == pytest.approx(trace, rel=1e-9)
    torch.manual_seed(1)
    block = measure(model, [x] * 500, labels="model", patterns=[BARE]).blocks[0]
    for key in (f"squared_gradient_norm_{part}", f"AF_{part}"):  # one token, so they are the same
        assert abs(getattr(block, key) - trace) < 4 * block.standard_errors[key]
        assert block.standard_errors[key] < 0.1 * trace


def _forward(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return model(batch[0])


def _loss_of_output(output: Tensor, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(output, batch[1])


# ---- the draw


def test_labels_are_drawn_from_the_softmax_where_they_count() -> None:
    logits = torch.tensor([[[0.0, math.log(3.0)], [0.0, 50.0]]]).expand(4000, 2, 2)
    terms = torch.tensor([[True, True]]).expand(4000, 2).clone()
    terms[:2000, 1] = False
    labels = sample_labels(logits, terms)
    assert (labels[:2000, 1] == -100).all()
    assert (labels[2000:, 1] == 1).all()
    share = (labels[:, 0] == 1).double().mean().item()
    assert abs(share - 0.75) < 4 * math.sqrt(0.75 * 0.25 / 4000)


def test_own_losses_are_means_or_sums_over_own_terms() -> None:
    logits = torch.zeros(2, 3, 4)
    labels = torch.tensor([[1, 2, 3], [0, -100, -100]])
    assert sum_of_own_losses(logits, labels, "mean").item() == pytest.approx(2 * math.log(4))
    assert sum_of_own_losses(logits, labels, "sum").item() == pytest.approx(4 * math.log(4))
