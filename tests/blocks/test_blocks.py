"""find_blocks on every architecture: names, parts, widths, order, wrappers and errors.

What the table says of an architecture is compared with what hooks see when the model runs.
"""

from __future__ import annotations

import contextlib
import operator
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import FrozenInstanceError, dataclass, replace
from functools import partial
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn import functional as F
from torch.utils.hooks import RemovableHandle
from transformers import BartConfig, BartModel, Olmo2Config, Olmo2Model, WhisperConfig, WhisperModel
from transformers.models.nomic_bert import NomicBertConfig, NomicBertModel

import models
import steppe
from models import D_HIDDEN, D_MODEL, MAX_TOKENS, VOCABULARY
from steppe.blocks.block import MLPBlock
from steppe.blocks.coverage import coverage
from steppe.blocks.find import find_blocks
from steppe.blocks.linear import linear_shape, linear_weight
from steppe.blocks.nested import find_nested_tensor_encoders
from steppe.blocks.patterns import BlockPattern
from steppe.blocks.wrappers import unwrap
from steppe.errors import BlocksNotFoundError, IncompleteCoverageWarning


class TimmMlp(nn.Module):
    """The parts of ``timm.layers.Mlp``."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(D_MODEL, D_HIDDEN)
        self.act = nn.GELU()
        self.drop1 = nn.Dropout(0.1)
        self.norm = nn.Identity()
        self.fc2 = nn.Linear(D_HIDDEN, D_MODEL)
        self.drop2 = nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop2(self.fc2(self.norm(self.drop1(self.act(self.fc1(x))))))


class TimmBlock(nn.Module):
    """The parts of ``timm.models.vision_transformer.Block``; attention left out."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(D_MODEL)
        self.attn = nn.Linear(D_MODEL, D_MODEL)
        self.norm2 = nn.LayerNorm(D_MODEL)
        self.mlp = TimmMlp()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class TorchvisionBlock(nn.Module):
    """The parts of ``torchvision.models.vision_transformer.EncoderBlock``; attention left out."""

    def __init__(self) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(D_MODEL)
        self.self_attention = nn.Linear(D_MODEL, D_MODEL)
        self.ln_2 = nn.LayerNorm(D_MODEL)
        self.mlp = nn.Sequential(
            nn.Linear(D_MODEL, D_HIDDEN),
            nn.GELU(),
            nn.Dropout(0.1),
            nn.Linear(D_HIDDEN, D_MODEL),
            nn.Dropout(0.1),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attention(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class Gated(nn.Module):
    """The parts of a Llama MLP."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(D_MODEL, D_HIDDEN, bias=False)
        self.up_proj = nn.Linear(D_MODEL, D_HIDDEN, bias=False)
        self.act_fn = nn.SiLU()
        self.down_proj = nn.Linear(D_HIDDEN, D_MODEL, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class LlamaLikeLayer(nn.Module):
    """The norm and the MLP of a Llama layer."""

    def __init__(self) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(D_MODEL)
        self.post_attention_layernorm = nn.RMSNorm(D_MODEL)
        self.mlp = Gated()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mlp(self.post_attention_layernorm(x))


class GemmaLikeLayer(LlamaLikeLayer):
    """As Gemma 2: another norm stands before the MLP."""

    def __init__(self) -> None:
        super().__init__()
        self.pre_feedforward_layernorm = nn.RMSNorm(D_MODEL)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.post_attention_layernorm(x)
        return x + self.mlp(self.pre_feedforward_layernorm(x))


class OddNames(nn.Module):
    """A layer of a shape that no row of the table has."""

    def __init__(self, d_back: int = D_MODEL) -> None:
        super().__init__()
        self.scale = nn.LayerNorm(D_MODEL)
        self.fc_in = nn.Linear(D_MODEL, D_HIDDEN)
        self.sigma = torch.relu
        self.fc_out = nn.Linear(D_HIDDEN, d_back)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc_out(self.sigma(self.fc_in(self.scale(x))))


ODD = BlockPattern(family="odd", norm="scale", up="fc_in", act="sigma", down="fc_out")


def encoder(norm_first: bool, batch_first: bool) -> nn.Module:
    """torch warns that post-norm with the sequence first has no fast path."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return models.torch_encoder(norm_first, batch_first)


def hidden_states() -> Tensor:
    return torch.randn(3, 5, D_MODEL)


@dataclass(frozen=True)
class Architecture:
    """What find_blocks must say; paths are below the block's owner."""

    build: Callable[[], nn.Module]
    names: tuple[str, ...]
    norm: str
    up: str
    act: str
    down: str
    gate: str | None = None
    norm_is_shared: bool = False
    token_dim: int = 1


t5_names = (
    "encoder.block.0.layer.1",
    "encoder.block.1.layer.1",
    "decoder.block.0.layer.2",
    "decoder.block.1.layer.2",
)
vit_parts: dict[str, Any] = {
    "norm": "layernorm_after",
    "up": "mlp.fc1",
    "act": "mlp.activation_fn",
    "down": "mlp.fc2",
}
opt_names = ("model.decoder.layers.0", "model.decoder.layers.1")
opt_parts: dict[str, Any] = {"up": "fc1", "act": "activation_fn", "down": "fc2"}
neox_parts: dict[str, Any] = {
    "norm": "post_attention_layernorm",
    "up": "mlp.dense_h_to_4h",
    "act": "mlp.act",
    "down": "mlp.dense_4h_to_h",
}
llama_parts: dict[str, Any] = {
    "norm": "post_attention_layernorm",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "act": "mlp.act_fn",
    "down": "mlp.down_proj",
}
torch_parts: dict[str, Any] = {"up": "linear1", "act": "activation", "down": "linear2"}

ARCHITECTURES: dict[str, Architecture] = {
    "t5": Architecture(
        models.t5,
        t5_names,
        norm="layer_norm",
        up="DenseReluDense.wi",
        act="DenseReluDense.act",
        down="DenseReluDense.wo",
    ),
    "t5_v1_1": Architecture(
        partial(models.t5, "gelu", gated=True),
        t5_names,
        norm="layer_norm",
        gate="DenseReluDense.wi_0",
        up="DenseReluDense.wi_1",
        act="DenseReluDense.act",
        down="DenseReluDense.wo",
    ),
    "vit": Architecture(models.vit, ("vit.layers.0", "vit.layers.1"), **vit_parts),
    "ijepa": Architecture(models.ijepa, ("ijepa.layers.0", "ijepa.layers.1"), **vit_parts),
    "opt": Architecture(models.opt, opt_names, norm="final_layer_norm", **opt_parts),
    "opt_post_norm": Architecture(
        partial(models.opt, norm_first=False),
        opt_names,
        norm="self_attn_layer_norm",
        norm_is_shared=True,
        **opt_parts,
    ),
    "gpt2": Architecture(
        partial(models.gpt2, "gelu_new"),
        ("transformer.h.0", "transformer.h.1"),
        norm="ln_2",
        up="mlp.c_fc",
        act="mlp.act",
        down="mlp.c_proj",
    ),
    "bert": Architecture(
        models.bert,
        ("bert.encoder.layer.0", "bert.encoder.layer.1"),
        norm="attention.output.LayerNorm",
        up="intermediate.dense",
        act="intermediate.intermediate_act_fn",
        down="output.dense",
        norm_is_shared=True,
    ),
    "gpt_neox": Architecture(
        models.gpt_neox, ("gpt_neox.layers.0", "gpt_neox.layers.1"), **neox_parts
    ),
    "gpt_neox_sequential": Architecture(
        partial(models.gpt_neox, parallel=False),
        ("gpt_neox.layers.0", "gpt_neox.layers.1"),
        **neox_parts,
    ),
    "llama": Architecture(
        partial(models.llama, "silu"), ("model.layers.0", "model.layers.1"), **llama_parts
    ),
    "qwen2": Architecture(models.qwen2, ("model.layers.0", "model.layers.1"), **llama_parts),
    "torch_norm_first": Architecture(
        partial(encoder, True, True), ("layers.0", "layers.1"), norm="norm2", **torch_parts
    ),
    "torch_norm_first_sequence_first": Architecture(
        partial(encoder, True, False),
        ("layers.0", "layers.1"),
        norm="norm2",
        token_dim=0,
        **torch_parts,
    ),
    "torch_post_norm": Architecture(
        partial(encoder, False, True),
        ("layers.0", "layers.1"),
        norm="norm1",
        norm_is_shared=True,
        **torch_parts,
    ),
    "torch_post_norm_sequence_first": Architecture(
        partial(encoder, False, False),
        ("layers.0", "layers.1"),
        norm="norm1",
        norm_is_shared=True,
        token_dim=0,
        **torch_parts,
    ),
    "torch_layer": Architecture(
        partial(nn.TransformerEncoderLayer, D_MODEL, 4, D_HIDDEN, batch_first=True),
        ("TransformerEncoderLayer",),
        norm="norm1",
        norm_is_shared=True,
        **torch_parts,
    ),
    "timm_vit": Architecture(
        lambda: nn.Sequential(TimmBlock(), TimmBlock()),
        ("0", "1"),
        norm="norm2",
        up="mlp.fc1",
        act="mlp.act",
        down="mlp.fc2",
    ),
    "torchvision_vit": Architecture(
        lambda: nn.Sequential(TorchvisionBlock(), TorchvisionBlock()),
        ("0", "1"),
        norm="ln_2",
        up="mlp.0",
        act="mlp.1",
        down="mlp.3",
    ),
    "llama_like": Architecture(
        lambda: nn.Sequential(LlamaLikeLayer(), LlamaLikeLayer()), ("0", "1"), **llama_parts
    ),
}
FAMILY_OF = {
    "t5": "T5",
    "t5_v1_1": "T5 v1.1 (gated)",
    "vit": "ViT, I-JEPA",
    "opt_post_norm": "OPT (post-norm)",
    "bert": "BERT (post-norm)",
    "torch_post_norm": "nn.TransformerEncoderLayer (post-norm)",
    "timm_vit": "timm ViT",
    "torchvision_vit": "torchvision ViT",
    "llama_like": "Llama, Qwen, Mistral (gated)",
}

every_architecture = pytest.mark.parametrize(
    "architecture", ARCHITECTURES.values(), ids=ARCHITECTURES.keys()
)


def run(model: nn.Module) -> Any:
    """One forward pass."""
    if hasattr(model, "config"):
        return model(**models.inputs_for(model))
    return model(hidden_states())


def owner_of(model: nn.Module, block: MLPBlock) -> nn.Module:
    return model if block.name == type(model).__name__ else model.get_submodule(block.name)


@contextmanager
def removed_afterwards() -> Iterator[list[RemovableHandle]]:
    """Hooks that are put into the list."""
    handles: list[RemovableHandle] = []
    try:
        yield handles
    finally:
        for handle in handles:
            handle.remove()


class Seen:
    """Hooks that note the calls of some modules: their first input and their output."""

    def __init__(self) -> None:
        self.calls: list[tuple[nn.Module, Tensor, Tensor]] = []

    def __call__(self, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        self.calls.append((module, args[0].clone(), output.clone()))

    def only(self, module: nn.Module) -> tuple[Tensor, Tensor]:
        """Input and output of the one call of a module."""
        ((_, x, output),) = (call for call in self.calls if call[0] is module)
        return x, output


def watch_parts(model: nn.Module, *modules: nn.Module | None) -> Seen:
    """What some modules were given and gave in one forward pass."""
    seen = Seen()
    with removed_afterwards() as handles, torch.no_grad():
        once = {id(module): module for module in modules if module is not None}
        handles += [module.register_forward_hook(seen) for module in once.values()]
        run(model)
    return seen


def others_read_the_norm(model: nn.Module, block: MLPBlock) -> bool:
    """Whether the owner's output changes with the norm's when the MLP is given the old one."""
    assert block.norm is not None
    given: list[Tensor] = []

    def change(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        given.append(output)
        return output + torch.linspace(-1.0, 1.0, D_MODEL)

    def put_back(module: nn.Module, args: Any) -> tuple[Tensor]:
        return (given[-1].reshape(args[0].shape),)

    def final(module: nn.Module, args: Any, output: Any) -> None:
        outputs.append(output[0] if isinstance(output, tuple) else output)

    outputs: list[Tensor] = []
    owner = owner_of(model, block)
    for changed in (False, True):
        torch.manual_seed(0)
        with removed_afterwards() as handles, torch.no_grad():
            handles.append(owner.register_forward_hook(final))
            if changed:
                handles.append(block.norm.register_forward_hook(change))
                for layer in (block.up, block.gate):
                    if layer is not None:
                        handles.append(layer.register_forward_pre_hook(put_back))
            run(model)
    return not torch.equal(outputs[0], outputs[1])


@every_architecture
def test_names_and_widths_of_every_block(architecture: Architecture) -> None:
    blocks = find_blocks(architecture.build())
    assert tuple(block.name for block in blocks) == architecture.names
    assert {(block.d_model, block.d_hidden) for block in blocks} == {(D_MODEL, D_HIDDEN)}


@every_architecture
def test_parts_are_the_very_objects_of_the_model(architecture: Architecture) -> None:
    model = architecture.build()
    for block in find_blocks(model):
        owner = owner_of(model, block)
        for part in ("norm", "up", "gate", "act", "down"):
            path = getattr(architecture, part)
            expected = None if path is None else operator.attrgetter(path)(owner)
            assert getattr(block, part) is expected, part
        assert block.activated is (block.up if block.gate is None else block.gate)
        assert getattr(block.act_slot.module, block.act_slot.name) is block.act


@every_architecture
def test_flags_of_every_block(architecture: Architecture) -> None:
    for block in find_blocks(architecture.build()):
        assert block.norm_is_shared is architecture.norm_is_shared
        assert block.token_dim == architecture.token_dim


@pytest.mark.parametrize(("name", "family"), FAMILY_OF.items(), ids=FAMILY_OF.keys())
def test_family_is_the_row_that_matched(name: str, family: str) -> None:
    assert {block.family for block in find_blocks(ARCHITECTURES[name].build())} == {family}


@every_architecture
def test_blocks_come_in_the_order_in_which_they_run(architecture: Architecture) -> None:
    model = architecture.build().eval()
    blocks = find_blocks(model)
    seen = watch_parts(model, *(block.up for block in blocks))
    assert [id(call[0]) for call in seen.calls] == [id(block.up) for block in blocks]


@every_architecture
def test_a_block_computes_down_of_the_activation_of_up(architecture: Architecture) -> None:
    model = architecture.build().eval()
    blocks = find_blocks(model)
    seen = watch_parts(model, *(part for b in blocks for part in (b.activated, b.up, b.down)))
    for block in blocks:
        x, p = seen.only(block.activated)
        with torch.no_grad():
            a = block.act(block.activated(x))
            a = a if block.gate is None else a * block.up(x)
            z = block.down(a)
        assert z.any()
        assert not torch.equal(p, a)
        torch.testing.assert_close(seen.only(block.down)[1], z, rtol=0, atol=0)


@every_architecture
def test_the_norm_is_the_one_whose_output_the_block_reads(architecture: Architecture) -> None:
    model = architecture.build().eval()
    blocks = find_blocks(model)
    assert misread_norms(model, blocks) == []


def misread_norms(model: nn.Module, blocks: list[MLPBlock]) -> list[str]:
    """Names of the blocks whose first layer is not given the output of their norm."""
    seen = watch_parts(model, *(part for b in blocks for part in (b.norm, b.activated)))
    return [
        b.name
        for b in blocks
        if b.norm is not None
        and not torch.equal(seen.only(b.activated)[0].flatten(), seen.only(b.norm)[1].flatten())
    ]


@every_architecture
def test_a_norm_is_shared_where_others_read_it(architecture: Architecture) -> None:
    model = architecture.build().eval()
    for block in find_blocks(model):
        assert others_read_the_norm(model, block) is block.norm_is_shared, block.name


@pytest.mark.parametrize(
    ("name", "stacks"),
    [
        ("t5", ["encoder", "encoder", "decoder", "decoder"]),
        ("opt", ["model.decoder"] * 2),
        ("gpt2", ["transformer"] * 2),
        ("bert", ["bert"] * 2),
        ("llama", ["model"] * 2),
        ("torch_norm_first", ["layers.0", "layers.1"]),
        ("vit", [None, None]),
        ("timm_vit", [None, None]),
    ],
)
def test_the_stack_is_the_deepest_that_is_told_of_tokens(
    name: str, stacks: list[str | None]
) -> None:
    model = ARCHITECTURES[name].build()
    expected = [None if path is None else model.get_submodule(path) for path in stacks]
    assert all(b.stack is s for b, s in zip(find_blocks(model), expected, strict=True))


@pytest.mark.parametrize("norm_first", [True, False])
def test_flags_of_the_fused_kernel_go_with_the_activation(norm_first: bool) -> None:
    layer = nn.TransformerEncoderLayer(D_MODEL, 4, D_HIDDEN, norm_first=norm_first)
    ((slot, value),) = find_blocks(layer)[0].act_flags
    assert slot.module is layer
    assert (slot.name, value) == ("activation_relu_or_gelu", 0)
    assert layer.activation_relu_or_gelu == 1  # so ReLU would be taken for granted


def test_a_further_norm_before_the_mlp_is_what_it_reads() -> None:
    model = GemmaLikeLayer()
    (block,) = find_blocks(model)
    assert block.norm is model.pre_feedforward_layernorm
    assert misread_norms(model, [block]) == []


def test_the_check_of_norms_can_fail() -> None:
    model = GemmaLikeLayer()
    wrong = BlockPattern(family="wrong", **llama_parts)
    assert misread_norms(model, find_blocks(model, patterns=[wrong])) == ["GemmaLikeLayer"]


bart = BartConfig(
    vocab_size=VOCABULARY,
    d_model=D_MODEL,
    encoder_layers=1,
    decoder_layers=1,
    encoder_ffn_dim=D_HIDDEN,
    decoder_ffn_dim=D_HIDDEN,
    encoder_attention_heads=4,
    decoder_attention_heads=4,
    max_position_embeddings=MAX_TOKENS,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
    decoder_start_token_id=1,
)
whisper = WhisperConfig(
    vocab_size=VOCABULARY,
    d_model=D_MODEL,
    encoder_layers=1,
    decoder_layers=1,
    encoder_ffn_dim=D_HIDDEN,
    decoder_ffn_dim=D_HIDDEN,
    encoder_attention_heads=4,
    decoder_attention_heads=4,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
    decoder_start_token_id=1,
)


# BART, mBART, Marian, Pegasus, M2M100, XGLM, BioGPT and Whisper have the parts of OPT's layers and
# no do_layer_norm_before.
@pytest.mark.parametrize(
    "build",
    [partial(BartModel, bart), partial(WhisperModel, whisper)],
    ids=["bart", "whisper"],
)
def test_layers_with_the_parts_of_another_family_raise_nothing_but_not_found(
    build: Callable[[], nn.Module],
) -> None:
    model = build().eval()
    try:
        blocks = find_blocks(model)
    except BlocksNotFoundError:
        return
    assert len(blocks) == 2


class NormalizeBefore(nn.Module):
    """DETR's own encoder layer: the parts of torch's, with another flag."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(D_MODEL), nn.LayerNorm(D_MODEL)
        self.linear1, self.linear2 = nn.Linear(D_MODEL, D_HIDDEN), nn.Linear(D_HIDDEN, D_MODEL)
        self.activation = F.relu
        self.normalize_before = True


def test_a_layer_like_torchs_without_its_flag_raises_nothing_but_not_found() -> None:
    with pytest.raises(BlocksNotFoundError):
        find_blocks(NormalizeBefore())


small: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": D_MODEL,
    "intermediate_size": D_HIDDEN,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


# In OLMo 2 and 3, EXAONE 4 and AFMoE the MLP does not read post_attention_layernorm; in nomic-bert
# and GTE the residual stream reads it too.
@pytest.mark.parametrize(
    "build",
    [
        lambda: Olmo2Model(Olmo2Config(**small)),
        lambda: NomicBertModel(NomicBertConfig(**small, head_dim=4)),
    ],
    ids=["olmo2", "nomic_bert"],
)
def test_a_post_norm_under_llamas_names_is_not_taken_for_a_pre_norm(
    build: Callable[[], nn.Module],
) -> None:
    model = build().eval()
    try:
        blocks = find_blocks(model)
    except BlocksNotFoundError:
        return
    assert misread_norms(model, blocks) == []
    for block in blocks:
        if block.norm is not None:
            assert others_read_the_norm(model, block) is block.norm_is_shared


# Its norm2 (norm1 behind a post-norm) is that of the cross-attention, and it has no flag
# activation_relu_or_gelu to override.
@pytest.mark.parametrize("norm_first", [True, False])
def test_torchs_decoder_layer_is_not_taken_for_an_encoder_layer(norm_first: bool) -> None:
    layer = nn.TransformerDecoderLayer(
        D_MODEL, 4, D_HIDDEN, norm_first=norm_first, batch_first=True
    )
    try:
        (block,) = find_blocks(layer)
    except BlocksNotFoundError:
        return
    assert block.norm is (layer.norm3 if norm_first else layer.norm2)
    assert all(hasattr(slot.module, slot.name) for slot, _ in block.act_flags)


def test_where_keeps_some_blocks_in_order() -> None:
    model = models.t5()
    blocks = find_blocks(model, where=lambda block: block.name.startswith("decoder"))
    assert [block.name for block in blocks] == [
        "decoder.block.0.layer.2",
        "decoder.block.1.layer.2",
    ]


def test_where_that_refuses_all_is_an_error_with_the_names() -> None:
    with pytest.raises(BlocksNotFoundError, match="refused all 2 MLP blocks of OPT") as caught:
        find_blocks(models.opt(), where=lambda block: False)
    assert all(name in str(caught.value) for name in opt_names)


@pytest.mark.parametrize("model", [nn.Linear(2, 2), nn.Sequential()], ids=str)
def test_where_nothing_looks_like_an_mlp_the_error_says_what_would(model: nn.Module) -> None:
    with pytest.raises(BlocksNotFoundError, match="Nothing in it looks like an MLP") as caught:
        find_blocks(model)
    assert type(model).__name__ in str(caught.value)
    assert "patterns=[BlockPattern(" in str(caught.value)
    assert isinstance(caught.value, LookupError)


def test_the_error_shows_what_looks_like_an_mlp_and_a_pattern_that_finds_it() -> None:
    model = nn.Sequential(OddNames(), OddNames())
    with pytest.raises(
        BlocksNotFoundError, match=r"fc_in, sigma, fc_out \(16 → 32 → 16\)"
    ) as caught:
        find_blocks(model)
    message = str(caught.value)
    assert "and 1 more like it" in message
    (line,) = {line.strip() for line in message.splitlines() if line.strip().startswith("Block")}
    pattern = eval(line.partition(" and ")[0], {"BlockPattern": BlockPattern})
    assert [block.name for block in find_blocks(model, patterns=[pattern])] == ["0", "1"]


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"down": "last"}, "0 has no last"),
        ({"up": "fc_out", "down": "scale"}, "no D → F and F → D"),
        ({"when": lambda owner: False}, "`when` says no"),
        ({"norm": "a", "up": "b", "act": "c", "down": "d"}, "no module has any of a, b, c, d"),
    ],
)
def test_the_error_says_what_a_pattern_of_the_user_lacks(change: dict[str, Any], why: str) -> None:
    model = nn.Sequential(OddNames())
    with pytest.raises(BlocksNotFoundError, match=why):
        find_blocks(model, patterns=[replace(ODD, **change)])


class Partial(nn.Module):
    """A block that is found beside one that is not."""

    def __init__(self) -> None:
        super().__init__()
        self.known, self.odd = models.opt(), OddNames()


def test_a_part_that_is_not_found_is_said_or_with_strict_refused() -> None:
    share = "67%"  # OPT's two blocks and one of the same size
    with pytest.warns(IncompleteCoverageWarning, match=share) as caught:
        assert len(find_blocks(Partial())) == 2
    assert "odd: fc_in, sigma, fc_out (16 → 32 → 16)" in str(caught[0].message)
    with pytest.raises(BlocksNotFoundError, match=share):
        find_blocks(Partial(), strict=True)
    found = coverage(Partial(), patterns=[ODD])
    assert (len(found.blocks), found.left, found.share) == (3, [], 1.0)


def test_what_where_leaves_out_counts_as_not_covered() -> None:
    found = find_blocks(Partial(), where=lambda b: b.name.endswith("layers.0"), patterns=[ODD])
    assert round(found.coverage.share, 6) == round(1 / 3, 6)
    left = [line.split(":")[0] for line in found.coverage.not_covered()]
    assert sorted(left) == ["known.model.decoder.layers.1", "odd"]
    assert "33% of the MLP parameters are in 1 blocks" in str(found.coverage)


def test_what_is_not_found_is_said_once_by_each_verb() -> None:
    model = Partial()
    x = {"input_ids": models.token_ids()}
    verbs: dict[str, Callable[[], object]] = {
        "find_blocks": lambda: find_blocks(model),
        "watch": lambda: steppe.watch(model).__enter__(),
        "measure": lambda: steppe.measure(
            model, [x], labels=None, forward=lambda model, batch: model.known(**batch)
        ),
        "sparsify_": lambda: steppe.sparsify_(model, [steppe.JumpingSquaredReLU()]),
        "accelerate_": lambda: steppe.accelerate_(model),
    }
    for verb, call in verbs.items():
        with pytest.warns(IncompleteCoverageWarning, match=f"^{verb}: 67%"):
            call()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        find_blocks(model)
        steppe.accelerate_(model)
        report = verbs["measure"]()
    assert isinstance(report, steppe.Report)
    assert round(report.coverage, 6) == round(2 / 3, 6)
    assert report.not_covered == ("odd: fc_in, sigma, fc_out (16 → 32 → 16)",)


@pytest.mark.parametrize("verb", ["measure", "watch", "sparsify_", "accelerate_"])
def test_strict_refuses_a_part_in_every_verb(verb: str) -> None:
    model = Partial()
    arguments = {"measure": ([],), "sparsify_": ([steppe.JumpingSquaredReLU()],)}.get(verb, ())
    refused = pytest.raises(BlocksNotFoundError, match=f"^{verb}: 67%")
    with refused, contextlib.ExitStack() as stack:
        stack.enter_context(getattr(steppe, verb)(model, *arguments, strict=True))


def test_a_pattern_of_the_user_finds_another_shape() -> None:
    model = nn.Sequential(OddNames(), nn.ReLU(), OddNames())
    blocks = find_blocks(model, patterns=[ODD])
    assert [block.name for block in blocks] == ["0", "2"]
    assert blocks[1].up is model[2].fc_in
    assert blocks[1].act is torch.relu
    assert blocks[1].family == "odd"


def test_a_pattern_of_the_user_needs_no_norm() -> None:
    pattern = BlockPattern(family="bare", up="fc_in", act="sigma", down="fc_out")
    assert find_blocks(OddNames(), patterns=[pattern])[0].norm is None


def test_a_pattern_of_the_user_goes_before_the_table() -> None:
    mine = BlockPattern(family="mine", up="fc1", act="activation_fn", down="fc2")
    blocks = find_blocks(models.opt(), patterns=[mine])
    assert [(block.family, block.norm) for block in blocks] == [("mine", None)] * 2


@pytest.mark.parametrize(
    "part", [{"norm": "no"}, {"up": "scale"}, {"down": "fc_in"}, {"act": "no"}, {"gate": "no"}]
)
def test_a_pattern_with_a_part_missing_or_of_another_kind_does_not_match(
    part: dict[str, str],
) -> None:
    parts: dict[str, Any] = {
        "norm": "scale",
        "up": "fc_in",
        "act": "sigma",
        "down": "fc_out",
        **part,
    }
    with pytest.raises(BlocksNotFoundError):
        find_blocks(OddNames(), patterns=[BlockPattern(family="wrong", **parts)])


def test_layers_that_do_not_lead_back_to_the_width_do_not_match() -> None:
    with pytest.raises(BlocksNotFoundError):
        find_blocks(OddNames(d_back=D_MODEL + 1), patterns=[ODD])


@pytest.mark.parametrize("allowed", [True, False])
def test_a_pattern_can_ask_the_owner(allowed: bool) -> None:
    pattern = BlockPattern(
        family="asked",
        up="fc_in",
        act="sigma",
        down="fc_out",
        when=lambda owner: allowed and isinstance(owner, OddNames),
        sequence_first=lambda owner: isinstance(owner, OddNames),
    )
    if allowed:
        assert find_blocks(OddNames(), patterns=[pattern])[0].token_dim == 0
    else:
        with pytest.raises(BlocksNotFoundError):
            find_blocks(OddNames(), patterns=[pattern])


def test_a_layer_that_runs_twice_is_one_block() -> None:
    layer = TimmBlock()
    assert [block.name for block in find_blocks(nn.Sequential(layer, layer))] == ["0"]


def test_layers_that_share_their_mlp_are_one_block() -> None:
    first, second = TimmBlock(), TimmBlock()
    second.mlp = first.mlp
    assert [block.name for block in find_blocks(nn.Sequential(first, second))] == ["0"]


def test_a_block_and_a_pattern_are_frozen() -> None:
    block = find_blocks(models.opt())[0]
    with pytest.raises(FrozenInstanceError):
        block.up = nn.Linear(1, 1)  # type: ignore[misc]
    with pytest.raises(FrozenInstanceError):
        ODD.up = "other"  # type: ignore[misc]


def replace_owners(
    model: nn.Module, wrap: Callable[[nn.Module], nn.Module], part: str = ""
) -> nn.Module:
    """A model with the owner of each block, or a part of it, wrapped."""
    for block in find_blocks(model):
        parent, _, name = f"{block.name}.{part}".rstrip(".").rpartition(".")
        above = model.get_submodule(parent)
        setattr(above, name, wrap(above.get_submodule(name)))
    return model


def compiled(model: nn.Module) -> nn.Module:
    wrapper = torch.compile(model, backend="eager")
    assert isinstance(wrapper, nn.Module)
    return wrapper


def compiled_in_place(model: nn.Module) -> nn.Module:
    model.compile(backend="eager")
    return model


WRAPPERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "compiled": compiled,
    "compiled twice": lambda model: compiled(nn.DataParallel(compiled(model))),
    "compiled in place": compiled_in_place,
    "inner layers compiled": partial(replace_owners, wrap=compiled),
    "inner layers checkpointed": partial(replace_owners, wrap=checkpoint_wrapper),
    "inner layers checkpointed and compiled": lambda model: replace_owners(
        replace_owners(model, checkpoint_wrapper), compiled
    ),
    "data parallel": nn.DataParallel,
}


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS.keys())
@pytest.mark.parametrize("name", ["t5", "vit", "opt", "gpt2", "llama", "torch_post_norm"])
def test_wrapped_models_have_the_same_blocks(
    name: str, wrap: Callable[[nn.Module], nn.Module]
) -> None:
    model = ARCHITECTURES[name].build()
    plain = find_blocks(model)
    assert find_blocks(wrap(model)) == plain  # modules are equal if they are the same


def test_equality_of_blocks_can_fail() -> None:
    assert find_blocks(models.opt()) != find_blocks(models.opt())


@pytest.mark.parametrize("wrap", [compiled, checkpoint_wrapper])
@pytest.mark.parametrize("part", ["fc1", "fc2", "activation_fn", "final_layer_norm"])
def test_wrapped_parts_are_seen_through(wrap: Callable[[nn.Module], nn.Module], part: str) -> None:
    model = models.opt()
    plain = find_blocks(model)
    assert find_blocks(replace_owners(model, wrap, part)) == plain


def test_the_slot_of_a_wrapped_activation_is_the_attribute_of_its_owner() -> None:
    model = replace_owners(models.opt(), checkpoint_wrapper, "activation_fn")
    for block in find_blocks(model):
        assert isinstance(block.act, nn.ReLU)
        assert block.act_slot.module is model.get_submodule(block.name)


def test_distributed_data_parallel_is_seen_through() -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        model = models.opt()
        plain = find_blocks(model)
        wrapped = nn.parallel.DistributedDataParallel(model)
        assert unwrap(wrapped) is model
        assert find_blocks(wrapped) == plain
    finally:
        dist.destroy_process_group()


# Linear layers of the attention, then those of the MLP.
LORA = {
    "t5": (["q", "v"], ["wi", "wo"]),
    "vit": (["q_proj"], ["fc1", "fc2"]),
    "opt": (["q_proj"], ["fc1", "fc2"]),
    "gpt2": (["c_attn"], ["c_fc", "mlp.c_proj"]),
    "bert": (["query"], ["intermediate.dense", "output.dense"]),
    "llama": (["q_proj"], ["gate_proj", "up_proj", "down_proj"]),
}


def with_lora(model: nn.Module, layers: list[str], name: str) -> nn.Module:
    config = LoraConfig(target_modules=layers, r=2, fan_in_fan_out=name == "gpt2")
    return get_peft_model(model, config)


@pytest.mark.parametrize("then", [lambda model: model, compiled], ids=["lora", "lora compiled"])
@pytest.mark.parametrize("name", LORA)
def test_lora_on_the_attention_leaves_the_blocks_as_they_were(
    name: str, then: Callable[[nn.Module], nn.Module]
) -> None:
    model = ARCHITECTURES[name].build()
    plain = find_blocks(model)
    wrapped = then(with_lora(model, LORA[name][0], name))
    assert find_blocks(wrapped) == plain
    assert unwrap(wrapped) is model


@pytest.mark.parametrize("name", LORA)
def test_lora_on_the_mlp_is_part_of_the_blocks_layers(name: str) -> None:
    model = ARCHITECTURES[name].build()
    plain = find_blocks(model)
    wrapped = with_lora(model, LORA[name][1], name).eval()
    for block, before in zip(find_blocks(wrapped), plain, strict=True):
        assert block.name == before.name
        assert block.norm is before.norm
        assert block.act is before.act
        assert (block.d_model, block.d_hidden) == (D_MODEL, D_HIDDEN)
        for part in ("up", "down", *(() if before.gate is None else ("gate",))):
            layer, base = getattr(block, part), getattr(before, part)
            assert layer is not base
            assert layer.base_layer is base
            assert hasattr(layer, "lora_A")
            assert linear_weight(layer) is base.weight
    assert misread_norms(model, find_blocks(wrapped)) == []


def test_parts_that_peft_trains_in_full_are_still_parts() -> None:
    model = models.opt()
    config = LoraConfig(target_modules=["q_proj"], modules_to_save=["fc1", "final_layer_norm"])
    for block in find_blocks(get_peft_model(model, config)):
        assert linear_shape(block.up) == (D_MODEL, D_HIDDEN)
        assert linear_weight(block.up).requires_grad
        assert block.norm is not None
        assert isinstance(block.norm.weight, nn.Parameter)


def test_unwrap_leaves_a_plain_model_alone() -> None:
    model = models.opt()
    assert unwrap(model) is model


def test_widths_of_linear_layers() -> None:
    assert linear_shape(nn.Linear(3, 5)) == (3, 5)
    assert linear_shape(models.gpt2().get_submodule("transformer.h.0.mlp.c_fc")) == (16, 32)
    assert linear_shape(nn.LayerNorm(3)) is None


def test_encoders_that_may_make_nested_tensors_are_found_below_wrappers() -> None:
    both = nn.Sequential(models.torch_encoder(norm_first=False), models.torch_encoder())
    assert find_nested_tensor_encoders(compiled(both)) == [*both]
