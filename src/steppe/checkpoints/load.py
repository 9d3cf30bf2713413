"""Load a checkpoint of a sparsified model: the stock model, and what steppe did to it.

``save_pretrained`` needs no help: the plug-ins' tensors are in the state dict, and what was done
stands in the config. Loading reads safetensors only; nothing is ever unpickled.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from steppe.blocks.coverage import coverage
from steppe.blocks.pattern_values import fault_in
from steppe.blocks.patterns import BlockPattern
from steppe.blocks.wrappers import owner_name, unwrap
from steppe.checkpoints.weights import Weights, find, read_json
from steppe.errors import CheckpointError, SteppeError
from steppe.plugins.base import Plugin, plugin_from_settings
from steppe.plugins.sparsify import PLUGINS, advance_, sparsification_of, sparsify_
from steppe.plugins.zeroth_bias import PARAMETER_NAME, ZerothBias
from steppe.record import RECORD_KEY, RECORD_VERSION, erase_records
from steppe.schema import fault_of
from steppe.surgery.pattern_notes import Noted, forget_patterns_, note_record_

_CONFIG = "config.json"
ADAPTER_RECORD = "steppe_config.json"  # beside an adapter of PEFT


@dataclass(frozen=True)
class Own:
    """What of the user's own a record may name.

    Attributes:
        patterns: go before those of the record.
        plugins: classes of plug-ins.
    """

    patterns: Sequence[BlockPattern] = ()
    plugins: Sequence[type[Plugin]] = ()


# What `load_pretrained` was given, for the loader that it calls.
_current_own: ContextVar[Own | None] = ContextVar("current_own", default=None)


@contextmanager
def _told(own: Own) -> Iterator[None]:
    """Within it, `current_own` is `own`."""
    token = _current_own.set(own)
    try:
        yield
    finally:
        _current_own.reset(token)


def current_own() -> Own:
    """What the `load_pretrained` around this call was given."""
    return _current_own.get() or Own()


@dataclass(frozen=True)
class Record:
    """What a config says that was done.

    Attributes:
        applied: the plug-ins with the names of their blocks.
        progress: share of the run that was done, in [0, 1].
        patterns: of the user's, as plain values, with the names of the blocks that they match.
    """

    applied: list[tuple[Plugin, list[str]]]
    progress: float
    patterns: list[Noted]

    @property
    def blocks(self) -> set[str]:
        """The names of all blocks."""
        return {name for _, names in self.applied for name in names}


@dataclass(frozen=True)
class _RecordFields:
    """What every record has, and what one with patterns of the user's has."""

    version: int
    progress: float
    plugins: list[dict[str, Any]]
    patterns: list[dict[str, Any]] = field(default_factory=list)


_FIELDS = tuple(one.name for one in fields(_RecordFields))


def load_pretrained(
    load: Callable[[str], nn.Module],
    folder: str | Path,
    patterns: Sequence[BlockPattern] = (),
    plugins: Sequence[type[Plugin]] = (),
) -> nn.Module:
    """A model as ``save_pretrained`` saved it after `sparsify_`, plug-ins and schedules included.

    Args:
        load: loads the stock model, e.g. ``AutoModelForCausalLM.from_pretrained``; options go in
            with ``functools.partial(AutoModelForCausalLM.from_pretrained, dtype=torch.bfloat16)``.
        folder: the folder that was saved, or a hub id. If an adapter of PEFT is in it, `load` puts
            that on a model: ``lambda folder: PeftModel.from_pretrained(base, folder)``.
        patterns: patterns of your own, which go before those that the folder has of `sparsify_`.
        plugins: classes of plug-ins of your own that it was given.

    Returns:
        The model, in the mode that `load` left it in.

    Raises:
        CheckpointError: no or a corrupt ``config.json``, a model without plug-ins, another model's
            record, or tensors that are missing or of another shape.
        ValueError: a plug-in of your own has the key of another.

    Example:
        ``model = load_pretrained(AutoModelForCausalLM.from_pretrained, "out")``
    """
    folder, own = str(folder), Own(tuple(patterns), tuple(plugins))
    if find(folder, _CONFIG) is None and find(folder, ADAPTER_RECORD) is not None:
        with _told(own):
            return load(folder)  # by PEFT, which steppe has taught to do the rest
    record = _read_record(folder, own)
    weights = Weights.of(folder)
    with _told(own), _held_load_reports() as reports:
        model = load(folder)
    root = unwrap(model)
    # Of a folder without marks, or by a loader of the user's, the model comes without plug-ins.
    is_plain = sparsification_of(root) is None
    left = apply_record_(root, record, weights, own) if is_plain else set()
    for report in reports:
        # It calls our tensors unexpected there; let it speak if there is anything else.
        if not is_plain or left or "MISSING" in report.getMessage():
            logging.getLogger(report.name).handle(report)
    return model


def apply_record_(
    root: nn.Module, record: Record, weights: Weights, own: Own, by_file_names: bool = True
) -> set[str]:
    """Do to a stock model what a record says, and fill what that adds.

    Args:
        root: the model, with the weights of its own.
        record: of its config.
        weights: of its checkpoint.
        own: what the record may name.
        by_file_names: whether the names in the files are those of ``save_pretrained``, and not the
            model's.

    Returns:
        The names of tensors in the checkpoint that the model does not have.

    Raises:
        CheckpointError: the record is another model's, or a tensor is missing or of another shape.
    """
    erase_records(root)
    before = set(root.state_dict())
    to_model = _renaming(root, record, own.patterns, weights.place)
    try:
        _refuse_longer_biases(root, record, weights)
        for plugin, names in record.applied:
            _sparsify_blocks(root, plugin, {to_model(name) for name in names}, own.patterns)
    except SteppeError as error:
        raise CheckpointError(f"{weights.place}: the record cannot be applied: {error}") from None
    advance_(root, record.progress)
    state = root.state_dict()
    saved_as = _saved_names(root, state) if by_file_names else {name: name for name in state}
    in_file = {to_model(name): name for name in weights.files}
    ours = {saved_as[name]: state[name] for name in state if name not in before}
    weights.copy_into(ours, in_file)
    return set(in_file) - {*saved_as.values(), *state}


def load_weights_(model: nn.Module, folder: str | Path) -> nn.Module:
    """Fill all of a model's tensors from a folder that its own ``save_pretrained`` wrote.

    Names are translated as ``from_pretrained`` does it: Transformers 5 saves some architectures
    (ViT) under the names of older versions, and ``load_state_dict`` would pass over those.

    Args:
        model: of the same class, with the same plug-ins.
        folder: the folder.

    Returns:
        The model.

    Raises:
        CheckpointError: a tensor is missing, of another shape, or damaged.
    """
    root = unwrap(model)
    weights = Weights.of(str(folder))
    state = root.state_dict()
    saved_as = _saved_names(root, state)
    held = {state[name].data_ptr() for name in state if saved_as[name] in weights.files}
    # Of tied tensors one is saved.
    wanted = {
        saved_as[name]: tensor
        for name, tensor in state.items()
        if saved_as[name] in weights.files or tensor.data_ptr() not in held
    }
    weights.copy_into(wanted, {})
    return model


def parse_record(record: Any, path: str, own: Own) -> Record:
    """A record of the JSON values that stand in a config.

    Args:
        record: the values.
        path: what errors name.
        own: the plug-ins that it may name besides steppe's.

    Raises:
        CheckpointError: it is damaged, or of a newer steppe.
        ValueError: a plug-in of the user's has the key of another.
    """
    values = record if isinstance(record, dict) else {}
    values = {key: values[key] for key in _FIELDS if key in values}
    fault = fault_of(_RecordFields, values)
    if fault is not None:
        raise CheckpointError(f"{path}: the record under {RECORD_KEY!r} is damaged ({fault})")
    version, progress = values["version"], float(values["progress"])
    if version != RECORD_VERSION or not 0.0 <= progress <= 1.0:
        raise CheckpointError(
            f"{path}: expected a record of version {RECORD_VERSION} with progress in 0 … 1, got"
            f" version {version!r}, progress {progress}. A newer steppe may have written it."
        )
    plugins = _with_blocks(values["plugins"], path)
    patterns = _with_blocks(values.get("patterns", []), path)
    if not plugins:
        raise CheckpointError(f"{path}: the record under {RECORD_KEY!r} is damaged (no plug-in)")
    noted = [name for _, names in patterns for name in names]
    if len(set(noted)) < len(noted):
        raise CheckpointError(
            f"{path}: the record under {RECORD_KEY!r} is damaged (two patterns for one block)"
        )
    for pattern, _ in patterns:
        fault = fault_in(pattern)
        if fault is not None:
            raise CheckpointError(
                f"{path}: a pattern in the record under {RECORD_KEY!r} is damaged ({fault})"
            )
    kinds = (*PLUGINS, *own.plugins)
    for kind in own.plugins:
        if [one.key for one in kinds].count(kind.key) > 1:
            raise ValueError(
                f"{kind.__name__}: another plug-in has the key {kind.key!r}. Give it its own."
            )
    applied = [(plugin_from_settings(entry, kinds), names) for entry, names in plugins]
    return Record(applied, progress, patterns)


def _with_blocks(entries: Sequence[Mapping[str, Any]], path: str) -> list[Noted]:
    """Entries of a record, each with the names of its blocks."""
    found = []
    for entry in entries:
        rest = dict(entry)
        names = rest.pop("blocks", None)
        if not isinstance(names, list) or not names or not all(isinstance(n, str) for n in names):
            raise CheckpointError(
                f"{path}: the record under {RECORD_KEY!r} is damaged (blocks: expected a list of"
                " names)"
            )
        found.append((rest, names))
    return found


def _read_record(folder: str, own: Own) -> Record:
    """The record in the ``config.json`` of a folder or a hub repository."""
    path = find(folder, _CONFIG)
    if path is None:
        raise CheckpointError(f"{folder}: expected a model folder or hub id, found no {_CONFIG}")
    config = read_json(path)
    record = config.get(RECORD_KEY) if isinstance(config, dict) else None
    if record is None:
        raise CheckpointError(
            f"{path}: no record of steppe; this is a plain model. Load it as such, then"
            " steppe.sparsify_(model, [...])"
        )
    return parse_record(record, str(path), own)


def _refuse_longer_biases(root: nn.Module, record: Record, weights: Weights) -> None:
    """Refuse a record of longer zeroth biases than were saved, before memory is taken for them."""
    asked = {
        plugin.resolve(root, ()).max_tokens
        for plugin, _ in record.applied
        if isinstance(plugin, ZerothBias)
    }
    names = [name for name in weights.files if name.endswith(f".{PARAMETER_NAME}")]
    saved = {length for name in names for length in weights.shape_of(name)[:1]} if asked else set()
    if not asked <= saved:
        raise CheckpointError(
            f"{PARAMETER_NAME} has {(asked - saved).pop()} positions by the record, and in the"
            f" weights {', '.join(map(str, saved)) or 'none'}. The files are of different"
            " checkpoints."
        )


def _renaming(
    root: nn.Module, record: Record, patterns: Sequence[BlockPattern], place: str
) -> Callable[[str], str]:
    """How names in the checkpoint become names in the model, which gets the record's patterns.

    They differ by the prefix of the base model where one of the two has a head and the other not.
    """
    prefix = f"{getattr(root, 'base_model_prefix', '')}."
    for rename in (_same, _Prefix(prefix, add=False), _Prefix(prefix, add=True)):
        if note_record_(root, record.patterns, rename, place):
            found = {block.name for block in coverage(root, patterns).blocks}
            if {rename(name) for name in record.blocks} <= found:
                return rename
            forget_patterns_(root)
    found = {block.name for block in coverage(root, patterns).blocks}
    named = {*record.blocks, *(name for _, names in record.patterns for name in names)}
    modules = {owner_name(name, module) for name, module in root.named_modules()}
    raise CheckpointError(
        f"{place}: the record names blocks that {type(root).__name__} does not have:"
        f" {', '.join((sorted(named - modules) or sorted(named - found))[:3])}; it has"
        f" {', '.join(sorted(found)[:3]) or 'none'}. Is this the checkpoint of another model?"
    )


def _same(name: str) -> str:
    return name


class _Prefix:
    """Adds a prefix to names, or takes it off where it is."""

    def __init__(self, prefix: str, add: bool) -> None:
        self._prefix = prefix
        self._add = add

    def __call__(self, name: str) -> str:
        return self._prefix + name if self._add else name.removeprefix(self._prefix)


def _sparsify_blocks(
    root: nn.Module, plugin: Plugin, names: set[str], patterns: Sequence[BlockPattern]
) -> None:
    """Apply one plug-in to the blocks of these names."""
    sparsify_(root, [plugin], where=lambda block: block.name in names, patterns=patterns)


def _saved_names(root: nn.Module, state: Mapping[str, Tensor]) -> dict[str, str]:
    """The name in the checkpoint of each tensor of the model.

    Transformers 5 keeps the names of older versions in the file for some architectures (ViT).
    """
    if not hasattr(root, "save_pretrained"):
        return {name: name for name in state}
    # Here, not above: `load` has imported transformers, `import steppe` does not.
    from transformers.core_model_loading import revert_weight_conversion

    saved_as: dict[str, str] = {}
    for name, tensor in state.items():
        # One by one: the result does not say which name became which.
        names = list(revert_weight_conversion(root, {name: tensor}))  # type: ignore[arg-type]
        saved_as[name] = names[0] if len(names) == 1 else name
    return saved_as


@contextmanager
def _held_load_reports() -> Iterator[list[logging.LogRecord]]:
    """Collect what Transformers logs of a checkpoint's keys instead of printing it."""
    held: list[logging.LogRecord] = []

    def hold(record: logging.LogRecord) -> bool:
        report = "LOAD REPORT" in record.getMessage()
        if report:
            held.append(record)
        return not report

    logger = logging.getLogger("transformers.modeling_utils")
    logger.addFilter(hold)
    try:
        yield held
    except BaseException:
        logger.removeFilter(hold)
        for record in held:
            logger.handle(record)
        raise
    finally:
        logger.removeFilter(hold)
