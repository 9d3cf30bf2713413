"""Tiny models of many architectures, with ReLU where the config lets one choose; no downloads."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor, nn

VOCABULARY, WIDTH, HIDDEN, LONGEST = 64, 16, 40, 64
Batch = dict[str, Tensor]
# By whatever names configs have for them.
_NAMES: tuple[tuple[str, Any], ...] = (
    ("hidden_size d_model n_embd dim word_embed_proj_dim embed_dim embedding_size", WIDTH),
    ("intermediate_size d_ff ffn_dim n_inner encoder_ffn_dim decoder_ffn_dim hidden_dim", HIDDEN),
    ("ffn_hidden_size", HIDDEN),
    ("num_hidden_layers num_layers n_layer n_layers encoder_layers decoder_layers", 2),
    ("num_decoder_layers", 2),
    ("num_attention_heads n_head n_heads num_heads encoder_attention_heads", 4),
    ("decoder_attention_heads attention_heads head_dim d_kv", 4),
    ("max_position_embeddings n_positions n_ctx max_seq_len max_source_positions", LONGEST),
    ("max_target_positions seq_length", LONGEST),
    ("hidden_dropout_prob attention_probs_dropout_prob dropout attention_dropout", 0.0),
    ("activation_dropout dropout_rate resid_pdrop embd_pdrop attn_pdrop resid_dropout", 0.0),
    ("embed_dropout hidden_dropout layerdrop encoder_layerdrop decoder_layerdrop", 0.0),
    ("drop_path_rate feat_proj_dropout residual_dropout embedding_dropout", 0.0),
)
_SIZES: dict[str, Any] = {
    **{name: value for names, value in _NAMES for name in names.split()},
    "num_key_value_heads": 2,
    "mlp_ratio": 2.5,
    "vocab_size": VOCABULARY,
    "image_size": 8,
    "patch_size": 4,
    "num_channels": 1,
    "type_vocab_size": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


@dataclass(frozen=True)
class Architecture:
    """A kind of model.

    Attributes:
        name: as people call it.
        build: makes a tiny one.
        batch: what it takes, by a seed.
        mlps: how many MLPs it really has.
        covered: how many of them steppe finds; the rest is warned of.
    """

    name: str
    build: Callable[[], nn.Module]
    batch: Callable[[int], Batch]
    mlps: int
    covered: int


ARCHITECTURES: list[Architecture] = []
# For slow tests, since another one is of the same row of the table or has the same kind of layer.
SLOW = {
    *("UMT5", "LongT5", "mT5", "mBART", "Pegasus", "Marian", "Speech2Text", "HuBERT", "RoBERTa"),
    *("Wav2Vec 2.0 (pre-norm)", "XLM-R", "ELECTRA", "DeiT", "BEiT", "I-JEPA", "ViT-MAE", "Swin"),
    *("Mistral", "Qwen 2", "Qwen 3", "OLMo", "Gemma", "Gemma 3 (text)", "StableLM", "Cohere"),
    *("CodeGen", "BioGPT", "XGLM", "Arcee", "Falcon (sequential)", "Falcon (two norms)"),
    *("Persimmon", "SmolVLM", "SigLIP", "DINOv3", "DINOv3 ConvNeXT", "Megatron-BERT"),
    *("LLaVA", "DeBERTa v2", "ConvNeXT", "FNet", "Bamba", "CTRL", "StableLM 2 (parallel)"),
    *("DistilBERT", "DINOv3 (gated)", "MPNet"),
}


def config_of(name: str, act: str | None = "hidden_act", **settings: Any) -> Any:
    """A tiny config of a class of Transformers, with ReLU under the key `act`."""
    kind = getattr(transformers, name)
    known = set(kind().to_dict())
    tiny = {key: value for key, value in _SIZES.items() if key in known}
    if act is not None:
        tiny[act] = "relu"
    tiny.update(settings)
    return kind(**{key: value for key, value in tiny.items() if value is not None})


def add(
    name: str,
    model: str,
    config: str | Callable[[], Any],
    batch: Callable[[int], Batch],
    mlps: int = 2,
    act: str | None = "hidden_act",
    covered: int | None = None,
    change: Callable[[Any], object] | None = None,
    **settings: Any,
) -> None:
    """Put an architecture of Transformers into the list."""

    def build() -> nn.Module:
        torch.manual_seed(0)
        made = config_of(config, act, **settings) if isinstance(config, str) else config()
        built: nn.Module = getattr(transformers, model)(made)
        if change is not None:
            change(built)
        return built

    ARCHITECTURES.append(
        Architecture(name, build, batch, mlps, mlps if covered is None else covered)
    )


def ids(seed: int, rows: int = 2, length: int = 7) -> Tensor:
    """Tokens that are none of the special ones."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(5, VOCABULARY, (rows, length), generator=generator)


def text(seed: int) -> Batch:
    """Two texts, the second one shorter, with labels."""
    tokens = ids(seed)
    mask = torch.ones_like(tokens)
    mask[1, 5:] = 0
    return {
        "input_ids": tokens,
        "attention_mask": mask,
        "labels": tokens.masked_fill(mask == 0, -100),
    }


def pairs(seed: int) -> Batch:
    """Two texts with shorter labels of their own."""
    labels = ids(seed + 100, length=6)
    labels[1, 4:] = -100
    return {**text(seed), "labels": labels}


def noise(seed: int, *shape: int) -> Tensor:
    """Gaussian input."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def images(seed: int, side: int = 8) -> Batch:
    """Two images of one channel with labels."""
    return {"pixel_values": noise(seed, 2, 1, side, side), "labels": torch.tensor([0, 1])}


def pixels(seed: int, side: int = 8) -> Batch:
    """Two images of one channel."""
    return {"pixel_values": noise(seed, 2, 1, side, side)}


def speech(seed: int) -> Batch:
    """Two spectrograms of a Whisper with labels."""
    return {"input_features": noise(seed, 2, 8, 2 * LONGEST), "labels": ids(seed)}


def image_and_text(seed: int) -> Batch:
    """For two towers that are compared."""
    tokens = ids(seed)
    tokens[:, -1] = 2
    return {
        "input_ids": tokens,
        "attention_mask": torch.ones_like(tokens),
        **pixels(seed),
        "return_loss": torch.tensor(True),
    }


def image_in_text(seed: int, places: int, *shape: int) -> Batch:
    """An image whose features stand in the text."""
    tokens = ids(seed, length=9)
    tokens[:, 1 : 1 + places] = 4
    return {
        "input_ids": tokens,
        "attention_mask": torch.ones_like(tokens),
        "pixel_values": noise(seed, 2, *shape),
        "labels": tokens.clone(),
    }


def rectify(name: str) -> Callable[[nn.Module], object]:
    """Put ReLU in where the config has no say."""

    def change(model: nn.Module) -> None:
        for module in list(model.modules()):
            if isinstance(getattr(module, name, None), nn.Module):
                setattr(module, name, nn.ReLU())

    return change


T5, FUNCTION = "feed_forward_proj", "activation_function"
add("T5", "T5ForConditionalGeneration", "T5Config", pairs, 4, T5, decoder_start_token_id=0)
for name, model in (("T5 v1.1", "T5"), ("mT5", "MT5"), ("UMT5", "UMT5")):
    add(
        name,
        f"{model}ForConditionalGeneration",
        f"{model}Config",
        pairs,
        4,
        None,
        feed_forward_proj="gated-relu",
        decoder_start_token_id=0,
    )
add(
    "LongT5",
    "LongT5ForConditionalGeneration",
    "LongT5Config",
    pairs,
    4,
    T5,
    local_radius=3,
    decoder_start_token_id=0,
)
add(
    "Switch Transformers",
    "SwitchTransformersForConditionalGeneration",
    "SwitchTransformersConfig",
    pairs,
    6,
    "dense_act_fn",
    num_experts=2,
    num_sparse_encoder_layers=1,
    num_sparse_decoder_layers=1,
    decoder_start_token_id=0,
)
for name, model, first in (
    ("BART", "BartForConditionalGeneration", 2),
    ("mBART", "MBartForConditionalGeneration", 2),
    ("Pegasus", "PegasusForConditionalGeneration", 2),
    ("M2M100, NLLB", "M2M100ForConditionalGeneration", 2),
    ("Marian", "MarianMTModel", 0),
):
    config = model.partition("For")[0].removesuffix("MTModel") + "Config"
    add(name, model, config, pairs, 4, FUNCTION, decoder_start_token_id=first)
add(
    "Whisper",
    "WhisperForConditionalGeneration",
    "WhisperConfig",
    speech,
    4,
    FUNCTION,
    num_mel_bins=8,
    decoder_start_token_id=3,
)
add(
    "Speech2Text",
    "Speech2TextForConditionalGeneration",
    "Speech2TextConfig",
    lambda seed: {"input_features": noise(seed, 2, 24, 8), "labels": ids(seed)},
    4,
    FUNCTION,
    input_feat_per_channel=8,
    conv_channels=16,
    decoder_start_token_id=3,
)
WAVES: dict[str, Any] = {
    "conv_dim": (8, 8),
    "conv_stride": (4, 4),
    "conv_kernel": (8, 8),
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2,
    "mask_time_prob": 0.0,
}
for name, model, settings in (
    ("Wav2Vec 2.0", "Wav2Vec2", {}),
    ("Wav2Vec 2.0 (pre-norm)", "Wav2Vec2", {"do_stable_layer_norm": True}),
    ("HuBERT", "Hubert", {}),
):
    add(
        name,
        f"{model}Model",
        f"{model}Config",
        lambda seed: {"input_values": noise(seed, 2, 400)},
        **WAVES,
        **settings,
    )

for name, model, act, settings in (
    ("OPT", "OPT", FUNCTION, {}),
    (
        "OPT (post-norm, projected)",
        "OPT",
        FUNCTION,
        {"do_layer_norm_before": False, "word_embed_proj_dim": 8},
    ),
    (
        "GPT-Neo",
        "GPTNeo",
        FUNCTION,
        {"attention_types": [[["global", "local"], 1]], "window_size": 4},
    ),
    ("GPT-J", "GPTJ", FUNCTION, {"rotary_dim": 4}),
    ("GPT-NeoX", "GPTNeoX", "hidden_act", {}),
    ("CodeGen", "CodeGen", FUNCTION, {"rotary_dim": 4}),
    ("Falcon (parallel)", "Falcon", "activation", {}),
    ("Falcon (two norms)", "Falcon", "activation", {"new_decoder_architecture": True}),
    (
        "Falcon (sequential)",
        "Falcon",
        "activation",
        {"parallel_attn": False, "new_decoder_architecture": False, "multi_query": False},
    ),
    ("Phi", "Phi", "hidden_act", {}),
    ("Llama", "Llama", "hidden_act", {}),
    ("Mistral", "Mistral", "hidden_act", {}),
    ("Qwen 2", "Qwen2", "hidden_act", {}),
    ("Qwen 3", "Qwen3", "hidden_act", {}),
    ("Gemma", "Gemma", "hidden_act", {}),
    ("Gemma 2", "Gemma2", "hidden_activation", {}),
    ("OLMo", "Olmo", "hidden_act", {}),
    ("OLMo 2", "Olmo2", "hidden_act", {}),
    ("StarCoder 2", "Starcoder2", "hidden_act", {}),
    ("StableLM", "StableLm", "hidden_act", {}),
    ("StableLM 2 (parallel)", "StableLm", "hidden_act", {"use_parallel_residual": True}),
    ("Persimmon", "Persimmon", "hidden_act", {}),
    (
        "Nemotron",
        "Nemotron",
        None,
        {"hidden_act": "relu2", "num_key_value_heads": 4},
    ),
    ("Arcee", "Arcee", None, {"hidden_act": "relu2"}),
    ("Cohere", "Cohere", "hidden_act", {}),
    ("BioGPT", "BioGpt", "hidden_act", {}),
    ("XGLM", "XGLM", FUNCTION, {}),
):
    add(name, f"{model}ForCausalLM", f"{model}Config", text, 2, act, **settings)
add("CTRL", "CTRLLMHeadModel", "CTRLConfig", text, 2, None, dff=HIDDEN)
add(
    "Jamba",
    "JambaForCausalLM",
    "JambaConfig",
    text,
    num_experts=1,
    use_mamba_kernels=False,
    attn_layer_offset=0,
    attn_layer_period=1,
)
add(
    "Bamba",
    "BambaForCausalLM",
    "BambaConfig",
    text,
    attn_layer_indices=[0, 1],
    mamba_n_heads=4,
    mamba_d_head=8,
)
add("GPT-2", "GPT2LMHeadModel", "GPT2Config", text, 2, FUNCTION)
add("OpenAI GPT", "OpenAIGPTLMHeadModel", "OpenAIGPTConfig", text, 2, "afn")
add(
    "Gemma 3 (text)",
    "Gemma3ForCausalLM",
    "Gemma3TextConfig",
    text,
    2,
    "hidden_activation",
)
add("Bloom", "BloomForCausalLM", "BloomConfig", text, 2, None, change=rectify("gelu_impl"))
add("MPT", "MptForCausalLM", "MptConfig", text, 2, None, change=rectify("act"), expansion_ratio=3)

for name, model in (
    ("BERT", "Bert"),
    ("RoBERTa", "Roberta"),
    ("DeBERTa v2", "DebertaV2"),
    ("ELECTRA", "Electra"),
    ("XLM-R", "XLMRoberta"),
    ("Megatron-BERT", "MegatronBert"),
    ("MPNet", "MPNet"),
    ("RoBERTa-PreLayerNorm", "RobertaPreLayerNorm"),
):
    add(name, f"{model}ForMaskedLM", f"{model}Config", text)
add(
    "DistilBERT",
    "DistilBertForMaskedLM",
    "DistilBertConfig",
    text,
    2,
    "activation",
    hidden_dim=HIDDEN,
)
add("ALBERT", "AlbertForMaskedLM", "AlbertConfig", text, 1)
add(
    "FNet",
    "FNetForMaskedLM",
    "FNetConfig",
    lambda seed: {"input_ids": ids(seed), "labels": ids(seed)},
)
add(
    "FlauBERT",
    "FlaubertWithLMHeadModel",
    "FlaubertConfig",
    text,
    2,
    None,
    emb_dim=WIDTH,
    n_words=VOCABULARY,
    gelu_activation=False,
)

for name, model in (
    ("ViT", "ViTForImageClassification"),
    ("DeiT", "DeiTForImageClassification"),
    ("BEiT", "BeitForImageClassification"),
    ("I-JEPA", "IJepaForImageClassification"),
):
    add(name, model, model.partition("For")[0] + "Config", images)
add(
    "ViT-MAE",
    "ViTMAEForPreTraining",
    "ViTMAEConfig",
    lambda seed: {**pixels(seed), "noise": noise(seed, 2, 4)},
    4,
    decoder_hidden_size=WIDTH,
    decoder_intermediate_size=HIDDEN,
    decoder_num_hidden_layers=2,
    decoder_num_attention_heads=4,
    mask_ratio=0.5,
)
add("DINOv2", "Dinov2ForImageClassification", "Dinov2Config", images, mlp_ratio=3)
add(
    "DINOv2 (giant, SwiGLU)",
    "Dinov2ForImageClassification",
    "Dinov2Config",
    images,
    act=None,
    change=rectify("act_fn"),
    mlp_ratio=3,
    use_swiglu_ffn=True,
)
add("DINOv3", "DINOv3ViTModel", "DINOv3ViTConfig", pixels)
add("DINOv3 (gated)", "DINOv3ViTModel", "DINOv3ViTConfig", pixels, use_gated_mlp=True)
WINDOWS: dict[str, Any] = {
    "image_size": 16,
    "patch_size": 2,
    "embed_dim": 8,
    "depths": [1, 1],
    "num_heads": [2, 2],
    "window_size": 2,
    "mlp_ratio": 2.0,
}
for name, model in (("Swin", "Swin"), ("Swin v2", "Swinv2")):
    add(
        name,
        f"{model}ForImageClassification",
        f"{model}Config",
        lambda seed: images(seed, 16),
        **WINDOWS,
    )
add(
    "Hiera",
    "HieraForImageClassification",
    "HieraConfig",
    lambda seed: images(seed, 16),
    image_size=[16, 16],
    patch_size=[3, 3],
    patch_stride=[2, 2],
    patch_padding=[1, 1],
    embed_dim=8,
    depths=[1, 1],
    num_heads=[1, 2],
    num_query_pool=1,
    query_stride=[2, 2],
    masked_unit_size=[2, 2],
    masked_unit_attention=[True, False],
    embed_dim_multiplier=2.0,
    mlp_ratio=2.0,
)
for name, model, config in (
    ("ConvNeXT", "ConvNextForImageClassification", "ConvNextConfig"),
    ("DINOv3 ConvNeXT", "DINOv3ConvNextModel", "DINOv3ConvNextConfig"),
):
    add(
        name,
        model,
        config,
        lambda seed: pixels(seed, 32),
        depths=[1, 1, 1, 1],
        hidden_sizes=[8, 8, 8, 8],
        mlps=4,
    )
add("AIMv2", "Aimv2VisionModel", "Aimv2VisionConfig", pixels)
TOWER: dict[str, Any] = {
    "hidden_size": WIDTH,
    "intermediate_size": HIDDEN,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "hidden_act": "relu",
}
WORDS: dict[str, Any] = {
    **TOWER,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": LONGEST,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
PATCHES: dict[str, Any] = {**TOWER, "image_size": 8, "patch_size": 4, "num_channels": 1}
LANGUAGE: dict[str, Any] = {"model_type": "llama", "num_key_value_heads": 2, **WORDS}
add(
    "CLIP",
    "CLIPModel",
    lambda: transformers.CLIPConfig(
        text_config={**WORDS, "projection_dim": WIDTH},
        vision_config={**PATCHES, "projection_dim": WIDTH},
        projection_dim=WIDTH,
    ),
    image_and_text,
    4,
)
add(
    "SigLIP",
    "SiglipModel",
    lambda: transformers.SiglipConfig(
        text_config={**WORDS, "projection_size": WIDTH}, vision_config=PATCHES
    ),
    image_and_text,
    5,
)
add(
    "DETR",
    "DetrForObjectDetection",
    lambda: transformers.DetrConfig(
        use_timm_backbone=False,
        use_pretrained_backbone=False,
        backbone=None,
        backbone_config=transformers.ResNetConfig(
            num_channels=1,
            embedding_size=8,
            hidden_sizes=[8, 8],
            depths=[1, 1],
            out_features=["stage2"],
        ),
        num_channels=1,
        d_model=WIDTH,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=HIDDEN,
        decoder_ffn_dim=HIDDEN,
        num_queries=5,
        num_labels=3,
        activation_function="relu",
        dropout=0.0,
    ),
    lambda seed: pixels(seed, 32),
    4,
)
add(
    "SmolVLM",
    "SmolVLMForConditionalGeneration",
    lambda: transformers.SmolVLMConfig(
        text_config=LANGUAGE,
        vision_config={**PATCHES, "intermediate_size": 24, "num_channels": 3},
        scale_factor=2,
        image_token_id=4,
        pad_token_id=0,
    ),
    lambda seed: image_in_text(seed, 1, 1, 3, 8, 8),
    4,
)
add(
    "LLaVA",
    "LlavaForConditionalGeneration",
    lambda: transformers.LlavaConfig(
        text_config=LANGUAGE,
        vision_config={
            **PATCHES,
            "model_type": "clip_vision_model",
            "projection_dim": WIDTH,
            "intermediate_size": 24,
            "num_channels": 3,
        },
        image_token_index=4,
        image_seq_length=4,
        vision_feature_layer=-1,
    ),
    lambda seed: image_in_text(seed, 4, 3, 8, 8),
    4,
)

# Experts, each of which is a block.
EXPERTS: dict[str, Any] = {"moe_intermediate_size": 24, "num_experts_per_tok": 2}
add(
    "Mixtral",
    "MixtralForCausalLM",
    "MixtralConfig",
    text,
    8,
    num_local_experts=4,
)
add(
    "Qwen 2 MoE",
    "Qwen2MoeForCausalLM",
    "Qwen2MoeConfig",
    text,
    6,
    num_experts=4,
    shared_expert_intermediate_size=HIDDEN,
    mlp_only_layers=[0],
    **EXPERTS,
)
add(
    "Qwen 2 MoE (experts everywhere)",
    "Qwen2MoeForCausalLM",
    "Qwen2MoeConfig",
    text,
    10,
    num_experts=4,
    shared_expert_intermediate_size=HIDDEN,
    **EXPERTS,
)
add(
    "Qwen 3 MoE",
    "Qwen3MoeForCausalLM",
    "Qwen3MoeConfig",
    text,
    8,
    num_experts=4,
    **EXPERTS,
)
add("OLMoE", "OlmoeForCausalLM", "OlmoeConfig", text, 8, num_experts=4, num_experts_per_tok=2)
add(
    "DeepSeek-V3",
    "DeepseekV3ForCausalLM",
    "DeepseekV3Config",
    text,
    6,
    num_key_value_heads=4,
    n_routed_experts=4,
    n_group=1,
    topk_group=1,
    first_k_dense_replace=1,
    q_lora_rank=8,
    kv_lora_rank=8,
    qk_rope_head_dim=4,
    qk_nope_head_dim=4,
    v_head_dim=8,
    **EXPERTS,
)

add("Phi-3", "Phi3ForCausalLM", "Phi3Config", text)
add(
    "ModernBERT",
    "ModernBertForMaskedLM",
    "ModernBertConfig",
    text,
    2,
    "hidden_activation",
    global_attn_every_n_layers=1,
    cls_token_id=1,
    sep_token_id=2,
)

# What no pattern names yet: it is said.
add("BitNet", "BitNetForCausalLM", "BitNetConfig", text, covered=0)
add(
    "GPT-OSS",
    "GptOssForCausalLM",
    "GptOssConfig",
    text,
    8,
    None,
    covered=0,
    num_local_experts=4,
    num_experts_per_tok=2,
)
