"""Where the parts of MLP blocks hang: the only file that knows foreign architectures.

One declarative table, `PATTERNS`, says for each family where the parts of a block hang below the
module that owns them. A new architecture is a new row; a user's own row goes in through
``find_blocks(model, patterns=[...])``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class BlockPattern:
    """Where the parts of an MLP block hang, as dotted paths below the module that owns them.

    Attributes:
        family: the name that errors and listings show.
        up: path of the first linear layer (for gated blocks, of the one that is not activated).
        act: path of the activation, a module or a plain function; empty where the forward of the
            MLP calls a function, which is then told by evaluating it.
        down: path of the second linear layer.
        norm: path of the norm whose output the block reads, or None.
        gate: path of the activated linear layer of a gated block, or None.
        gate_up: path of a linear layer that is gate and up in one, in place of both; or None.
        gate_first: whether the gate is its first half.
        dropout: path of the dropout between activation and second layer, a module or the number
            that is handed to a function, or None.
        norm_is_shared: others (the residual stream, attention) read the norm's output too.
        when: further condition on the owner, for families that differ by a flag only.
        sequence_first: says of the owner that tokens are dimension 0 of its input, not 1.
        act_flags: attributes of the owner that describe `act`, with what they must be when it
            changes.
        is_expert: the owner is one of a list of modules to which tokens are routed.
    """

    family: str
    up: str = ""
    act: str = ""
    down: str = ""
    norm: str | None = None
    gate: str | None = None
    gate_up: str | None = None
    gate_first: bool = True
    dropout: str | None = None
    norm_is_shared: bool = False
    when: Callable[[Any], bool] | None = None
    sequence_first: Callable[[Any], bool] | None = None
    act_flags: tuple[tuple[str, object], ...] = ()
    is_expert: bool = False

    def __post_init__(self) -> None:
        """Refuse a pattern that names no block."""
        if self.gate_up and (self.gate or self.up):
            raise ValueError(
                f"BlockPattern {self.family!r}: gate_up={self.gate_up!r} is gate and up in one, so"
                " leave out gate and up"
            )
        if not self.down or not (self.gate_up or self.up):
            raise ValueError(
                f"BlockPattern {self.family!r}: expected the paths of two linear layers, e.g."
                " up='fc_in', act='act', down='fc_out', or gate_up='gate_up' in place of up"
            )

    def paths(self) -> list[str]:
        """Every path that must exist for the pattern to match."""
        return [
            path
            for path in (self.norm, self.gate, self.gate_up, self.up, self.act, self.down)
            if path
        ]


# nn.TransformerEncoderLayer decides by this attribute whether it may run its fused kernel.
_FUSED_FLAG = "activation_relu_or_gelu"
_ENCODER_LAYER_FLAGS = ((_FUSED_FLAG, 0),)

# Layers with the same parts in another order, which only their forward tells.
_BART_NORM_LAST = (
    *("Autoformer", "Bart", "BlenderbotSmall", "Informer", "LED", "Marian", "Mvp", "PLBart"),
    *("TimeSeriesTransformer", "TrOCR"),
)
_BART_NORM_FIRST = (
    *("AudioFlamingo3", "BigBirdPegasus", "BioGpt", "Blenderbot", "M2M100", "MBart", "Musicgen"),
    *("Pegasus", "PPFormulaNet", "Qwen2Audio", "Qwen2_5OmniAudio", "Qwen3ASRAudio"),
    *("Qwen3OmniMoeAudio", "Speech2Text", "TableTransformer", "Voxtral", "Whisper", "XGLM"),
)
# Layers whose norm follows the MLP, or which have others around it: what the MLP reads is no norm's
# output.
_NO_NORM = ("Swinv2", "SwinTransformerV2", "ResPostBlock", "MobileBert", "FFNLayer")

# Where a layer has one of these, its post_attention_layernorm is not what the MLP reads (Gemma 2,
# OLMo 2, AFMoE) or not by the MLP alone (nomic-bert).
OTHER_MLP_NORMS = (
    "pre_feedforward_layernorm",
    "post_feedforward_layernorm",
    "pre_mlp_layernorm",
    "post_mlp_layernorm",
)


def _is(*prefixes: str) -> Callable[[Any], bool]:
    """Whether a layer's class, or one that it derives from, has a name that begins so."""
    return lambda layer: any(kind.__name__.startswith(prefixes) for kind in type(layer).__mro__)


def _has_no_norm(layer: Any) -> bool:
    # A Q-Former's two MLPs read a part each of what its norm gives.
    return _is(*_NO_NORM)(layer) or _has(layer, "intermediate_query")


def _has(layer: Any, name: str) -> bool:
    return getattr(layer, name, None) is not None


def _norm_first(layer: Any) -> bool:
    return hasattr(layer, _FUSED_FLAG) and layer.norm_first


def _norm_last(layer: Any) -> bool:
    return hasattr(layer, _FUSED_FLAG) and not layer.norm_first


def _decoder_norm_first(layer: Any) -> bool:
    return _has(layer, "multihead_attn") and getattr(layer, "norm_first", None) is True


def _decoder_norm_last(layer: Any) -> bool:
    return _has(layer, "multihead_attn") and getattr(layer, "norm_first", None) is False


def _sequence_first(layer: Any) -> bool:
    return not layer.self_attn.batch_first


def _opt_norm_first(layer: Any) -> bool:
    return getattr(layer, "do_layer_norm_before", None) is True


def _opt_norm_last(layer: Any) -> bool:
    return getattr(layer, "do_layer_norm_before", None) is False


def _bart_norm_first(layer: Any) -> bool:
    return _is(*_BART_NORM_FIRST)(layer) and not _is(*_BART_NORM_LAST)(layer)


def _bart_encoder_norm_last(layer: Any) -> bool:
    return _is(*_BART_NORM_LAST)(layer) and not _has(layer, "encoder_attn_layer_norm")


def _bart_decoder_norm_last(layer: Any) -> bool:
    return _is(*_BART_NORM_LAST)(layer)


def _attends_to_itself(layer: Any) -> bool:
    return not _has(layer, "encoder_attn_layer_norm")


def _bert_alone(layer: Any) -> bool:
    return not _has(layer, "crossattention") and not _has_no_norm(layer)


def _reads_a_norm(layer: Any) -> bool:
    return not _has_no_norm(layer)


def _openai(layer: Any) -> bool:
    return ".openai." in type(layer).__module__


def _gpt2(layer: Any) -> bool:
    return not _openai(layer)


def _reads_post_attention_norm(layer: Any) -> bool:
    return (
        _has(layer, "input_layernorm")
        and not any(_has(layer, name) for name in OTHER_MLP_NORMS)
        and _has_nothing_between(layer)
    )


def _is_parallel(layer: Any) -> bool:
    """The MLP reads the norm that attention reads."""
    return not any(
        _has(layer, name) for name in ("post_attention_layernorm", "ln_mlp", *OTHER_MLP_NORMS)
    )


def _has_nothing_between(layer: Any) -> bool:
    """Whether nothing stands between the activation and the last layer.

    No norm (BitNet, timm), no top-k (Gemma 3n), no convolution (SegFormer), no clamp (DeepSeek V4).
    """
    mlp = layer.mlp
    norm = getattr(mlp, "norm", None)
    return not (
        _has(mlp, "ffn_sub_norm")
        or any("conv" in name for name, _ in mlp.named_children())
        or (norm is not None and type(norm).__name__ != "Identity")
        or getattr(mlp, "activation_sparsity", 0.0) > 0.0
        or any(_has(mlp, name) for name in _CLAMPS)
    )


def _reads_norms_around(layer: Any) -> bool:
    return not _has(layer, "pre_feedforward_layernorm") and _has(
        layer, "post_feedforward_layernorm"
    )


def _is_ungated(layer: Any) -> bool:
    return _reads_post_attention_norm(layer) and not _has(layer.mlp, "gate_proj")


def _is_dinov3(layer: Any) -> bool:
    return not _has(layer.mlp, "gate_proj")


def _timm_norm_first(layer: Any) -> bool:
    return _has_nothing_between(layer) and not _has_no_norm(layer)


def _timm_norm_last(layer: Any) -> bool:
    return _has_nothing_between(layer) and _has_no_norm(layer)


def _timm_gate_first(layer: Any) -> bool:
    return _timm_norm_first(layer) and getattr(layer.mlp, "gate_last", None) is False


def _timm_gate_last(layer: Any) -> bool:
    return _timm_norm_first(layer) and getattr(layer.mlp, "gate_last", None) is True


def _glm4(layer: Any) -> bool:
    return _has(layer, "post_self_attn_layernorm") and _has(layer, "post_mlp_layernorm")


def _bloom_norm_is_shared(layer: Any) -> bool:
    return bool(getattr(layer, "apply_residual_connection_post_layernorm", False))


def _bloom(layer: Any) -> bool:
    return not _bloom_norm_is_shared(layer)


def _is_stable(layer: Any) -> bool:
    return type(layer).__name__.endswith("StableLayerNorm")


def _is_not_stable(layer: Any) -> bool:
    return not _is_stable(layer)


def _has_no_response_norm(layer: Any) -> bool:
    return not _has(layer, "grn")


def _has_no_multiplier(layer: Any) -> bool:
    """Falcon H1 scales what its activation gets."""
    return not _has(layer.feed_forward, "gate_multiplier")


def _is_merger(module: Any) -> bool:
    return _has(module, "post_projection_norm") and not any(_has(module, name) for name in _CLAMPS)


def _has_attention(layer: Any) -> bool:
    return _has(layer, "self_attn") and not _has(layer, "ffn_layernorm")


def _x_transformers(layer: Any) -> bool:
    return type(layer.ff[1]).__name__ == "Dropout"


# Modules that are an MLP and no more, in whatever layer: gate, up, activation, down, dropout. What
# norm they read is not known.
_MLP_MODULES: tuple[tuple[str | None, str, str, str, str | None], ...] = (
    ("gate_proj", "up_proj", "act_fn", "down_proj", None),
    ("gate_proj", "up_proj", "activation_fn", "down_proj", None),
    ("gate_proj", "up_proj", "act", "down_proj", None),
    ("gate_proj.linear", "up_proj.linear", "act_fn", "down_proj.linear", None),
    ("wi_0", "wi_1", "act", "wo", "dropout"),
    ("w_in.w_0", "w_in.w_1", "w_in.act", "w_out", None),
    (None, "up_proj", "act_fn", "down_proj", None),
    (None, "up_proj", "silu", "down_proj", None),
    (None, "fc1", "activation_fn", "fc2", None),
    (None, "fc1", "act_fn", "fc2", None),
    (None, "fc1", "activation", "fc2", None),
    (None, "fc1", "act", "fc2", None),
    (None, "linear1", "activation", "linear2", None),
    (None, "linear_fc1", "act_fn", "linear_fc2", None),
    (None, "lin1", "act", "lin2", None),
    (None, "in_proj", "gelu", "out_proj", None),
    (None, "proj_in", "activation", "proj_out", None),
    (None, "ffw_layer_1.linear", "act_fn", "ffw_layer_2.linear", None),
    (None, "intermediate_dense", "intermediate_act_fn", "output_dense", "intermediate_dropout"),
    (None, "dense1", "intermediate_act_fn", "dense2", None),
    (None, "intermediate", "activation_fn", "output", None),
    ("proj_up_gate", "proj_up", "act_fn", "proj_down", None),
)


# Likewise with gate and up in one, the gate first: that, activation, down, dropout.
_FUSED_MODULES: tuple[tuple[str, str, str, str | None], ...] = (
    ("gate_up_proj", "activation_fn", "down_proj", None),
    ("gate_up_proj", "act_fn", "down_proj", None),
    ("Wi", "act", "Wo", "drop"),
    ("input_linear", "activation", "output_linear", None),
)

# Numbers by which a module bends what flows between its layers: DeepSeek V4, Falcon H1, Gemma 3n.
_CLAMPS = ("limit", "swiglu_limit")
_BENT = (*_CLAMPS, "gate_multiplier", "activation_sparsity")


def _is_no_more_than(*paths: str) -> Callable[[Any], bool]:
    """Whether all parameters of a module are in its parts: nothing can stand between them."""
    parts = {path.partition(".")[0] for path in paths}

    def when(module: Any) -> bool:
        names = (name.partition(".")[0] for name, _ in module.named_parameters())
        return not any(_has(module, name) for name in _BENT) and parts.issuperset(names)

    return when


def _has_shared_expert(layer: Any) -> bool:
    """Whether the expert of all tokens reads the norm of the others, with nothing between."""
    mlp = layer.mlp
    expert = getattr(mlp, "shared_expert", None) or getattr(mlp, "shared_experts", None)
    return _reads_post_attention_norm(layer) and not any(_has(expert, name) for name in _BENT)


def _of_modules() -> Iterator[BlockPattern]:
    """A row for each of `_MLP_MODULES` and `_FUSED_MODULES`."""
    for gate, up, act, down, dropout in _MLP_MODULES:
        paths = [path for path in (gate, up, act, down) if path is not None]
        yield BlockPattern(
            family=f"an MLP of {', '.join(paths)}",
            gate=gate,
            up=up,
            act=act,
            down=down,
            dropout=dropout,
            when=_is_no_more_than(*paths),
        )
    for gate_up, act, down, dropout in _FUSED_MODULES:
        yield BlockPattern(
            family=f"an MLP of {gate_up}, {act}, {down}",
            gate_up=gate_up,
            act=act,
            down=down,
            dropout=dropout,
            when=_is_no_more_than(gate_up, act, down),
        )


# Layers of modules that are an MLP and call their activation as a function: gate, up, down.
_INLINE_MODULES: tuple[tuple[str | None, str, str], ...] = (
    (None, "c_fc", "c_proj"),
    (None, "fc1", "fc2"),
    (None, "fc_in", "fc_out"),
    (None, "lin1", "lin2"),
    (None, "linear1", "linear2"),
    (None, "up_proj", "down_proj"),
    (None, "wi", "wo"),
    ("w1", "w3", "w2"),
    ("gate_proj", "up_proj", "down_proj"),
    ("c_gate", "c_fc", "c_proj"),
)
_INLINE_FUSED_MODULES = (
    ("weights_in", "weights_out"),
    ("w12", "w3"),
    ("gate_up_proj", "down_proj"),
    ("Wi", "Wo"),
)
# Where the norm that such a module reads hangs beside it.
_INLINE_WITH_NORM = (
    ("modded nanoGPT, nanochat", "mlp", "ln_2"),
    ("Meta Llama", "feed_forward", "ffn_norm"),
)


def _of_inline_modules() -> Iterator[BlockPattern]:
    """Rows for MLPs without an activation module, of a layer with a known norm or of any other."""
    for gate, up, down in _INLINE_MODULES:
        names = ", ".join(filter(None, (gate, up, down)))
        for family, mlp, norm in _INLINE_WITH_NORM:
            yield BlockPattern(
                family=f"{family} ({names}; inline)",
                norm=norm,
                gate=None if gate is None else f"{mlp}.{gate}",
                up=f"{mlp}.{up}",
                down=f"{mlp}.{down}",
            )
        yield BlockPattern(family=f"an MLP of {names} (inline)", gate=gate, up=up, down=down)
    for gate_up, down in _INLINE_FUSED_MODULES:
        for gate_first, place in ((True, "first"), (False, "last")):
            yield BlockPattern(
                family=f"an MLP of {gate_up}, {down} (gate {place}, inline)",
                gate_up=gate_up,
                gate_first=gate_first,
                down=down,
            )


PATTERNS: tuple[BlockPattern, ...] = (
    BlockPattern(
        family="T5",
        norm="layer_norm",
        up="DenseReluDense.wi",
        act="DenseReluDense.act",
        down="DenseReluDense.wo",
        dropout="DenseReluDense.dropout",
    ),
    BlockPattern(
        family="T5 v1.1 (gated)",
        norm="layer_norm",
        gate="DenseReluDense.wi_0",
        up="DenseReluDense.wi_1",
        act="DenseReluDense.act",
        down="DenseReluDense.wo",
        dropout="DenseReluDense.dropout",
    ),
    BlockPattern(
        family="Switch Transformers (dense layers)",
        norm="layer_norm",
        up="mlp.wi",
        act="mlp.act",
        down="mlp.wo",
        dropout="mlp.dropout",
    ),
    BlockPattern(
        family="ViT, I-JEPA",
        norm="layernorm_after",
        up="mlp.fc1",
        act="mlp.activation_fn",
        down="mlp.fc2",
        when=_has_nothing_between,
    ),
    BlockPattern(
        family="CLIP, SigLIP, Idefics 3",
        norm="layer_norm2",
        up="mlp.fc1",
        act="mlp.activation_fn",
        down="mlp.fc2",
        when=_has_nothing_between,
    ),
    BlockPattern(
        family="DINOv2",
        norm="norm2",
        up="mlp.fc1",
        act="mlp.activation_fn",
        down="mlp.fc2",
        when=_has_nothing_between,
    ),
    BlockPattern(
        family="SigLIP (pooling head)",
        norm="layernorm",
        up="mlp.fc1",
        act="mlp.activation_fn",
        down="mlp.fc2",
        when=_has_nothing_between,
    ),
    BlockPattern(
        family="Phi",
        norm="input_layernorm",
        norm_is_shared=True,
        up="mlp.fc1",
        act="mlp.activation_fn",
        down="mlp.fc2",
        when=_is_parallel,
    ),
    BlockPattern(
        family="DETR (decoder)",
        norm="encoder_attn_layer_norm",
        norm_is_shared=True,
        up="mlp.fc1",
        act="mlp.activation_fn",
        down="mlp.fc2",
        when=_has_nothing_between,
    ),
    BlockPattern(
        family="DETR (encoder)",
        norm="self_attn_layer_norm",
        norm_is_shared=True,
        up="mlp.fc1",
        act="mlp.activation_fn",
        down="mlp.fc2",
        when=_attends_to_itself,
    ),
    BlockPattern(
        family="ViT (Transformers 4)",
        norm="layernorm_after",
        up="intermediate.dense",
        act="intermediate.intermediate_act_fn",
        down="output.dense",
        when=_reads_a_norm,
    ),
    BlockPattern(
        family="BERT (cross-attention)",
        norm="crossattention.output.LayerNorm",
        norm_is_shared=True,
        up="intermediate.dense",
        act="intermediate.intermediate_act_fn",
        down="output.dense",
        when=_reads_a_norm,
    ),
    BlockPattern(
        family="BERT (post-norm)",
        norm="attention.output.LayerNorm",
        norm_is_shared=True,
        up="intermediate.dense",
        act="intermediate.intermediate_act_fn",
        down="output.dense",
        when=_bert_alone,
    ),
    BlockPattern(
        family="FNet",
        norm="fourier.output.LayerNorm",
        norm_is_shared=True,
        up="intermediate.dense",
        act="intermediate.intermediate_act_fn",
        down="output.dense",
    ),
    BlockPattern(
        family="Megatron-BERT",
        norm="ln",
        up="intermediate.dense",
        act="intermediate.intermediate_act_fn",
        down="output.dense",
    ),
    # Before MPNet, whose norm it has too: there it is the attention that reads it.
    BlockPattern(
        family="RoBERTa-PreLayerNorm",
        norm="intermediate.LayerNorm",
        up="intermediate.dense",
        act="intermediate.intermediate_act_fn",
        down="output.dense",
    ),
    BlockPattern(
        family="MPNet",
        norm="attention.LayerNorm",
        norm_is_shared=True,
        up="intermediate.dense",
        act="intermediate.intermediate_act_fn",
        down="output.dense",
    ),
    BlockPattern(
        family="LiLT (layout)",
        norm="attention.layout_output.LayerNorm",
        norm_is_shared=True,
        up="layout_intermediate.dense",
        act="layout_intermediate.intermediate_act_fn",
        down="layout_output.dense",
    ),
    BlockPattern(
        family="LXMERT (language)",
        norm="lang_self_att.output.LayerNorm",
        norm_is_shared=True,
        up="lang_inter.dense",
        act="lang_inter.intermediate_act_fn",
        down="lang_output.dense",
    ),
    BlockPattern(
        family="LXMERT (vision)",
        norm="visn_self_att.output.LayerNorm",
        norm_is_shared=True,
        up="visn_inter.dense",
        act="visn_inter.intermediate_act_fn",
        down="visn_output.dense",
    ),
    BlockPattern(
        family="Swin v2, MobileBERT",
        up="intermediate.dense",
        act="intermediate.intermediate_act_fn",
        down="output.dense",
        when=_has_no_norm,
    ),
    BlockPattern(
        family="DistilBERT",
        norm="sa_layer_norm",
        norm_is_shared=True,
        up="ffn.lin1",
        act="ffn.activation",
        down="ffn.lin2",
    ),
    BlockPattern(
        family="ALBERT",
        norm="attention.LayerNorm",
        norm_is_shared=True,
        up="ffn",
        act="activation",
        down="ffn_output",
    ),
    BlockPattern(
        family="OPT",
        norm="final_layer_norm",
        up="fc1",
        act="activation_fn",
        down="fc2",
        when=_opt_norm_first,
    ),
    BlockPattern(
        family="OPT (post-norm)",
        norm="self_attn_layer_norm",
        norm_is_shared=True,
        up="fc1",
        act="activation_fn",
        down="fc2",
        when=_opt_norm_last,
    ),
    BlockPattern(
        family="BART, Marian (encoder)",
        norm="self_attn_layer_norm",
        norm_is_shared=True,
        up="fc1",
        act="activation_fn",
        down="fc2",
        dropout="activation_dropout",
        when=_bart_encoder_norm_last,
    ),
    BlockPattern(
        family="BART, Marian (decoder)",
        norm="encoder_attn_layer_norm",
        norm_is_shared=True,
        up="fc1",
        act="activation_fn",
        down="fc2",
        dropout="activation_dropout",
        when=_bart_decoder_norm_last,
    ),
    BlockPattern(
        family="M2M100, mBART, Pegasus, Whisper",
        norm="final_layer_norm",
        up="fc1",
        act="activation_fn",
        down="fc2",
        dropout="activation_dropout",
        when=_bart_norm_first,
    ),
    BlockPattern(
        family="Wav2Vec 2.0, HuBERT (pre-norm)",
        norm="final_layer_norm",
        up="feed_forward.intermediate_dense",
        act="feed_forward.intermediate_act_fn",
        down="feed_forward.output_dense",
        dropout="feed_forward.intermediate_dropout",
        when=_is_stable,
    ),
    BlockPattern(
        family="Wav2Vec 2.0, HuBERT",
        norm="layer_norm",
        norm_is_shared=True,
        up="feed_forward.intermediate_dense",
        act="feed_forward.intermediate_act_fn",
        down="feed_forward.output_dense",
        dropout="feed_forward.intermediate_dropout",
        when=_is_not_stable,
    ),
    BlockPattern(
        family="OpenAI GPT",
        norm="ln_1",
        norm_is_shared=True,
        up="mlp.c_fc",
        act="mlp.act",
        down="mlp.c_proj",
        when=_openai,
    ),
    BlockPattern(
        family="GPT-2",
        norm="ln_2",
        up="mlp.c_fc",
        act="mlp.act",
        down="mlp.c_proj",
        when=_gpt2,
    ),
    BlockPattern(
        family="nanoGPT",
        norm="ln_2",
        up="mlp.c_fc",
        act="mlp.gelu",
        down="mlp.c_proj",
    ),
    BlockPattern(
        family="StarCoder 2",
        norm="post_attention_layernorm",
        up="mlp.c_fc",
        act="mlp.act",
        down="mlp.c_proj",
    ),
    BlockPattern(
        family="GPT-J, CodeGen",
        norm="ln_1",
        norm_is_shared=True,
        up="mlp.fc_in",
        act="mlp.act",
        down="mlp.fc_out",
    ),
    BlockPattern(
        family="GPT-NeoX, Falcon (sequential), Persimmon",
        norm="post_attention_layernorm",
        up="mlp.dense_h_to_4h",
        act="mlp.act",
        down="mlp.dense_4h_to_h",
    ),
    BlockPattern(
        family="Falcon (two norms)",
        norm="ln_mlp",
        up="mlp.dense_h_to_4h",
        act="mlp.act",
        down="mlp.dense_4h_to_h",
    ),
    BlockPattern(
        family="Falcon (parallel)",
        norm="input_layernorm",
        norm_is_shared=True,
        up="mlp.dense_h_to_4h",
        act="mlp.act",
        down="mlp.dense_4h_to_h",
        when=_is_parallel,
    ),
    BlockPattern(
        family="Bloom",
        norm="post_attention_layernorm",
        up="mlp.dense_h_to_4h",
        act="mlp.gelu_impl",
        down="mlp.dense_4h_to_h",
        when=_bloom,
    ),
    BlockPattern(
        family="Bloom (residual of the norm)",
        norm="post_attention_layernorm",
        norm_is_shared=True,
        up="mlp.dense_h_to_4h",
        act="mlp.gelu_impl",
        down="mlp.dense_4h_to_h",
        when=_bloom_norm_is_shared,
    ),
    BlockPattern(
        family="MPT",
        norm="norm_2",
        up="ffn.up_proj",
        act="ffn.act",
        down="ffn.down_proj",
    ),
    BlockPattern(
        family="Llama, Qwen, Mistral (gated)",
        norm="post_attention_layernorm",
        gate="mlp.gate_proj",
        up="mlp.up_proj",
        act="mlp.act_fn",
        down="mlp.down_proj",
        when=_reads_post_attention_norm,
    ),
    BlockPattern(
        family="Gemma 2, Gemma 3 (gated)",
        norm="pre_feedforward_layernorm",
        gate="mlp.gate_proj",
        up="mlp.up_proj",
        act="mlp.act_fn",
        down="mlp.down_proj",
        when=_has_nothing_between,
    ),
    BlockPattern(
        family="OLMo 2 (gated)",
        gate="mlp.gate_proj",
        up="mlp.up_proj",
        act="mlp.act_fn",
        down="mlp.down_proj",
        when=_reads_norms_around,
    ),
    BlockPattern(
        family="Cohere, StableLM 2 (gated, parallel)",
        norm="input_layernorm",
        norm_is_shared=True,
        gate="mlp.gate_proj",
        up="mlp.up_proj",
        act="mlp.act_fn",
        down="mlp.down_proj",
        when=_is_parallel,
    ),
    BlockPattern(
        family="Phi-3, GLM (gate and up in one)",
        norm="post_attention_layernorm",
        gate_up="mlp.gate_up_proj",
        act="mlp.activation_fn",
        down="mlp.down_proj",
        when=_reads_post_attention_norm,
    ),
    BlockPattern(
        family="GLM-4 (gate and up in one)",
        norm="post_attention_layernorm",
        gate_up="mlp.gate_up_proj",
        act="mlp.activation_fn",
        down="mlp.down_proj",
        when=_glm4,
    ),
    BlockPattern(
        family="ModernBERT (gate and up in one)",
        norm="mlp_norm",
        gate_up="mlp.Wi",
        act="mlp.act",
        down="mlp.Wo",
        dropout="mlp.drop",
    ),
    BlockPattern(
        family="Moonshine decoder (gate and up in one)",
        norm="final_layernorm",
        gate_up="mlp.fc1",
        gate_first=False,
        act="mlp.activation_fn",
        down="mlp.fc2",
    ),
    BlockPattern(
        family="Phi-4 audio (gate and up in one)",
        norm="layer_norm",
        gate_up="gate_up_proj",
        gate_first=False,
        act="act_fn",
        down="down_proj",
        dropout="dropout",
    ),
    BlockPattern(
        family="Granite-MoE (shared expert)",
        norm="post_attention_layernorm",
        norm_is_shared=True,
        gate_up="shared_mlp.input_linear",
        act="shared_mlp.activation",
        down="shared_mlp.output_linear",
    ),
    BlockPattern(
        family="timm SwiGLU, GluMlp (gate and up in one)",
        norm="norm2",
        gate_up="mlp.fc1",
        act="mlp.act",
        down="mlp.fc2",
        dropout="mlp.drop1",
        when=_timm_gate_first,
    ),
    BlockPattern(
        family="timm GluMlp (gate last)",
        norm="norm2",
        gate_up="mlp.fc1",
        gate_first=False,
        act="mlp.act",
        down="mlp.fc2",
        dropout="mlp.drop1",
        when=_timm_gate_last,
    ),
    BlockPattern(
        family="DINOv3 (gated)",
        norm="norm2",
        gate="mlp.gate_proj",
        up="mlp.up_proj",
        act="mlp.act_fn",
        down="mlp.down_proj",
        when=_has_nothing_between,
    ),
    BlockPattern(
        family="DINOv3",
        norm="norm2",
        up="mlp.up_proj",
        act="mlp.act_fn",
        down="mlp.down_proj",
        when=_is_dinov3,
    ),
    BlockPattern(
        family="Nemotron, Arcee",
        norm="post_attention_layernorm",
        up="mlp.up_proj",
        act="mlp.act_fn",
        down="mlp.down_proj",
        when=_is_ungated,
    ),
    BlockPattern(
        family="nn.TransformerEncoderLayer (norm first)",
        norm="norm2",
        up="linear1",
        act="activation",
        down="linear2",
        dropout="dropout",
        when=_norm_first,
        sequence_first=_sequence_first,
        act_flags=_ENCODER_LAYER_FLAGS,
    ),
    BlockPattern(
        family="nn.TransformerEncoderLayer (post-norm)",
        norm="norm1",
        norm_is_shared=True,
        up="linear1",
        act="activation",
        down="linear2",
        dropout="dropout",
        when=_norm_last,
        sequence_first=_sequence_first,
        act_flags=_ENCODER_LAYER_FLAGS,
    ),
    BlockPattern(
        family="nn.TransformerDecoderLayer (norm first)",
        norm="norm3",
        up="linear1",
        act="activation",
        down="linear2",
        dropout="dropout",
        when=_decoder_norm_first,
        sequence_first=_sequence_first,
    ),
    BlockPattern(
        family="nn.TransformerDecoderLayer (post-norm)",
        norm="norm2",
        norm_is_shared=True,
        up="linear1",
        act="activation",
        down="linear2",
        dropout="dropout",
        when=_decoder_norm_last,
        sequence_first=_sequence_first,
    ),
    BlockPattern(
        family="timm ViT",
        norm="norm2",
        up="mlp.fc1",
        act="mlp.act",
        down="mlp.fc2",
        dropout="mlp.drop1",
        when=_timm_norm_first,
    ),
    BlockPattern(
        family="timm Swin v2, ResPostBlock",
        up="mlp.fc1",
        act="mlp.act",
        down="mlp.fc2",
        dropout="mlp.drop1",
        when=_timm_norm_last,
    ),
    BlockPattern(
        family="torchvision ViT",
        norm="ln_2",
        up="mlp.0",
        act="mlp.1",
        down="mlp.3",
        dropout="mlp.2",
    ),
    BlockPattern(
        family="x-transformers",
        up="ff.0.0",
        act="ff.0.1",
        down="ff.2",
        dropout="ff.1",
        when=_x_transformers,
    ),
    BlockPattern(
        family="Qwen-MoE (shared expert)",
        norm="post_attention_layernorm",
        norm_is_shared=True,
        gate="mlp.shared_expert.gate_proj",
        up="mlp.shared_expert.up_proj",
        act="mlp.shared_expert.act_fn",
        down="mlp.shared_expert.down_proj",
        when=_has_shared_expert,
    ),
    BlockPattern(
        family="DeepSeek, GLM-MoE (shared expert)",
        norm="post_attention_layernorm",
        norm_is_shared=True,
        gate="mlp.shared_experts.gate_proj",
        up="mlp.shared_experts.up_proj",
        act="mlp.shared_experts.act_fn",
        down="mlp.shared_experts.down_proj",
        when=_has_shared_expert,
    ),
    BlockPattern(
        family="Switch Transformers (experts)",
        up="wi",
        act="act",
        down="wo",
        dropout="dropout",
        is_expert=True,
    ),
    BlockPattern(
        family="NLLB-MoE (experts)",
        up="fc1",
        act="act",
        down="fc2",
        dropout="dropout",
        is_expert=True,
    ),
    BlockPattern(
        family="Mixtral (Transformers 4, experts)",
        gate="w1",
        up="w3",
        act="act_fn",
        down="w2",
        is_expert=True,
    ),
    BlockPattern(
        family="Qwen-MoE, DeepSeek (Transformers 4, experts)",
        gate="gate_proj",
        up="up_proj",
        act="act_fn",
        down="down_proj",
        is_expert=True,
    ),
    BlockPattern(
        family="Bamba, Jamba (gated)",
        norm="pre_ff_layernorm",
        gate="feed_forward.gate_proj",
        up="feed_forward.up_proj",
        act="feed_forward.act_fn",
        down="feed_forward.down_proj",
        when=_has_no_multiplier,
    ),
    BlockPattern(
        family="Llama 4 (gated)",
        norm="post_attention_layernorm",
        gate="feed_forward.gate_proj",
        up="feed_forward.up_proj",
        act="feed_forward.activation_fn",
        down="feed_forward.down_proj",
    ),
    BlockPattern(
        family="AIMv2 (gated)",
        norm="rms_norm2",
        gate="ffn.gate_proj",
        up="ffn.up_proj",
        act="ffn.act_fn",
        down="ffn.down_proj",
    ),
    BlockPattern(
        family="Pixtral (gated)",
        norm="ffn_norm",
        gate="feed_forward.gate_proj",
        up="feed_forward.up_proj",
        act="feed_forward.act_fn",
        down="feed_forward.down_proj",
    ),
    BlockPattern(
        family="AFMoE (gated)",
        norm="pre_mlp_layernorm",
        gate="mlp.gate_proj",
        up="mlp.up_proj",
        act="mlp.act_fn",
        down="mlp.down_proj",
        when=_has_nothing_between,
    ),
    BlockPattern(
        family="Moonshine, Canary (decoder)",
        norm="final_layernorm",
        up="mlp.fc1",
        act="mlp.activation_fn",
        down="mlp.fc2",
        when=_has_nothing_between,
    ),
    BlockPattern(
        family="Mimi, Moonshine, Llama 4 (vision)",
        norm="post_attention_layernorm",
        up="mlp.fc1",
        act="mlp.activation_fn",
        down="mlp.fc2",
        when=_reads_post_attention_norm,
    ),
    BlockPattern(
        family="Qwen 3 VL (vision)",
        norm="norm2",
        up="mlp.linear_fc1",
        act="mlp.act_fn",
        down="mlp.linear_fc2",
    ),
    BlockPattern(
        family="CvT",
        norm="layernorm_after",
        up="intermediate.dense",
        act="intermediate.activation",
        down="output.dense",
    ),
    BlockPattern(
        family="CTRL",
        norm="layernorm2",
        up="ffn.0",
        act="ffn.1",
        down="ffn.2",
    ),
    # Without the norm that they read: their tokens are a grid, and ZerothBias is for sequences.
    BlockPattern(
        family="ConvNeXT",
        up="pwconv1",
        act="act",
        down="pwconv2",
        when=_has_no_response_norm,
    ),
    BlockPattern(
        family="DINOv3 (ConvNeXT)",
        up="pointwise_conv1",
        act="activation_fn",
        down="pointwise_conv2",
    ),
    BlockPattern(
        family="SAM 2, EdgeTAM (memory fuser)",
        up="pointwise_conv1",
        act="activation",
        down="pointwise_conv2",
    ),
    BlockPattern(
        family="XLNet",
        up="layer_1",
        act="activation_function",
        down="layer_2",
    ),
    BlockPattern(
        family="PatchTST",
        up="ff.0",
        act="ff.1",
        down="ff.3",
        dropout="ff.2",
    ),
    BlockPattern(
        family="BERT's like",
        up="intermediate.dense",
        act="intermediate.intermediate_act_fn",
        down="output.dense",
    ),
    BlockPattern(
        family="GLM-4V (merger)",
        gate="gate_proj",
        up="up_proj",
        act="act_fn",
        down="down_proj",
        when=_is_merger,
    ),
    BlockPattern(
        family="FSMT, Deformable DETR",
        up="fc1",
        act="activation_fn",
        down="fc2",
        when=_has_attention,
    ),
    BlockPattern(
        family="BLIP-2 (Q-Former)",
        up="intermediate_query.dense",
        act="intermediate_query.intermediate_act_fn",
        down="output_query.dense",
    ),
    *_of_modules(),
    *_of_inline_modules(),
)
