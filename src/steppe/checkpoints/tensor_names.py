"""Names of blocks and tensors in a checkpoint's files, and in the model that is loaded from them.

They differ in two ways. The prefix of the base model stands on one side only where one of the two
has a head and the other not; and Transformers 5 keeps the names of older versions in the files of
some architectures (ViT).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from torch import Tensor, nn

from steppe.blocks.find import coverage, owner_name
from steppe.blocks.patterns import BlockPattern
from steppe.checkpoints.saved_record import Record
from steppe.errors import CheckpointError
from steppe.surgery.pattern_notes import forget_patterns_, note_record_


def renaming_of(
    root: nn.Module, record: Record, patterns: Sequence[BlockPattern], place: str
) -> Callable[[str], str]:
    """How names in the checkpoint become names in the model, which gets the record's patterns.

    Args:
        root: the model; the record's patterns are noted with it.
        record: of the checkpoint.
        patterns: of the user's own, which go first.
        place: the checkpoint, as errors name it.

    Returns:
        A function from a name in the checkpoint to the name in the model.

    Raises:
        CheckpointError: the record names blocks that the model does not have.
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


def saved_names(root: nn.Module, state: Mapping[str, Tensor]) -> dict[str, str]:
    """The name in the files of each tensor of a model.

    Args:
        root: the model.
        state: its state dict, or a part of it.
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


def _same(name: str) -> str:
    return name


class _Prefix:
    """Adds a prefix to names, or takes it off where it is."""

    def __init__(self, prefix: str, add: bool) -> None:
        self._prefix = prefix
        self._add = add

    def __call__(self, name: str) -> str:
        return self._prefix + name if self._add else name.removeprefix(self._prefix)
