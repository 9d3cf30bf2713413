"""Load a checkpoint of a sparsified model: the stock model, then the plug-ins of its record.

``save_pretrained`` needs no help: the plug-ins' tensors are in the state dict, and the record of
the plug-ins is in the config. Loading reads safetensors only; nothing is ever unpickled.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from torch import nn

from steppe.blocks.find import unwrap
from steppe.blocks.patterns import BlockPattern
from steppe.checkpoints.saved_record import (
    ADAPTER_RECORD,
    CONFIG,
    Own,
    Record,
    given_own,
    read_record,
)
from steppe.checkpoints.tensor_names import renaming_of, saved_names
from steppe.checkpoints.weights import Weights, find
from steppe.errors import CheckpointError, SteppeError
from steppe.plugins.applied import sparsification_of
from steppe.plugins.base import Plugin
from steppe.plugins.constrain import advance_
from steppe.plugins.sparsify import sparsify_
from steppe.record import erase_records


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
    if find(folder, CONFIG) is None and find(folder, ADAPTER_RECORD) is not None:
        with given_own(own):
            return load(folder)  # by PEFT, which steppe has taught to do the rest
    record = read_record(folder, own)
    weights = Weights.of(folder)
    with given_own(own), _held_load_reports() as reports:
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
    """Apply a record to a stock model, and fill the tensors that this adds.

    Args:
        root: the model, with the weights of its own.
        record: of its config.
        weights: of its checkpoint.
        own: plug-ins and patterns of the user's that the record may name.
        by_file_names: whether the names in the files are those of ``save_pretrained``, and not the
            model's.

    Returns:
        The names of tensors in the checkpoint that the model does not have.

    Raises:
        CheckpointError: the record is another model's, or a tensor is missing or of another shape.
    """
    erase_records(root)
    before = set(root.state_dict())
    to_model = renaming_of(root, record, own.patterns, weights.place)
    try:
        _refuse_other_lengths(root, record, weights)
        for plugin, names in record.applied:
            _sparsify_blocks(root, plugin, {to_model(name) for name in names}, own.patterns)
    except SteppeError as error:
        raise CheckpointError(f"{weights.place}: the record cannot be applied: {error}") from None
    advance_(root, record.progress)
    state = root.state_dict()
    saved_as = saved_names(root, state) if by_file_names else {name: name for name in state}
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
    saved_as = saved_names(root, state)
    held = {state[name].data_ptr() for name in state if saved_as[name] in weights.files}
    # Of tied tensors one is saved.
    wanted = {
        saved_as[name]: tensor
        for name, tensor in state.items()
        if saved_as[name] in weights.files or tensor.data_ptr() not in held
    }
    weights.copy_into(wanted, {})
    return model


def _refuse_other_lengths(root: nn.Module, record: Record, weights: Weights) -> None:
    """Refuse a record of longer tensors than were saved, before memory is taken for them."""
    asked = [item for plugin, _ in record.applied for item in plugin.added_lengths(root).items()]
    for tensor, length in asked:
        names = [name for name in weights.files if name.endswith(f".{tensor}")]
        saved = {length for name in names for length in weights.shape_of(name)[:1]}
        if length not in saved:
            raise CheckpointError(
                f"{tensor} has {length} positions by the record, and in the weights"
                f" {', '.join(map(str, saved)) or 'none'}. The files are of different checkpoints."
            )


def _sparsify_blocks(
    root: nn.Module, plugin: Plugin, names: set[str], patterns: Sequence[BlockPattern]
) -> None:
    """Apply one plug-in to the blocks of these names."""
    sparsify_(root, [plugin], where=lambda block: block.name in names, patterns=patterns)


@contextmanager
def _held_load_reports() -> Iterator[list[logging.LogRecord]]:
    """Hold back the load report that Transformers logs about a checkpoint's keys."""
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
