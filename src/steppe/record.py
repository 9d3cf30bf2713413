"""The record of a model's plug-ins, in the config that ``save_pretrained`` writes.

In the file two marks stand beside it, so that nobody takes the folder for that of a plain model.
Transformers' own loader refuses the first one, unless ``import steppe`` has extended it
(`checkpoints.stock`); vLLM and others refuse the second one, a quantization that they do not know.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

RECORD_KEY = "steppe"
RECORD_VERSION = 1
_OF_BLOCKS = ("plugins", "patterns")  # lists of entries that name blocks
METHOD = "steppe"  # the quantization method
APPLIED = "_steppe_sparsification"  # the attribute of a model whose record is applied

WEIGHTS_MARK = "transformers_weights"  # a name of a file of weights, which must end in .safetensors
WEIGHTS_MARK_TEXT = (
    "none. The model has plug-ins of steppe, without which it is another function: `import steppe`"
    " before from_pretrained, or use steppe.load_pretrained"
)
METHOD_MARK = "quantization_config"


@dataclass(eq=False)
class Holder:
    """A model that ``save_pretrained`` can save by itself: the root, or one within it.

    Attributes:
        module: the model.
        prefix: of the names of its modules in the root, with the dot; empty for the root.
        has_record: whether its config has a record of its own, and not that of a model above it.
    """

    module: nn.Module
    prefix: str
    has_record: bool

    def write(self, value: object, record: Mapping[str, Any]) -> None:
        """Write the record into the model's config.

        Args:
            value: kept on the model under `APPLIED`.
            record: the root's, as JSON values; this model gets the part of its own blocks.
        """
        self.module.__dict__[APPLIED] = value
        if self.has_record:
            config = config_of(self.module)
            own = {
                key: [
                    {**entry, "blocks": self._own(entry["blocks"])}
                    for entry in record[key]
                    if self._own(entry["blocks"])
                ]
                for key in _OF_BLOCKS
                if key in record
            }
            setattr(config, RECORD_KEY, {**record, **own})

    def erase(self) -> None:
        """Remove the record from model and config."""
        self.module.__dict__.pop(APPLIED, None)
        _erase(self.module)

    def _own(self, names: Sequence[str]) -> list[str]:
        """The names of the blocks within this model."""
        return [name.removeprefix(self.prefix) for name in names if name.startswith(self.prefix)]


def config_of(module: nn.Module) -> Any:
    """The Hugging Face config of a module, or None."""
    config = module.__dict__.get("config")
    return config if _is_config(config) else None


def own_configs(root: nn.Module) -> None:
    """Give a model and its modules configs of their own: models built from one config share it."""
    copies: dict[int, Any] = {}
    for module in root.modules():
        for name, value in module.__dict__.items():
            if _is_config(value):
                module.__dict__[name] = copy.deepcopy(value, copies)


def holders_of(root: nn.Module, names: Sequence[str]) -> list[Holder]:
    """The models within a model that are to hold the record, the root first.

    Args:
        root: the model.
        names: of the blocks that were changed.
    """
    holders: list[Holder] = []
    seen: set[int] = set()
    for name, module in _models(root):
        config, prefix = config_of(module), f"{name}." if name else ""
        concerned = any(block.startswith(prefix) for block in names)
        if module is root or concerned or id(config) in seen:
            has_record = config is not None and concerned and id(config) not in seen
            holders.append(Holder(module, prefix, has_record))
            if has_record:
                seen.add(id(config))
    return holders


def unapplied(root: nn.Module) -> nn.Module | None:
    """A model within a model whose config has a record that nobody has applied, or None."""
    for _, module in _models(root):
        config = config_of(module)
        if config is not None and RECORD_KEY in config.__dict__ and APPLIED not in module.__dict__:
            return module
    return None


def erase_records(root: nn.Module) -> None:
    """Remove records and marks from the configs of a model and of all modules in it."""
    for module in root.modules():
        _erase(module)


def with_marks(content: dict[str, Any]) -> dict[str, Any]:
    """The content of a ``config.json``, with marks if it has a record."""
    if RECORD_KEY not in content:
        return content
    return {METHOD_MARK: {"quant_method": METHOD}, **content, WEIGHTS_MARK: WEIGHTS_MARK_TEXT}


def _models(root: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The root, and the models in it that can be saved by themselves, by name."""
    for name, module in root.named_modules():
        if module is root or hasattr(type(module), "save_pretrained"):
            yield name, module


def _erase(module: nn.Module) -> None:
    """Remove the record from a module's config, and the marks if a file brought them."""
    config = config_of(module)
    if config is not None:
        method = config.__dict__.get(METHOD_MARK)
        ours = (WEIGHTS_MARK, METHOD_MARK) if method == {"quant_method": METHOD} else ()
        for name in (RECORD_KEY, *ours):
            config.__dict__.pop(name, None)


def _is_config(value: object) -> bool:
    return hasattr(type(value), "model_type") and callable(getattr(value, "to_dict", None))
