"""Find the MLP blocks of a Transformer: the only file that knows foreign architectures.

One declarative table, `PATTERNS`, says for each family where the parts of a block hang below the
module that owns them. A new architecture is a new row; a user's own row goes in through
``find_blocks(model, patterns=[...])``.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from steppe.errors import BlocksNotFoundError

# Wrappers that hold one inner module under a name of their own, and leave its behaviour alone.
_WRAPPER_ATTRIBUTES = ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module")


@dataclass(frozen=True)
class BlockPattern:
    """Where the parts of an MLP block hang, as dotted paths below the module that owns them.

    Attributes:
        family: the name that errors and listings show.
        up: path of the first linear layer (for gated blocks, of the one that is not activated).
        act: path of the activation, a module or a plain function.
        down: path of the second linear layer.
        norm: path of the norm whose output the block reads, or None.
        gate: path of the activated linear layer of a gated block, or None.
        dropout: path of the dropout between activation and second layer, or None.
        norm_is_shared: others (the residual stream, attention) read the norm's output too.
        when: further condition on the owner, for families that differ by a flag only.
        sequence_first: says of the owner that tokens are dimension 0 of its input, not 1.
        act_flags: attributes of the owner that describe `act`, with what they must be when it
            changes.
    """

    family: str
    up: str
    act: str
    down: str
    norm: str | None = None
    gate: str | None = None
    dropout: str | None = None
    norm_is_shared: bool = False
    when: Callable[[Any], bool] | None = None
    sequence_first: Callable[[Any], bool] | None = None
    act_flags: tuple[tuple[str, object], ...] = ()

    def paths(self) -> list[str]:
        """Every path that must exist for the pattern to match."""
        return [p for p in (self.norm, self.gate, self.up, self.act, self.down) if p is not None]


@dataclass(frozen=True)
class Slot:
    """An attribute of a module that holds a part of a block and can be given another value."""

    module: nn.Module
    name: str


@dataclass(frozen=True)
class MLPBlock:
    """One MLP block: ``x → p = up(x) → a = act(p) → z = down(a)``, or ``a = act(gate(x)) ⊙ up(x)``.

    Attributes:
        name: dotted name of the owner below the unwrapped model (its class, if it is the model);
            unique, stable under wrapping.
        norm: the norm whose output the block reads, or None.
        up: first linear layer ``[d_model → d_hidden]``.
        gate: the activated linear layer of a gated block, or None.
        act: the activation, a module or a plain function.
        down: second linear layer ``[d_hidden → d_model]``.
        dropout: the dropout between activation and `down`, or None.
        d_model: width of the input.
        d_hidden: width of the hidden layer.
        family: name of the pattern that matched.
        norm_is_shared: whether others read the norm's output too.
        token_dim: dimension of the tokens in a batched input: 1 in ``[B, T, D]``, 0 in
            ``[T, B, D]``.
        act_slot: the attribute that holds `act`.
        act_flags: attributes of the owner to override when `act` changes.
        stack: what tells the token positions and the padding, or None.
    """

    name: str
    norm: nn.Module | None
    up: nn.Module
    gate: nn.Module | None
    act: Callable[[Tensor], Tensor]
    down: nn.Module
    dropout: nn.Module | None
    d_model: int
    d_hidden: int
    family: str = field(repr=False)
    norm_is_shared: bool = field(repr=False)
    token_dim: int = field(repr=False)
    act_slot: Slot = field(repr=False)
    act_flags: tuple[tuple[Slot, object], ...] = field(repr=False)
    stack: nn.Module | None = field(repr=False)

    @property
    def activated(self) -> nn.Module:
        """The linear layer whose output the activation reads: `gate`, or `up` if there is none."""
        return self.up if self.gate is None else self.gate


# nn.TransformerEncoderLayer decides by this attribute whether it may run its fused kernel;
# nn.TransformerDecoderLayer, whose norms have other places, does not have it.
_FUSED_FLAG = "activation_relu_or_gelu"
_ENCODER_LAYER_FLAGS = ((_FUSED_FLAG, 0),)


def _norm_first(layer: Any) -> bool:
    return hasattr(layer, _FUSED_FLAG) and layer.norm_first


def _norm_last(layer: Any) -> bool:
    return hasattr(layer, _FUSED_FLAG) and not layer.norm_first


def _sequence_first(layer: Any) -> bool:
    return not layer.self_attn.batch_first


def _opt_norm_first(layer: Any) -> bool:
    # BART and its kin have the same parts in another order, and no such flag.
    return getattr(layer, "do_layer_norm_before", None) is True


def _opt_norm_last(layer: Any) -> bool:
    return getattr(layer, "do_layer_norm_before", None) is False


# Where a layer has one of these, its post_attention_layernorm is not what the MLP reads (Gemma 2,
# OLMo 2, AFMoE) or not by the MLP alone (nomic-bert).
_OTHER_MLP_NORMS = (
    "pre_feedforward_layernorm",
    "post_feedforward_layernorm",
    "pre_mlp_layernorm",
    "post_mlp_layernorm",
)


def _reads_post_attention_norm(layer: Any) -> bool:
    return hasattr(layer, "input_layernorm") and not any(
        hasattr(layer, name) for name in _OTHER_MLP_NORMS
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
        family="ViT, I-JEPA",
        norm="layernorm_after",
        up="mlp.fc1",
        act="mlp.activation_fn",
        down="mlp.fc2",
    ),
    BlockPattern(
        family="ViT (Transformers 4)",
        norm="layernorm_after",
        up="intermediate.dense",
        act="intermediate.intermediate_act_fn",
        down="output.dense",
    ),
    BlockPattern(
        family="BERT (post-norm)",
        norm="attention.output.LayerNorm",
        norm_is_shared=True,
        up="intermediate.dense",
        act="intermediate.intermediate_act_fn",
        down="output.dense",
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
    BlockPattern(family="GPT-2", norm="ln_2", up="mlp.c_fc", act="mlp.act", down="mlp.c_proj"),
    BlockPattern(
        family="GPT-NeoX",
        norm="post_attention_layernorm",
        up="mlp.dense_h_to_4h",
        act="mlp.act",
        down="mlp.dense_4h_to_h",
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
        family="timm ViT",
        norm="norm2",
        up="mlp.fc1",
        act="mlp.act",
        down="mlp.fc2",
        dropout="mlp.drop1",
    ),
    BlockPattern(
        family="torchvision ViT",
        norm="ln_2",
        up="mlp.0",
        act="mlp.1",
        down="mlp.3",
        dropout="mlp.2",
    ),
)


def unwrap(model: nn.Module) -> nn.Module:
    """The user's own model below torch.compile, DDP and PEFT wrappers.

    Args:
        model: any module.

    Returns:
        The innermost model; `model` itself if nothing wraps it.
    """
    while True:
        if isinstance(
            model, nn.parallel.DistributedDataParallel | nn.parallel.DataParallel
        ) and isinstance(model.module, nn.Module):
            model = model.module
        elif hasattr(model, "peft_config") and callable(getattr(model, "get_base_model", None)):
            model = model.get_base_model()  # type: ignore[operator]  # a PeftModel's
        elif (inner := _wrapped(model)) is not None:
            model = inner
        else:
            return model


def find_blocks(
    model: nn.Module,
    where: Callable[[MLPBlock], bool] | None = None,
    patterns: Sequence[BlockPattern] = (),
) -> list[MLPBlock]:
    """Every MLP block of a model, in forward order.

    Sees through ``torch.compile``, DDP, PEFT and checkpoint wrappers. Names are those of the
    unwrapped model.

    Args:
        model: T5, ViT, I-JEPA, OPT, GPT-2, BERT, GPT-NeoX, Llama/Qwen, ``nn.TransformerEncoder``,
            timm's or torchvision's ViT, or anything of the same shape.
        where: keeps the blocks for which it is true; all by default.
        patterns: patterns of your own, tried before the built-in ones.

    Returns:
        The blocks. Never empty.

    Raises:
        BlocksNotFoundError: no module matches any pattern, or `where` refused all that do.

    Example:
        >>> layer = nn.TransformerEncoderLayer(8, 2, 32, norm_first=True, batch_first=True)
        >>> [(b.d_model, b.d_hidden) for b in find_blocks(layer)]
        [(8, 32)]
    """
    root = unwrap(model)
    tried = (*patterns, *PATTERNS)
    blocks: list[MLPBlock] = []
    seen: set[int] = set()
    for name, owner in root.named_modules():
        if _wrapped(owner) is not None:
            continue
        for pattern in tried:
            block = _match(root, name, owner, pattern)
            if block is not None and id(block.up) not in seen:
                seen.add(id(block.up))
                blocks.append(block)
                break
    if not blocks:
        looked_for = "\n".join(f"  {p.family}: {', '.join(p.paths())}" for p in tried)
        raise BlocksNotFoundError(
            f"no MLP block found in {type(root).__name__}. Looked for modules with these parts:\n"
            f"{looked_for}\n"
            "If your model names them otherwise, say so:\n"
            "  find_blocks(model, patterns=[BlockPattern(family='mine', norm='norm', up='fc_in',"
            " act='act', down='fc_out')])"
        )
    kept = [block for block in blocks if where is None or where(block)]
    if not kept:
        names = ", ".join(block.name for block in blocks)
        raise BlocksNotFoundError(
            f"`where` refused all {len(blocks)} MLP blocks of {type(root).__name__}: {names}"
        )
    return kept


def find_nested_tensor_encoders(model: nn.Module) -> list[nn.Module]:
    """The ``nn.TransformerEncoder`` modules, which may hand nested tensors to their layers.

    In evaluation they drop the padding that way, for a fused kernel that runs no hook; a layer with
    a hook then fails on the nested tensor. Whoever adds hooks sets ``use_nested_tensor`` to False.

    Args:
        model: any module.

    Returns:
        The encoders that have ``use_nested_tensor``, on or off.
    """
    return [
        module
        for module in unwrap(model).modules()
        if isinstance(module, nn.TransformerEncoder) and hasattr(module, "use_nested_tensor")
    ]


def linear_shape(module: nn.Module) -> tuple[int, int] | None:
    """Input and output width of a linear layer.

    Args:
        module: ``nn.Linear``, Transformers' ``Conv1D``, or a PEFT layer around one of them.

    Returns:
        ``(in, out)``, or None if the module is no linear layer.
    """
    base: Any = getattr(module, "base_layer", module)
    if hasattr(base, "in_features") and hasattr(base, "out_features"):
        return int(base.in_features), int(base.out_features)
    if hasattr(base, "nx") and hasattr(base, "nf"):
        return int(base.nx), int(base.nf)
    return None


def linear_weight(module: nn.Module) -> Tensor:
    """The weight of a linear layer, below a PEFT layer if there is one."""
    weight = getattr(module, "base_layer", module).weight
    assert isinstance(weight, Tensor)
    return weight


def max_tokens_of(model: nn.Module) -> int | None:
    """The longest sequence a Hugging Face model can see, by its config.

    Args:
        model: any module.

    Returns:
        Number of tokens, or None where the config sets no limit (T5's relative positions) or there
        is no config.
    """
    config = getattr(unwrap(model), "config", None)
    for key in ("max_position_embeddings", "n_positions"):
        limit = getattr(config, key, None)
        # T5 keeps `n_positions` from its tokenizer; its attention has no such limit.
        if isinstance(limit, int) and not hasattr(config, "relative_attention_num_buckets"):
            return limit
    image_size, patch_size = (getattr(config, key, None) for key in ("image_size", "patch_size"))
    if image_size is None or patch_size is None:
        return None
    height, width = _pair(image_size)
    patch_height, patch_width = _pair(patch_size)
    # One more than the patches: ViT's class token. Too many by one costs one row of zeros.
    return (height // patch_height) * (width // patch_width) + 1


def decoder_stack(model: nn.Module) -> nn.Module | None:
    """The decoder of an encoder-decoder model, whose padding is known from the labels alone."""
    root = unwrap(model)
    if not getattr(getattr(root, "config", None), "is_encoder_decoder", False):
        return None
    get_decoder: Any = getattr(root, "get_decoder", None)
    return get_decoder() if get_decoder is not None else None


def shifts_labels(model: nn.Module) -> bool:
    """Whether a Hugging Face model predicts each label from the tokens before it."""
    root = unwrap(model)
    if getattr(getattr(root, "config", None), "is_encoder_decoder", False):
        return False
    names = [kind.__name__ for kind in type(root).__mro__]
    return any("ForCausalLM" in name or "LMHeadModel" in name for name in names)


def forward_parameters(module: nn.Module) -> list[str]:
    """Names of the parameters of a module's ``forward``, in order."""
    return list(inspect.signature(module.forward).parameters)


def _match(root: nn.Module, name: str, owner: nn.Module, pattern: BlockPattern) -> MLPBlock | None:
    """The block that hangs below `owner` by `pattern`, or None."""
    act_slot = _slot(owner, pattern.act)
    up, down = _part(owner, pattern.up), _part(owner, pattern.down)
    norm = None if pattern.norm is None else _part(owner, pattern.norm)
    gate = None if pattern.gate is None else _part(owner, pattern.gate)
    if act_slot is None or not isinstance(up, nn.Module) or not isinstance(down, nn.Module):
        return None
    if pattern.norm is not None and not isinstance(norm, nn.Module):
        return None
    if pattern.gate is not None and not isinstance(gate, nn.Module):
        return None
    dropout = None if pattern.dropout is None else _part(owner, pattern.dropout)
    up_shape, down_shape = linear_shape(up), linear_shape(down)
    if up_shape is None or down_shape != up_shape[::-1]:
        return None
    if pattern.when is not None and not pattern.when(owner):
        return None
    sequence_first = pattern.sequence_first is not None and pattern.sequence_first(owner)
    return MLPBlock(
        name=_plain_name(name) or type(owner).__name__,
        norm=norm,
        up=up,
        gate=gate,
        act=see_through(getattr(act_slot.module, act_slot.name)),
        down=down,
        dropout=dropout if isinstance(dropout, nn.Module) else None,
        d_model=up_shape[0],
        d_hidden=up_shape[1],
        family=pattern.family,
        norm_is_shared=pattern.norm_is_shared,
        token_dim=0 if sequence_first else 1,
        act_slot=act_slot,
        act_flags=tuple((Slot(owner, flag), value) for flag, value in pattern.act_flags),
        stack=_stack_of(root, name),
    )


def _stack_of(root: nn.Module, name: str) -> nn.Module | None:
    """The deepest ancestor of a block whose forward is told about tokens."""
    for ancestor in _ancestors(root, name):
        told = forward_parameters(ancestor)
        if {"input_ids", "inputs_embeds", "src_key_padding_mask"} & set(told):
            return ancestor
    return None


def _ancestors(root: nn.Module, name: str) -> Iterator[nn.Module]:
    """The module `name` and those above it, deepest first."""
    while name:
        yield see_through(root.get_submodule(name))
        name = name.rpartition(".")[0]
    yield root


def _slot(owner: nn.Module, path: str) -> Slot | None:
    """The attribute at the end of a dotted path, or None if it is not there."""
    parent_path, _, name = path.rpartition(".")
    parent = _part(owner, parent_path)
    if isinstance(parent, nn.Module) and callable(getattr(parent, name, None)):
        return Slot(parent, name)
    return None


def _part(owner: nn.Module, path: str) -> Any:
    """What a dotted path leads to, below any wrapper, or None."""
    part: Any = owner
    for name in filter(None, path.split(".")):
        part = see_through(getattr(part, name, None))
    return part


def see_through(part: Any) -> Any:
    """What a wrapper holds, or `part` itself."""
    while isinstance(part, nn.Module) and (inner := _wrapped(part)) is not None:
        part = inner
    return part


def _wrapped(module: nn.Module) -> nn.Module | None:
    """The module that a wrapper holds, or None if `module` is no wrapper."""
    for name in _WRAPPER_ATTRIBUTES:
        inner = module._modules.get(name)
        if inner is not None:
            return inner
    return None


def _plain_name(name: str) -> str:
    """A module's name without the names of wrappers."""
    return ".".join(part for part in name.split(".") if part not in _WRAPPER_ATTRIBUTES)


def _pair(size: Any) -> tuple[int, int]:
    """Height and width from a number or a pair."""
    if isinstance(size, int):
        return size, size
    height, width = size
    return int(height), int(width)
