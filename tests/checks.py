"""What is checked of every architecture: `test_architectures.py` and docs/models.py run the same.

A check takes an architecture, raises an AssertionError where steppe is wrong, and returns what it
has to say besides: what steppe refuses by name, empty for nothing.
"""

from __future__ import annotations

import functools
import tempfile
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

import steppe
from architectures import Architecture, Batch
from steppe import IncompleteCoverageWarning, MLPBlock
from steppe.blocks.linear import linear_weight
from steppe.errors import AccelerationError, BlocksNotFoundError, UnfitBlockError

PLUGINS: tuple[Callable[[], steppe.Plugin], ...] = (
    lambda: steppe.ZerothBias(max_tokens=64),
    lambda: steppe.RestrictedNorm(allow_shared=True, ramp=0.5),
    lambda: steppe.JumpingSquaredReLU(ramp=0.5),
    lambda: steppe.RisingThreshold(),
    lambda: steppe.ActivationPenalty(1e-4),
)


def found(model: nn.Module) -> list[MLPBlock]:
    """The blocks, without a word of what is left."""
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


def loss_of(output: Any) -> Tensor:
    """The model's own loss, or the mean square of what it gives."""
    loss = getattr(output, "loss", None)
    if isinstance(loss, Tensor):
        return loss
    return torch.stack([value.float().square().mean() for value in tensors_of(output)]).sum()


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
    """Whether two tensors have the same values, in any shape."""
    return one.numel() == other.numel() and torch.equal(one.flatten(), other.flatten())


def consists_of(tokens: Tensor, routed: Tensor) -> bool:
    """Whether all rows of one tensor are rows of another."""
    rows = routed.flatten(0, -2).unsqueeze(1)
    return bool((rows == tokens.flatten(0, -2)).all(-1).any(-1).all())


def found_or_said(one: Architecture) -> str:
    """All MLPs are blocks, or what is missing is said and `strict` refuses it."""
    model = one.build()
    told: list[str] = []
    blocks: list[MLPBlock] = []
    refusal = ""
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            blocks = steppe.find_blocks(model)
        told = [str(w.message) for w in caught if w.category is IncompleteCoverageWarning]
    except BlocksNotFoundError as error:
        refusal = str(error)
    assert "These look like MLPs" in refusal or blocks
    assert len(blocks) == one.covered
    assert bool(told) is (0 < one.covered < one.mlps)
    if one.covered == one.mlps:
        assert len(steppe.find_blocks(model, strict=True)) == one.mlps
        return ""
    try:
        steppe.find_blocks(model, strict=True)
    except BlocksNotFoundError:
        return "the rest is warned of" if blocks else "not found; the error shows them"
    raise AssertionError("strict=True does not refuse it")


def flows_as_the_pattern_says(one: Architecture) -> str:
    """The block reads its norm, and what `down` gets is what the activation gives."""
    model = one.build().eval()
    for block in found(model):
        with seen(model, one.batch(0), block) as record:
            for x, p, a in zip(record["x"], record["p"], record["a"], strict=True):
                expected = block.act(p)
                if block.gate is not None:
                    expected = expected * record["up"].pop(0)
                assert same(expected, a), block.name
                if block.norm is not None:
                    reads = consists_of if block.is_routed else same
                    assert any(reads(norm, x) for norm in record["norm"]), block.name
            assert record["x"] or block.is_routed, block.name
    return ""


def norms_are_shared_or_not(one: Architecture) -> str:
    """Others read a norm that is said to be shared, and no other."""
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
        with steppe.watch(model):  # which calls layers that are parts of larger ones
            given = tensors_of(model(**one.batch(0)))
        outputs = [value for value in given if value.requires_grad]
        for handle in handles:
            handle.remove()
        directions = [torch.randn_like(value) for value in outputs]
        (grad,) = torch.autograd.grad(outputs, weight, directions, allow_unused=True)
        is_read = grad is not None and bool(grad.abs().max() > 1e-12)
        assert is_read is block.norm_is_shared, block.name
    return ""


@functools.lru_cache(maxsize=4)  # two checks of an architecture ask, one after the other
def fitting(one: Architecture) -> tuple[tuple[Callable[[], steppe.Plugin], ...], tuple[str, ...]]:
    """What makes the plug-ins that an architecture takes, and of the others why not."""
    model, fit, refused = one.build(), [], []
    for make in PLUGINS:
        try:
            steppe.sparsify_(model, [make()])
        except UnfitBlockError as error:
            name = type(make()).__name__
            assert name in ("ZerothBias", "RestrictedNorm")  # there is no norm, or of another kind
            reason = str(error).partition(": ")[2].partition(". ")[0].partition("; ")[0]
            refused.append(f"{name}: {reason}")
        else:
            steppe.restore_(model)
            fit.append(make)
    return tuple(fit), tuple(refused)


def plugins_come_off_again(one: Architecture) -> str:
    """Each plug-in that fits, and all of them, change no bit at first, and come off again."""
    model = one.build().eval()
    batch = one.batch(0)
    makers, refused = fitting(one)
    fit = [make() for make in makers]
    with torch.no_grad():
        before = tensors_of(model(**batch))
        for plugins in (*([plugin] for plugin in fit), fit):
            steppe.sparsify_(model, plugins)
            during = tensors_of(model(**batch))
            steppe.restore_(model)
            after = tensors_of(model(**batch))
            assert all(map(torch.equal, before, during)), plugins
            assert all(map(torch.equal, before, after)), plugins
    return "; ".join(refused)


def density_is_counted(one: Architecture) -> str:
    """The density is what hooks count."""
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
    assert any(counts)
    for block, count in zip(monitor.report().blocks, counts, strict=True):
        density = block.density if block.tokens else 0.0  # an expert may have got none
        assert round(density * block.tokens * block.d_hidden) == count, block.name
    return ""


def gradients_are_autograds(one: Architecture) -> str:
    """‖∂ℓ/∂W‖² of each weight, of a sample run alone, is that of autograd's gradient."""
    model = one.build().eval()
    blocks = found(model)
    for index in range(2):
        batch = {
            name: value[index : index + 1] if value.ndim else value
            for name, value in one.batch(0).items()
            if name != "return_loss"  # which compares samples
        }
        model.zero_grad()
        with steppe.watch(model, gradients=True) as monitor:
            loss_of(model(**batch)).backward()
        total = 0.0
        for block, told in zip(blocks, monitor.report().blocks, strict=True):
            for name in ("up", "gate", "down"):
                layer = getattr(block, name)
                if layer is None:
                    continue
                wanted = squared_gradient_norm(linear_weight(layer))
                got = getattr(told, f"squared_gradient_norm_{name}") if told.tokens else 0.0
                assert abs(got - wanted) <= 1e-4 * wanted + 1e-12, (block.name, name, got, wanted)
                total += wanted
        assert total > 0.0
    return ""


def squared_gradient_norm(weight: Tensor) -> float:
    """Of a parameter or a part of one, as backward has left it; 0 where there is none."""
    whole = weight if weight._base is None else weight._base
    if whole.grad is None:
        return 0.0
    grad = whole.grad.contiguous()
    part = grad.as_strided(weight.shape, weight.stride(), weight.storage_offset())
    return part.double().square().sum().item()


def accelerated_is_the_same(one: Architecture) -> str:
    """Forward and backward on the kernels, to 1e-5 and 1e-4 of the largest gradient."""
    model = one.build()
    batch = one.batch(0)

    def run() -> tuple[list[Tensor], dict[str, Tensor]]:
        model.zero_grad()
        torch.manual_seed(0)
        output = tensors_of(model(**batch))
        torch.stack([value.float().square().mean() for value in output]).sum().backward()
        parameters = model.named_parameters()
        grads = {name: p.grad for name, p in parameters if p.grad is not None and p.numel()}
        return [value.detach() for value in output], grads

    expected, wanted = run()
    try:
        steppe.accelerate_(model, max_density=1.0)
    except AccelerationError as error:
        if "needs an activation" not in str(error):
            raise
        return str(error).partition(": ")[2].partition(". ")[0]
    run()  # of some blocks the first call is looked at, by their own modules
    got, grads = run()
    for one_output, other in zip(expected, got, strict=True):
        torch.testing.assert_close(other, one_output, rtol=1e-4, atol=1e-5)
    largest = max(float(grad.abs().max()) for grad in wanted.values())
    assert grads.keys() == wanted.keys()
    for name, grad in wanted.items():
        torch.testing.assert_close(grads[name], grad, rtol=1e-3, atol=1e-4 * largest, msg=name)
    ran = steppe.explain(model).blocks
    return "; ".join(sorted({block.reason for block in ran if block.how == "own modules"}))


def trains_and_is_loaded_again(one: Architecture) -> str:
    """Two steps with all plug-ins that fit, then a save and a load, to the same bits."""
    model = one.build()
    steppe.sparsify_(model, [make() for make in fitting(one)[0]])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    steppe.constrain_(model, optimizer, total_steps=4)
    before = [linear_weight(layer).detach().clone() for layer in layers_of(model)]
    for seed in range(2):
        batch = one.batch(seed)
        with steppe.watch(model, gradients=True) as monitor:
            loss = steppe.penalize(loss_of(model(**batch)), model)
            loss.backward()
        assert torch.isfinite(loss)
        assert 0.0 < monitor.report().density <= 1.0
        optimizer.step()
        optimizer.zero_grad()
    moved = [
        not torch.equal(old, linear_weight(layer))
        for old, layer in zip(before, layers_of(model), strict=True)
    ]
    assert any(moved)
    model.eval()
    with torch.no_grad(), tempfile.TemporaryDirectory() as folder:
        expected = tensors_of(model(**one.batch(0)))
        model.save_pretrained(folder)
        again = steppe.load_pretrained(type(model).from_pretrained, folder).eval()
        assert all(map(torch.equal, expected, tensors_of(again(**one.batch(0)))))
    return ""


def layers_of(model: nn.Module) -> list[nn.Module]:
    """The linear layers of all blocks."""
    return [layer for block in found(model) for layer in block.layers]


CHECKS: dict[str, Callable[[Architecture], str]] = {
    "found": found_or_said,
    "wired": flows_as_the_pattern_says,
    "norm": norms_are_shared_or_not,
    "plug-ins": plugins_come_off_again,
    "density": density_is_counted,
    "gradients": gradients_are_autograds,
    "accelerated": accelerated_is_the_same,
    "trained, saved": trains_and_is_loaded_again,
}


def checks_of(one: Architecture) -> list[str]:
    """The names of the checks that there is something to check for."""
    return list(CHECKS) if one.covered else ["found"]
