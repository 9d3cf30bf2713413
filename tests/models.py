"""Tiny models of every supported architecture, randomly initialised: nothing is downloaded."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import (
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    IJepaConfig,
    IJepaForImageClassification,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
)

VOCABULARY = 64
D_MODEL = 16
D_HIDDEN = 32
MAX_TOKENS = 32
SPECIAL_TOKENS = {"bos_token_id": 1, "eos_token_id": 2}
SIZES = {
    "hidden_size": D_MODEL,
    "intermediate_size": D_HIDDEN,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
TEXT = {**SIZES, "vocab_size": VOCABULARY, "max_position_embeddings": MAX_TOKENS}
IMAGES = {**SIZES, "image_size": 8, "patch_size": 4, "num_channels": 1, "num_labels": 10}


def t5(act: str = "relu", gated: bool = False, dropout: float = 0.0) -> nn.Module:
    """T5, or T5 v1.1 if gated: 2 encoder and 2 decoder blocks."""
    return T5ForConditionalGeneration(
        T5Config(
            vocab_size=VOCABULARY,
            d_model=D_MODEL,
            d_kv=4,
            d_ff=D_HIDDEN,
            num_layers=2,
            num_heads=4,
            dropout_rate=dropout,
            feed_forward_proj=f"gated-{act}" if gated else act,
            decoder_start_token_id=0,
            pad_token_id=0,
        )
    )


def one_layer_(model: nn.Module) -> nn.Module:
    """Leave the first layer of each stack, which torch.compile traces in half the time."""
    for name, child in model.named_children():
        if isinstance(child, nn.ModuleList):  # not those within a layer, as T5 has them
            setattr(model, name, child[:1])
        else:
            one_layer_(child)
    return model


def opt(act: str = "relu", norm_first: bool = True) -> nn.Module:
    """OPT; with norm_first=False as OPT-350m."""
    return OPTForCausalLM(
        OPTConfig(
            vocab_size=VOCABULARY,
            hidden_size=D_MODEL,
            word_embed_proj_dim=D_MODEL,
            num_hidden_layers=2,
            ffn_dim=D_HIDDEN,
            num_attention_heads=4,
            max_position_embeddings=MAX_TOKENS,
            activation_function=act,
            do_layer_norm_before=norm_first,
            dropout=0.0,
        )
    )


def gpt2(act: str = "relu") -> nn.Module:
    """GPT-2, whose linear layers are Conv1D."""
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=VOCABULARY,
            n_embd=D_MODEL,
            n_inner=D_HIDDEN,
            n_layer=2,
            n_head=4,
            n_positions=MAX_TOKENS,
            activation_function=act,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            pad_token_id=0,
            **SPECIAL_TOKENS,
        )
    )


def gpt_neox(act: str = "relu", parallel: bool = True) -> nn.Module:
    """GPT-NeoX."""
    return GPTNeoXForCausalLM(
        GPTNeoXConfig(**TEXT, hidden_act=act, use_parallel_residual=parallel, **SPECIAL_TOKENS)
    )


def llama(act: str = "relu") -> nn.Module:
    """Llama, gated."""
    return LlamaForCausalLM(LlamaConfig(**TEXT, hidden_act=act, **SPECIAL_TOKENS))


def qwen2(act: str = "relu") -> nn.Module:
    """Qwen 2, gated."""
    return Qwen2ForCausalLM(
        Qwen2Config(**TEXT, num_key_value_heads=2, hidden_act=act, **SPECIAL_TOKENS)
    )


def bert(act: str = "relu") -> nn.Module:
    """BERT, post-norm."""
    return BertForMaskedLM(
        BertConfig(
            **TEXT, hidden_act=act, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0
        )
    )


def vit(act: str = "relu") -> nn.Module:
    """ViT with a class token: 4 patches and 1."""
    return ViTForImageClassification(ViTConfig(**IMAGES, hidden_act=act))


def ijepa(act: str = "relu") -> nn.Module:
    """I-JEPA: a ViT with mean pooling, 4 patches."""
    return IJepaForImageClassification(IJepaConfig(**IMAGES, hidden_act=act))


def torch_encoder(norm_first: bool = True, batch_first: bool = True) -> nn.Module:
    """``nn.TransformerEncoder`` with ReLU as a plain function."""
    layer = nn.TransformerEncoderLayer(
        D_MODEL, 4, D_HIDDEN, dropout=0.0, norm_first=norm_first, batch_first=batch_first
    )
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=batch_first and not norm_first)


class CheckpointedStack(nn.Module):
    """Two encoder layers, with or without gradient checkpointing."""

    def __init__(self, reentrant: bool | None = None) -> None:
        super().__init__()
        self.reentrant = reentrant
        self.layers = torch_encoder().layers

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            if self.reentrant is None:
                x = layer(x)
            else:
                x = checkpoint(layer, x, use_reentrant=self.reentrant)
        return x


LANGUAGE_MODELS: dict[str, Callable[[], nn.Module]] = {
    "t5": t5,
    "opt": opt,
    "gpt2": gpt2,
    "gpt_neox": gpt_neox,
    "llama": llama,
    "qwen2": qwen2,
    "bert": bert,
}
VISION_MODELS: dict[str, Callable[[], nn.Module]] = {"vit": vit, "ijepa": ijepa}


def token_ids(batch: int = 2, tokens: int = 7, seed: int = 0) -> Tensor:
    """int64 ``[batch, tokens]``, no special tokens."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCABULARY, (batch, tokens), generator=generator)


def images(batch: int = 2, seed: int = 0) -> Tensor:
    """float32 ``[batch, 1, 8, 8]``."""
    return torch.randn(batch, 1, 8, 8, generator=torch.Generator().manual_seed(seed))


def inputs_for(model: nn.Module, batch: int = 2, tokens: int = 7) -> dict[str, Tensor]:
    """Keyword arguments for a forward pass of any Hugging Face model above, without labels."""
    if model.config.model_type in ("vit", "ijepa"):
        return {"pixel_values": images(batch)}
    ids = token_ids(batch, tokens)
    if model.config.is_encoder_decoder:
        return {"input_ids": ids, "decoder_input_ids": token_ids(batch, tokens, seed=1)}
    return {"input_ids": ids}
