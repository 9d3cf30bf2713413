"""Every architecture: all its MLPs found and wired as believed, or what is missing is said."""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import steppe
from architectures import ARCHITECTURES, Architecture, Batch
from steppe import IncompleteCoverageWarning, MLPBlock
from steppe.errors import BlocksNotFoundError, UnfitBlockError

PLUGINS: dict[str, Callable[[], list[steppe.Plugin]]] = {
    "zeroth bias": lambda: [steppe.ZerothBias(max_tokens=64)],
    "norm": lambda: [steppe.RestrictedNorm()],
    "activation": lambda: [steppe.JumpingSquaredReLU(ramp=0.5)],
    "threshold": lambda: [steppe.RisingThreshold()],
}
COVERED = [one for one in ARCHITECTURES if one.covered]


def by_name(one: Architecture) -> str:
    return one.name


def found(model: nn.Module) -> list[MLPBlock]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", IncompleteCoverageWarning)
        return steppe.find_blocks(model)


def tensors_of(output: Any) -> list[Tensor]:
    """The output's tensors of floats, in order."""
    values = output.values() if hasattr(output, "values") else output
    return [
        value
        for value in values
        if isinstance(value, Tensor) and value.is_floating_point() and value.ndim >= 2
    ]


@contextmanager
def seen(model: nn.Module, batch: Batch, block: MLPBlock) -> Iterator[dict[str, list[Tensor]]]:
    """What goes through the parts of a block in one forward pass."""
    record: defaultdict[str, list[Tensor]] = defaultdict(list)

    def entering(name: str) -> Callable[..., None]:
        return lambda module, args: record[name].append(args[0].detach().clone())

    def leaving(name: str) -> Callable[..., None]:
        return lambda module, args, output: record[name].append(output.detach().clone())

    handles = [
        block.activated.register_forward_pre_hook(entering("x")),
        block.activated.register_forward_hook(leaving("p")),
        block.down.register_forward_pre_hook(entering("a")),
    ]
    if block.norm is not None:
        handles.append(block.norm.register_forward_hook(leaving("norm")))
    if block.gate is not None:
        handles.append(block.up.register_forward_hook(leaving("up")))
    # Experts in tensors of three dimensions are modules while somebody watches.
    with torch.no_grad(), steppe.watch(model):
        model(**batch)
    for handle in handles:
        handle.remove()
    yield record


def same(one: Tensor, other: Tensor) -> bool:
    return one.numel() == other.numel() and torch.equal(one.flatten(), other.flatten())


def consists_of(tokens: Tensor, routed: Tensor) -> bool:
    """Whether all rows of one tensor are rows of another."""
    rows = routed.flatten(0, -2).unsqueeze(1)
    return bool((rows == tokens.flatten(0, -2)).all(-1).any(-1).all())


@pytest.mark.parametrize("one", ARCHITECTURES, ids=by_name)
def test_all_is_found_or_what_is_missing_is_said(one: Architecture) -> None:
    model = one.build()
    if one.covered == one.mlps:
        with warnings.catch_warnings():
            warnings.simplefilter("error", IncompleteCoverageWarning)
            assert len(steppe.find_blocks(model, strict=True)) == one.mlps
    elif one.covered:
        with pytest.warns(IncompleteCoverageWarning, match=r"\d+% of the MLP parameters"):
            assert len(steppe.find_blocks(model)) == one.covered
        with pytest.raises(BlocksNotFoundError, match="Not covered"):
            steppe.find_blocks(model, strict=True)
    else:
        with pytest.raises(BlocksNotFoundError, match="These look like MLPs"):
            steppe.find_blocks(model)


@pytest.mark.parametrize("one", COVERED, ids=by_name)
def test_what_flows_is_what_the_pattern_says(one: Architecture) -> None:
    model = one.build().eval()
    for block in found(model):
        with seen(model, one.batch(0), block) as record:
            for x, p, a in zip(record["x"], record["p"], record["a"], strict=True):
                expected = block.act(p)
                if block.gate is not None:
                    expected = expected * record["up"].pop(0)
                assert same(expected, a)
                if block.norm is not None:
                    reads = consists_of if block.is_routed else same
                    assert any(reads(norm, x) for norm in record["norm"]), block.family
            assert record["x"] or block.is_routed


@pytest.mark.parametrize("one", COVERED, ids=by_name)
def test_others_read_a_norm_that_is_said_to_be_shared_and_no_other(one: Architecture) -> None:
    model = one.build().eval()
    for block in found(model):
        weight = getattr(block.norm, "weight", None)
        if weight is None:
            continue
        layers = [block.activated] if block.gate is None else [block.gate, block.up]
        handles = [
            layer.register_forward_pre_hook(lambda module, args: (args[0].detach(), *args[1:]))
            for layer in layers
        ]
        outputs = [value for value in tensors_of(model(**one.batch(0))) if value.requires_grad]
        for handle in handles:
            handle.remove()
        directions = [torch.randn_like(value) for value in outputs]
        (grad,) = torch.autograd.grad(outputs, weight, directions, allow_unused=True)
        is_read = grad is not None and bool(grad.abs().max() > 1e-12)
        assert is_read is block.norm_is_shared, block.name


@pytest.mark.parametrize("one", COVERED, ids=by_name)
@pytest.mark.filterwarnings("ignore::steppe.IncompleteCoverageWarning")
def test_plug_ins_change_nothing_at_first_and_come_off_again(one: Architecture) -> None:
    model = one.build().eval()
    batch = one.batch(0)
    with torch.no_grad():
        before = tensors_of(model(**batch))
        for name, plugins in PLUGINS.items():
            try:
                steppe.sparsify_(model, plugins())
            except UnfitBlockError:
                assert name in ("zeroth bias", "norm")  # there is no norm, or it has no scale
                continue
            during = tensors_of(model(**batch))
            steppe.restore_(model)
            after = tensors_of(model(**batch))
            assert all(map(torch.equal, before, during))
            assert all(map(torch.equal, before, after))


@pytest.mark.parametrize("one", COVERED, ids=by_name)
@pytest.mark.filterwarnings("ignore::steppe.IncompleteCoverageWarning")
def test_density_is_what_hooks_count(one: Architecture) -> None:
    model = one.build().eval()
    batch = {key: value for key, value in one.batch(0).items() if key != "attention_mask"}
    if "labels" in batch:
        batch["labels"] = batch["labels"].clamp(min=0)
    counts = []
    for block in found(model):
        with seen(model, batch, block) as record:
            counts.append(sum(int(a.count_nonzero()) for a in record["a"]))
    with torch.no_grad(), steppe.watch(model) as monitor:
        model(**batch)
    for block, count in zip(monitor.report().blocks, counts, strict=True):
        density = block.density if block.tokens else 0.0  # an expert may have got none
        assert round(density * block.tokens * block.d_hidden) == count, block.name


@pytest.mark.parametrize("one", COVERED, ids=by_name)
@pytest.mark.filterwarnings("ignore::steppe.IncompleteCoverageWarning")
def test_accelerated_is_the_same_forward_and_backward(one: Architecture) -> None:
    model = one.build()
    batch = one.batch(0)

    def run() -> tuple[list[Tensor], dict[str, Tensor]]:
        model.zero_grad()
        torch.manual_seed(0)
        output = tensors_of(model(**batch))
        sum(value.float().square().mean() for value in output).backward()
        parameters = model.named_parameters()
        grads = {name: p.grad for name, p in parameters if p.grad is not None and p.numel()}
        return [value.detach() for value in output], grads

    expected, wanted = run()
    steppe.accelerate_(model, max_density=1.0)
    got, grads = run()
    for one_output, other in zip(expected, got, strict=True):
        torch.testing.assert_close(other, one_output, rtol=1e-4, atol=1e-5)
    largest = max(float(grad.abs().max()) for grad in wanted.values())
    assert grads.keys() == wanted.keys()
    for name, grad in wanted.items():
        torch.testing.assert_close(grads[name], grad, rtol=1e-3, atol=1e-4 * largest, msg=name)
