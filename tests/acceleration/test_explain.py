"""`explain` says how each block ran last, and why: the one place to look."""

from __future__ import annotations

import copy
import math
import pickle
from pathlib import Path

import pytest
import torch
from torch import nn

import models
import steppe
from steppe.bench import PATTERNS, Block
from steppe.errors import AccelerationError
from steppe.ops.cpu import copies, writes
from steppe.ops.cpu.library import kernels

native = pytest.mark.skipif(kernels().name != "native", reason=kernels().reason)


def block_of_density(density: float) -> Block:
    """A block with units that are active on a share of Gaussian tokens."""
    block = Block(16, 640)
    quantile = torch.distributions.Normal(0.0, 1.0).icdf(torch.tensor(density)).item()
    with torch.no_grad():
        nn.init.normal_(block.up.weight, std=0.25)
        nn.init.constant_(block.up.bias, quantile)
    return block


def explain_one(model: nn.Module) -> steppe.BlockExplanation:
    (block,) = steppe.explain(model).blocks
    return block


@native
@pytest.mark.parametrize("rows", [4, 200])
@pytest.mark.parametrize("density", [0.1, 0.6])
def test_density_and_tokens_are_those_of_the_last_call(density: float, rows: int) -> None:
    plain = block_of_density(density)
    fast = steppe.accelerate_(copy.deepcopy(plain), patterns=PATTERNS, max_density=1.0)
    x = torch.randn(rows, 16)
    with torch.no_grad():
        for _ in range(3):
            fast(x)
    block = explain_one(fast)
    expected = (plain.up(x) > 0).float().mean().item()
    assert block.density == pytest.approx(expected, abs=1e-6)
    assert block.density == pytest.approx(density, abs=0.15)
    assert (block.how, block.tokens, block.is_few) == ("sparse", rows, rows <= 8)
    assert (block.trains, block.reason, block.calls) == (False, "", {"sparse": 3})
    assert (block.max_density, block.max_candidates) == (1.0, 0.0)
    fast(x)
    assert explain_one(fast).trains


@native
def test_why_a_block_is_dense() -> None:
    fast = steppe.accelerate_(block_of_density(0.6), patterns=PATTERNS, max_density=0.3)
    assert explain_one(fast).how == "not yet"
    assert math.isnan(explain_one(fast).max_density)
    for rows in (4, 200):
        with torch.no_grad():
            for _ in range(2):
                fast(torch.randn(rows, 16))
        block = explain_one(fast)
        assert (block.how, block.tokens) == ("dense", rows)
        assert block.reason == "more than 30% of the entries are active"
    steppe.restore_(fast)
    steppe.accelerate_(fast, patterns=PATTERNS)
    fast(torch.randn(4, 16))
    assert explain_one(fast).reason == "these are too few tokens for so small a block"


@native
def test_candidates_are_a_share() -> None:
    if kernels().unscreened:
        pytest.skip(kernels().unscreened)
    plain = block_of_density(0.1)
    fast = steppe.accelerate_(
        copy.deepcopy(plain), patterns=PATTERNS, max_density=1.0, max_candidates=1.0
    )
    x = torch.randn(200, 16)
    fast(x)
    block = explain_one(fast)
    assert block.how == "screened"
    assert block.is_sparse
    assert block.density <= block.candidates < 2 * block.density


def test_a_table_names_each_block_and_the_reasons() -> None:
    model = steppe.accelerate_(models.gpt2().eval())
    model(**models.inputs_for(model))
    text = str(steppe.explain(model))
    for block in steppe.find_blocks(model):
        assert block.name in text
    assert "own modules" in text
    assert (kernels().isa or "without a C++ compiler") in text
    assert len(text.splitlines()) < 20


def test_a_model_that_is_not_accelerated_is_an_error() -> None:
    with pytest.raises(AccelerationError, match=r"First: steppe.accelerate_\(model\)"):
        steppe.explain(models.gpt2())


@native
def test_what_cannot_be_kept_is_said_with_its_cure(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (writes, copies):
        monkeypatch.setattr(module, "unseen", lambda: "an old kernel")
    plain = Block(512, 2048)
    nn.init.constant_(plain.up.bias, -1.0)
    x = torch.randn(1, 512)
    expected = plain(x)
    with torch.no_grad():
        fast = steppe.accelerate_(copy.deepcopy(plain), patterns=PATTERNS)
        for _ in range(4):
            assert torch.allclose(fast(x), expected, atol=1e-5)
        block = explain_one(fast)
        assert block.how == "own modules"
        assert "an old kernel; accelerate_(model, weights_are_final=True)" in block.reason
        fast.down.weight.data[:, 3] = 7.0
        plain.down.weight.data[:, 3] = 7.0
        assert torch.equal(fast(x), plain(x))
        fast = steppe.accelerate_(fast, patterns=PATTERNS, weights_are_final=True)
        for _ in range(4):
            assert torch.allclose(fast(x), plain(x), atol=1e-5)
        assert explain_one(fast).is_sparse
        steppe.restore_(fast)
        fast.down.weight.data[:, 3] = 0.0
        steppe.accelerate_(fast, patterns=PATTERNS)
        for _ in range(3):
            fast(x)
        assert explain_one(fast).how == "own modules"


@native
@pytest.mark.parametrize("way", ["deepcopy", "pickle"])
def test_a_copy_is_accelerated_as_its_original(way: str) -> None:
    model = steppe.accelerate_(
        models.gpt2().eval(), lambda block: block.name.endswith("1"), max_density=1.0
    )
    inputs = models.inputs_for(model)
    expected = model(**inputs).logits
    replica = copy.deepcopy(model) if way == "deepcopy" else pickle.loads(pickle.dumps(model))
    for _ in range(2):
        assert torch.allclose(replica(**inputs).logits, expected, atol=1e-5)
    (block,) = steppe.explain(replica).blocks
    assert block.name.endswith("1")
    assert block.is_sparse
    assert steppe.explain(model).blocks[0].calls == {"sparse": 1}
    with torch.no_grad():
        for parameter in replica.parameters():
            parameter.add_(1.0)
    assert torch.equal(model(**inputs).logits, expected)
    steppe.restore_(replica)
    steppe.restore_(model)
    kinds = [type(module) for module in model.modules()]
    assert [type(module) for module in replica.modules()] == kinds


@native
@pytest.mark.skipif(bool(writes.unseen()), reason=writes.unseen() or "writes are seen")
def test_a_model_that_transformers_has_loaded_decodes_sparse(tmp_path: Path) -> None:
    """Its weights are mapped from the file."""
    models.opt().save_pretrained(tmp_path)
    model = type(models.opt()).from_pretrained(tmp_path).eval()
    plain = copy.deepcopy(model)
    steppe.accelerate_(model, max_density=1.0)
    ids = models.token_ids(1, 4)
    with torch.no_grad():
        for _ in range(4):
            got, expected = model(input_ids=ids).logits, plain(input_ids=ids).logits
            assert torch.allclose(got, expected, rtol=1e-4, atol=1e-5)
    assert all(block.is_sparse and block.is_few for block in steppe.explain(model).blocks)
