"""Load a checkpoint of a sparsified model: the stock model, and what steppe did to it.

``save_pretrained`` needs no help: the plug-ins' tensors are in the state dict, and what was done
stands in the config. Loading reads safetensors only; nothing is ever unpickled.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from steppe.blocks import find_blocks, unwrap
from steppe.errors import CheckpointError, SteppeError
from steppe.patterns import BlockPattern
from steppe.plugins.base import Plugin, plugin_from_settings
from steppe.plugins.sparsify import (
    CONFIG_KEY,
    PLUGINS,
    RECORD_VERSION,
    advance_,
    sparsify_,
)
from steppe.plugins.zeroth_bias import PARAMETER_NAME, ZerothBias

_CONFIG = "config.json"
_WEIGHTS = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_Applied = list[tuple[Plugin, list[str]]]


def load_pretrained(
    load: Callable[[str], nn.Module], folder: str | Path, patterns: Sequence[BlockPattern] = ()
) -> nn.Module:
    """A model as ``save_pretrained`` saved it after `sparsify_`, plug-ins and schedules included.

    Args:
        load: loads the stock model, e.g. ``AutoModelForCausalLM.from_pretrained``; options go in
            with ``functools.partial(AutoModelForCausalLM.from_pretrained, dtype=torch.bfloat16)``.
        folder: the folder that was saved, or a hub id.
        patterns: patterns of your own that `sparsify_` was given.

    Returns:
        The model, in the mode that `load` left it in.

    Raises:
        CheckpointError: no or a corrupt ``config.json``, a model without plug-ins, another model's
            record, or tensors that are missing or of another shape.
    """
    folder = str(folder)
    applied, progress = _read_record(folder)
    weight_files = _weight_files(folder)
    with _held_load_reports() as reports:
        model = load(folder)
    root = unwrap(model)
    if hasattr(getattr(root, "config", None), CONFIG_KEY):
        delattr(root.config, CONFIG_KEY)
    before = set(root.state_dict())
    to_model = _renaming(root, applied, patterns)
    try:
        _check_sizes(root, folder, applied, weight_files)
        for plugin, names in applied:
            _sparsify_blocks(root, plugin, {to_model(name) for name in names}, patterns)
    except SteppeError as error:
        raise CheckpointError(f"{folder}: the record cannot be applied: {error}") from None
    advance_(root, progress)
    state = root.state_dict()
    saved_as = _saved_names(root, state)
    files = {to_model(name): (name, file) for name, file in weight_files.items()}
    ours = {saved_as[name]: state[name] for name in state if name not in before}
    _copy_tensors(folder, ours, files)
    for report in reports:
        # Transformers calls our tensors unexpected; let it speak if there is anything else.
        if "MISSING" in report.getMessage() or set(files) - {*saved_as.values(), *state}:
            logging.getLogger(report.name).handle(report)
    return model


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
    files = _weight_files(str(folder))
    state = root.state_dict()
    saved_as = _saved_names(root, state)
    held = {state[name].data_ptr() for name in state if saved_as[name] in files}
    # Of tied tensors one is saved.
    wanted = {
        saved_as[name]: tensor
        for name, tensor in state.items()
        if saved_as[name] in files or tensor.data_ptr() not in held
    }
    _copy_tensors(str(folder), wanted, {name: (name, file) for name, file in files.items()})
    return model


def _read_record(folder: str) -> tuple[_Applied, float]:
    """The plug-ins with the names of their blocks, and the progress, from ``config.json``."""
    path = _find(folder, _CONFIG)
    if path is None:
        raise CheckpointError(f"{folder}: expected a model folder or hub id, found no {_CONFIG}")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CheckpointError(
            f"{path}: not valid JSON ({error}). Copy it anew from where it was saved."
        ) from None
    record = config.get(CONFIG_KEY) if isinstance(config, dict) else None
    if record is None:
        raise CheckpointError(
            f"{path}: no record of steppe; this is a plain model. Load it as such, then"
            " steppe.sparsify_(model, [...])"
        )
    try:
        version = record["version"]
        progress = float(record["progress"])
        entries = [dict(entry) for entry in record["plugins"]]
        names = [[str(name) for name in entry.pop("blocks")] for entry in entries]
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{path}: the record under {CONFIG_KEY!r} is damaged ({type(error).__name__}: {error})"
        ) from None
    if version != RECORD_VERSION or not 0.0 <= progress <= 1.0:
        raise CheckpointError(
            f"{path}: expected a record of version {RECORD_VERSION} with progress in 0 … 1, got"
            f" version {version!r}, progress {progress}. A newer steppe may have written it."
        )
    if not entries or not all(names):
        raise CheckpointError(
            f"{path}: the record under {CONFIG_KEY!r} is damaged (no plug-in, or one for no block)"
        )
    plugins = [plugin_from_settings(entry, PLUGINS) for entry in entries]
    return list(zip(plugins, names, strict=True)), progress


def _check_sizes(root: nn.Module, folder: str, applied: _Applied, files: Mapping[str, str]) -> None:
    """Refuse a record of longer zeroth biases than were saved, before memory is taken for them."""
    asked = {
        plugin.resolve(root, ()).max_tokens
        for plugin, _ in applied
        if isinstance(plugin, ZerothBias)
    }
    saved: set[int] = set()
    for name, file in files.items() if asked else ():
        if name.endswith(f".{PARAMETER_NAME}"):
            with _opened(_named_by_index(folder, file)) as tensors:
                saved.update(tensors.get_slice(name).get_shape()[:1])
    if not asked <= saved:
        raise CheckpointError(
            f"{PARAMETER_NAME} has {(asked - saved).pop()} positions by the record, and in the"
            f" weights {', '.join(map(str, saved)) or 'none'}. The files are of different"
            " checkpoints."
        )


def _renaming(
    root: nn.Module, applied: _Applied, patterns: Sequence[BlockPattern]
) -> Callable[[str], str]:
    """How names in the checkpoint become names in the model.

    They differ by the prefix of the base model where one of the two has a head and the other not.
    """
    found = {block.name for block in find_blocks(root, patterns=patterns)}
    recorded = {name for _, names in applied for name in names}
    prefix = f"{getattr(root, 'base_model_prefix', '')}."
    for rename in (_same, _Prefix(prefix, add=False), _Prefix(prefix, add=True)):
        if {rename(name) for name in recorded} <= found:
            return rename
    raise CheckpointError(
        f"the record names blocks that {type(root).__name__} does not have:"
        f" {', '.join(sorted(recorded - found)[:3])}; it has {', '.join(sorted(found)[:3])}."
        " Is this the checkpoint of another model?"
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


def _weight_files(folder: str) -> dict[str, str]:
    """The file of each tensor in a checkpoint, every file opened once to see that it is whole."""
    index = _find(folder, _INDEX)
    path = _find(folder, _WEIGHTS)
    if path is not None:
        with _opened(path) as tensors:
            return dict.fromkeys(tensors.keys(), _WEIGHTS)
    if index is None:
        raise CheckpointError(
            f"{folder}: found no {_WEIGHTS}. steppe reads safetensors only; save the model with"
            " save_pretrained"
        )
    try:
        files = dict(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{index}: damaged ({type(error).__name__}: {error})") from None
    for file in sorted(set(files.values())):
        with _opened(_named_by_index(folder, file)):
            pass
    return files


def _named_by_index(folder: str, file: str) -> Path:
    """A file of weights that the index names."""
    path = _find(folder, file)
    if path is None:
        raise CheckpointError(f"{folder}: found no {file}, which the index names")
    return path


def _copy_tensors(
    folder: str, wanted: Mapping[str, Tensor], files: Mapping[str, tuple[str, str]]
) -> None:
    """Fill tensors of the model from the checkpoint; all are checked before any is filled."""
    missing = [name for name in wanted if name not in files]
    if missing:
        raise CheckpointError(
            f"{folder}: the model has {missing[0]}, and the weights do not"
            f" hold it ({len(missing)} missing). The files are of different checkpoints."
        )
    values: dict[str, Tensor] = {}
    for file in sorted({files[name][1] for name in wanted}):
        with _opened(_named_by_index(folder, file)) as tensors:
            values |= {
                name: tensors.get_tensor(files[name][0])
                for name in wanted
                if files[name][1] == file
            }
    for name, tensor in wanted.items():
        if values[name].shape != tensor.shape:
            raise CheckpointError(
                f"{folder}: {name} is {list(values[name].shape)} in the weights and"
                f" {list(tensor.shape)} by the record"
            )
    with torch.no_grad():
        for name, tensor in wanted.items():
            tensor.copy_(values[name])


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """A safetensors file, its errors told by name."""
    try:
        with safe_open(path, framework="pt") as tensors:
            yield tensors
    except SafetensorError as error:
        raise CheckpointError(f"{path}: damaged or truncated ({error})") from None


def _find(folder: str, file: str) -> Path | None:
    """A file of a local folder or of a hub repository, or None if it has none of that name."""
    if Path(folder).is_dir():
        path = Path(folder) / file
        return path if path.is_file() else None
    # Here, not above: half of what `import steppe` would take, for what a local folder never needs.
    from huggingface_hub import errors, hf_hub_download

    try:
        return Path(hf_hub_download(folder, file))
    except (errors.EntryNotFoundError, errors.RepositoryNotFoundError, errors.HFValidationError):
        return None


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
