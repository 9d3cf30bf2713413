"""measure: any loader, the model left as it was, and what densities must not depend on."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import models
import steppe
from steppe import (
    JumpingSquaredReLU,
    Report,
    find_blocks,
    sparsify_,
    watch,
)
from steppe.errors import BlocksNotFoundError, EmptyLoaderError
from steppe.measures.measure import call_model

Batches = list[dict[str, Tensor]]
Densities = list[tuple[str, float, float, int, int]]

measure = functools.partial(steppe.measure, labels=None)  # densities alone


def densities(report: Report) -> Densities:
    """What is exact and does not depend on the order of the samples."""
    pooled = ("all", report.density, report.derivative_density, 0, 0)
    return [pooled] + [
        (block.name, block.density, block.derivative_density, block.tokens, block.dead_neurons)
        for block in report.blocks
    ]


def token_batches(sizes: tuple[int, ...] = (2, 2, 2), tokens: int = 7) -> Batches:
    return [
        {"input_ids": models.token_ids(size, tokens, seed=seed)} for seed, size in enumerate(sizes)
    ]


def watched(model: nn.Module, batches: Batches) -> Report:
    """The truth, by a plain loop."""
    model.eval()
    with watch(model) as monitor, torch.no_grad():
        for batch in batches:
            model(**batch)
    return monitor.report()


def modes(model: nn.Module) -> list[bool]:
    return [module.training for module in model.modules()]


class Batch(Mapping[str, Tensor]):
    """A mapping that is no dict, as tokenizers return them."""

    def __init__(self, **tensors: Tensor) -> None:
        self._tensors = tensors

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


# ---- loaders


@pytest.mark.parametrize("name", ["opt", "gpt2", "bert", "llama"])
def test_a_loader_of_dicts_gives_what_a_loop_gives(name: str) -> None:
    model = models.LANGUAGE_MODELS[name]()
    batches = token_batches()
    assert densities(measure(model, batches)) == densities(watched(model, batches))


@pytest.mark.parametrize(
    "as_batch",
    [
        pytest.param(lambda ids: {"input_ids": ids, "use_cache": False}, id="dict"),
        pytest.param(lambda ids: Batch(input_ids=ids), id="mapping"),
        pytest.param(lambda ids: (ids, torch.zeros(2)), id="tuple"),
        pytest.param(lambda ids: [ids, torch.zeros(2)], id="list"),
        pytest.param(lambda ids: ids, id="tensor"),
    ],
)
def test_batches_come_in_every_usual_form(as_batch: Callable[[Tensor], Any]) -> None:
    model = models.opt()
    ids = models.token_ids()
    assert densities(measure(model, [as_batch(ids)])) == densities(
        watched(model, [{"input_ids": ids}])
    )


def test_call_model_returns_what_the_model_returns() -> None:
    model = models.opt().eval()
    ids = models.token_ids()
    want = model(ids).logits
    for batch in ({"input_ids": ids}, (ids, "target"), [ids], ids):
        assert torch.equal(call_model(model, batch).logits, want)


def test_a_torch_data_loader_works() -> None:
    model = models.vit()
    pixels = models.images(5)
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(pixels), batch_size=2)
    report = measure(model, loader)
    assert densities(report) == densities(watched(model, [{"pixel_values": pixels}]))
    assert [block.tokens for block in report.blocks] == [5 * 5, 5 * 5]


def test_a_model_without_parameters_takes_batches_as_they_are() -> None:
    class Forward(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + 1

    assert torch.equal(call_model(Forward(), torch.zeros(2)), torch.ones(2))


def test_a_forward_of_your_own_runs_the_model() -> None:
    model = models.t5()
    seen = []

    def forward(called: nn.Module, batch: Tensor) -> None:
        seen.append(called)
        called(input_ids=batch, decoder_input_ids=batch[:, :3])

    report = measure(model, [models.token_ids()], forward=forward)
    assert seen == [model]
    assert [block.tokens for block in report.blocks] == [14, 14, 6, 6]


@pytest.mark.parametrize("wanted", [1, 2, 3, 10])
def test_max_batches_stops_early(wanted: int) -> None:
    model = models.opt()
    batches = token_batches((1, 2, 3))
    assert densities(measure(model, batches, max_batches=wanted)) == densities(
        watched(model, batches[:wanted])
    )


def test_max_batches_takes_no_batch_it_does_not_use() -> None:
    loader = iter(token_batches((1, 2, 3)))
    measure(models.opt(), loader, max_batches=2)
    assert next(loader)["input_ids"].shape[0] == 3


def test_where_measures_some_blocks() -> None:
    model = models.opt()
    batches = token_batches()
    report = measure(model, batches, where=lambda block: block.name.endswith(".1"))
    assert densities(report)[1:] == densities(watched(model, batches))[2:]
    assert report.density == report.blocks[0].density


# ---- the model is left as it was


def test_dropout_is_off_and_every_module_is_back_in_its_own_mode() -> None:
    model = models.t5(dropout=0.5)
    model.train()
    model.encoder.block[1].eval()
    before = modes(model)
    assert True in before
    assert False in before
    batch = models.inputs_for(model)
    report = measure(model, [batch], forward=lambda called, b: _forward_in_eval(called, b))
    assert modes(model) == before
    assert densities(report) == densities(watched(model, [batch]))


def _forward_in_eval(model: nn.Module, batch: dict[str, Tensor]) -> None:
    assert not any(modes(model))
    assert not torch.is_grad_enabled()
    call_model(model, batch)


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_error_in_the_loop_leaves_modes_hooks_and_gradients_alone(
    error: type[BaseException],
) -> None:
    model = models.gpt2().train()
    model.transformer.h[0].eval()
    before = modes(model)
    kinds = [type(module) for module in model.modules()]

    def fail(called: nn.Module, batch: Any) -> None:
        call_model(called, batch)
        raise error("user's code")

    with pytest.raises(error, match="user's code"):
        measure(model, token_batches(), forward=fail)
    assert modes(model) == before
    assert [type(module) for module in model.modules()] == kinds
    assert not any(module._forward_hooks for module in model.modules())
    assert torch.is_grad_enabled()


def test_measuring_leaves_no_gradient_and_no_random_number_behind() -> None:
    model = models.t5(dropout=0.5)
    state = torch.get_rng_state()
    measure(model, [models.inputs_for(model)])
    assert torch.equal(torch.get_rng_state(), state)
    assert all(parameter.grad is None for parameter in model.parameters())


# ---- nothing to measure


@pytest.mark.parametrize(
    ("loader", "batches"),
    [
        pytest.param([], 0, id="empty"),
        pytest.param(iter(()), 0, id="used up"),
        pytest.param(
            [
                {
                    "input_ids": models.token_ids(),
                    "attention_mask": torch.zeros(2, 7, dtype=torch.int64),
                }
            ],
            1,
            id="all padding",
        ),
    ],
)
def test_a_loader_without_a_token_is_an_error_that_says_so(loader: Any, batches: int) -> None:
    model = models.bert().train()
    with pytest.raises(EmptyLoaderError, match=rf"{batches} batches.*BertForMaskedLM"):
        measure(model, loader)
    assert all(modes(model))


def test_max_batches_of_zero_is_an_empty_loader() -> None:
    with pytest.raises(EmptyLoaderError):
        measure(models.opt(), token_batches(), max_batches=0)


def test_an_empty_loader_is_a_value_error_too() -> None:
    with pytest.raises(ValueError, match="loader"):
        measure(models.opt(), [])


def test_a_model_without_blocks_is_an_error_before_the_loader_is_touched() -> None:
    loader = iter([torch.zeros(1, 2)])
    with pytest.raises(BlocksNotFoundError):
        measure(nn.Linear(2, 2), loader)
    assert next(loader).shape == (1, 2)


# ---- what a density does not depend on


@pytest.mark.parametrize("name", ["opt", "gpt2", "llama", "t5"])
def test_permuting_hidden_units_with_their_weights_keeps_the_densities(name: str) -> None:
    model = models.LANGUAGE_MODELS[name]().double().eval()
    batch = models.inputs_for(model)
    before = measure(model, [batch])
    outputs = model(**batch).logits
    for block in find_blocks(model):
        order = torch.randperm(block.d_hidden)
        for layer in filter(None, (block.up, block.gate)):
            _take_hidden_units(layer, order, block.d_hidden, hidden_is_output=True)
        _take_hidden_units(block.down, order, block.d_hidden, hidden_is_output=False)
    assert densities(measure(model, [batch])) == densities(before)
    torch.testing.assert_close(model(**batch).logits, outputs)


def _take_hidden_units(
    layer: nn.Module, order: Tensor, d_hidden: int, hidden_is_output: bool
) -> None:
    """Reorder a layer's hidden units; Conv1D keeps its weight the other way round."""
    conv1d = hasattr(layer, "nf")
    dim = 1 if hidden_is_output == conv1d else 0
    assert layer.weight.shape[dim] == d_hidden
    layer.weight.data = layer.weight.data.index_select(dim, order)
    if hidden_is_output and layer.bias is not None:
        layer.bias.data = layer.bias.data[order]


@pytest.mark.parametrize("dead", [1, 32])
def test_dead_units_scale_the_densities_by_their_share(dead: int) -> None:
    model = models.opt()
    batches = token_batches()
    before = measure(model, batches)
    for block in find_blocks(model):
        up, down = block.up, block.down
        up.weight.data = torch.cat([up.weight.data, torch.zeros(dead, block.d_model)])
        up.bias.data = torch.cat([up.bias.data, -torch.ones(dead)])
        down.weight.data = torch.cat([down.weight.data, torch.randn(block.d_model, dead)], dim=1)
        up.out_features += dead
        down.in_features += dead
    after = measure(model, batches)
    shrink = models.D_HIDDEN / (models.D_HIDDEN + dead)
    assert after.density == pytest.approx(before.density * shrink, rel=1e-12)
    for new, old in zip(after.blocks, before.blocks, strict=True):
        assert new.density == pytest.approx(old.density * shrink, rel=1e-12)
        assert new.derivative_density == pytest.approx(old.derivative_density * shrink, rel=1e-12)
        assert new.tokens == old.tokens


def test_a_bias_that_decides_the_sign_gives_a_density_known_by_hand() -> None:
    model = models.opt()
    for share, block in zip((0.25, 0.75), find_blocks(model), strict=True):
        nn.init.zeros_(block.up.weight)
        active = torch.arange(block.d_hidden) < share * block.d_hidden
        block.up.bias.data = torch.where(active, 1.0, -1.0)
    report = measure(sparsify_(model, [JumpingSquaredReLU()]), token_batches())
    assert [block.density for block in report.blocks] == [0.25, 0.75]
    assert [block.derivative_density for block in report.blocks] == [0.25, 0.75]
    assert report.density == report.derivative_density == 0.5


IDS = models.token_ids(12, 5)


@functools.cache
def double_opt() -> nn.Module:
    """In float64 no batch size rounds a unit over zero."""
    torch.manual_seed(0)
    return models.opt().double().eval()


@settings(max_examples=25, deadline=None)
@given(cuts=st.sets(st.integers(1, 11)), order=st.permutations(range(12)))
def test_batches_of_any_size_in_any_order_pool_to_one_big_batch(
    cuts: set[int], order: list[int]
) -> None:
    ids = IDS[torch.tensor(order)]
    ends = [*sorted(cuts), 12]
    sizes = [end - start for start, end in zip([0, *ends], ends, strict=False)]
    assert densities(measure(double_opt(), ids.split(sizes))) == densities(
        measure(double_opt(), [IDS])
    )


@settings(max_examples=25, deadline=None)
@given(lengths=st.lists(st.integers(1, 5), min_size=1, max_size=4), pad=st.integers(0, 3))
def test_padding_changes_no_density(lengths: list[int], pad: int) -> None:
    """Sequences one at a time, and together, padded on the right."""
    longest = max(lengths) + pad
    alone = [{"input_ids": IDS[i : i + 1, :length]} for i, length in enumerate(lengths)]
    ids = torch.zeros(len(lengths), longest, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for i, length in enumerate(lengths):
        ids[i, :length] = IDS[i, :length]
        mask[i, :length] = 1
    together = measure(double_opt(), [{"input_ids": ids, "attention_mask": mask}])
    assert densities(together) == densities(measure(double_opt(), alone))
    assert [block.tokens for block in together.blocks] == [sum(lengths)] * 2
