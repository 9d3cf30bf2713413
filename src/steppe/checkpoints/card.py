"""The section of a model card (``README.md``) that says which plug-ins a saved model has.

The rest of a card is its author's. Its text stays byte by byte. Its metadata gets the tag `TAG` if
`huggingface_hub` can write them again without changing anything else, and stays as it is if not.
"""

from __future__ import annotations

import inspect
import logging
import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import transformers
import yaml
from huggingface_hub import ModelCard, ModelCardData
from torch import nn

from steppe.blocks.wrappers import unwrap
from steppe.checkpoints.saved_record import ADAPTER_RECORD, CONFIG
from steppe.checkpoints.weights import read_json
from steppe.errors import RunError
from steppe.files import write_file
from steppe.plugins.applied import sparsification_of
from steppe.plugins.base import Plugin
from steppe.plugins.registry import PLUGINS
from steppe.record import RECORD_KEY
from steppe.runs import RUN_FILE, Run, read_run

CARD = "README.md"
TAG = "steppe"
HERE = "."  # the folder, in code that is run within it
_BEGIN = "<!-- steppe:begin (the lines up to steppe:end are written again with each save) -->"
_END = "<!-- steppe:end -->"
# Never across a second begin: where an author has lost an end mark, the text after it stays.
_SECTION = re.compile(
    r"<!-- steppe:begin\b(?:(?!<!-- steppe:begin\b).)*?<!-- steppe:end -->", re.DOTALL
)
_logger = logging.getLogger(__name__)


def update_card(folder: Path, model: nn.Module, place: str = HERE, run: Run | None = None) -> None:
    """Make the card of a saved model say what the record in its folder says.

    A folder without a record gets no section, and loses one that is there. The section states a
    density only of a run's record: of `run`, or of a ``steppe.json`` in the folder that has the
    same plug-ins. A card that cannot be read stays as it is, with a warning.

    Args:
        folder: where the model was saved, with the record in ``config.json`` or beside an adapter.
        model: the one that was saved, for the classes that the section names.
        place: what the section's code loads: the hub id, or `HERE`.
        run: that has made the model.

    Raises:
        OutputError: the card cannot be written; an older one is whole.
    """
    path = folder / CARD
    is_adapter = (folder / ADAPTER_RECORD).is_file()
    source = folder / (ADAPTER_RECORD if is_adapter else CONFIG)
    record = read_json(source).get(RECORD_KEY) if source.is_file() else None
    section = ""
    if record is not None and sparsification_of(model) is not None:
        known = _run_beside(folder, record["plugins"]) if run is None else run
        section = _section(record["plugins"], model, place, is_adapter, known)
    try:
        old = path.read_bytes().decode("utf-8-sig") if path.is_file() else ""
    except UnicodeDecodeError as error:
        _logger.warning("%s: stays as it is, without a section of steppe (%s)", path, error)
        return
    new = _with_section(old, section) if old else _new_card(section, is_adapter)
    if new != old:
        write_file(path, lambda temporary: temporary.write_bytes(new.encode("utf-8")))


def update_before_upload(
    upload: Callable[..., Any],
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
) -> Any:
    """Around a model's ``_upload_modified_files``: Transformers has just replaced the card."""
    given = inspect.signature(upload).bind(*args, **kwargs).arguments
    update_card(Path(given["working_dir"]), model, given["repo_id"])
    return upload(*args, **kwargs)


def _with_section(content: str, section: str) -> str:
    """A card with a section in place of its older one; without one if the section is empty."""
    line_end = "\r\n" if "\r\n" in content else "\n"
    section = section.replace("\n", line_end)
    content, replaced = _SECTION.subn(lambda _: section, content, count=1)
    if not section:
        return content
    if not replaced:
        gap = line_end if content.endswith("\n") else line_end * 2
        content = f"{content}{gap}{section}{line_end}"
    return _tagged(content)


def _tagged(content: str) -> str:
    """A card with the tag, if it has metadata that come out of a `ModelCard` as they went in."""
    if not content.lstrip().startswith("---"):
        return content
    try:
        card = ModelCard(content)
    except (TypeError, ValueError, yaml.YAMLError):  # the hub's to complain about
        return content
    tags = card.data.get("tags") or []
    if str(card) != content or TAG in tags:
        return content
    card.data["tags"] = [*tags, TAG]
    return str(card)


def _new_card(section: str, is_adapter: bool) -> str:
    """A card of the section alone; nothing if that is empty."""
    if not section:
        return ""
    data = ModelCardData(library_name="peft" if is_adapter else "transformers", tags=[TAG])
    return str(ModelCard(f"---\n{data.to_yaml()}\n---\n\n{section}\n"))


def _section(
    plugins: Sequence[Mapping[str, Any]],
    model: nn.Module,
    place: str,
    is_adapter: bool,
    run: Run | None,
) -> str:
    """The section, with its marks."""
    own = _own_plugins(model)
    names = {kind.key: kind.__name__ for kind in (*PLUGINS.values(), *own)}
    if is_adapter:
        code = _load_adapter(place, own)
        intro = (
            "This adapter comes with plug-ins of steppe, which change the MLP blocks of the model"
            " below it. Without them it is another function. PEFT alone refuses the adapter. With"
            " steppe, where `base` is the plain model:"
        )
    else:
        code = _load_model(model, place, own)
        intro = (
            "This model has plug-ins of steppe in its MLP blocks. Without them it is another"
            " function, so the stock class alone refuses it, and no tool should load it as a plain"
            " model. With steppe:"
        )
    return "\n".join(
        (
            *(_BEGIN, "## Plug-ins of steppe", "", intro, ""),
            *("```python", *code, "```", ""),
            *(_line(entry, names) for entry in plugins),
            *([] if run is None else _density(run)),
            _END,
        )
    )


def _line(entry: Mapping[str, Any], names: Mapping[str, str]) -> str:
    """A plug-in of the record as an item of a list."""
    settings = {key: value for key, value in entry.items() if key not in ("plugin", "blocks")}
    given = ", ".join(f"{key}={value!r}" for key, value in settings.items())
    count = len(entry["blocks"])
    name = names.get(entry["plugin"], entry["plugin"])
    return f"- `{name}({given})` in {count} block{'s' if count > 1 else ''}"


def _density(run: Run) -> list[str]:
    """The densities that the record of a run has, as a paragraph; nothing if there is none."""
    found = []
    if run.held_out and math.isfinite(run.held_out[-1].density):
        found.append(
            f"{100 * run.held_out[-1].density:.2f} % on held-out data after step"
            f" {run.held_out_steps[-1]}"
        )
    if math.isfinite(run.training_density):
        found.append(f"{100 * run.training_density:.2f} % over the measured training steps")
    about = "Density, the share of hidden entries that are not zero, by the record of the training"
    return ["", f"{about} run: {', '.join(found)}."] if found else []


def _run_beside(folder: Path, plugins: Sequence[Mapping[str, Any]]) -> Run | None:
    """The run whose record is in a folder, if it was of a model with these plug-ins."""
    path = folder / RUN_FILE
    if not path.is_file():
        return None
    try:
        run = read_run(path)
    except RunError as error:
        _logger.warning("the model card states no density: %s", error)
        return None
    return run if run.plugins == list(plugins) else None


def _own_plugins(model: nn.Module) -> list[type[Plugin]]:
    """The classes of plug-ins of the user's that a model has."""
    sparsification = sparsification_of(model)
    applied = [] if sparsification is None else sparsification.applied
    kinds = dict.fromkeys(type(one.plugin) for one in applied)
    return [kind for kind in kinds if not kind.__module__.startswith("steppe.")]


def _load_model(model: nn.Module, place: str, own: Sequence[type[Plugin]]) -> list[str]:
    """The lines that load a model."""
    # FSDP2 makes a class of its own of a model's.
    kind = next(one for one in type(unwrap(model)).__mro__ if not one.__name__.startswith("FSDP"))
    loader = f"{kind.__name__}.from_pretrained"
    return [
        *("import steppe", _import_of(kind), *map(_import_of, own), ""),
        f'model = steppe.load_pretrained({loader}, "{place}"{_given(own)}){_about(place)}',
    ]


def _load_adapter(place: str, own: Sequence[type[Plugin]]) -> list[str]:
    """The lines that load an adapter, and the plug-ins with it."""
    lines = ["import steppe", "from peft import PeftModel", *map(_import_of, own), ""]
    if not own:
        return [*lines, f'model = PeftModel.from_pretrained(base, "{place}"){_about(place)}']
    loader = "lambda folder: PeftModel.from_pretrained(base, folder)"
    return [
        *lines,
        f"load = {loader}",
        f'model = steppe.load_pretrained(load, "{place}"{_given(own)})',
    ]


def _given(own: Sequence[type[Plugin]]) -> str:
    """The argument for plug-ins of the user's."""
    return f", plugins=[{', '.join(kind.__name__ for kind in own)}]" if own else ""


def _about(place: str) -> str:
    return "  # in this folder" if place == HERE else ""


def _import_of(kind: type) -> str:
    """The line that imports a class."""
    if getattr(transformers, kind.__name__, None) is kind:
        return f"from transformers import {kind.__name__}"
    if kind.__module__ == "__main__" or "." in kind.__qualname__:
        return f"# {kind.__name__} is a class of your own"
    return f"from {kind.__module__} import {kind.__name__}"
