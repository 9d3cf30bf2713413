"""Conditions on the owner of a block that rows of several families share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

OTHER_MLP_NORMS = (
    "pre_feedforward_layernorm",
    "post_feedforward_layernorm",
    "pre_mlp_layernorm",
    "post_mlp_layernorm",
)
"""In a layer with one of these the MLP does not read `post_attention_layernorm` (Gemma 2, OLMo 2,
AFMoE), or others read it too (nomic-bert)."""

# In these layers the norm follows the MLP, or others stand around it: the MLP reads no norm.
_NO_NORM = ("Swinv2", "SwinTransformerV2", "ResPostBlock", "MobileBert", "FFNLayer")
# Numbers by which a module changes the tensor between its layers: DeepSeek V4; Falcon H1, Gemma 3n.
CLAMPS = ("limit", "swiglu_limit")
"""Attributes that bound the hidden tensor, as DeepSeek V4 does."""
_BENT = (*CLAMPS, "gate_multiplier", "activation_sparsity")


def has(layer: Any, name: str) -> bool:
    """Whether a layer has an attribute that is not None."""
    return getattr(layer, name, None) is not None


def is_named(layer: Any, *prefixes: str) -> bool:
    """Whether the class of a layer, or a base of it, has a name that begins with a prefix."""
    return any(kind.__name__.startswith(prefixes) for kind in type(layer).__mro__)


def has_no_norm(layer: Any) -> bool:
    """Whether no norm's whole output goes to the MLP."""
    # A Q-Former's two MLPs read a part each of the norm's output.
    return is_named(layer, *_NO_NORM) or has(layer, "intermediate_query")


def reads_a_norm(layer: Any) -> bool:
    """The opposite of `has_no_norm`."""
    return not has_no_norm(layer)


def has_nothing_between(layer: Any) -> bool:
    """Whether nothing stands between the activation and the last layer of ``layer.mlp``.

    No norm (BitNet, timm), no top-k (Gemma 3n), no convolution (SegFormer), no clamp (DeepSeek V4).
    """
    mlp = layer.mlp
    norm = getattr(mlp, "norm", None)
    return not (
        has(mlp, "ffn_sub_norm")
        or any("conv" in name for name, _ in mlp.named_children())
        or (norm is not None and type(norm).__name__ != "Identity")
        or getattr(mlp, "activation_sparsity", 0.0) > 0.0
        or any(has(mlp, name) for name in CLAMPS)
    )


def reads_post_attention_norm(layer: Any) -> bool:
    """Whether the MLP reads `post_attention_layernorm`, with nothing between its own layers."""
    return (
        has(layer, "input_layernorm")
        and not any(has(layer, name) for name in OTHER_MLP_NORMS)
        and has_nothing_between(layer)
    )


def is_parallel(layer: Any) -> bool:
    """Whether the MLP reads the norm that attention reads."""
    return not any(
        has(layer, name) for name in ("post_attention_layernorm", "ln_mlp", *OTHER_MLP_NORMS)
    )


def is_bent(module: Any) -> bool:
    """Whether a module scales, bounds or thins out the tensor between its layers."""
    return any(has(module, name) for name in _BENT)


def is_no_more_than(*paths: str) -> Callable[[Any], bool]:
    """The condition that all parameters of a module are in its parts, so none stands between."""
    parts = {path.partition(".")[0] for path in paths}

    def when(module: Any) -> bool:
        names = (name.partition(".")[0] for name, _ in module.named_parameters())
        return not is_bent(module) and parts.issuperset(names)

    return when
