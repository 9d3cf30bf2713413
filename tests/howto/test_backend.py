"""A backend is one package and one line: `dummy_backend` runs a whole model."""

from __future__ import annotations

import copy

import pytest
import torch

import models
import steppe
from howto.dummy_backend import PlainBackend
from steppe.ops import backend
from steppe.ops.backend import backend_of
from steppe.ops.plan import Backend

TOKENS = torch.arange(1, 13).view(2, 6)


@pytest.fixture
def plain(monkeypatch: pytest.MonkeyPatch) -> PlainBackend:
    """The line in the table."""
    plain: Backend = PlainBackend()
    monkeypatch.setitem(backend._BACKENDS, plain.name, plain)
    assert isinstance(plain, PlainBackend)
    return plain


def test_a_tensor_says_which_backend_it_has(plain: PlainBackend) -> None:
    assert backend_of(torch.ones(2)) is plain
    assert backend_of(torch.ones(2, device="meta")) is None


@torch.no_grad()
def test_a_model_runs_on_it(plain: PlainBackend) -> None:
    model = models.gpt2("relu").eval()
    fast = steppe.accelerate_(copy.deepcopy(model), max_density=1.0)
    for tokens in (TOKENS, TOKENS[:1, :1]):
        expected = model(input_ids=tokens).logits
        torch.testing.assert_close(fast(input_ids=tokens).logits, expected)
    assert [block.calls for block in plain.blocks] == [2] * len(steppe.find_blocks(model))
    rows = steppe.explain(fast).blocks
    assert all(row.is_sparse and 0 < row.density < 1 for row in rows)


def test_what_it_cannot_do_runs_on_the_models_own_modules(plain: PlainBackend) -> None:
    model = models.gpt2("relu").eval()
    fast = steppe.accelerate_(copy.deepcopy(model), max_density=1.0)
    for one in (model, fast):
        one(input_ids=TOKENS, labels=TOKENS).loss.backward()
    for own, routed in zip(model.parameters(), fast.parameters(), strict=True):
        assert torch.equal(own.grad, routed.grad)
    assert "backward pass is not written" in str(steppe.explain(fast))
