"""What belongs to a call stays with it: several threads, a server, a call inside another."""

from __future__ import annotations

import asyncio
import copy
import pickle
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor, nn

import models
import steppe
from steppe.per_thread import PerThread

THREADS = 8


def padded(seed: int, tokens: int, padding: int) -> dict[str, Tensor]:
    """One text with padding on the left."""
    ids = models.token_ids(1, tokens, seed=seed)
    mask = torch.ones_like(ids)
    mask[:, :padding] = 0
    return {"input_ids": ids, "attention_mask": mask}


SAME_LENGTH = [padded(seed, 12, seed % 8) for seed in range(32)]
ANY_LENGTH = [padded(seed, 5 + seed % 9, seed % 4) for seed in range(32)]


def with_zeroth_bias(build: Callable[[], nn.Module]) -> nn.Module:
    model = steppe.sparsify_(build().eval(), [steppe.ZerothBias()])
    for bias in steppe.added_parameters(model).values():
        nn.init.normal_(bias, std=0.5)
    return model


@torch.no_grad()
def answer(model: nn.Module, request: dict[str, Tensor]) -> Tensor:
    logits: Tensor = model(**request).logits[:, -1]
    return logits


@pytest.mark.parametrize("requests", [SAME_LENGTH, ANY_LENGTH], ids=["same length", "any length"])
@pytest.mark.parametrize("build", [models.gpt2, models.opt, models.llama])
def test_a_model_with_zeroth_biases_is_served_from_many_threads(
    build: Callable[[], nn.Module], requests: list[dict[str, Tensor]]
) -> None:
    model = with_zeroth_bias(build)
    expected = [answer(model, request) for request in requests]
    assert not torch.allclose(expected[0], answer(build().eval(), requests[0]))
    with ThreadPoolExecutor(THREADS) as pool:
        for _ in range(4):
            got = list(pool.map(lambda request: answer(model, request), requests))
            for one, other in zip(got, expected, strict=True):
                torch.testing.assert_close(one, other)


def test_an_asynchronous_server_is_right() -> None:
    model = with_zeroth_bias(models.gpt2)
    expected = [answer(model, request) for request in ANY_LENGTH]

    async def serve() -> list[Tensor]:
        calls = [asyncio.to_thread(answer, model, request) for request in ANY_LENGTH]
        return await asyncio.gather(*calls)

    for one, other in zip(asyncio.run(serve()), expected, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("build", [models.gpt2, models.llama, models.t5])
def test_watching_counts_the_calls_of_many_threads(build: Callable[[], nn.Module]) -> None:
    model = build().eval()
    requests = ANY_LENGTH
    if build is models.t5:
        requests = [{**r, "labels": r["input_ids"]} for r in requests]

    def run(request: dict[str, Tensor]) -> None:
        with torch.no_grad():
            model(**request)

    with steppe.watch(model) as monitor:
        for request in requests * 4:
            run(request)
    expected = monitor.counts()
    with steppe.watch(model) as monitor, ThreadPoolExecutor(THREADS) as pool:
        list(pool.map(run, requests * 4))
    assert torch.equal(monitor.counts(), expected)


def test_a_call_inside_another_one_does_not_disturb_it() -> None:
    model = with_zeroth_bias(models.gpt2)
    outer, inner = SAME_LENGTH[3], ANY_LENGTH[5]
    expected = answer(model, outer)
    calls: list[Tensor | None] = []

    def look_elsewhere(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        if not calls:
            calls.append(None)
            calls[0] = answer(model, inner)

    handle = model.transformer.h[0].attn.register_forward_pre_hook(look_elsewhere)
    torch.testing.assert_close(answer(model, outer), expected)
    handle.remove()
    torch.testing.assert_close(calls[0], answer(model, inner))


def test_a_call_that_raises_leaves_nothing_to_the_one_around_it() -> None:
    model = with_zeroth_bias(models.gpt2)
    outer = SAME_LENGTH[3]
    expected = answer(model, outer)
    tries: list[str] = []

    def fail_inside(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        if not tries:
            tries.append("")
            with pytest.raises(IndexError):
                answer(model, {"input_ids": torch.full((1, 3), 10**6)})

    handle = model.transformer.h[0].attn.register_forward_pre_hook(fail_inside)
    torch.testing.assert_close(answer(model, outer), expected)
    handle.remove()


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable. is deprecated:FutureWarning")
def test_checkpointed_blocks_run_again_with_what_their_call_said() -> None:
    """Also in a thread of autograd's own, which has had no call."""
    model = with_zeroth_bias(models.gpt2).train()
    batch = {**SAME_LENGTH[5], "labels": SAME_LENGTH[5]["input_ids"]}
    model(**batch).loss.backward()
    wanted = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    loss = model(**batch).loss
    with ThreadPoolExecutor(1) as pool:
        pool.submit(loss.backward).result()
    got = [p.grad for p in model.parameters() if p.grad is not None]
    for one, other in zip(got, wanted, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("again", [copy.deepcopy, lambda kept: pickle.loads(pickle.dumps(kept))])
def test_a_copy_begins_anew(again: Callable[[PerThread[int]], PerThread[int]]) -> None:
    kept = PerThread(1, inherits=True)
    kept.enter(2)
    assert again(kept).get() == 1
    assert kept.get() == 2


@pytest.fixture
def other_thread() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(1) as pool:
        yield pool


@pytest.mark.parametrize(("inherits", "seen"), [(False, 1), (True, 2)])
def test_a_thread_that_kept_nothing(
    inherits: bool, seen: int, other_thread: ThreadPoolExecutor
) -> None:
    kept = PerThread(1, inherits)
    kept.set(2)
    assert other_thread.submit(kept.get).result() == seen
    other_thread.submit(kept.set, 3).result()
    assert kept.get() == 2
