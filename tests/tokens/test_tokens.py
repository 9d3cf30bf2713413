"""What a stack's call says of its tokens: absolute positions, padding, cached tokens, labels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import models
from steppe.blocks.block import MLPBlock
from steppe.blocks.find import find_blocks
from steppe.errors import TokenPositionError
from steppe.tokens import IGNORED_LABEL, DecoderLabels, TokenContext, listen

PARAMETERS = (
    "input_ids",
    "attention_mask",
    "position_ids",
    "past_key_values",
    "inputs_embeds",
    "src_key_padding_mask",
)
B, T, D = 2, 4, 16


class Cache:
    """A cache of so many tokens."""

    def __init__(self, tokens: int | Tensor) -> None:
        self._tokens = tokens

    def get_seq_length(self) -> int | Tensor:
        return self._tokens


class Stack(nn.Module):
    """What a block below it takes for its stack."""

    def forward(self, input_ids: Tensor) -> Tensor:
        return input_ids


def told(*args: Any, **kwargs: Any) -> TokenContext:
    """A context that has heard one call."""
    context = TokenContext(PARAMETERS)
    context(nn.Identity(), args, kwargs)
    return context


def ids(batch: int = B, tokens: int = T) -> Tensor:
    return torch.ones(batch, tokens, dtype=torch.int64)


def positions_by_loop(mask: Sequence[Sequence[int]], tokens: int) -> list[list[int]]:
    """The number of counted tokens before each of the last ones; 0 where there are none."""
    rows = []
    for row in mask:
        positions = [max(0, sum(row[: t + 1]) - 1) for t in range(len(row))]
        rows.append(positions[len(row) - tokens :])
    return rows


def plain(tensor: Tensor | None) -> list[Any] | None:
    return None if tensor is None else tensor.tolist()


def encoder_block(batch_first: bool = True) -> MLPBlock:
    """A block whose stack knows no input_ids."""
    return find_blocks(nn.TransformerEncoderLayer(D, 2, 32, batch_first=batch_first))[0]


def language_model_block() -> MLPBlock:
    """A block whose stack takes input_ids."""
    return replace(encoder_block(), stack=Stack())


def test_ids_alone_tell_the_shape_and_nothing_else() -> None:
    context = told(input_ids=ids())
    assert context.shape == (B, T)
    assert (context.mask, context.positions, context.offset) == (None, None, 0)


def test_a_call_that_says_nothing_leaves_everything_open() -> None:
    context = told()
    assert (context.shape, context.mask, context.positions) == (None, None, None)
    assert context.offset == 0


def test_a_single_sequence_of_ids_is_a_batch_of_one() -> None:
    assert told(input_ids=ids()[0]).shape == (1, T)


def test_embeddings_tell_the_shape_and_take_a_mask() -> None:
    mask = torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]])
    context = told(inputs_embeds=torch.zeros(B, T, D), attention_mask=mask)
    assert context.shape == (B, T)
    assert plain(context.mask) == mask.bool().tolist()
    assert plain(context.positions) == [[0, 0, 1, 2], [0, 1, 2, 3]]


def test_positional_arguments_are_read_as_keywords_are() -> None:
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 0]])
    by_place, by_name = told(ids(), mask), told(input_ids=ids(), attention_mask=mask)
    assert by_place.shape == by_name.shape == (B, T)
    assert plain(by_place.mask) == plain(by_name.mask) == mask.bool().tolist()
    assert plain(by_place.positions) == plain(by_name.positions)


@pytest.mark.parametrize(
    ("row", "positions"),
    [
        ([1, 1, 1, 1], [0, 1, 2, 3]),
        ([0, 0, 1, 1], [0, 0, 0, 1]),
        ([1, 1, 0, 0], [0, 1, 1, 1]),
        ([0, 1, 0, 1], [0, 0, 0, 1]),
        ([0, 0, 0, 0], [0, 0, 0, 0]),
    ],
    ids=["full", "left padding", "right padding", "gap", "all padding"],
)
@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.float32])
def test_positions_count_the_tokens_before_without_the_padding(
    row: list[int], positions: list[int], dtype: torch.dtype
) -> None:
    context = told(input_ids=ids(1), attention_mask=torch.tensor([row]).to(dtype))
    assert plain(context.positions) == [positions]
    assert plain(context.mask) == [[bool(entry) for entry in row]]


@settings(deadline=None, max_examples=60)
@given(
    mask=st.integers(1, 6).flatmap(
        lambda length: st.lists(
            st.lists(st.integers(0, 1), min_size=length, max_size=length), min_size=1, max_size=3
        )
    ),
    data=st.data(),
)
def test_positions_and_mask_equal_the_loop_with_and_without_a_cache(
    mask: list[list[int]], data: st.DataObject
) -> None:
    tokens = data.draw(st.integers(1, len(mask[0])))
    cached = len(mask[0]) - tokens
    context = told(
        input_ids=ids(len(mask), tokens),
        attention_mask=torch.tensor(mask),
        past_key_values=Cache(cached) if cached else None,
    )
    assert plain(context.positions) == positions_by_loop(mask, tokens)
    assert plain(context.mask) == [[bool(entry) for entry in row[cached:]] for row in mask]
    assert context.offset == cached


def test_the_cache_alone_is_the_offset() -> None:
    context = told(input_ids=ids(tokens=1), past_key_values=Cache(5))
    assert (context.offset, context.positions, context.mask) == (5, None, None)


def test_a_cache_may_count_its_tokens_on_the_device() -> None:
    context = told(input_ids=ids(tokens=1), past_key_values=Cache(torch.tensor(5)))
    assert isinstance(context.offset, Tensor)
    assert context.offset.item() == 5


def test_position_ids_go_before_the_mask() -> None:
    given_positions = torch.tensor([[7, 8, 9, 10]])
    mask = torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]])
    context = told(input_ids=ids(), attention_mask=mask, position_ids=given_positions)
    assert plain(context.positions) == [[7, 8, 9, 10]]
    assert plain(context.mask) == mask.bool().tolist()


def test_a_negative_position_of_padding_becomes_zero() -> None:
    context = told(input_ids=ids(1), position_ids=torch.tensor([[-1, -1, 0, 1]]))
    assert plain(context.positions) == [[0, 0, 0, 1]]


def test_position_ids_of_more_dimensions_are_left_to_the_mask() -> None:
    mask = torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]])
    three = torch.zeros(3, B, T, dtype=torch.int64)
    context = told(input_ids=ids(), attention_mask=mask, position_ids=three)
    assert plain(context.positions) == [[0, 0, 1, 2], [0, 1, 2, 3]]


@pytest.mark.parametrize("mask", [torch.ones(B, 1, T, T), "flash", None], ids=["4-dim", "str", "-"])
def test_a_mask_that_is_not_one_entry_per_token_says_nothing(mask: object) -> None:
    context = told(input_ids=ids(), attention_mask=mask)
    assert (context.mask, context.positions) == (None, None)


def test_each_call_forgets_the_one_before() -> None:
    context = told(input_ids=ids(), attention_mask=torch.zeros(B, T + 3), past_key_values=Cache(3))
    context(nn.Identity(), (), {"input_ids": ids(3, 5)})
    assert context.shape == (3, 5)
    assert (context.mask, context.positions, context.offset) == (None, None, 0)


@pytest.mark.parametrize(
    "padding",
    [
        torch.tensor([[False, False, True, True], [False, False, False, True]]),
        torch.tensor([[0.0, 0.0, float("-inf"), float("-inf")], [0.0, 0.0, 0.0, float("-inf")]]),
        torch.tensor([[0.0, 0.0, -1e9, -1e9], [0.0, 0.0, 0.0, -1e9]]),
    ],
    ids=["bool", "-inf", "large"],
)
def test_a_key_padding_mask_is_true_or_negative_for_padding(padding: Tensor) -> None:
    context = told(src_key_padding_mask=padding)
    assert plain(context.mask) == [[True, True, False, False], [True, True, True, False]]
    # nn.TransformerEncoder's positions are places in the sequence, padding or not.
    assert context.positions is None


def test_a_key_padding_mask_of_one_sequence_is_a_batch_of_one() -> None:
    assert plain(told(src_key_padding_mask=torch.tensor([False, True])).mask) == [[True, False]]


@pytest.mark.parametrize(("batch_first", "shape"), [(True, (B, T, D)), (False, (T, B, D))])
def test_tokens_are_the_dimension_that_the_block_says(
    batch_first: bool, shape: tuple[int, ...]
) -> None:
    assert told().tokens_per_sequence(torch.zeros(shape), encoder_block(batch_first)) == T


def test_flattened_tokens_are_told_apart_by_the_stack() -> None:
    x = torch.zeros(B * T, D)
    assert told(input_ids=ids()).tokens_per_sequence(x, language_model_block()) == T


def test_a_sequence_without_a_batch_is_one_sequence() -> None:
    context = TokenContext(("src", "src_mask", "src_key_padding_mask", "is_causal"))
    assert context.tokens_per_sequence(torch.zeros(T, D), encoder_block()) == T
    no_stack = replace(encoder_block(), stack=None)
    assert TokenContext(()).tokens_per_sequence(torch.zeros(T, D), no_stack) == T


def test_flattened_tokens_of_an_unknown_batch_are_an_error() -> None:
    with pytest.raises(TokenPositionError, match=r"\[8, 16\].*Call Stack \(or the model\)"):
        TokenContext(PARAMETERS).tokens_per_sequence(torch.zeros(8, D), language_model_block())


@pytest.mark.parametrize("shape", [(B, T - 1, D), (B + 1, T, D), (B * T - 1, D)])
def test_an_input_that_is_not_the_stacks_tokens_is_an_error(shape: tuple[int, ...]) -> None:
    block = language_model_block()
    with pytest.raises(TokenPositionError, match="chunk_size_feed_forward = 0") as caught:
        told(input_ids=ids()).tokens_per_sequence(torch.zeros(shape), block)
    assert str(caught.value).startswith(f"{block.name}: the model was called with 2 × 4 tokens")


@pytest.mark.parametrize(
    ("batch_first", "shape"),
    [(True, (B, T, 32)), (True, (B * T, 32)), (False, (T, B, 32))],
    ids=["batch first", "flattened", "sequence first"],
)
def test_samples_are_counted_in_every_layout(batch_first: bool, shape: tuple[int, ...]) -> None:
    context = told(input_ids=ids())
    assert context.samples(torch.zeros(shape), encoder_block(batch_first)) == B


def test_the_mask_goes_by_sample() -> None:
    mask = torch.tensor([[False, True, True, False], [True, True, True, True]])
    context = told(src_key_padding_mask=~mask)
    by_sample = context.mask_by_sample(torch.zeros(T, B, 32), encoder_block(batch_first=False))
    assert by_sample is not None
    assert by_sample.dtype == torch.bool
    assert torch.equal(by_sample, mask)


def test_without_a_mask_there_is_none_by_sample() -> None:
    assert told(input_ids=ids()).mask_by_sample(torch.zeros(B, T, 32), encoder_block()) is None


@pytest.mark.parametrize("shape", [(B, T - 1, 32), (B, T + 1, 32), (1, T, 32)])
def test_a_mask_of_other_tokens_is_an_error(shape: tuple[int, ...]) -> None:
    context = told(input_ids=ids(), attention_mask=torch.ones(B, T))
    with pytest.raises(TokenPositionError, match=r"the padding mask has \[2, 4\] tokens"):
        context.mask_by_sample(torch.zeros(shape), encoder_block())


def labelled(labels: Tensor | None, **call: Any) -> TokenContext:
    """A decoder's context after the model was called with labels."""
    context = TokenContext(PARAMETERS)
    DecoderLabels(("input_ids", "labels"), context)(nn.Identity(), (ids(),), {"labels": labels})
    context(nn.Identity(), (), call)
    return context


def test_ignored_labels_are_the_decoders_padding() -> None:
    labels = torch.tensor([[5, 6, IGNORED_LABEL, IGNORED_LABEL], [5, 6, 7, IGNORED_LABEL]])
    context = labelled(labels, input_ids=ids())
    assert plain(context.mask) == [[True, True, False, False], [True, True, True, False]]
    assert context.positions is None


def test_a_decoder_mask_goes_before_the_labels() -> None:
    context = labelled(
        torch.full((B, T), IGNORED_LABEL), input_ids=ids(), attention_mask=torch.ones(B, T)
    )
    assert plain(context.mask) == [[True] * T] * B


def test_labels_count_for_one_call_only() -> None:
    context = labelled(torch.full((B, T), IGNORED_LABEL), input_ids=ids())
    context(nn.Identity(), (), {"input_ids": ids()})
    assert context.mask is None


def test_labels_are_read_by_place_too_and_may_be_absent() -> None:
    context = TokenContext(PARAMETERS)
    hook = DecoderLabels(("input_ids", "labels"), context)
    hook(nn.Identity(), (ids(), ids()), {})
    assert context.decoder_labels.get() is not None
    hook(nn.Identity(), (ids(),), {})
    assert context.decoder_labels.get() is None


def test_blocks_of_one_stack_share_a_context() -> None:
    model = models.opt()
    contexts, hooks = listen(model, find_blocks(model))
    assert contexts[0] is contexts[1]
    assert hooks == [(model.get_submodule("model.decoder"), contexts[0])]


def test_an_encoder_and_a_decoder_have_their_own_and_the_labels_go_to_the_decoder() -> None:
    model = models.t5()
    contexts, hooks = listen(model, find_blocks(model))
    assert contexts[0] is contexts[1]
    assert contexts[2] is contexts[3]
    assert contexts[0] is not contexts[2]
    encoder, decoder = model.get_submodule("encoder"), model.get_submodule("decoder")
    assert [module for module, _ in hooks] == [encoder, decoder, model]
    assert hooks[:2] == [(encoder, contexts[0]), (decoder, contexts[2])]
    assert isinstance(hooks[2][1], DecoderLabels)


def test_a_model_without_a_stack_needs_no_hook() -> None:
    model = models.vit()
    contexts, hooks = listen(model, find_blocks(model))
    assert hooks == []
    assert len(contexts) == 2
    assert contexts[0].tokens_per_sequence(torch.zeros(B, 5, D), find_blocks(model)[0]) == 5


def run_listening(model: nn.Module, **call: Any) -> tuple[list[TokenContext], Any]:
    """The contexts after one call of a model, and its output."""
    contexts, hooks = listen(model, find_blocks(model))
    handles = [module.register_forward_pre_hook(hook, with_kwargs=True) for module, hook in hooks]
    try:
        return contexts, model(**call)
    finally:
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize("build", [models.opt, models.gpt2, models.llama, models.gpt_neox])
def test_a_model_with_a_real_cache_is_heard_in_full(build: Any) -> None:
    model = build().eval()
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    first = models.token_ids(2, 4)
    contexts, output = run_listening(
        model, input_ids=first, attention_mask=mask[:, :4], use_cache=True
    )
    assert contexts[0].offset == 0
    contexts, _ = run_listening(
        model,
        input_ids=first[:, -1:],
        attention_mask=mask,
        past_key_values=output.past_key_values,
        use_cache=True,
    )
    assert (contexts[0].shape, contexts[0].offset) == ((2, 1), 4)
    assert plain(contexts[0].positions) == [[2], [4]]
    assert plain(contexts[0].mask) == [[True], [True]]


def test_the_labels_of_a_real_encoder_decoder_reach_the_decoder_alone() -> None:
    model = models.t5().eval()
    labels = models.token_ids(2, 3)
    labels[0, 1:] = IGNORED_LABEL
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]])
    contexts, _ = run_listening(
        model, input_ids=models.token_ids(2, 4), attention_mask=mask, labels=labels
    )
    assert plain(contexts[0].mask) == mask.bool().tolist()
    assert plain(contexts[2].mask) == [[True, False, False], [True, True, True]]


@pytest.mark.parametrize("batch_first", [True, False])
def test_a_torch_encoder_passes_its_padding_to_every_layer(batch_first: bool) -> None:
    model = models.torch_encoder(norm_first=True, batch_first=batch_first)
    padding = torch.tensor([[False, False, True, True], [False, False, False, False]])
    x = torch.randn((B, T, D) if batch_first else (T, B, D))
    contexts, _ = run_listening(model, src=x, src_key_padding_mask=padding)
    assert len({id(context) for context in contexts}) == 2
    for context in contexts:
        assert plain(context.mask) == (~padding).tolist()
