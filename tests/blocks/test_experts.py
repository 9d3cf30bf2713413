"""Experts: each is a block whose tokens are those that are routed to it."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    MixtralConfig,
    MixtralForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    SwitchTransformersConfig,
    SwitchTransformersForConditionalGeneration,
)

import steppe
from oracles import flatness_row
from steppe import MLPBlock
from steppe.blocks.experts import Experts, ExpertsForward, experts_of
from steppe.blocks.routed import current_rows
from steppe.errors import SparsificationError, TokenPositionError, UnfitBlockError

VOCABULARY, WIDTH, HIDDEN, EXPERTS = 50, 16, 24, 4
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
    "hidden_act": "relu",
}


def qwen(**settings: Any) -> nn.Module:
    """Three layers: a dense one, and two with four experts each."""
    torch.manual_seed(0)
    sizes = {
        **SIZES,
        "intermediate_size": 48,
        "moe_intermediate_size": HIDDEN,
        "num_hidden_layers": 3,
        "head_dim": 8,
        "num_experts": EXPERTS,
        "mlp_only_layers": [0],
    }
    model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**{**sizes, **settings}))
    with torch.no_grad():  # a router that tells tokens apart
        for name, parameter in model.named_parameters():
            if name.endswith("mlp.gate.weight"):
                parameter.normal_()
    return model


def mixtral() -> nn.Module:
    torch.manual_seed(0)
    config = MixtralConfig(
        **SIZES, intermediate_size=HIDDEN, num_hidden_layers=2, num_local_experts=EXPERTS
    )
    return MixtralForCausalLM(config)


def batch(rows: int = 3, length: int = 9, padded: bool = True) -> dict[str, Tensor]:
    """Texts, the second one padded on the right, with labels."""
    ids = torch.randint(VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    if padded:
        mask[1, 6:] = 0
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "labels": ids.masked_fill(mask == 0, -100),
    }


def experts_in(model: nn.Module) -> list[MLPBlock]:
    return [block for block in steppe.find_blocks(model) if block.is_routed]


class Seen:
    """What each expert computes by the model's own code, with the tokens that it gets."""

    def __init__(self, model: nn.Module) -> None:
        self.rows: dict[str, Tensor] = {}
        self.x: dict[str, Tensor] = {}
        self.p: dict[str, Tensor] = {}
        self.a: dict[str, Tensor] = {}
        self._handles = [
            module.register_forward_pre_hook(self._see(name), with_kwargs=True)
            for name, module in model.named_modules()
            if name.endswith("mlp.experts")
        ]

    def _see(self, name: str) -> Any:
        def see(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x, index, _ = (*args, *kwargs.values())
            for expert in range(len(module.down_proj)):
                rows = (index == expert).any(-1).nonzero().flatten()
                gate, up = F.linear(x[rows], module.gate_up_proj[expert]).chunk(2, -1)
                key = f"{name}.{expert}"
                self.rows[key], self.x[key] = rows, x[rows].detach()
                self.p[key], self.a[key] = gate.detach(), (gate.relu() * up).detach()

        return see

    def __enter__(self) -> Seen:
        return self

    def __exit__(self, *error: object) -> None:
        for handle in self._handles:
            handle.remove()


def states(model: nn.Module) -> Iterator[tuple[str, set[str], set[str]]]:
    for name, module in model.named_modules():
        yield name, set(vars(module)), set(module._modules)


def test_each_expert_is_a_block_and_the_same_one_every_time() -> None:
    model = qwen()
    before = list(states(model))
    blocks = steppe.find_blocks(model, strict=True)
    names = [f"model.layers.{i}.mlp.experts.{e}" for i in (1, 2) for e in range(EXPERTS)]
    assert [block.name for block in blocks] == ["model.layers.0", *names]
    assert {(b.d_model, b.d_hidden) for b in blocks[1:]} == {(WIDTH, HIDDEN)}
    assert all(block.norm is not None and block.norm_is_shared for block in blocks[1:])
    assert steppe.find_blocks(model) == blocks
    assert list(states(model)) == before


def test_the_weights_are_parts_of_the_models_own() -> None:
    model: Any = qwen()
    block = experts_in(model)[2]
    tensor = model.model.layers[1].mlp.experts.gate_up_proj
    assert block.gate is not None
    for layer, rows in ((block.gate, slice(0, HIDDEN)), (block.up, slice(HIDDEN, None))):
        weight: Any = layer.weight
        assert torch.equal(weight, tensor[2, rows])
        assert weight.untyped_storage().data_ptr() == tensor.untyped_storage().data_ptr()
    assert not list(block.down.parameters())


@pytest.mark.parametrize("build", [qwen, mixtral])
def test_densities_are_those_of_the_routed_tokens(build: Any) -> None:
    model = build().eval()
    inputs = batch()
    counted = inputs["attention_mask"].flatten() != 0
    with Seen(model) as seen, torch.no_grad():
        model(**inputs)
    with steppe.watch(model) as monitor, torch.no_grad():
        model(**inputs)
    reports = {report.name: report for report in monitor.report().blocks}
    for block in experts_in(model):
        report, keep = reports[block.name], counted[seen.rows[block.name]]
        rows = seen.rows[block.name][keep]
        a, p = seen.a[block.name][keep], seen.p[block.name][keep]
        assert report.tokens == len(a) < len(seen.a[block.name]) + 1
        assert report.samples == len((rows // inputs["input_ids"].shape[1]).unique())
        assert round(report.density * a.numel()) == int(a.count_nonzero())
        assert round(report.derivative_density * a.numel()) == int((p > 0).sum())
        assert report.dead_neurons == int((a == 0).all(0).sum())
    assert sum(reports[b.name].tokens for b in experts_in(model)) == int(counted.sum()) * 4


def keep(kept: dict[str, Any], name: str, module: Any, args: Any, p: Tensor) -> None:
    """Forward hook on a gate."""
    p.retain_grad()
    kept[name] = args[0].detach(), p


def test_flatness_is_that_of_the_gradients_of_each_samples_own_loss() -> None:
    model = qwen().double()
    inputs = batch()
    with steppe.watch(model, gradients=True) as monitor:
        model(**inputs).loss.backward()
    reports = {report.name: report for report in monitor.report().blocks}
    samples, length = inputs["input_ids"].shape
    found: dict[str, list[list[float]]] = {block.name: [] for block in experts_in(model)}
    weights: dict[str, list[float]] = {name: [] for name in found}
    for sample in range(samples):
        model.zero_grad()
        own = {key: value[sample : sample + 1] for key, value in inputs.items()}
        own = {k: v[:, : int(own["attention_mask"].sum())] for k, v in own.items()}
        with steppe.watch(model):  # the experts are modules meanwhile
            blocks = experts_in(model)
            kept: dict[str, tuple[Tensor, Tensor]] = {}
            handles = [
                layer.register_forward_hook(partial(keep, kept, block.name))
                for block in blocks
                if (layer := block.gate) is not None
            ]
            model(**own).loss.backward()
            for handle in handles:
                handle.remove()
        for block in blocks:
            if block.name in kept:
                x, p = kept[block.name]
                assert p.grad is not None
                everything = torch.ones(len(x), dtype=torch.bool)
                found[block.name].append(flatness_row(x, p.grad, (p > 0) * 1.0, everything))
                layer: Any = block.gate
                whole = layer.held[0][0][layer.source].grad[layer.expert][slice(*layer.rows)]
                weights[block.name].append(float(whole.square().sum()))
    for name, rows in found.items():
        report = reports[name]
        assert report.samples == len(rows)
        assert report.AF_gate == pytest.approx(sum(row[3] for row in rows) / len(rows), rel=1e-5)
        assert report.squared_gradient_norm_gate == pytest.approx(
            sum(weights[name]) / len(rows), rel=1e-5
        )
        assert report.derivative_density_by_identity == pytest.approx(
            report.derivative_density, rel=1e-12
        )
    assert length == 9


def test_measure_leaves_out_experts_that_no_token_reached() -> None:
    model = qwen()
    report = steppe.measure(model, [batch(rows=2, length=3, padded=False)], labels="model")
    tokens = {block.name: block.tokens for block in report.blocks[1:]}
    assert sum(tokens.values()) == 2 * 2 * 6
    assert all((block.AF_up != block.AF_up) == (block.tokens == 0) for block in report.blocks[1:])


def test_gradients_of_parameters_are_those_of_the_plain_model() -> None:
    model = qwen()
    inputs = batch()

    def gradients() -> dict[str, Tensor]:
        model.zero_grad()
        model(**inputs).loss.backward()
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    expected = gradients()
    with steppe.watch(model, gradients=True):
        watched = gradients()
    steppe.sparsify_(model, [steppe.RisingThreshold()])
    sparse = gradients()
    for grads in (watched, sparse):
        assert grads.keys() == expected.keys()
        for name, grad in expected.items():
            torch.testing.assert_close(grads[name], grad, rtol=1e-4, atol=1e-7, msg=name)


def test_restored_is_what_it_was() -> None:
    model = qwen().eval()
    inputs = batch()
    with torch.no_grad():
        before = model(**inputs).logits
    tensors = {name: value.clone() for name, value in model.state_dict().items()}
    parameters = dict(model.named_parameters())
    held = list(states(model))
    steppe.sparsify_(
        model,
        [steppe.JumpingSquaredReLU(), steppe.RisingThreshold(), steppe.ActivationPenalty(1e-3)],
    )
    with steppe.watch(model), torch.no_grad():
        assert not torch.equal(model(**inputs).logits, before)
    expert = experts_of(model.get_submodule("model.layers.1.mlp.experts")).each[0]
    assert "act" in expert._modules
    steppe.restore_(model)
    assert "act" not in expert._modules
    assert list(states(model)) == held
    assert dict(model.named_parameters()) == parameters
    after = model.state_dict()
    assert list(after) == list(tensors)
    assert all(torch.equal(after[name], value) for name, value in tensors.items())
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, before)


def test_experts_are_in_the_mode_of_their_model() -> None:
    model = qwen().eval()
    blocks = experts_in(model)
    assert blocks[0].down.training
    for mode in (False, True):
        model.train(mode)
        with steppe.watch(model):
            assert {block.down.training for block in experts_in(model)} == {mode}


@pytest.mark.parametrize("kind", ["tensor", "list"])
def test_nothing_is_kept_of_a_calls_tokens(kind: str) -> None:
    model, inputs = (qwen() if kind == "tensor" else ListedModel()), batch()
    del inputs["labels"]
    with steppe.watch(model):
        model(**inputs)
        assert current_rows.get() is None


def test_verbs_may_end_in_any_order() -> None:
    model: Any = qwen()
    held = list(states(model))
    with steppe.watch(model):
        steppe.sparsify_(model, [steppe.JumpingSquaredReLU()])
    inputs = batch()
    with steppe.watch(model) as monitor:
        model(**inputs)
        steppe.restore_(model)
        model(**inputs)
    assert monitor.report().blocks[1].tokens > 0
    assert list(states(model)) == held


def test_one_expert_can_be_changed_alone() -> None:
    model: Any = qwen()
    names = {experts_in(model)[1].name}
    steppe.sparsify_(model, [steppe.JumpingSquaredReLU()], where=lambda b: b.name in names)
    acts = [type(block.act).__name__ for block in experts_in(model)]
    assert acts == ["ReLU", "Rectifier", *["ReLU"] * 6]


def test_thresholds_are_of_each_experts_own_tokens() -> None:
    model: Any = qwen()
    inputs = batch()
    counted = inputs["attention_mask"].flatten() != 0
    with Seen(model) as seen:
        model(**inputs)
    steppe.sparsify_(model, [steppe.RisingThreshold()])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    steppe.constrain_(model, optimizer, total_steps=4)
    model(**inputs).loss.backward()
    optimizer.step()
    state = model.state_dict()
    for name, p in seen.p.items():
        p = p[counted[seen.rows[name]]].double()
        expected = p.std(0, correction=0)
        torch.testing.assert_close(
            state[f"{name}.gate.threshold.deviation"], expected.float(), rtol=1e-5, atol=1e-7
        )


def test_the_penalty_is_of_each_experts_own_tokens() -> None:
    model = qwen()
    inputs = batch()
    counted = inputs["attention_mask"].flatten() != 0
    with Seen(model) as seen:
        plain = model(**inputs).loss
    steppe.sparsify_(model, [steppe.ActivationPenalty(0.25)], where=lambda block: block.is_routed)
    loss = steppe.penalize(model(**inputs).loss, model)
    means = [
        a[counted[seen.rows[name]]].abs().sum(-1).mean() for name, a in seen.a.items() if len(a)
    ]
    torch.testing.assert_close(loss - plain, 0.25 * sum(means), rtol=1e-4, atol=1e-6)


def test_what_does_not_fit_experts_is_refused_by_name() -> None:
    model: Any = qwen()
    with pytest.raises(UnfitBlockError, match=r"experts\.0: is an expert"):
        steppe.sparsify_(model, [steppe.ZerothBias()])
    with pytest.raises(UnfitBlockError, match=r"experts\.0: the norm is read by others"):
        steppe.sparsify_(model, [steppe.RestrictedNorm()])
    steppe.sparsify_(model, [steppe.RisingThreshold()])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    steppe.constrain_(model, optimizer, total_steps=4)
    model(**batch()).loss.backward()
    optimizer.step()
    with pytest.raises(SparsificationError, match="no bias to fold"):
        steppe.fold_(model)
    expert = experts_of(model.model.layers[1].mlp.experts).each[0]
    with (
        steppe.watch(model),
        pytest.raises(TokenPositionError, match=r"which of the tokens .* are is unknown"),
    ):
        expert(torch.zeros(3, WIDTH))


def test_a_norm_that_all_experts_read_has_one_floor() -> None:
    model: Any = qwen()
    steppe.sparsify_(model, [steppe.RestrictedNorm(allow_shared=True)])
    norm = model.model.layers[1].post_attention_layernorm
    optimizer = torch.optim.SGD([norm.weight], lr=1.0)
    steppe.constrain_(model, optimizer, total_steps=4)
    norm.weight.grad = torch.ones_like(norm.weight)
    optimizer.step()
    assert bool((norm.weight == 1.0).all())


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copies_run_their_own_experts(how: str) -> None:
    model: Any = qwen().eval()
    inputs = batch()
    steppe.sparsify_(model, [steppe.JumpingSquaredReLU(), steppe.RisingThreshold()])
    with steppe.watch(model):
        replica: Any = (
            copy.deepcopy(model) if how == "deepcopy" else pickle.loads(pickle.dumps(model))
        )
    with torch.no_grad():
        expected = model(**inputs).logits
        assert torch.equal(replica(**inputs).logits, expected)
        replica.model.layers[1].mlp.experts.down_proj.mul_(2.0)
        assert not torch.equal(replica(**inputs).logits, expected)
        assert torch.equal(model(**inputs).logits, expected)
    for block in experts_in(replica):
        layer: Any = block.down
        assert layer.experts.module in set(replica.modules())
    steppe.restore_(replica)
    assert not any("threshold" in name for name in replica.state_dict())


def test_saved_and_loaded_with_what_was_put_in(tmp_path: Path) -> None:
    model: Any = qwen().eval()
    inputs = batch()
    steppe.sparsify_(model, [steppe.JumpingSquaredReLU(ramp=0.5), steppe.RisingThreshold()])
    steppe.advance_(model, 0.25)
    with torch.no_grad():
        for name, value in model.state_dict().items():
            if name.endswith("threshold.deviation"):
                value.uniform_(0.1, 1.0)
        expected = model(**inputs).logits
    model.save_pretrained(tmp_path)
    loaded = steppe.load_pretrained(Qwen3MoeForCausalLM.from_pretrained, tmp_path).eval()
    assert list(loaded.state_dict()) == list(model.state_dict())
    with torch.no_grad():
        assert torch.equal(loaded(**inputs).logits, expected)


def switch() -> nn.Module:
    """An encoder and a decoder of two layers each, every second one with experts."""
    torch.manual_seed(0)
    config = SwitchTransformersConfig(
        vocab_size=VOCABULARY,
        d_model=WIDTH,
        d_kv=8,
        d_ff=HIDDEN,
        num_layers=2,
        num_decoder_layers=2,
        num_heads=2,
        num_experts=EXPERTS,
        num_sparse_encoder_layers=1,
        num_sparse_decoder_layers=1,
        expert_capacity=6,
        dense_act_fn="relu",
        dropout_rate=0.0,
        router_jitter_noise=0.0,
        decoder_start_token_id=0,
        pad_token_id=0,
    )
    model = SwitchTransformersForConditionalGeneration(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "router" in name:
                parameter.normal_()
    return model


class ListedExpert(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w1, self.w3 = (nn.Linear(WIDTH, HIDDEN, bias=False) for _ in range(2))
        self.w2 = nn.Linear(HIDDEN, WIDTH, bias=False)
        self.act_fn = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.w2(self.act_fn(self.w1(x)) * self.w3(x))
        return output


class ListedMoE(nn.Module):
    """As the Mixtral of Transformers 4, every expert called even if it gets no token."""

    def __init__(self, jitter: float = 0.0) -> None:
        super().__init__()
        self.gate = nn.Linear(WIDTH, EXPERTS)
        self.experts = nn.ModuleList(ListedExpert() for _ in range(EXPERTS))
        self.jitter = jitter
        self.rows: list[Tensor] = []

    def forward(self, hidden: Tensor) -> Tensor:
        x = hidden.reshape(-1, WIDTH) * (1.0 + self.jitter)
        shares, chosen = self.gate(x).softmax(-1).topk(2)
        output = torch.zeros_like(x)
        self.rows = []
        for number, expert in enumerate(self.experts):
            place, rows = torch.where((chosen == number).T)  # not in the order of the tokens
            self.rows.append(rows)
            output.index_add_(0, rows, expert(x[rows]) * shares[rows, place, None])
        return output.view_as(hidden)


class ListedModel(nn.Module):
    def __init__(self, jitter: float = 0.0) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.moe = ListedMoE(jitter)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        output: Tensor = self.moe(self.embedding(input_ids))
        return output


def test_the_tokens_of_experts_in_a_list_are_found() -> None:
    torch.manual_seed(0)
    model, inputs = ListedModel().double(), batch()
    del inputs["labels"]
    inputs["input_ids"][0, 3:6] = inputs["input_ids"][2, 2]  # equal rows
    with steppe.watch(model, gradients=True, reduction="sum") as monitor:
        model(**inputs).square().sum().backward()
    reports = {block.name: block for block in monitor.report().blocks}
    assert list(reports) == [f"moe.experts.{number}" for number in range(EXPERTS)]
    counted = inputs["attention_mask"].flatten() != 0
    taken: dict[str, Any] = {}
    handles = [
        expert.w1.register_forward_hook(partial(keep, taken, f"moe.experts.{number}"))
        for number, expert in enumerate(model.moe.experts)
        if isinstance(expert, ListedExpert)
    ]
    model(**inputs).square().sum().backward()
    for handle in handles:
        handle.remove()
    for (name, report), rows in zip(reports.items(), model.moe.rows, strict=True):
        (x, p), samples = taken[name], (rows // 9)
        assert report.tokens == int(counted[rows].sum())
        assert report.samples == len(samples[counted[rows]].unique())
        sums = [0.0] * 7
        for sample in range(3):
            here = samples == sample
            row = flatness_row(x[here], p.grad[here], (p[here] > 0) * 1.0, counted[rows][here])
            sums = [total + value for total, value in zip(sums, row, strict=True)]
        assert report.AF_gate == pytest.approx(sums[3] / report.samples, rel=1e-9)
        assert report.squared_gradient_norm_gate == pytest.approx(
            sums[6] / report.samples, rel=1e-9
        )
        assert report.density * report.tokens * HIDDEN == pytest.approx(sums[1])


def test_tokens_that_were_changed_before_they_are_routed_are_refused() -> None:
    model, inputs = ListedModel(jitter=0.01), batch()
    del inputs["labels"]
    with (
        steppe.watch(model),
        pytest.raises(TokenPositionError, match=r"moe\.experts\.0: .* ListedMoE .* unknown"),
    ):
        model(**inputs)


def test_experts_of_switch_transformers() -> None:
    model, inputs = switch(), batch(padded=False)
    blocks = steppe.find_blocks(model, strict=True)
    assert [block.is_routed for block in blocks] == [False, *[True] * 4, False, *[True] * 4]
    assert all(block.norm is not None for block in blocks)
    hidden: dict[str, Tensor] = {}
    handles = [
        block.down.register_forward_pre_hook(
            lambda m, args, name=block.name: hidden.__setitem__(name, args[0].detach())
        )
        for block in blocks
    ]
    expected, wanted = run(model, inputs)
    for handle in handles:
        handle.remove()
    held = list(states(model))
    with steppe.watch(model, gradients=True) as monitor:
        run(model, inputs)
    for report in monitor.report().blocks:
        a = hidden[report.name].flatten(0, -2)
        assert report.tokens == len(a)
        assert round(report.density * a.numel()) == int(a.count_nonzero())
    steppe.sparsify_(model, [steppe.RisingThreshold(), steppe.RestrictedNorm(allow_shared=True)])
    steppe.accelerate_(model, max_density=1.0)
    run(model, inputs)
    logits, grads = run(model, inputs)
    assert all(block.is_sparse for block in steppe.explain(model).blocks)
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)
    for name, grad in grads.items():
        torch.testing.assert_close(grad, wanted[name], rtol=1e-4, atol=1e-6, msg=name)
    steppe.restore_(model)
    assert list(states(model)) == held


class OwnExperts(nn.Module):
    """Experts with weights ``[E, in, out]`` and biases, and a forward of their own."""

    def __init__(self, factor: float = 1.0) -> None:
        super().__init__()
        self.factor = factor
        self.is_transposed = True
        self.up_proj = nn.Parameter(torch.randn(EXPERTS, WIDTH, HIDDEN))
        self.up_proj_bias = nn.Parameter(torch.randn(EXPERTS, HIDDEN))
        self.down_proj = nn.Parameter(torch.randn(EXPERTS, HIDDEN, WIDTH))
        self.down_proj_bias = nn.Parameter(torch.randn(EXPERTS, WIDTH))
        self.act_fn = nn.ReLU()

    def forward(self, tokens: Tensor, chosen: Tensor, shares: Tensor) -> Tensor:
        output = torch.zeros_like(tokens)
        for token in range(len(tokens)):
            for expert, share in zip(chosen[token].tolist(), shares[token], strict=True):
                p = tokens[token] @ self.up_proj[expert] + self.up_proj_bias[expert]
                z = self.act_fn(p) @ self.down_proj[expert] + self.down_proj_bias[expert]
                output[token] += self.factor * share * z
        return output


class Routed(nn.Module):
    """Sends each token to the two experts of the largest score."""

    def __init__(self, factor: float = 1.0) -> None:
        super().__init__()
        self.router = nn.Linear(WIDTH, EXPERTS)
        self.experts = OwnExperts(factor)

    def forward(self, x: Tensor) -> Tensor:
        shares, chosen = self.router(x).softmax(-1).topk(2)
        output: Tensor = self.experts(tokens=x, shares=shares, chosen=chosen)
        return output


def run(model: nn.Module, inputs: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    output = model(**inputs)
    output.loss.backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return output.logits.detach(), grads


@pytest.mark.parametrize("plugins", [False, True], ids=["plain", "with plug-ins"])
@pytest.mark.parametrize("build", [qwen, mixtral])
def test_accelerated_is_the_same_forward_and_backward(build: Any, plugins: bool) -> None:
    model = build()
    inputs = batch()
    if plugins:
        steppe.sparsify_(model, [steppe.JumpingSquaredReLU(ramp=0.5), steppe.RisingThreshold()])
        steppe.advance_(model, 0.25)
        with torch.no_grad():
            for name, value in model.state_dict().items():
                if name.endswith("threshold.deviation"):
                    value.uniform_(0.1, 0.3)
    expected, wanted = run(model, inputs)
    held = list(states(model))
    keys = list(model.state_dict())
    steppe.accelerate_(model, max_density=1.0)
    assert list(model.state_dict()) == keys
    run(model, inputs)  # looks at the wiring
    logits, grads = run(model, inputs)
    told = steppe.explain(model).blocks
    assert all(block.is_sparse for block in told), [block.reason for block in told]
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)
    assert grads.keys() == wanted.keys()
    for name, grad in wanted.items():
        torch.testing.assert_close(grads[name], grad, rtol=1e-4, atol=1e-6, msg=name)
    with steppe.watch(model) as monitor, torch.no_grad():
        model(**inputs)
    with torch.no_grad():
        model.eval()
        eager = model(**inputs).logits
        for _ in range(3):
            torch.testing.assert_close(
                model(input_ids=inputs["input_ids"][:, :1]).logits, eager[:, :1]
            )
    assert monitor.report().blocks[-1].tokens > 0
    steppe.restore_(model)
    if not plugins:
        assert list(states(model)) == held


def test_no_hook_of_others_is_called_with_tokens_that_there_are_not() -> None:
    model: Any = qwen()
    experts = model.model.layers[1].mlp.experts
    calls = []
    for module in (experts, experts.act_fn, *experts_of(experts).each[0].modules()):
        module.register_forward_hook(lambda *arguments: calls.append(arguments))
    with steppe.watch(model):
        pass
    steppe.sparsify_(model, [steppe.RisingThreshold()])
    steppe.accelerate_(model)
    assert not calls


@pytest.mark.filterwarnings(
    # Deprecated in Transformers 5, but the only name that the oldest supported version has.
    "ignore:.gradient_checkpointing_enable. is deprecated:FutureWarning"
)
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoints_change_nothing(reentrant: bool) -> None:
    model: Any = qwen().train()
    reports = []
    for checkpointed in (False, True):
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        with steppe.watch(model, gradients=True) as monitor:
            model(**batch()).loss.backward()
        reports.append(monitor.report().blocks)
    for plain, again in zip(*reports, strict=True):
        assert (plain.tokens, plain.samples) == (again.tokens, again.samples)
        assert again.AF_gate == pytest.approx(plain.AF_gate, rel=1e-4)
        assert again.squared_gradient_norm_down == pytest.approx(
            plain.squared_gradient_norm_down, rel=1e-4
        )


def test_generated_text_is_the_same_watched_and_accelerated() -> None:
    model: Any = qwen().eval()
    ids = batch(padded=False)["input_ids"]
    expected = model.generate(ids, max_new_tokens=5, do_sample=False)
    with steppe.watch(model) as monitor:
        assert torch.equal(model.generate(ids, max_new_tokens=5, do_sample=False), expected)
    assert sum(block.tokens for block in monitor.report().blocks[1:5]) == 2 * 3 * (9 + 4)
    steppe.accelerate_(model, max_density=1.0)
    for _ in range(2):
        assert torch.equal(model.generate(ids, max_new_tokens=5, do_sample=False), expected)
    told = steppe.explain(model).blocks[1:]
    assert any(block.is_few and block.is_sparse for block in told)


def test_a_hook_of_others_on_the_shared_activation_is_called() -> None:
    model: Any = qwen(num_hidden_layers=2)
    inputs = batch()
    expected = model(**inputs).logits
    steppe.accelerate_(model, max_density=1.0)
    model(**inputs)
    widths: list[int] = []
    act = model.model.layers[1].mlp.experts.act_fn
    handle = act.register_forward_hook(lambda m, args, a: widths.append(a.shape[-1]))
    torch.testing.assert_close(model(**inputs).logits, expected, rtol=1e-5, atol=1e-5)
    assert widths == [HIDDEN] * EXPERTS
    handle.remove()
    widths.clear()
    model(**inputs)
    assert not widths
    model.model.layers[1].mlp.experts.act_fn = nn.SiLU()
    changed = model(**inputs).logits
    steppe.restore_(model)
    torch.testing.assert_close(model(**inputs).logits, changed, rtol=1e-5, atol=1e-5)


def test_experts_of_ones_own_with_the_last_dimensions_swapped_and_biases() -> None:
    torch.manual_seed(0)
    model, x = Routed().double(), torch.randn(7, WIDTH, dtype=torch.float64)
    expected = model(x)
    with steppe.watch(model) as monitor:
        torch.testing.assert_close(model(x), expected, rtol=1e-12, atol=1e-12)
    assert sum(block.tokens for block in monitor.report().blocks) == 14
    assert [block.d_hidden for block in monitor.report().blocks] == [HIDDEN] * EXPERTS


def test_experts_that_compute_something_else_are_refused() -> None:
    torch.manual_seed(0)
    model = Routed(factor=1.01)
    held = list(states(model))
    for verb in (steppe.watch(model).__enter__, lambda: steppe.accelerate_(model)):
        with pytest.raises(UnfitBlockError, match=r"OwnExperts: .* differs by 1\.0%"):
            verb()
        assert list(states(model)) == held


def test_gates_and_layouts_that_are_others_are_no_blocks() -> None:
    assert isinstance(experts_of(OwnExperts()), Experts)
    other = OwnExperts()
    other.down_proj = nn.Parameter(torch.randn(EXPERTS, HIDDEN + 1, WIDTH))
    assert experts_of(other) is None
    other = OwnExperts()
    del other.is_transposed  # D and F may be either
    assert experts_of(other) is None
    other = OwnExperts()
    other.is_concatenated = False
    assert experts_of(other) is None


def test_tokens_of_no_expert_are_left_out() -> None:
    torch.manual_seed(0)
    module = OwnExperts()
    experts = experts_of(module)
    assert experts is not None
    x, shares = torch.randn(3, WIDTH), torch.ones(3, 2)
    index = torch.tensor([[0, EXPERTS], [-1, 2], [EXPERTS + 3, EXPERTS]])
    with torch.no_grad():
        got = experts.forward(x, index, shares)
        alone = module(x[:2], torch.tensor([[0], [2]]), shares[:2, :1])
    torch.testing.assert_close(got[:2], alone)
    assert not got[2].any()


def test_thousands_of_experts_are_found_by_looking_at_each_module_once() -> None:
    with torch.device("meta"):
        model: Any = qwen(num_experts=128, num_hidden_layers=9, mlp_only_layers=[])
    looked = 0
    name = "named_modules"
    plain = type(model).named_modules

    def counting(self: nn.Module, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Module]]:
        nonlocal looked
        for one in plain(self, *args, **kwargs):
            looked += 1
            yield one

    modules = len(list(model.modules()))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(model), name, counting)
        blocks = steppe.find_blocks(model)
    assert len(blocks) == 9 * 128
    assert looked <= 10 * modules  # walks over the model, none of them for each block
    assert len({block.name for block in blocks}) == len(blocks)


def test_the_forward_is_put_in_for_as_long_as_it_is_needed() -> None:
    model: Any = qwen()
    experts = model.model.layers[1].mlp.experts
    with steppe.watch(model):
        assert isinstance(experts.forward, ExpertsForward)
        assert dict(experts.named_children()).keys() == {"act_fn", "0", "1", "2", "3"}
    assert "forward" not in vars(experts)
    assert dict(experts.named_children()).keys() == {"act_fn"}
