"""ZerothBias: the bias that the MLP sees at each position, in training and in generation."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import models
import steppe
from steppe import ZerothBias
from steppe.blocks.block import MLPBlock
from steppe.blocks.linear import linear_weight
from steppe.errors import TokenPositionError

B, T = 3, 7
MAX_TOKENS = 16
MODELS: dict[str, Callable[[], nn.Module]] = {
    **models.LANGUAGE_MODELS,
    **models.VISION_MODELS,
    "t5 gated": functools.partial(models.t5, gated=True),
    "opt post-norm": functools.partial(models.opt, norm_first=False),
    "torch encoder": models.torch_encoder,
    "torch encoder, sequence first": functools.partial(models.torch_encoder, batch_first=False),
    "torch encoder, post-norm": functools.partial(models.torch_encoder, norm_first=False),
}
DECODERS: dict[str, Callable[[], nn.Module]] = {
    name: models.LANGUAGE_MODELS[name] for name in ("opt", "gpt2", "llama", "qwen2", "gpt_neox")
}
GENERATORS: dict[str, Callable[[], nn.Module]] = {"t5": models.t5, **DECODERS}
# torch.compile makes an instance of a custom autograd function and then warns of it.
ignore_dynamo = pytest.mark.filterwarnings(
    "ignore:.* should not be instantiated:DeprecationWarning"
)


def each(table: dict[str, Callable[[], nn.Module]]) -> pytest.MarkDecorator:
    """The test for every model of a table."""
    return pytest.mark.parametrize("make", table.values(), ids=table.keys())


def with_bias(
    make: Callable[[], nn.Module], std: float = 1.0, max_tokens: int = MAX_TOKENS
) -> nn.Module:
    """A float64 model in evaluation with random zeroth biases."""
    model = steppe.sparsify_(make().double().eval(), [ZerothBias(max_tokens=max_tokens)])
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for bias in steppe.added_parameters(model).values():
            bias.normal_(std=std, generator=generator)
    return model


def run(model: nn.Module, **more: Any) -> Any:
    """A forward pass over B sequences, of T tokens where they have no length of their own."""
    if isinstance(model, nn.TransformerEncoder):
        shape = (B, T) if model.layers[0].self_attn.batch_first else (T, B)
        dtype = model.layers[0].linear1.weight.dtype
        return model(torch.randn(*shape, models.D_MODEL, dtype=dtype), **more)
    inputs = models.inputs_for(model, B, T)
    if "pixel_values" in inputs:
        inputs["pixel_values"] = inputs["pixel_values"].to(model.dtype)
    return model(**{**inputs, **more})


@dataclass
class Seen:
    """What the parts of one block saw in the last forward pass."""

    norm: list[Tensor] = field(default_factory=list)
    x: dict[str, Tensor] = field(default_factory=dict)
    p: dict[str, Tensor] = field(default_factory=dict)


def listen_to(block: MLPBlock) -> Seen:
    """Hooks on the norm and on the first linear layers of a block."""
    seen = Seen()

    def see_norm(module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
        seen.norm.append(out.detach())

    def see(name: str, module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
        seen.x[name], seen.p[name] = args[0].detach(), out.detach()

    assert block.norm is not None
    block.norm.register_forward_hook(see_norm)
    block.up.register_forward_hook(functools.partial(see, "up"))
    if block.gate is not None:
        block.gate.register_forward_hook(functools.partial(see, "gate"))
    return seen


def bias_of(block: MLPBlock) -> Tensor:
    """The table of a block."""
    bias: Tensor = block.up.zeroth_bias
    return bias


def to_batches(x: Tensor, block: MLPBlock, batch: int = B) -> Tensor:
    """[B, T, D] from the layout of the block."""
    if x.dim() == 2:
        return x.unflatten(0, (batch, -1))
    return x.transpose(0, 1) if block.token_dim == 0 else x


@each(MODELS)
def test_up_and_gate_see_the_norms_output_and_the_bias_at_each_position(
    make: Callable[[], nn.Module],
) -> None:
    model = with_bias(make)
    blocks = steppe.find_blocks(model)
    seen = [listen_to(block) for block in blocks]
    run(model)
    for block, s in zip(blocks, seen, strict=True):
        assert set(s.x) == ({"up"} if block.gate is None else {"up", "gate"})
        normed = to_batches(s.norm[-1], block)
        tokens = normed.shape[1]
        expected = torch.stack([normed[:, t] + bias_of(block)[t] for t in range(tokens)], 1)
        for x in s.x.values():
            torch.testing.assert_close(to_batches(x, block), expected, rtol=0, atol=1e-14)
        assert (expected - normed).abs().max() > 1.0


@each({name: MODELS[name] for name in ("bert", "opt post-norm", "torch encoder, post-norm")})
def test_the_residual_stream_behind_a_post_norm_sees_no_bias(
    make: Callable[[], nn.Module],
) -> None:
    model = with_bias(make)
    block = steppe.find_blocks(model)[-1]
    owner = model.get_submodule(block.name)
    last_norm = next(
        norm
        for name in ("output.LayerNorm", "final_layer_norm", "norm2")
        if (norm := _submodule(owner, name)) is not None
    )
    inputs: list[Tensor] = []
    last_norm.register_forward_pre_hook(lambda module, args: inputs.append(args[0].detach()))
    seen, outputs = listen_to(block), list[Tensor]()
    block.down.register_forward_hook(lambda module, args, out: outputs.append(out.detach()))
    run(model)
    expected = (seen.norm[0] + outputs[0].view_as(seen.norm[0])).view_as(inputs[0])
    torch.testing.assert_close(inputs[0], expected, rtol=0, atol=1e-14)


def _submodule(owner: nn.Module, path: str) -> nn.Module | None:
    try:
        return owner.get_submodule(path)
    except AttributeError:
        return None


def test_attention_beside_a_parallel_block_sees_no_bias() -> None:
    torch.manual_seed(0)
    model = models.gpt_neox(parallel=True).double().eval()
    layer = model.gpt_neox.layers[0]
    outputs: list[Tensor] = []
    layer.attention.register_forward_hook(lambda module, args, out: outputs.append(out[0].detach()))
    run(model)
    steppe.sparsify_(model, [ZerothBias()])
    with torch.no_grad():
        for bias in steppe.added_parameters(model).values():
            bias.normal_()
    run(model)
    assert torch.equal(outputs[0], outputs[1])


@each({k: MODELS[k] for k in ("t5", "t5 gated", "opt", "gpt2", "llama", "vit", "bert")})
def test_the_biases_gradient_is_the_sum_over_the_batch(make: Callable[[], nn.Module]) -> None:
    # With ℓ = Σ C ⊙ p of the last block, ∂ℓ/∂b_t = Σ_batch C_t Wᵀ: no autograd in the expectation.
    model = with_bias(make)
    block = steppe.find_blocks(model)[-1]
    layers = {"up": block.up} if block.gate is None else {"up": block.up, "gate": block.gate}
    p: dict[str, Tensor] = {}

    def keep(name: str, module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
        p[name] = out

    for name, layer in layers.items():
        layer.register_forward_hook(functools.partial(keep, name))
    run(model)
    weights = {name: torch.randn_like(out) for name, out in p.items()}
    torch.stack([(p[name] * weights[name]).sum() for name in layers]).sum().backward()

    expected = torch.zeros_like(bias_of(block))
    for name, layer in layers.items():
        weight = linear_weight(layer).detach()
        weight = weight if hasattr(layer, "nf") else weight.T  # [D, F]
        by_token = to_batches(weights[name], block)
        for b in range(by_token.shape[0]):
            for t in range(by_token.shape[1]):
                expected[t] += weight @ by_token[b, t]
    torch.testing.assert_close(bias_of(block).grad, expected, rtol=1e-12, atol=1e-12)
    assert bias_of(block).grad[: p["up"].numel() // B // models.D_HIDDEN].abs().min() > 0
    assert expected[-1].abs().max() == 0  # no token came that far


@each(DECODERS)
def test_with_left_padding_positions_count_from_the_first_real_token(
    make: Callable[[], nn.Module],
) -> None:
    model = with_bias(make)
    block = steppe.find_blocks(model)[0]
    seen = listen_to(block)
    padding = torch.tensor([0, 2, 5])
    mask = (torch.arange(T) >= padding[:, None]).long()
    run(model, attention_mask=mask)
    added = to_batches(seen.x["up"], block) - to_batches(seen.norm[-1], block)
    for row, missing in enumerate(padding.tolist()):
        expected = bias_of(block)[: T - missing]
        torch.testing.assert_close(added[row, missing:], expected, rtol=0, atol=1e-13)


def test_the_biases_gradient_with_left_padding_goes_to_the_tokens_positions() -> None:
    model = with_bias(models.gpt2)
    block = steppe.find_blocks(model)[-1]
    kept: list[Tensor] = []
    block.up.register_forward_hook(lambda module, args, out: kept.append(out))
    padding = torch.tensor([0, 2, 5])
    mask = torch.arange(T) >= padding[:, None]
    run(model, attention_mask=mask.long())
    weights = torch.randn_like(kept[0]) * mask[..., None]
    (kept[0] * weights).sum().backward()
    expected = torch.zeros_like(bias_of(block))
    for row, missing in enumerate(padding.tolist()):
        for token in range(missing, T):
            expected[token - missing] += linear_weight(block.up).detach() @ weights[row, token]
    torch.testing.assert_close(bias_of(block).grad, expected, rtol=1e-12, atol=1e-12)


def test_explicit_position_ids_choose_the_biases() -> None:
    model = with_bias(models.gpt2)
    block = steppe.find_blocks(model)[0]
    seen = listen_to(block)
    positions = torch.tensor([[4, 0, 9, 9, 1, 15, 2]]).expand(B, -1)
    run(model, position_ids=positions)
    added = seen.x["up"] - seen.norm[-1]
    torch.testing.assert_close(added, bias_of(block)[positions], rtol=0, atol=1e-13)


def test_embeddings_in_place_of_token_ids_give_the_same() -> None:
    for make in (models.opt, models.gpt2, models.t5):
        model = with_bias(make)
        inputs = models.inputs_for(model, B, T)
        embeds = model.get_input_embeddings()(inputs["input_ids"])
        by_embeds = {**inputs, "input_ids": None, "inputs_embeds": embeds}
        torch.testing.assert_close(model(**by_embeds).logits, model(**inputs).logits)


def generate(model: nn.Module, ids: Tensor, **more: Any) -> Tensor:
    """Greedy, 8 new tokens."""
    tokens = model.generate(
        ids, do_sample=False, max_new_tokens=8, min_new_tokens=8, pad_token_id=0, **more
    )
    return tokens[:, -8:]


def shift_positions_(model: nn.Module) -> None:
    """What a mistake of one in the positions amounts to."""
    with torch.no_grad():
        for bias in steppe.added_parameters(model).values():
            bias.copy_(bias.roll(1, 0))


@each(GENERATORS)
def test_generation_with_and_without_cache_gives_the_same_tokens(
    make: Callable[[], nn.Module],
) -> None:
    model = with_bias(make, std=3.0)
    ids = models.token_ids(B, 6)
    cached = generate(model, ids, use_cache=True)
    assert torch.equal(cached, generate(model, ids, use_cache=False))
    shift_positions_(model)
    for use_cache in (True, False):
        assert not torch.equal(cached, generate(model, ids, use_cache=use_cache))


# A static cache counts in a tensor, which a block's attention moves on before its MLP runs.
@each(GENERATORS)
def test_generation_with_a_static_cache_gives_the_same_tokens(
    make: Callable[[], nn.Module],
) -> None:
    model = with_bias(make, std=3.0)
    ids = models.token_ids(B, 6)
    assert torch.equal(generate(model, ids), generate(model, ids, cache_implementation="static"))


@each(GENERATORS)
@pytest.mark.parametrize("use_cache", [True, False], ids=["cache", "no cache"])
def test_a_padded_row_generates_the_same_tokens_as_the_row_alone(
    make: Callable[[], nn.Module], use_cache: bool
) -> None:
    model = with_bias(make, std=3.0)
    long, short = models.token_ids(1, 8, seed=1), models.token_ids(1, 5, seed=2)
    rows = [generate(model, ids, use_cache=use_cache) for ids in (long, short)]
    padded = torch.cat([long, nn.functional.pad(short, (3, 0))])
    mask = torch.ones_like(padded)
    mask[1, :3] = 0
    together = generate(model, padded, attention_mask=mask, use_cache=use_cache)
    assert torch.equal(together, torch.cat(rows))
    # Positions that counted the padding would have given other tokens for the short row.
    with torch.no_grad():
        for bias in steppe.added_parameters(model).values():
            bias.copy_(bias.roll(-3, 0))
    assert not torch.equal(generate(model, short, use_cache=use_cache), rows[1])


def test_beam_search_keeps_the_positions() -> None:
    model = with_bias(models.gpt2, std=3.0)
    ids = models.token_ids(2, 6)
    beams = [generate(model, ids, num_beams=3, use_cache=use) for use in (True, False)]
    assert torch.equal(*beams)


@each({k: MODELS[k] for k in ("t5", "opt", "gpt2", "llama", "bert", "vit", "torch encoder")})
def test_a_sequence_beyond_the_table_is_refused_by_name(make: Callable[[], nn.Module]) -> None:
    model = with_bias(make, max_tokens=4)
    tokens = 5 if hasattr(model, "vit") else T
    name = steppe.find_blocks(model)[0].name.replace(".", r"\.")
    message = rf"{name}: a sequence of {tokens} tokens, .* 4 positions.*max_tokens={tokens}"
    with pytest.raises(TokenPositionError, match=message):
        run(model)


@pytest.mark.parametrize("use_cache", [True, False], ids=["cache", "no cache"])
@each({name: GENERATORS[name] for name in ("t5", "opt", "gpt2")})
def test_generating_beyond_the_table_is_refused_by_name(
    make: Callable[[], nn.Module], use_cache: bool
) -> None:
    model = with_bias(make, max_tokens=7)
    with pytest.raises(TokenPositionError, match=r"\.0.*: a sequence of 8 tokens, .* 7 positions"):
        generate(model, models.token_ids(B, 6), use_cache=use_cache)


@each({name: DECODERS[name] for name in ("opt", "gpt2", "llama")})
def test_position_ids_beyond_the_table_are_refused_by_name(make: Callable[[], nn.Module]) -> None:
    model = with_bias(make, max_tokens=8)
    positions = torch.arange(T).expand(B, -1).clone()
    run(model, position_ids=positions)
    positions[1, 2] = 8
    with pytest.raises(TokenPositionError, match=r"0: a sequence of 9 tokens, .* 8 positions"):
        run(model, position_ids=positions)


def test_a_chunked_feed_forward_layer_is_refused_by_name() -> None:
    model = models.bert()
    model.config.chunk_size_feed_forward = 1
    for layer in model.bert.encoder.layer:
        layer.chunk_size_feed_forward = 1
    run(model)
    steppe.sparsify_(model, [ZerothBias()])
    with pytest.raises(TokenPositionError, match=r"layer\.0: .*chunk_size_feed_forward = 0"):
        run(model)


def test_flattened_tokens_of_unknown_sequences_are_refused_by_name() -> None:
    model = with_bias(models.opt)
    layer = model.model.decoder.layers[0]
    with pytest.raises(TokenPositionError, match=r"layers\.0: got flattened tokens \[14, 16\]"):
        layer.fc1(torch.randn(14, models.D_MODEL, dtype=torch.float64))


@pytest.mark.parametrize("make", [models.gpt2, models.t5, models.llama, models.torch_encoder])
@pytest.mark.parametrize("limit", [0.1, 0.5])
def test_projection_clips_each_column_to_the_share_of_the_norms_scale(
    make: Callable[[], nn.Module], limit: float
) -> None:
    model = make().double()
    steppe.sparsify_(model, [ZerothBias(max_tokens=MAX_TOKENS, limit=limit)])
    blocks = steppe.find_blocks(model)
    before = []
    with torch.no_grad():
        for block in blocks:
            block.norm.weight.normal_()  # also negative
            block.norm.weight[0] = 0.0
            bias_of(block).normal_(std=0.1)
            before.append(bias_of(block).clone())
    assert steppe.project_(model) is model
    clipped = 0
    for block, old in zip(blocks, before, strict=True):
        for t in range(MAX_TOKENS):
            for d in range(models.D_MODEL):
                bound = limit * abs(block.norm.weight[d].item())
                expected = min(max(old[t, d].item(), -bound), bound)
                assert bias_of(block)[t, d].item() == pytest.approx(expected, rel=1e-15, abs=0)
                clipped += expected != old[t, d].item()
    assert 0 < clipped < sum(old.numel() for old in before)


# Transformers 5 renames it on the way.
@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable. is deprecated:FutureWarning")
@pytest.mark.parametrize("padded", [False, True], ids=["full", "left padding"])
@pytest.mark.parametrize("reentrant", [False, True], ids=["non-reentrant", "reentrant"])
@each({name: GENERATORS[name] for name in ("t5", "opt", "gpt2", "llama")})
def test_gradient_checkpointing_gives_the_same_gradients(
    make: Callable[[], nn.Module], reentrant: bool, padded: bool
) -> None:
    model = with_bias(make).train()
    ids = models.token_ids(B, T)
    mask = torch.ones_like(ids)
    if padded:
        mask[1, :3] = 0
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()  # reentrant checkpoints need it
        model.zero_grad()
        model(input_ids=ids, attention_mask=mask, labels=ids).loss.backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters()})
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-12, atol=1e-14)
    assert all(gradients[0][name].any() for name in steppe.added_parameters(model))


@each({name: MODELS[name] for name in ("gpt2", "t5", "opt", "llama")})
def test_under_autocast_a_zero_bias_changes_no_bit_and_trains(
    make: Callable[[], nn.Module],
) -> None:
    model = make()
    with torch.no_grad():
        for block in steppe.find_blocks(model):
            linear_weight(block.down).mul_(20.0)  # so that the blocks matter
    inputs = {**models.inputs_for(model, B, T), "labels": models.token_ids(B, T)}
    with torch.autocast("cpu", torch.bfloat16):
        before = model(**inputs).logits
        steppe.sparsify_(model, [ZerothBias(max_tokens=MAX_TOKENS)])
        outputs = model(**inputs)
    assert outputs.logits.dtype == torch.bfloat16
    assert torch.equal(outputs.logits, before)
    outputs.loss.backward()
    for bias in steppe.added_parameters(model).values():
        assert bias.dtype == bias.grad.dtype == torch.float32
        assert bias.grad.any()
        with torch.no_grad():
            bias.normal_(std=2.0)
    exact = model(**inputs).logits
    with torch.autocast("cpu", torch.bfloat16):
        near = model(**inputs).logits.float()
    assert (exact - before).abs().max() > 0.2
    torch.testing.assert_close(near, exact, rtol=0.05, atol=0.05)


def test_the_bias_has_the_dtype_of_the_model() -> None:
    model = models.gpt2().to(torch.bfloat16)
    steppe.sparsify_(model, [ZerothBias()])
    biases = list(steppe.added_parameters(model).values())
    assert [bias.dtype for bias in biases] == [torch.bfloat16] * 2
    assert [list(bias.shape) for bias in biases] == [[models.MAX_TOKENS, models.D_MODEL]] * 2
    assert run(model).logits.dtype == torch.bfloat16


@ignore_dynamo
@pytest.mark.parametrize("make", [models.gpt2, models.t5])
def test_a_compiled_model_in_one_graph_gives_the_same(make: Callable[[], nn.Module]) -> None:
    """Also of left padding, by the same graph."""
    torch.compiler.reset()
    model = models.one_layer_(with_bias(make))
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for padded in (0, 3):
        mask = torch.ones(B, T, dtype=torch.long)
        mask[1, :padded] = 0
        inputs = {**models.inputs_for(model, B, T), "attention_mask": mask}
        results = []
        for runner in (model, compiled):
            model.zero_grad()
            out = runner(**inputs).logits
            out.pow(2).sum().backward()
            results.append((out, [b.grad.clone() for b in steppe.added_parameters(model).values()]))
        torch.testing.assert_close(results[1], results[0], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("settings", [{"max_tokens": 0}, {"limit": 0.0}, {"limit": -0.1}])
def test_settings_that_mean_nothing_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"ZerothBias: expected {next(iter(settings))}"):
        ZerothBias(**settings)
