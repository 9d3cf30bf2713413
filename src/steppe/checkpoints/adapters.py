"""Teach PEFT to save the plug-ins of a model beside its adapter, and to load them from there.

PEFT saves the adapter alone; the plug-ins are part of the model below it. Two more files hold them,
and the adapter's type in ``adapter_config.json`` is one that PEFT knows only where steppe is
imported: without the plug-ins the adapter would be another model's.
"""

from __future__ import annotations

import inspect
import json
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from wrapt import wrap_function_wrapper

from steppe.blocks.wrappers import unwrap
from steppe.checkpoints.card import update_before_upload, update_card
from steppe.checkpoints.load import apply_record_
from steppe.checkpoints.saved_record import ADAPTER_RECORD, current_own, parse_record
from steppe.checkpoints.weights import Weights, find, read_json
from steppe.errors import CheckpointError, SparsificationError
from steppe.plugins.applied import added_parameters, changed_tensors, sparsification_of
from steppe.plugins.constrain import advance_
from steppe.record import RECORD_KEY
from steppe.sharding import full

_WEIGHTS = "steppe_model.safetensors"
_ADAPTER_CONFIG = "adapter_config.json"
_MARK = ", with plug-ins of steppe: `import steppe` before the adapter is loaded"
_PREFIX = "base_model.model."  # of the names in a PeftModel's state dict
_logger = logging.getLogger(__name__)

_Call = Callable[..., Any]
_Args = tuple[Any, ...]
_Kwargs = dict[str, Any]


def register() -> None:
    """Make it known to PEFT, which has been imported."""
    configs: dict[str, Any] = PEFT_TYPE_TO_CONFIG_MAPPING  # type: ignore[assignment]
    configs |= {f"{getattr(kind, 'value', kind)}{_MARK}": one for kind, one in configs.items()}
    wrap_function_wrapper(PeftModel, "__init__", _init)
    wrap_function_wrapper(PeftModel, "save_pretrained", _save_pretrained)
    wrap_function_wrapper(PeftModel, "load_adapter", _load_adapter)
    wrap_function_wrapper(PeftModel, "_upload_modified_files", update_before_upload)
    # Transformers' models can have adapters themselves.
    wrap_function_wrapper(PreTrainedModel, "save_pretrained", _save_with_own_adapter)
    wrap_function_wrapper(PreTrainedModel, "load_adapter", _load_own_adapter)


def _init(init: _Call, model: PeftModel, args: _Args, kwargs: _Kwargs) -> None:
    """Refuse an adapter around a layer that has a plug-in; warn of frozen parameters.

    Raises:
        SparsificationError: the adapter would not see the plug-in's addition to the input.
    """
    init(*args, **kwargs)
    if sparsification_of(model) is None:
        return
    adapted = {
        getattr(module, "base_layer", None) or getattr(module, "original_module", None)
        for module in model.modules()
    }
    changed = changed_tensors(model)
    for name, module in unwrap(model).named_modules():
        if module in adapted and any(one.startswith(f"{name}.") for one in changed):
            raise SparsificationError(
                f"{name}: has a plug-in, and the adapter would not see its effect. Name the"
                " attention alone in target_modules and modules_to_save, or leave the block out:"
                " steppe.sparsify_(..., where=...)"
            )
    frozen = [name for name, one in added_parameters(model).items() if not one.requires_grad]
    training = not all(config.inference_mode for config in model.peft_config.values())
    if frozen and training:
        _logger.warning(
            "PEFT has frozen %s and %d more parameters of plug-ins, which stay as they are. To"
            " train them: first get_peft_model, then steppe.sparsify_",
            frozen[0],
            len(frozen) - 1,
        )


def _save_pretrained(save: _Call, model: PeftModel, args: _Args, kwargs: _Kwargs) -> None:
    """Save the adapters, and the plug-ins beside each."""
    save(*args, **kwargs)
    sparsification = sparsification_of(model)
    given = inspect.signature(save).bind(*args, **kwargs)
    given.apply_defaults()
    if sparsification is None or not given.arguments["is_main_process"]:
        return
    tensors = _tensors_of(model, given.arguments["kwargs"].get("state_dict"))
    root = Path(given.arguments["save_directory"])
    for adapter in given.arguments["selected_adapters"] or model.peft_config:
        folder = root if adapter == "default" else root / adapter
        _write_beside(folder, sparsification.record(), tensors)
        update_card(folder, model)


def _save_with_own_adapter(
    save: _Call, model: PreTrainedModel, args: _Args, kwargs: _Kwargs
) -> None:
    """Save the adapter of a model that Transformers has adapted, and the plug-ins beside it."""
    save(*args, **kwargs)
    sparsification = sparsification_of(model)
    given = inspect.signature(save).bind(*args, **kwargs)
    given.apply_defaults()
    is_adapter = getattr(model, "_hf_peft_config_loaded", False)
    if sparsification is not None and is_adapter and given.arguments["is_main_process"]:
        tensors = _tensors_of(model, given.arguments["state_dict"])
        folder = Path(given.arguments["save_directory"])
        _write_beside(folder, sparsification.record(), tensors)
        update_card(folder, model)


def _write_beside(folder: Path, record: Mapping[str, Any], tensors: dict[str, Tensor]) -> None:
    """Write the plug-ins beside an adapter, and mark it."""
    save_file(tensors, folder / _WEIGHTS, metadata={"format": "pt"})
    content = json.dumps({RECORD_KEY: record}, indent=2)
    (folder / ADAPTER_RECORD).write_text(content + "\n", encoding="utf-8")
    path = folder / _ADAPTER_CONFIG
    config = read_json(path)
    config["peft_type"] = config["peft_type"].removesuffix(_MARK) + _MARK
    path.write_text(json.dumps(config, indent=2, sort_keys=True), encoding="utf-8")


def _tensors_of(model: nn.Module, state: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
    """The plug-ins' tensors, from a state dict that was gathered over processes if there is one."""
    tensors = changed_tensors(model)
    if state is not None:
        tensors = {name: state.get(_PREFIX + name, one) for name, one in tensors.items()}
    # Copies: safetensors refuses tensors that share memory.
    return {name: full(one).detach().contiguous().clone() for name, one in tensors.items()}


def _load_adapter(load: _Call, model: PeftModel, args: _Args, kwargs: _Kwargs) -> Any:
    """Load an adapter, and the plug-ins that lie beside it.

    Raises:
        CheckpointError: the files are damaged, or the model has other plug-ins.
    """
    given = inspect.signature(load).bind(*args, **kwargs).arguments
    adapter, options = given["adapter_name"], given.get("kwargs", {})
    is_new = adapter not in model.peft_config
    others = len(model.peft_config) - (not is_new)
    found = _beside(str(given["model_id"]), options.get("subfolder"))
    if found is not None and is_new and others:
        _refuse_others(model, *found)
    result = load(*args, **kwargs)
    if found is not None:
        _restore_plug_ins(model, *found)
    elif sparsification_of(model) is not None and not is_new and added_parameters(model):
        _logger.warning(
            "%s: has no plug-ins beside the adapter, so those of the model stay as they are",
            given["model_id"],
        )
    return result


def _load_own_adapter(load: _Call, model: PreTrainedModel, args: _Args, kwargs: _Kwargs) -> Any:
    """Load an adapter into a model of Transformers, and the plug-ins that lie beside it.

    Raises:
        CheckpointError: the files are damaged, or the model has other plug-ins.
    """
    given = inspect.signature(load).bind(*args, **kwargs).arguments
    place, options = given.get("peft_model_id"), given.get("adapter_kwargs") or {}
    found = None if place is None else _beside(str(place), options.get("subfolder"))
    if found is not None and getattr(model, "_hf_peft_config_loaded", False):
        _refuse_others(model, *found)
    result = load(*args, **kwargs)
    if found is not None:
        _restore_plug_ins(model, *found)
    return result


def _beside(folder: str, subfolder: str | None) -> tuple[dict[str, Any], Weights] | None:
    """The record and the tensors beside an adapter, or None."""
    prefix = f"{subfolder}/" if subfolder else ""
    path = find(folder, prefix + ADAPTER_RECORD)
    if path is None:
        return None
    weights = find(folder, prefix + _WEIGHTS)
    content = read_json(path)
    if weights is None or not isinstance(content, dict) or RECORD_KEY not in content:
        raise CheckpointError(
            f"{path}: expected a record under {RECORD_KEY!r}, and {_WEIGHTS} beside it. Copy the"
            " folder again from where it was saved."
        )
    return content[RECORD_KEY], Weights.in_files(folder, [weights])


def _refuse_others(model: nn.Module, record: Mapping[str, Any], weights: Weights) -> None:
    """Refuse a second adapter that was trained with other plug-ins than the model has."""
    have = changed_tensors(model)
    stored = {name: torch.empty_like(one, device="cpu") for name, one in have.items()}
    sparsification = sparsification_of(model)
    same = sparsification is not None and sparsification.record()["plugins"] == record["plugins"]
    if same:
        weights.copy_into(stored, {})
    if not same or any(not torch.equal(stored[name], one.cpu()) for name, one in have.items()):
        raise CheckpointError(
            f"{weights.place}: this adapter has other plug-ins than the model, which all adapters"
            " share. Load it into a model of its own."
        )


def _restore_plug_ins(model: nn.Module, record: Mapping[str, Any], weights: Weights) -> None:
    """Give a model the plug-ins of a record, or their values if it has them."""
    root, own = unwrap(model), current_own()
    read = parse_record(record, weights.place, own)
    sparsification = sparsification_of(root)
    if sparsification is None:
        before = root.state_dict()
        weights.copy_into({name: before[name] for name in weights.files if name in before}, {})
        apply_record_(root, read, weights, own, by_file_names=False)
        return
    if sparsification.record()["plugins"] != record["plugins"]:
        raise CheckpointError(
            f"{weights.place}: the model has other plug-ins than this adapter was trained with."
            " Load it into the plain model, which gets them from there."
        )
    weights.copy_into(changed_tensors(root), {})
    advance_(root, read.progress)
