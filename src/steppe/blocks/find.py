"""Find the MLP blocks of a Transformer, by the table of `steppe.blocks.patterns`."""

from __future__ import annotations

import inspect
import warnings
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice, takewhile
from typing import Any

from torch import Tensor, nn

from steppe.blocks.candidates import Candidate, candidates, listed, share_of
from steppe.blocks.experts import Expert, experts_of
from steppe.blocks.fused import halves_of
from steppe.blocks.inline import Inline, inline_of
from steppe.blocks.linear import PartOfLinear, linear_shape
from steppe.blocks.pattern_values import pattern_noted_on
from steppe.blocks.patterns import OTHER_MLP_NORMS, PATTERNS, BlockPattern
from steppe.errors import BlocksNotFoundError, IncompleteCoverageWarning, SparsificationError
from steppe.record import config_of, unapplied

# Wrappers that hold one inner module under a name of their own, and leave its behaviour alone.
_WRAPPER_ATTRIBUTES = ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module")


# Norms whose output a layer's router and experts read, where none of the others is beside them.
_EXPERTS_NORMS = (
    *("post_attention_layernorm", "pre_ff_layernorm", "ffn_norm", "layer_norm", "ff_layer_norm"),
)

# Parameters of the forward of what is told about tokens, and of a tower that makes its own.
_TOKENS = {"input_ids", "inputs_embeds", "src_key_padding_mask"}
_OTHER_INPUTS = {"pixel_values", "input_features", "input_values"}


# What was said of each model: once for each function that the user calls is enough.
_said: weakref.WeakKeyDictionary[nn.Module, set[str]] = weakref.WeakKeyDictionary()


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
        dropout_slot: the attribute with its probability, where a function drops; or None.
        d_model: width of the input.
        d_hidden: width of the hidden layer.
        family: name of the pattern that matched.
        norm_is_shared: whether others read the norm's output too.
        token_dim: dimension of the tokens in a batched input: 1 in ``[B, T, D]``, 0 in
            ``[T, B, D]``.
        act_slot: the attribute that holds `act`.
        act_flags: attributes of the owner to override when `act` changes.
        stack: what tells the token positions and the padding, or None.
        routed_in: of an expert, the module that routes its tokens to it and others; None for what
            is no expert.
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
    routed_in: nn.Module | None = field(repr=False, default=None)
    dropout_slot: Slot | None = field(repr=False, default=None)

    @property
    def is_routed(self) -> bool:
        """Whether the block is an expert: its tokens are those that are routed to it."""
        return self.routed_in is not None

    @property
    def layers(self) -> list[nn.Module]:
        """The linear layers: `gate` if there is one, `up`, `down`."""
        return [layer for layer in (self.gate, self.up, self.down) if layer is not None]

    @property
    def activated(self) -> nn.Module:
        """The linear layer whose output the activation reads: `gate`, or `up` if there is none."""
        return self.up if self.gate is None else self.gate


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


@dataclass(frozen=True)
class Coverage:
    """What of a model its blocks cover.

    Attributes:
        blocks: the blocks, in forward order; empty if there are none.
        left: what looks like an MLP and is in no block.
        share: of the parameters of all of these that are in blocks, in [0, 1].
        excluded: blocks that `where` has left out.
    """

    blocks: list[MLPBlock]
    left: list[Candidate]
    share: float
    excluded: list[MLPBlock] = field(default_factory=list)

    def not_covered(self) -> tuple[str, ...]:
        """A line for each kind of what is left, and one for each block that was left out."""
        kinds = tuple(line.strip() for line in listed(self.left).splitlines())
        return (*kinds, *(f"{block.name}: left out by `where`" for block in self.excluded))

    def __str__(self) -> str:
        """The share, and what is not covered."""
        lines = "".join(f"\n  {line}" for line in self.not_covered())
        return f"{self.share:.0%} of the MLP parameters are in {len(self.blocks)} blocks{lines}"


class Blocks(list[MLPBlock]):
    """Blocks of a model, in forward order.

    Attributes:
        coverage: what of the model they cover, and what is left.
    """

    def __init__(self, found: Coverage) -> None:
        super().__init__(found.blocks)
        self.coverage = found


def coverage(
    model: nn.Module,
    patterns: Sequence[BlockPattern] = (),
    where: Callable[[MLPBlock], bool] | None = None,
) -> Coverage:
    """Which MLPs of a model are found, and which are not; also of a model on the meta device.

    Args:
        model: as of `find_blocks`.
        patterns: as there.
        where: as there.

    Example:
        >>> coverage(nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 8))).left[0].pattern()
        "BlockPattern(family='mine', up='0', act='1', down='2')"
    """
    root = unwrap(model)
    found = [block for _, _, _, block in matches(root, patterns)]
    blocks = [block for block in found if where is None or where(block)]
    kept = {id(block) for block in blocks}
    excluded = [block for block in found if id(block) not in kept]
    layers, others = ([la for block in some for la in block.layers] for some in (blocks, excluded))
    left = candidates(root, [*layers, *others])
    return Coverage(blocks, left, share_of(layers, left, others), excluded)


def find_blocks(
    model: nn.Module,
    where: Callable[[MLPBlock], bool] | None = None,
    patterns: Sequence[BlockPattern] = (),
    strict: bool = False,
) -> Blocks:
    """Every MLP block of a model, in forward order.

    Sees through ``torch.compile``, DDP, PEFT and checkpoint wrappers. Names are those of the
    unwrapped model. Warns, once a model, of what looks like an MLP and is not among them; what
    `where` leaves out it was told to, ``print(find_blocks(model, where=...).coverage)`` shows it.

    Args:
        model: T5, ViT, I-JEPA, OPT, GPT-2, BERT, GPT-NeoX, Llama/Qwen, ``nn.TransformerEncoder``,
            timm's or torchvision's ViT, or anything of the same shape.
        where: keeps the blocks for which it is true; all by default.
        patterns: patterns of your own, tried first; then those that `sparsify_`, `accelerate_`,
            `watch` or `measure` was given for this model, then the built-in ones.
        strict: refuse a model of which a part is not found, instead of warning.

    Returns:
        The blocks, a list that says in its ``coverage`` what is left. Never empty.

    Raises:
        BlocksNotFoundError: no module matches any pattern, or `where` refused all that do, or with
            `strict` something that looks like an MLP is not found.
        SparsificationError: the config has the record of plug-ins that the model does not have.

    Example:
        >>> layer = nn.TransformerEncoderLayer(8, 2, 32, norm_first=True, batch_first=True)
        >>> [(b.d_model, b.d_hidden) for b in find_blocks(layer)]
        [(8, 32)]
    """
    return blocks_for("find_blocks", model, where, patterns, strict)


def blocks_for(
    verb: str,
    model: nn.Module,
    where: Callable[[MLPBlock], bool] | None = None,
    patterns: Sequence[BlockPattern] = (),
    strict: bool = False,
) -> Blocks:
    """`find_blocks` for a function that the user has called, which warns in its own name.

    Args:
        verb: the function.
        model: as of `find_blocks`, as all that follows.
        where: which blocks.
        patterns: of the user's own.
        strict: refuse instead of warning.
    """
    root = unwrap(model)
    _refuse_record(root)
    found = coverage(root, patterns, where)
    if not found.blocks and not found.excluded:
        raise BlocksNotFoundError(_nothing_found(root, patterns, found.left))
    if not found.blocks:
        names = ", ".join(block.name for block in found.excluded)
        raise BlocksNotFoundError(
            f"`where` refused all {len(found.excluded)} MLP blocks of {type(root).__name__}:"
            f" {names}"
        )
    if found.left:
        number = len(found.blocks) + len(found.excluded)
        covered = [la for block in (*found.blocks, *found.excluded) for la in block.layers]
        partly = (
            f"{verb}: {share_of(covered, found.left):.0%} of the MLP parameters of"
            f" {type(root).__name__} are in the {number} blocks that were found. Not"
            f" covered:\n{listed(found.left)}\n"
            f"To cover what a pattern can name:\n{listed(found.left, Candidate.pattern)}"
        )
        if strict:
            raise BlocksNotFoundError(partly)
        said = _said.setdefault(root, set())
        if partly not in said:
            said.add(partly)
            warnings.warn(partly, IncompleteCoverageWarning, stacklevel=3)
    return Blocks(found)


def _refuse_record(root: nn.Module) -> None:
    """Refuse a model that is not what its config says, as a loader without steppe leaves it."""
    model = unapplied(root)
    if model is not None:
        raise SparsificationError(
            f"{type(model).__name__}: its config has the record of plug-ins that the model does not"
            " have, so it is another function than the one that was saved, or it was made of the"
            " config of one with plug-ins. Load the folder with steppe.load_pretrained(...); for a"
            " plain model, first: steppe.restore_(model)"
        )


def matches(
    root: nn.Module, patterns: Sequence[BlockPattern]
) -> Iterator[tuple[str, nn.Module, BlockPattern | None, MLPBlock]]:
    """Every block that a pattern names, in forward order.

    Args:
        root: the model.
        patterns: tried first; then what is noted on an owner, then the built-in ones.

    Yields:
        Name of the owner, the owner, the pattern that matched (None where a block is found without
        one), the block.
    """
    seen: set[int] = set()
    for name, owner in root.named_modules():
        if _wrapped(owner) is not None or isinstance(owner, Expert | PartOfLinear | Inline):
            continue
        for expert in _expert_blocks(root, name, owner):
            seen.add(id(expert.up))
            yield name, owner, None, expert
        if not owner._modules:
            continue
        for pattern in (*patterns, *pattern_noted_on(owner), *PATTERNS):
            if pattern.down.partition(".")[0] not in owner._modules:
                continue  # as nearly all: of a large model this is what takes the time
            block = _match(root, name, owner, pattern)
            if block is not None and id(block.up) not in seen:
                seen.add(id(block.up))
                yield name, owner, pattern, block
                break


def _nothing_found(
    root: nn.Module, patterns: Sequence[BlockPattern], left: Sequence[Candidate]
) -> str:
    """The message where no pattern matches: what there is, and what to type."""
    own = "".join(f"\n  your pattern {one.family!r}: {_missing(root, one)}" for one in patterns)
    if own:
        own = f" None of your patterns matched:{own}"
    found = f"no MLP block found in {type(root).__name__}.{own}"
    if not left:
        return (
            f"{found}\nNothing in it looks like an MLP: a linear layer D → F and one F → D, with"
            " F > D, in one module or in two of one module. If it has one, name it:\n"
            "  find_blocks(model, patterns=[BlockPattern(family='mine', up='fc_in', act='act',"
            " down='fc_out')])"
        )
    return (
        f"{found}\nThese look like MLPs:\n{listed(left)}\n"
        f"If they are, find_blocks(model, patterns=[...]) with\n{listed(left, Candidate.pattern)}\n"
        "and norm='...', the path of the norm whose output it reads, for RestrictedNorm."
    )


def _missing(root: nn.Module, pattern: BlockPattern) -> str:
    """Why a pattern matches nowhere: the part that the owner which has most of them lacks."""
    paths = pattern.paths()
    best, name = max(
        (
            (sum(_slot(owner, path) is not None for path in paths), -depth, name)
            for depth, (name, owner) in enumerate(root.named_modules())
        ),
    )[::2]
    owner = root.get_submodule(name)
    where = name or "the model itself"
    if best == 0:
        return f"no module has any of {', '.join(paths)}"
    lacking = [path for path in paths if _slot(owner, path) is None]
    if lacking:
        return f"{where} has no {', '.join(lacking)}"
    if pattern.when is not None and not pattern.when(owner):
        return f"{where} has all parts, but `when` says no"
    shapes = {
        path: linear_shape(_part(owner, path))
        for path in (pattern.gate_up or pattern.up, pattern.down)
    }
    return f"in {where}, up and down are no D → F and F → D: {shapes}"


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


def max_tokens_of(model: nn.Module) -> int | None:
    """The longest sequence a Hugging Face model can see, by its config.

    Args:
        model: any module.

    Returns:
        Number of tokens, or None where the config sets no limit (T5's relative positions) or there
        is no config.
    """
    config = config_of(stock_model(model))
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


def stock_model(model: nn.Module) -> nn.Module:
    """The Hugging Face model that knows what the others are asked: its config, what labels mean.

    Args:
        model: any module.

    Returns:
        What is below known wrappers, if it has a config or holds no Hugging Face model or several;
        else the one that it holds (a LightningModule, an ``AveragedModel``).
    """
    root = unwrap(model)
    if config_of(root) is not None:
        return root
    found = list(_outermost_models(root))
    return found[0] if len(found) == 1 else root


def _outermost_models(root: nn.Module) -> Iterator[nn.Module]:
    """The Hugging Face models within a module that are in no other one."""
    for child in root.children():
        if _is_model(child):
            yield child
        else:
            yield from _outermost_models(child)


def _is_model(module: nn.Module) -> bool:
    """Whether a module is a whole Hugging Face model."""
    return config_of(module) is not None and hasattr(type(module), "save_pretrained")


def decoders(model: nn.Module) -> Iterator[tuple[nn.Module, set[nn.Module]]]:
    """Encoder-decoder models within a model, the innermost last, each with its decoder's modules.

    A decoder's padding is known from the labels of the model alone. What some models call their
    decoder holds the encoder too, or is it.
    """
    for module in unwrap(model).modules():
        get_decoder: Any = getattr(module, "get_decoder", None)
        if get_decoder is not None and getattr(config_of(module), "is_encoder_decoder", False):
            parts = [getattr(module, name, None) for name in ("get_decoder", "get_encoder")]
            decoder, encoder = (part() if callable(part) else None for part in parts)
            if isinstance(decoder, nn.Module) and decoder is not module:
                inside = set(encoder.modules()) if isinstance(encoder, nn.Module) else set()
                yield module, set(decoder.modules()) - inside


def shifts_labels(model: nn.Module) -> bool:
    """Whether a Hugging Face model, or the one in a wrapper, predicts a label from those before."""
    root = stock_model(model)
    if getattr(config_of(root), "is_encoder_decoder", False):
        return False
    names = [kind.__name__ for kind in type(root).__mro__]
    if any("ForCausalLM" in name or "LMHeadModel" in name for name in names):
        return True
    # LLaVA and its kin are of a text decoder; Pix2Struct, whose config does not say so, is of two.
    conditional = any("ForConditionalGeneration" in name for name in names)
    return conditional and "decoder_input_ids" not in forward_parameters(root)


def forward_parameters(module: nn.Module) -> list[str]:
    """Names of the parameters of a module's ``forward``, in order."""
    return list(inspect.signature(module.forward).parameters)


def _match(root: nn.Module, name: str, owner: nn.Module, pattern: BlockPattern) -> MLPBlock | None:
    """The block that hangs below `owner` by `pattern`, or None."""
    act_slot = _slot(owner, pattern.act) if pattern.act else None
    down = _part(owner, pattern.down)
    norm = None if pattern.norm is None else _part(owner, pattern.norm)
    if pattern.gate_up is None:
        up = _part(owner, pattern.up)
        gate = None if pattern.gate is None else _part(owner, pattern.gate)
    else:
        fused = _part(owner, pattern.gate_up)
        halves = halves_of(fused) if isinstance(fused, nn.Module) else None
        if halves is None:
            return None
        gate, up = halves.both if pattern.gate_first else halves.both[::-1]
    if not isinstance(up, nn.Module) or not isinstance(down, nn.Module):
        return None
    if pattern.act and act_slot is None:
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
    if act_slot is None:
        mlp = _part(owner, _shared_path(pattern))
        inline = inline_of(mlp, gate, up, down)
        if inline is None:
            return None
        act_slot = Slot(inline, "act")
    router = _router_of(root, name) if pattern.is_expert else None
    if pattern.is_expert and router is None:
        return None
    if router is not None:
        norm = _experts_norm(root, name.rpartition(".")[0])
    dropout_slot = None
    if pattern.dropout and isinstance(dropout, float):
        dropout_slot = Slot(*_parent(owner, pattern.dropout))
    sequence_first = pattern.sequence_first is not None and pattern.sequence_first(owner)
    return MLPBlock(
        name=owner_name(name, owner),
        norm=norm,
        up=up,
        gate=gate,
        act=see_through(getattr(act_slot.module, act_slot.name)),
        down=down,
        dropout=dropout if isinstance(dropout, nn.Module) else None,
        d_model=up_shape[0],
        d_hidden=up_shape[1],
        family=pattern.family,
        norm_is_shared=pattern.norm_is_shared or (router is not None and norm is not None),
        token_dim=0 if sequence_first else 1,
        act_slot=act_slot,
        act_flags=tuple((Slot(owner, flag), value) for flag, value in pattern.act_flags),
        stack=_stack_of(root, name),
        routed_in=router,
        dropout_slot=dropout_slot,
    )


def _expert_blocks(root: nn.Module, name: str, owner: nn.Module) -> Iterator[MLPBlock]:
    """The blocks of the experts that `owner` has the weights of, if it has any."""
    experts = experts_of(owner)
    if experts is None:
        return
    stack = _stack_of(root, name)
    norm = _experts_norm(root, name)
    for number, expert in enumerate(experts.each):
        act_slot = Slot(expert, "act")
        yield MLPBlock(
            name=f"{owner_name(name, owner)}.{number}",
            norm=norm,
            up=expert.up,
            gate=expert.gate,
            act=see_through(getattr(act_slot.module, act_slot.name)),
            down=expert.down,
            dropout=None,
            d_model=expert.width,
            d_hidden=expert.hidden,
            family=f"experts of {type(owner).__name__}",
            norm_is_shared=norm is not None,  # by the router
            token_dim=1,
            act_slot=act_slot,
            act_flags=(),
            stack=stack,
            routed_in=owner,
        )


def _experts_norm(root: nn.Module, name: str) -> nn.Module | None:
    """The norm whose output the experts in a module read, with the router; None if unknown."""
    norms = (
        norm
        for ancestor in islice(_ancestors(root, name), 1, 3)
        if not any(hasattr(ancestor, other) for other in OTHER_MLP_NORMS)
        for path in _EXPERTS_NORMS
        if isinstance(norm := _part(ancestor, path), nn.Module)
    )
    return next(norms, None)


def _router_of(root: nn.Module, name: str) -> nn.Module | None:
    """The module that runs the list of modules that `name` is in; None if it is in none."""
    parent, _, _ = name.rpartition(".")
    listed = root.get_submodule(parent)
    if not isinstance(listed, nn.ModuleList | nn.ModuleDict) or not parent:
        return None
    if type(listed).forward not in (nn.ModuleList.forward, nn.ModuleDict.forward):
        return listed
    return root.get_submodule(parent.rpartition(".")[0])


def _shared_path(pattern: BlockPattern) -> str:
    """Path of the innermost module that has the layers of a pattern."""
    paths = [path.split(".") for path in (pattern.gate_up or pattern.up, pattern.down)]
    shared = takewhile(lambda level: len(set(level)) == 1, zip(*paths, strict=False))
    return ".".join(level[0] for level in shared)


def _stack_of(root: nn.Module, name: str) -> nn.Module | None:
    """The deepest ancestor of a block whose forward is told about tokens; None in other towers."""
    for ancestor in _ancestors(root, name):
        told = set(forward_parameters(ancestor))
        if _TOKENS & told:
            return ancestor
        # The text and the padding that modules above are told of are not a tower's own.
        if _OTHER_INPUTS & told or (ancestor is not root and _is_model(ancestor)):
            return None
    return None


def _ancestors(root: nn.Module, name: str) -> Iterator[nn.Module]:
    """The module `name` and those above it, deepest first."""
    while name:
        yield see_through(root.get_submodule(name))
        name = name.rpartition(".")[0]
    yield root


def _slot(owner: nn.Module, path: str) -> Slot | None:
    """The attribute at the end of a dotted path, or None if nothing that can be called is there."""
    parent, name = _parent(owner, path)
    if isinstance(parent, nn.Module) and callable(getattr(parent, name, None)):
        return Slot(parent, name)
    return None


def _parent(owner: nn.Module, path: str) -> tuple[Any, str]:
    """What has the attribute at the end of a dotted path, or None, and the attribute's name."""
    above, _, name = path.rpartition(".")
    return _part(owner, above), name


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


def owner_name(name: str, owner: nn.Module) -> str:
    """The name of a block, by that of its owner."""
    return _plain_name(name) or type(owner).__name__


def _plain_name(name: str) -> str:
    """A module's name without the names of wrappers."""
    return ".".join(part for part in name.split(".") if part not in _WRAPPER_ATTRIBUTES)


def _pair(size: Any) -> tuple[int, int]:
    """Height and width from a number or a pair."""
    if isinstance(size, int):
        return size, size
    height, width = size
    return int(height), int(width)
